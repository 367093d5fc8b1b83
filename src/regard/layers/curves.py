"""Space-filling curves: an order of a grid's tokens in which neighbours in the sequence are neighbours in space."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from regard.errors import ShapeError

__all__ = ["gilbert3d", "hilbert_order"]

_Edge = tuple[int, int]
"""An edge of a box on a grid: the signed distance from one cell to the next in the flattened grid, and its cells."""


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


@torch.compiler.disable
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def gilbert3d(width: int, height: int, depth: int) -> tuple[Tensor, Tensor]:
    """The generalised Hilbert curve through a grid of any size: the order of its cells, and the place of each cell.

    Both int64 ``(width * height * depth,)``. A cell ``(x, y, z)`` has the flat index ``x + width (y + height z)``, so a
    video ``(frames, height, width)`` is ``gilbert3d(width, height, frames)``. ``order[i]`` is the cell at place ``i``,
    ``inverse[order]`` the identity. Unlike :func:`hilbert_order` the curve stays inside the grid: where all sizes are
    even (or 1) every step goes to a neighbour; odd sizes may need a few longer ones. The rules by which a box is cut
    are those of Cerveny's "gilbert" (2018).
    """
    sizes, strides = (width, height, depth), (1, width, width * height)
    if min(sizes) < 1:
        raise ShapeError(f"Each side of the grid has 1 cell or more; got {width} x {height} x {depth}.")
    edges = list(zip(strides, sizes, strict=True))
    longest = edges.pop(sizes.index(max(sizes)))
    order = torch.tensor(list(_fill(0, longest, *edges)), dtype=torch.int64)
    return order, order.argsort()


def _fill(at: int, main: _Edge, second: _Edge, third: _Edge) -> Iterator[int]:
    """The cells of a box from its corner ``at`` to the corner at the far end of ``main``."""
    if sum(count > 1 for _, count in (main, second, third)) <= 1:
        step, count = max(main, second, third, key=lambda edge: edge[1])
        yield from range(at, at + count * step, step)
        return
    (a, w), (b, h), (c, d) = main, second, third
    w2, h2, d2 = _half(main), _half(second), _half(third)
    end = at + (w - 1) * a
    parts: list[tuple[int, _Edge, _Edge, _Edge]]
    if 2 * w > 3 * max(h, d):  # long: one half after the other
        parts = [(at, (a, w2), second, third), (at + w2 * a, (a, w - w2), second, third)]
    elif 3 * h > 4 * d:  # flat: out along the second edge, across, and back; the third stays whole
        parts = [
            (at, (b, h2), third, (a, w2)),
            (at + h2 * b, main, (b, h - h2), third),
            (end + (h2 - 1) * b, (-b, h2), third, (-a, w - w2)),
        ]
    elif 3 * d > 4 * h:  # the same along the third edge
        parts = [
            (at, (c, d2), (a, w2), second),
            (at + d2 * c, main, second, (c, d - d2)),
            (end + (d2 - 1) * c, (-c, d2), (-a, w - w2), second),
        ]
    else:  # out along the second edge, up the third, across, down, and back
        parts = [
            (at, (b, h2), (c, d2), (a, w2)),
            (at + h2 * b, third, (a, w2), (b, h - h2)),
            (at + (h2 - 1) * b + (d - 1) * c, main, (-b, h2), (-c, d - d2)),
            (end + h2 * b + (d - 1) * c, (-c, d), (-a, w - w2), (b, h - h2)),
            (end + (h2 - 1) * b, (-b, h2), (c, d2), (-a, w - w2)),
        ]
    for part in parts:
        if all(count for _, count in part[1:]):
            yield from _fill(*part)


def _half(edge: _Edge) -> int:
    """Cells of an edge's first half: an even number, so that the curve can return on the side where it set out."""
    step, count = edge
    half = (count + (step < 0)) // 2
    return half + 1 if half % 2 and count > 2 else half
