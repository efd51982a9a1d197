"""Checkpoints: written atomically, free of executable code, and readable by every engine at every world size."""
