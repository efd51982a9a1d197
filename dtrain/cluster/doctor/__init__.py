"""The checks of the doctor command: hosts, network and links."""
