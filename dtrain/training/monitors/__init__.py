"""What looks at each step and may stop the run: one file each, in one visible list (commands/train.py)."""
