"""Jobs on several hosts over ssh. Imports no torch."""
