"""Watches the ranks from outside their interpreter: which have died, which hang, and where."""
