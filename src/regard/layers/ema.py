"""The damped moving average with its parameters; what it computes is in :mod:`regard.kernels.ema`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels.ema import damped_ema
from regard.kernels.shapes import accumulation_dtype

__all__ = ["DampedEMA"]


class DampedEMA(nn.Module):
    """``(batch, length, dim)`` in and out: :func:`~regard.kernels.ema.damped_ema` plus ``omega x``, linear in ``x``.

    ema_dim: averages of each channel; with 0 there is none, and ``omega x`` is left. Initial values as in Mega: alpha
    and delta from N(0, 0.2), beta from N(0, 0.02) about +1, -1, +1, ... (which its authors found more stable), gamma
    and omega from N(0, 1). bidirectional, official: as there.
    """

    def __init__(self, dim: int, ema_dim: int = 16, *, bidirectional: bool = False, official: bool = False) -> None:
        super().__init__()
        if dim < 1 or ema_dim < 0:
            raise OptionError(f"Need dim >= 1 and ema_dim >= 0; got {dim} and {ema_dim}.")
        self.dim, self.ema_dim, self.bidirectional, self.official = dim, ema_dim, bidirectional, official
        rows = 2 * dim if bidirectional else dim
        self.alpha, self.delta, self.beta, self.gamma = (nn.Parameter(torch.empty(rows, ema_dim)) for _ in range(4))
        self.omega = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values."""
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            self.beta.add_(1 - 2 * (torch.arange(self.ema_dim, device=self.beta.device) % 2))
        nn.init.normal_(self.gamma)
        nn.init.normal_(self.omega)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, ema_dim={self.ema_dim}, bidirectional={self.bidirectional}"

    def init_state(self, batch: int, *, like: Tensor) -> Tensor:
        """Zeros ``(batch, dim, ema_dim)``, in the accumulation dtype of ``like``."""
        return like.new_zeros(batch, self.dim, self.ema_dim, dtype=accumulation_dtype(like.dtype))

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Output and the state after the last token. keys: boolean ``(batch | 1, length)``; others count as zeros."""
        if keys is not None:
            if keys.dim() != 2 or keys.shape[1] != x.shape[1]:
                raise ShapeError(f"keys are (batch, length) for x {tuple(x.shape)}, got {tuple(keys.shape)}.")
            x = x.masked_fill(~keys[..., None], 0)
        return damped_ema(
            x,
            self.alpha,
            self.delta,
            self.beta,
            self.gamma,
            self.omega,
            self.bidirectional,
            state,
            official=self.official,
        )
