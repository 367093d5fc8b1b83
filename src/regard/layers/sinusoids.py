"""Sinusoidal position codes ("Attention Is All You Need", 2017, arXiv 1706.03762, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.errors import OptionError

__all__ = ["sinusoids"]


def sinusoids(length: int, dim: int, base: float = 10000.0) -> Tensor:
    """Codes ``(length, dim)``: channel ``2i`` is ``sin(t / base^(2i / dim))``, channel ``2i + 1`` its cosine."""
    if dim % 2:
        raise OptionError(f"Sinusoids come in pairs of sine and cosine, so dim is even; got {dim}.")
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(base) / dim))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
