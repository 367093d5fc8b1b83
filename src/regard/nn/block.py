"""A pre-norm transformer block around any attention module ``(batch, length, channels)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["TransformerBlock"]


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))`` with a GELU MLP of ``mlp_ratio`` times the width."""

    def __init__(self, embed_dim: int, attention: nn.Module, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        """``(batch, length, embed_dim)`` in and out; keywords go to the attention (causal, mask, grid)."""
        x = x + self.attention(self.attention_norm(x), **call)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out
