"""Depthwise convolution of values on their grid: a positional and local term beside attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.maps import space_of

__all__ = ["ConditionalPositionEncoding", "DepthwiseConv"]

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


class DepthwiseConv(nn.Module):
    """One odd kernel per channel over tokens ``(batch, heads, length, head_dim)`` on a grid of ``axes`` axes,
    zeros outside; ``channels = heads * head_dim``."""

    def __init__(self, channels: int, kernel_size: int = 3, axes: int = 2, bias: bool = True) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or axes not in _CONVOLUTIONS:
            raise OptionError(f"Need an odd kernel_size and 1 to 3 axes, got {kernel_size} and {axes}.")
        self.axes = axes
        self.conv = _CONVOLUTIONS[axes](
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias
        )

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens in and out, ``grid`` the space behind them."""
        batch, heads, length, dim = x.shape
        if len(grid) != self.axes or math.prod(grid) != length:
            raise ShapeError(f"A grid of {self.axes} axes for {length} tokens is needed, got {tuple(grid)}.")
        maps: Tensor = self.conv(x.transpose(2, 3).reshape(batch, heads * dim, *grid))
        return maps.reshape(batch, heads, dim, length).transpose(2, 3)


class ConditionalPositionEncoding(nn.Module):
    """``x + DWConv(x)``; the zeros around the map tell each token where it stands."""

    def __init__(self, embed_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = DepthwiseConv(embed_dim, kernel_size)

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width)."""
        out: Tensor = x + self.conv(x[:, None], space_of(x, grid))[:, 0]
        return out
