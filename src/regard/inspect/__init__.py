"""Looking into a model's attention."""
