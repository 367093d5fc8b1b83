"""Tokens of a grid in tiles: the order in which n-dimensional locality becomes blocks of a sequence.

A kernel computes attention block by block of consecutive tokens. Consecutive tokens of a flattened image are strips, so
the windows of a block's queries touch far more blocks than they fill. Reordered tile by tile (8 x 8 pixels, say), they
touch few. With dilation, tokens of one residue class (coordinate modulo dilation) come together first, since only they
see one another. Short tiles at the border are filled up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = ["TileOrder", "balanced_tile", "tile_order", "token_permute", "token_unpermute"]


def balanced_tile(grid: Sequence[int], volume: int = 64) -> tuple[int, ...]:
    """A tile of up to ``volume`` tokens, as nearly cubic as the grid allows, its sides powers of two or whole axes."""
    tile = [1] * len(grid)
    while True:
        growing = [a for a in range(len(grid)) if tile[a] < grid[a] and 2 * math.prod(tile) <= volume]
        if not growing:
            return tuple(min(side, length) for side, length in zip(tile, grid, strict=True))
        # The last axis grows first: its tokens are neighbours in memory.
        axis = min(growing, key=lambda a: (tile[a], -a))
        tile[axis] *= 2


@dataclass(frozen=True, eq=False)
class TileOrder:
    """Tile-major order of the ``length`` tokens of a grid, short tiles filled up.

    ``order`` ``(padded,)``: the token at each place (a filling place repeats a token of its tile). ``valid``
    ``(padded,)``: False at filling places. ``inverse`` ``(length,)``: the place of each token. ``block``: tokens of a
    tile. Where ``identity``, tokens stay as they are.
    """

    order: Tensor
    valid: Tensor
    inverse: Tensor
    block: int
    identity: bool

    @property
    def length(self) -> int:
        return len(self.inverse)

    @property
    def padded(self) -> int:
        return len(self.order)

    def apply(self, x: Tensor) -> Tensor:
        """``(batch, heads, length, dim)`` into tile order, ``(batch, heads, padded, dim)``."""
        return x if self.identity else x.index_select(2, self.order)

    def undo(self, x: Tensor) -> Tensor:
        """``(batch, heads, padded, ...)`` back into the grid's order, ``(batch, heads, length, ...)``."""
        return x if self.identity else x.index_select(2, self.inverse)

    def block_tokens(self) -> Tensor:
        """Real tokens of each block, ``(blocks,)``."""
        short = -self.padded % self.block
        return F.pad(self.valid, (0, short)).view(-1, self.block).sum(-1)


@torch.compiler.disable
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def tile_order(
    grid: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...], device: torch.device
) -> TileOrder:
    """The order of ``grid`` in tiles of ``tile`` tokens of one residue class modulo ``dilation``."""
    axes = len(grid)
    token = torch.zeros((1,) * (3 * axes), dtype=torch.int64)
    valid = torch.ones((1,) * (3 * axes), dtype=torch.bool)
    for axis, (length, side, rate) in enumerate(zip(grid, tile, dilation, strict=True)):
        if side < 1 or not 1 <= rate <= length:
            raise OptionError(f"Axis {axis} of length {length} cannot hold tiles of {side} at dilation {rate}.")
        tiles = -(-length // (side * rate))
        residue = torch.arange(rate).view(-1, 1, 1)
        place = (torch.arange(tiles)[:, None] * side + torch.arange(side))[None]
        last = (length - 1 - residue).div(rate, rounding_mode="floor")
        shape = [1] * (3 * axes)
        shape[axis], shape[axes + axis], shape[2 * axes + axis] = rate, tiles, side
        # Filling places repeat the last token of their class, so that the extent of a tile stays tight.
        token = token * length + (torch.minimum(place, last) * rate + residue).view(shape)
        valid = valid & (place <= last).view(shape)
    order, valid = token.flatten(), valid.expand_as(token).flatten()
    count = math.prod(grid)
    if axes == 1 and dilation == (1,):
        plain = torch.arange(count, device=device)
        return TileOrder(plain, torch.ones_like(plain, dtype=torch.bool), plain, tile[0], True)
    inverse = torch.empty(count, dtype=torch.int64)
    inverse[order[valid]] = torch.arange(len(order))[valid]
    return TileOrder(order.to(device), valid.to(device), inverse.to(device), math.prod(tile), False)


def _split(space: Sequence[int], tile: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Tiles along each axis of one residue class."""
    if not len(space) == len(tile) == len(dilation):
        raise ShapeError(f"Space {tuple(space)}, tile {tuple(tile)} and dilation {tuple(dilation)} differ in axes.")
    return [-(-length // (side * rate)) for length, side, rate in zip(space, tile, dilation, strict=True)]


def token_permute(x: Tensor, tile: Sequence[int], dilation: Sequence[int] | None = None) -> Tensor:
    """``(batch, heads, *space, dim)`` -> ``(batch * classes, heads, tokens, dim)``, tile-major.

    Each residue class modulo ``dilation`` becomes a sequence of its own (``classes = prod(dilation)``, varying fastest
    in the batch); its tokens come tile by tile, and borders are filled with zeros up to whole tiles.
    """
    axes = x.dim() - 3
    rates = (1,) * axes if dilation is None else tuple(dilation)
    space = x.shape[2:-1]
    tiles = _split(space, tile, rates)
    full = [n * side * rate for n, side, rate in zip(tiles, tile, rates, strict=True)]
    missing = [extent - length for extent, length in zip(full, space, strict=True)]
    padding = [0, 0, *itertools.chain.from_iterable((0, m) for m in reversed(missing))]
    x = F.pad(x, padding) if any(missing) else x
    parts = itertools.chain.from_iterable(zip(tiles, tile, rates, strict=True))
    x = x.reshape(*x.shape[:2], *parts, x.shape[-1])
    tile_axes, side_axes, class_axes = (range(2 + part, 2 + 3 * axes, 3) for part in range(3))
    x = x.permute(0, *class_axes, 1, *tile_axes, *side_axes, x.dim() - 1)
    return x.reshape(x.shape[0] * math.prod(rates), x.shape[1 + axes], -1, x.shape[-1])


def token_unpermute(
    x: Tensor, space: Sequence[int], tile: Sequence[int], dilation: Sequence[int] | None = None
) -> Tensor:
    """The inverse of :func:`token_permute` for the original ``space``; filling is cut off."""
    axes = len(space)
    rates = (1,) * axes if dilation is None else tuple(dilation)
    tiles = _split(space, tile, rates)
    heads, dim = x.shape[1], x.shape[-1]
    x = x.reshape(-1, *rates, heads, *tiles, *tile, dim)
    order = [0, axes + 1]
    for axis in range(axes):
        order += [axes + 2 + axis, 2 * axes + 2 + axis, 1 + axis]
    x = x.permute(*order, x.dim() - 1)
    full = [n * side * rate for n, side, rate in zip(tiles, tile, rates, strict=True)]
    x = x.reshape(x.shape[0], heads, *full, dim)
    return x[(slice(None), slice(None), *(slice(0, length) for length in space))]
