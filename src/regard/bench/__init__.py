"""Tasks, training, measurements and reports."""
