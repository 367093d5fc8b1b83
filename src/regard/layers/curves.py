"""Space-filling curves: an order of a grid's tokens in which neighbours in the sequence are neighbours in space."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from regard.errors import ShapeError

__all__ = ["hilbert_order"]


@torch.compiler.disable
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def hilbert_order(grid: tuple[int, ...]) -> Tensor:
    """Flat indices of the tokens of ``grid`` along Hilbert's curve, int64 ``(tokens,)``.

    The curve is that of the smallest cube of side ``2^b`` that holds the grid; what lies outside of the grid is passed
    over. In a cube of such a side every step goes to a neighbour. By the bit operations of Skilling, "Programming the
    Hilbert curve", 2004.
    """
    if not grid or min(grid) < 1:
        raise ShapeError(f"A grid has at least one axis, each of length 1 or more; got {grid}.")
    axes = list(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    axes = [axis.flatten().clone() for axis in axes]
    bits = max((max(grid) - 1).bit_length(), 1)
    for bit in reversed(range(1, bits)):
        side, low = 1 << bit, (1 << bit) - 1
        for axis in range(len(axes)):
            # Inside each half of the cube the curve is turned: mirrored, or two axes exchanged.
            mirrored = (axes[axis] & side) > 0
            exchange = torch.where(mirrored, 0, (axes[0] ^ axes[axis]) & low)
            axes[0] = torch.where(mirrored, axes[0] ^ low, axes[0] ^ exchange)
            if axis:
                axes[axis] = axes[axis] ^ exchange
    for axis in range(1, len(axes)):  # Gray code across the axes
        axes[axis] = axes[axis] ^ axes[axis - 1]
    turn = torch.zeros_like(axes[0])
    for bit in reversed(range(1, bits)):
        turn = torch.where((axes[-1] >> bit & 1) > 0, turn ^ ((1 << bit) - 1), turn)
    place = torch.zeros_like(turn)
    for bit, coordinate in itertools.product(reversed(range(bits)), axes):
        place = place << 1 | ((coordinate ^ turn) >> bit & 1)
    return place.argsort()
