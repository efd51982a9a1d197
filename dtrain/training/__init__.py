"""A run's life, from building the model to the summary."""
