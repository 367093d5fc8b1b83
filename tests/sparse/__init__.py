"""Mechanisms that form all pairs."""
