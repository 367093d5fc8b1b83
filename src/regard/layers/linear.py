"""Linear layers on tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.kernels.token_linear import token_linear

__all__ = ["HeadLinear", "TokenLinear"]


class TokenLinear(nn.Linear):
    """``nn.Linear`` through :func:`regard.kernels.token_linear.token_linear`: the same weights, the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        return token_linear(x, self.weight, self.bias)


class HeadLinear(nn.Module):
    """A linear map for each head, ``(batch, num_heads, length, in)`` to ``(batch, num_heads, length, out)``, each begun
    as ``nn.Linear`` is."""

    def __init__(self, num_heads: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(num_heads, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_heads, 1, out_features).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight
        return out if self.bias is None else out + self.bias
