"""The feed-forward half of a transformer block."""

from __future__ import annotations

from torch import nn

__all__ = ["Mlp"]


class Mlp(nn.Sequential):
    """Linear to ``int(mlp_ratio * embed_dim)``, GELU, dropout, linear, dropout: ``(..., embed_dim)`` in and out."""

    def __init__(self, embed_dim: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        hidden = int(embed_dim * mlp_ratio)
        layers: list[nn.Module] = [nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim)]
        if dropout:
            layers = [*layers[:2], nn.Dropout(dropout), layers[2], nn.Dropout(dropout)]
        super().__init__(*layers)
