"""A model of attention alone: no MLP and no norm, so that a task shows what the attention can do by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import ShapeError
from regard.mechanism import Mechanism
from regard.nn import make_attention
from regard.nn.attention import MultiHeadAttention

__all__ = ["AttentionOnlyModel"]


class AttentionOnlyModel(nn.Module):
    """Tokens ``(batch, length)`` int64 to logits ``(batch, length, num_classes)``: embeddings of tokens and positions,
    ``h + attention(h)`` per layer, a linear head; the test bed of the tasks in :mod:`regard.bench.sequence_tasks`.

    "SLAY", 2026, arXiv 2602.04915, section 3.3. mechanism: a name with its ``options``, or a function that builds one
    :class:`~regard.mechanism.Mechanism` per layer.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        *,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mechanism: str | Callable[[], Mechanism] = "full",
        options: Mapping[str, Any] | None = None,
        causal: bool = True,
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.positions = nn.Embedding(max_length, embed_dim)
        self.layers = nn.ModuleList()
        for index in range(depth):
            if isinstance(mechanism, str):
                named = {"layer_index": index, "num_layers": depth, **(options or {})}
                self.layers.append(make_attention(mechanism, embed_dim, num_heads, **named))
            else:
                self.layers.append(MultiHeadAttention(embed_dim, num_heads, mechanism()))
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits per position."""
        if x.shape[1] > self.positions.num_embeddings:
            raise ShapeError(f"{x.shape[1]} tokens exceed max_length {self.positions.num_embeddings}.")
        hidden = self.embed(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            hidden = hidden + layer(hidden, causal=self.causal)
        return cast(Tensor, self.head(hidden))
