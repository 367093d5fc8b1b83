"""Hosts: multi-head projections, transformer blocks and map adapters around any mechanism."""

from regard.nn.attention import MultiHeadAttention, make_attention
from regard.nn.block import TransformerBlock
from regard.nn.maps import OnMap

__all__ = ["MultiHeadAttention", "OnMap", "TransformerBlock", "make_attention"]
