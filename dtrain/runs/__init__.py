"""The folder of a run: its files, its lock, metrics, and whether a new start may use or resume it."""
