"""The folder of a run: its files, its lock, and what a start does with it."""
