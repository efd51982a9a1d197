"""One process among the ranks of a job."""
