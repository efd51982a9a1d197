"""Code that surrounds every command on every rank: start, watchdog, error reports, exit."""
