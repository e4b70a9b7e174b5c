"""Whether this machine trains right, how fast it is, and what the papers' tables would take on it."""
