"""Padding in this folder: every mechanism can hide keys from all queries, none can per query."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.layers.padding import layer_keys

__all__ = ["layer_keys", "per_head"]


def per_head(real: Tensor | None) -> Tensor | None:
    """A mask of real tokens, ``(batch, length)`` or ``(batch | 1, heads | 1, length)``, as the latter."""
    if real is None or (real.dim() == 3 and real.dtype == torch.bool):
        return real
    if real.dim() != 2 or real.dtype != torch.bool:
        raise ShapeError(
            "A padding mask is boolean, True for real tokens, of shape (batch, length) or (batch, heads, length); "
            f"got {real.dtype} of shape {tuple(real.shape)}."
        )
    return real[:, None]
