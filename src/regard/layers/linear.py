"""Linear layers on tokens."""

from __future__ import annotations

from torch import Tensor, nn

from regard.kernels.token_linear import token_linear

__all__ = ["TokenLinear"]


class TokenLinear(nn.Linear):
    """``nn.Linear`` through :func:`regard.kernels.token_linear.token_linear`: the same weights, the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        return token_linear(x, self.weight, self.bias)
