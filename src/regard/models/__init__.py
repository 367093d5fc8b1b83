"""Backbones and task models, built from hosts and mechanisms."""
