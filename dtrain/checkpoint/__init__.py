"""Durable state: checkpoints that are whole or not there, that hold no code, and that any engine and world size can read."""
