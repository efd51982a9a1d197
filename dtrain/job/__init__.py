"""What surrounds every command on every rank."""
