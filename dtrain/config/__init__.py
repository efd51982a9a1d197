"""The settings of a run: their schema, how they are read, and their error messages. Imports no torch."""
