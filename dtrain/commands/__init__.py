"""One file per command: the order of construction, from a config to a result."""
