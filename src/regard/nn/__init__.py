"""Hosts: multi-head projections, transformer blocks and map adapters around any mechanism."""

from regard.nn.attention import MultiHeadAttention, make_attention
from regard.nn.block import TransformerBlock
from regard.nn.maps import OnMap, OnTokens

__all__ = ["MultiHeadAttention", "OnMap", "OnTokens", "TransformerBlock", "make_attention"]
