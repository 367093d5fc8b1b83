"""Mechanisms that choose blocks or tokens by content. One file a paper."""
