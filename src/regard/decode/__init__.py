"""Decoding: loops over a model, and what they keep of the past. One file a paper."""
