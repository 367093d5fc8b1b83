"""Softmax attention over all keys: ``softmax(scale q k^T + bias) v``.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, equation 1. Time ``2 N M (d + d_v)`` per head; with
torch's fused kernel no scores are stored.
"""

from __future__ import annotations

from torch import Tensor

from regard.kernels import dense_attention, dense_weights
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = ["FullAttention"]


@register("full")
class FullAttention(Mechanism):
    """The yardstick: exact, any mask, any bias."""

    exact = True
    takes_bias = True
    decodes = True
    takes_evicted = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return dense_attention(
            query,
            key,
            value,
            causal=request.causal,
            mask=request.mask,
            bias=request.bias,
            scale=request.scale,
        )

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        """The softmax itself, which costs less than feeding the identity as values."""
        self._require_value_linear()
        return dense_weights(
            query, key, causal=request.causal, mask=request.mask, bias=request.bias, scale=request.scale
        )
