"""A pre-norm transformer block around any attention module ``(batch, length, channels)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.layers.drop_path import DropPath
from regard.layers.mlp import Mlp

__all__ = ["TransformerBlock"]


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))`` with a GELU MLP of ``mlp_ratio`` times the width.

    drop_path: rate of stochastic depth on both branches. layer_scale: initial value of a learned scale per channel on
    each branch (Touvron et al., 2021, arXiv 2103.17239), None for none.
    """

    def __init__(
        self,
        embed_dim: int,
        attention: nn.Module,
        mlp_ratio: float = 4.0,
        *,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm: nn.Module = nn.LayerNorm(embed_dim)
        self.attention = attention
        self.mlp_norm: nn.Module = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.attention_scale, self.mlp_scale = (
            None if layer_scale is None else nn.Parameter(torch.full((embed_dim,), layer_scale)) for _ in range(2)
        )

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        """``(batch, length, embed_dim)`` in and out; keywords go to the attention (causal, mask, grid)."""
        return self.feed_forward(self.attend(x, **call))

    def attend(self, x: Tensor, **call: Any) -> Tensor:
        """The first half: ``x + attention(norm(x))``."""
        return x + self._branch(self.attention(self.attention_norm(x), **call), self.attention_scale)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half: ``x + mlp(norm(x))``."""
        return x + self._branch(self.mlp(self.mlp_norm(x)), self.mlp_scale)

    def _branch(self, x: Tensor, scale: Tensor | None) -> Tensor:
        kept: Tensor = self.drop_path(x if scale is None else x * scale)
        return kept
