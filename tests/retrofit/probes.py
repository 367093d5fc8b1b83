"""Mechanisms that declare little, to see what reaches them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.dense.full import FullAttention
from regard.mechanism import Mechanism, Request
from regard.registry import register


class Unmasked(FullAttention):
    """Softmax attention that takes no mask at all."""

    registered_name = "unmasked"
    mask_support = "none"
    takes_bias = False


class KeysOnly(FullAttention):
    """Softmax attention that takes padding alone."""

    registered_name = "keys_only"
    mask_support = "keys"
    takes_bias = False


class SquareOnly(FullAttention):
    """Softmax attention that knows no cross-attention, as a linear-time parallel form."""

    registered_name = "square_only"
    patterns = frozenset({"self", "causal-self"})
    takes_bias = False


class Linear(FullAttention):
    """Declares itself cheaper than quadratic."""

    registered_name = "cheap"
    growth = "N"


class Gated(FullAttention):
    """Squares the values: it implies no attention matrix."""

    registered_name = "gated"
    value_linear = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query, key, value**2, request)


class Watching(FullAttention):
    """Remembers the requests that it got."""

    registered_name = "watching"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Request, int, int]] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        self.seen.append((request, query.shape[2], key.shape[2]))
        return super().attend(query, key, value, request)


@register("test_tempered")
class Tempered(Mechanism):
    """Softmax attention with a learned temperature per head and a buffer, which asks for all that a model can tell."""

    takes_bias = True

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        embed_dim: int,
        layer_index: int,
        num_layers: int,
        start: float = 1.0,
    ) -> None:
        super().__init__()
        self.context = (num_heads, num_kv_heads, head_dim, embed_dim, layer_index, num_layers)
        self.temperature = nn.Parameter(torch.full((num_heads,), start))
        self.register_buffer("calls", torch.zeros(()))
        self.inner = FullAttention()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return self.inner.attend(query * self.temperature[:, None, None], key, value, request)


@register("test_layer")
class OwnProjections(nn.Module):
    """Not a mechanism."""

    def forward(self, x: Any) -> Any:
        return x
