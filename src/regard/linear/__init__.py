"""Mechanisms whose cost grows linearly with length. One file a paper."""
