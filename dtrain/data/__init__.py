"""From files and hubs to rows, from rows to micro-batches in a fixed order."""
