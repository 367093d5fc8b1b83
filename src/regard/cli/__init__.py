"""The command ``regard``; each module holds some of its commands."""

from regard.cli import catalogue, compare, env, inspect, plan, simulate, train
from regard.cli.group import main

__all__ = ["catalogue", "compare", "env", "inspect", "main", "plan", "simulate", "train"]
