"""The hosts against torch's own modules."""
