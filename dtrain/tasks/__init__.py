"""What is learned: one file per task behind one protocol."""
