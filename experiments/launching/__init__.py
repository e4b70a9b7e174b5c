"""Training what a table or figure lacks: which runs are missing, what they cost, and where they are trained."""
