"""Pooling of tokens that stand on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["pool_tokens"]

_POOLS: dict[int, Callable[[Tensor, Any], Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def pool_tokens(x: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Adaptive average pooling of ``x (batch, heads, length, dim)`` on its ``grid`` to ``(batch, heads,
    prod(size), dim)``.

    Bin ``i`` of an axis of length ``L`` and size ``s`` holds positions ``floor(i L / s)`` to ``ceil((i + 1) L
    / s) - 1``.
    """
    batch, heads, length, dim = x.shape
    if len(grid) not in _POOLS or len(grid) != len(size):
        raise OptionError(f"Tokens are pooled on grids of 1 to 3 axes, one size an axis; got {grid} and {size}.")
    if math.prod(grid) != length:
        raise ShapeError(f"grid {tuple(grid)} holds {math.prod(grid)} tokens, but there are {length}.")
    maps = x.to(accumulation_dtype(x.dtype)).transpose(2, 3).reshape(batch, heads * dim, *grid)
    pooled = _POOLS[len(grid)](maps, tuple(size))
    return pooled.reshape(batch, heads, dim, -1).transpose(2, 3).to(x.dtype)
