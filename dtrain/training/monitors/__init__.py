"""Monitors look at each step and may stop the run: one file each, in one visible list (training/run.py)."""
