"""Rotary positions: Su et al., "RoFormer", 2021, arXiv 2104.09864, equation 34 (halves rotated, as in Llama)."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import OptionError

__all__ = ["apply_rotary", "rotary_angles"]


def rotary_angles(
    length: int | Tensor,
    head_dim: int,
    *,
    base: float = 10000.0,
    start: int = 0,
    step: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(length, head_dim)`` of ``length`` positions from ``start`` on, ``step`` apart.

    length: or the positions themselves, ``(length,)``, where tokens do not follow one another.
    """
    if head_dim % 2:
        raise OptionError(f"Rotary positions need an even head_dim, got {head_dim}.")
    # Angles are formed in float64: at long lengths float32 loses digits of position times frequency.
    rates = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    if isinstance(length, Tensor):
        position = length.to(rates)
    else:
        position = start + step * torch.arange(length, device=device, dtype=torch.float64)
    angles = position[:, None] * rates
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x (..., length, head_dim)`` by its positions; norms stay, ``q_i . k_j`` depends on ``i - j`` alone."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
