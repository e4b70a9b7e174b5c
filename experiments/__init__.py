"""Training runs, tables and figures."""
