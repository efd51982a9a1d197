"""Watching the ranks from outside their interpreter: who has died, who hangs, and where."""
