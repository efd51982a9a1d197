"""What a run is told: the settings, how they are read and how their errors are worded. Imports no torch."""
