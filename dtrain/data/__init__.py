"""Reads files and hub data sets as rows, and splits rows into micro-batches in a fixed order."""
