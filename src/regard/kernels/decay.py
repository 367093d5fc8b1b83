"""Products of decays, kept as sums of logarithms."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fading", "log_gap", "running_decay"]

# Powers below this are zero even in float64, and sums of it over any chunk keep their digits.
_LEAST = -800.0


def running_decay(log_decay: Tensor, dim: int) -> Tensor:
    """Cumulative sums of ``log_decay`` along ``dim``, such that differences of them can be trusted.

    In float64 (float32 where a device has none), since after strong decays a float32 sum has lost the digits of weak
    ones. ``-inf``, which forgets everything, becomes a number whose power is zero: a difference of two infinities
    would be none.
    """
    return log_decay.clamp_min(_LEAST).to(_wide(log_decay)).cumsum(dim)


def log_gap(later: Tensor, earlier: Tensor, dtype: torch.dtype) -> Tensor:
    """``later - earlier`` of running decays in ``dtype``, without a large tensor in float64.

    Each sum is split into two numbers of ``dtype``; the difference is then as exact as its own size allows.
    """
    if later.dtype == dtype:
        return later - earlier
    high = [t.to(dtype) for t in (later, earlier)]
    low = [(t - h).to(dtype).detach() for t, h in zip((later, earlier), high, strict=True)]
    return (high[0] - high[1]) + (low[0] - low[1])


def fading(log_decay: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``exp(log_decay)`` as a factor in ``dtype`` and what its rounding left: ``S -> factor S + (rest S + new)``.

    A float32 factor near one is off by up to 3e-8, which a state that is updated a million times would show: a decay of
    1e-6 a token by 3 %.
    """
    exact = log_decay.to(_wide(log_decay)).exp()
    factor = exact.to(dtype)
    return factor, (exact - factor.detach()).to(dtype).detach()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
