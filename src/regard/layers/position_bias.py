"""Relative position biases: a learned number per head and offset, added to the logits of pairs at that offset."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError

__all__ = ["RelativePositionBias", "relative_offsets", "resize_rel_bias"]


def relative_offsets(window: tuple[int, ...], device: torch.device) -> Tensor:
    """Query position minus key position of all pairs in a window of ``n`` tokens, ``(n, n, axes)``, row-major."""
    axes = torch.meshgrid(*(torch.arange(side, device=device) for side in window), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, -2)
    return place[:, None] - place[None]


class RelativePositionBias(nn.Module):
    """The table of Swin (arXiv 2103.14030, equation 4) for windows of any number of axes.

    ``table`` ``(prod(2 window - 1), num_heads)``, row-major in the offsets (query minus key, from ``-(w - 1)`` to
    ``w - 1`` on each axis), drawn from a normal distribution of deviation ``std``, cut at two.
    """

    def __init__(self, window: Sequence[int], num_heads: int, std: float = 0.02) -> None:
        super().__init__()
        if not window or min(window) < 1 or num_heads < 1:
            raise OptionError(f"A bias table needs a window and heads of at least 1; got {tuple(window)}, {num_heads}.")
        self.window, self.num_heads = tuple(window), num_heads
        self.table = nn.Parameter(torch.empty(math.prod(2 * side - 1 for side in window), num_heads))
        nn.init.trunc_normal_(self.table, std=std, a=-2 * std, b=2 * std)

    def extra_repr(self) -> str:
        return f"window={self.window}, num_heads={self.num_heads}"

    def at(self, offsets: Tensor) -> Tensor:
        """The bias at integer ``offsets`` ``(..., axes)``: ``(num_heads, ...)``."""
        row = torch.zeros_like(offsets[..., 0])
        for axis, side in enumerate(self.window):
            row = row * (2 * side - 1) + offsets[..., axis] + side - 1
        return self.table[row.flatten()].T.reshape(self.num_heads, *row.shape)

    def forward(self, window: Sequence[int] | None = None) -> Tensor:
        """``(num_heads, n, n)`` for all pairs of a window, the table's own or a smaller one."""
        sides = self.window if window is None else tuple(window)
        if len(sides) != len(self.window) or any(a > b for a, b in zip(sides, self.window, strict=True)):
            raise ShapeError(f"A table for windows of {self.window} has no bias for {sides}; see resize_rel_bias.")
        return self.at(relative_offsets(sides, self.table.device))


def resize_rel_bias(table: Tensor, new_window: Sequence[int], window: Sequence[int] | None = None) -> Tensor:
    """A bias table for another window, by bicubic interpolation between offsets (ends kept).

    table: ``(prod(2 window - 1), num_heads)``. ``window`` is needed where its sides differ; square ones are recognised.
    """
    if window is None:
        side = round(table.shape[0] ** (1 / len(new_window)))
        window = ((side + 1) // 2,) * len(new_window)
    extents, targets = ([2 * side - 1 for side in sides] for sides in (window, new_window))
    if math.prod(extents) != table.shape[0] or len(extents) != len(targets):
        raise ShapeError(
            f"A table of {table.shape[0]} rows is not one for windows of {tuple(window)}; give window, its sides."
        )
    work = torch.float32 if table.dtype in (torch.float16, torch.bfloat16) else table.dtype
    grid = table.to(work).T.reshape(-1, *extents)
    # Cubic interpolation is separable: one axis after the other gives the bicubic result in two, and goes on to three.
    for axis, target in enumerate(targets, start=1):
        if grid.shape[axis] != target:
            rows = grid.movedim(axis, -1)
            flat = rows.reshape(1, -1, 1, rows.shape[-1])
            flat = F.interpolate(flat, size=(1, target), mode="bicubic", align_corners=True)
            grid = flat.view(*rows.shape[:-1], target).movedim(-1, axis)
    return grid.flatten(1).T.to(table.dtype)
