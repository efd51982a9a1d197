"""The tasks, one file each, behind one protocol."""
