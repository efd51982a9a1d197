"""Many hosts over ssh. Imports no torch."""
