"""Mechanisms on feature maps."""
