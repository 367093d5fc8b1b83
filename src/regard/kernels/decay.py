"""Products of decays, kept as sums of logarithms."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["running_decay"]

# Powers below this are zero even in float64, and sums of it over any chunk keep their digits.
_LEAST = -800.0


def running_decay(log_decay: Tensor, dim: int) -> Tensor:
    """Cumulative sums of ``log_decay`` along ``dim``, such that differences of them can be trusted.

    In float64 (float32 where a device has none), since after strong decays a float32 sum has lost the digits of weak
    ones. ``-inf``, which forgets everything, becomes a number whose power is zero: a difference of two infinities
    would be none.
    """
    wide = torch.float32 if log_decay.device.type == "mps" else torch.float64
    return log_decay.clamp_min(_LEAST).to(wide).cumsum(dim)
