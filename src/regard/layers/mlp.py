"""The feed-forward half of a transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedMlp", "Mlp"]


class Mlp(nn.Sequential):
    """Linear to ``int(mlp_ratio * embed_dim)``, GELU, dropout, linear, dropout: ``(..., embed_dim)`` in and out."""

    def __init__(self, embed_dim: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        hidden = int(embed_dim * mlp_ratio)
        layers: list[nn.Module] = [nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim)]
        if dropout:
            layers = [*layers[:2], nn.Dropout(dropout), layers[2], nn.Dropout(dropout)]
        super().__init__(*layers)


class GatedMlp(nn.Module):
    """``W_down (silu(W_gate x) * W_up x)``, as in Llama: ``(..., embed_dim)`` in and out.

    Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202, equation 6 (SwiGLU, without biases).
    """

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(embed_dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape in and out."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out
