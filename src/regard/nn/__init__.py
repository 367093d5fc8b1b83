"""Hosts: multi-head projections and transformer blocks around any mechanism."""

from regard.nn.attention import MultiHeadAttention, make_attention
from regard.nn.block import TransformerBlock

__all__ = ["MultiHeadAttention", "TransformerBlock", "make_attention"]
