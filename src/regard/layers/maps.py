"""Tokens and the map they stand on: ``(batch, length, channels)`` with a grid, and ``(batch, channels, *space)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from regard.errors import OptionError, ShapeError

__all__ = ["PatchEmbed", "map_of", "merge_heads", "space_of", "split_heads", "tokens_of"]


def space_of(x: Tensor, grid: Sequence[int] | None, axes: int = 2) -> tuple[int, ...]:
    """The space behind ``x (batch, length, channels)``, checked: ``axes`` sides whose product is the length."""
    if grid is None or len(grid) != axes or math.prod(grid) != x.shape[1]:
        sides = {1: "length,", 2: "height, width", 3: "frames, height, width"}.get(axes, f"{axes} sides")
        raise ShapeError(f"grid=({sides}) of {x.shape[1]} tokens in all is needed with this input, got {grid}.")
    return tuple(grid)


def map_of(x: Tensor, grid: Sequence[int]) -> Tensor:
    """``(batch, length, channels)`` -> ``(batch, channels, *grid)``."""
    return x.transpose(1, 2).unflatten(2, tuple(grid))


def tokens_of(maps: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``(batch, channels, *space)`` -> ``(batch, length, channels)`` and the space."""
    return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])


def split_heads(x: Tensor, num_heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """``(batch, length, parts * heads * head_dim)`` -> ``parts`` tensors ``(batch, heads, length, head_dim)``."""
    return tuple(t.transpose(1, 2) for t in x.unflatten(-1, (parts, num_heads, -1)).unbind(2))


def merge_heads(x: Tensor) -> Tensor:
    """``(batch, num_heads, length, head_dim)`` -> ``(batch, length, num_heads * head_dim)``."""
    return x.transpose(1, 2).flatten(2)


class PatchEmbed(nn.Module):
    """A strided convolution, then LayerNorm over channels: ``(batch, in_channels, *space)`` -> tokens and their grid.

    padding 0 and ``kernel_size = stride`` cuts patches; a larger kernel overlaps them. A map that the stride does not
    divide is filled up with zeros at the end of each axis when patches do not overlap (fill: False leaves the rest of
    the map out instead). norm: LayerNorm or not.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        *,
        bias: bool = True,
        norm: bool = True,
        fill: bool = True,
    ) -> None:
        super().__init__()
        self.stride = kernel_size if stride is None else stride
        if not 1 <= self.stride <= kernel_size:
            raise OptionError(f"Need 1 <= stride <= kernel_size, got {self.stride} and {kernel_size}.")
        self.fill = fill and kernel_size == self.stride
        self.conv = nn.Conv2d(in_channels, embed_dim, kernel_size, self.stride, padding, bias=bias)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens ``(batch, length, embed_dim)`` and their grid."""
        if self.fill:
            short = [-side % self.stride for side in maps.shape[:-3:-1]]
            maps = nn.functional.pad(maps, (0, short[0], 0, short[1])) if any(short) else maps
        tokens, grid = tokens_of(self.conv(maps))
        return self.norm(tokens), grid
