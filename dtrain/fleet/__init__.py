"""Several hosts over ssh: a look at each before anything starts, and one job on all of them. Imports no torch."""
