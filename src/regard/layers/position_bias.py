"""Relative position biases, added to the logits of pairs: a learned number per head and offset, a small network of the
offset, waves of the offset, or a learned vector per row and column offset that meets the query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype

__all__ = [
    "ContinuousPositionBias",
    "RelativePositionBias",
    "RotaryPositionBias",
    "RowColumnPositions",
    "fold_positions",
    "relative_offsets",
    "resize_rel_bias",
]


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
        return self._rows(_table_rows(offsets, self.window))

    def _rows(self, rows: Tensor) -> Tensor:
        return self.table.index_select(0, rows.flatten()).T.reshape(self.num_heads, *rows.shape)

    def forward(self, window: Sequence[int] | None = None) -> Tensor:
        """``(num_heads, n, n)`` for all pairs of a window, the table's own or a smaller one."""
        sides = self.window if window is None else tuple(window)
        if len(sides) != len(self.window) or any(a > b for a, b in zip(sides, self.window, strict=True)):
            raise ShapeError(f"A table for windows of {self.window} has no bias for {sides}; see resize_rel_bias.")
        return self._rows(_window_rows(sides, self.window, self.table.device))


def _table_rows(offsets: Tensor, window: Sequence[int]) -> Tensor:
    """Rows of a table for ``window``, by offsets ``(..., axes)``."""
    row = torch.zeros_like(offsets[..., 0])
    for axis, side in enumerate(window):
        row = row * (2 * side - 1) + offsets[..., axis] + side - 1
    return row


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _window_rows(sides: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows of all pairs of a window, ``(n, n)``; kept, since every forward pass asks for them."""
    return _table_rows(relative_offsets(sides, device), window)


class ContinuousPositionBias(nn.Module):
    """A small network of log-spaced offsets gives the bias, so that it reaches windows that were never trained.

    ``16 sigmoid(W_2 relu(W_1 c))`` with ``c_a = sign(o_a) log2(1 + 8 |o_a| / (w_a - 1)) / log2(8)`` per axis: Liu et
    al., "Swin Transformer V2", 2021, arXiv 2111.09883, section 3.3. window: the sides that offsets are measured by.
    """

    def __init__(self, window: Sequence[int], num_heads: int, hidden: int = 512) -> None:
        super().__init__()
        if not window or min(window) < 1 or num_heads < 1:
            raise OptionError(f"A bias needs a window and heads of at least 1; got {tuple(window)}, {num_heads}.")
        self.window, self.num_heads = tuple(window), num_heads
        self.network = nn.Sequential(
            nn.Linear(len(self.window), hidden), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False)
        )

    def extra_repr(self) -> str:
        return f"window={self.window}, num_heads={self.num_heads}"

    def at(self, offsets: Tensor) -> Tensor:
        """The bias at integer ``offsets`` ``(..., axes)``: ``(num_heads, ...)``."""
        weight = next(self.network.parameters())
        reach = torch.tensor([max(side - 1, 1) for side in self.window], device=weight.device)
        relative = 8 * offsets.to(weight.device, weight.dtype) / reach
        spaced = relative.sign() * torch.log2(1 + relative.abs()) / math.log2(8)
        return 16 * torch.sigmoid(self.network(spaced)).movedim(-1, 0)

    def forward(self, window: Sequence[int] | None = None) -> Tensor:
        """``(num_heads, n, n)`` for all pairs of a window of any size."""
        sides = self.window if window is None else tuple(window)
        if len(sides) != len(self.window):
            raise ShapeError(f"A bias on {len(self.window)} axes has no value for windows of {sides}.")
        return self.at(relative_offsets(sides, next(self.network.parameters()).device))


class RotaryPositionBias(nn.Module):
    """``(R_i a) . (R_j b)`` with learned vectors ``a`` and ``b`` of ``dim`` numbers and the rotations ``R`` of rotary
    positions: a sum of ``dim / 2`` waves of the offset ``i - j``, for one head and any length.

    Ma et al., "Mega", 2022, arXiv 2209.10655, as in its released code. Both vectors are drawn from a normal
    distribution of deviation ``std``.
    """

    def __init__(self, dim: int, std: float = 0.02, base: float = 10000.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise OptionError(f"Rotations turn pairs of channels: dim is even and at least 2, got {dim}.")
        self.dim, self.base = dim, base
        self.first, self.second = (nn.Parameter(std * torch.randn(dim)) for _ in range(2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def at(self, offsets: Tensor) -> Tensor:
        """The bias at integer ``offsets`` ``(..., 1)``, query minus key: ``(1, ...)``."""
        rates = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64, device=offsets.device) / self.dim)
        # Angles are formed in float64: at long lengths float32 loses digits of offset times rate.
        angles = offsets.to(torch.float64) * rates
        (a, b), (c, d) = self.first.chunk(2), self.second.chunk(2)
        waves = angles.cos().to(a.dtype) * (a * c + b * d) + angles.sin().to(a.dtype) * (a * d - b * c)
        return waves.sum(-1)[None]


class RowColumnPositions(nn.Module):
    """Learned vectors per offset on each axis that meet the query: ``q_i . (r_1[o_1] + r_2[o_2] + ...)``.

    ``o`` is key position minus query position, from ``-reach`` to ``reach`` on each axis. Bello et al., "Attention
    Augmented Convolutional Networks", 2019, arXiv 1904.09925, section 3.1.1. ``tables``: ``(2 reach + 1, head_dim)``
    per axis, shared by the heads, from a normal distribution of deviation ``head_dim ** -0.5``, so that queries of
    variance one get logits of variance one.
    """

    def __init__(self, reach: Sequence[int], head_dim: int) -> None:
        super().__init__()
        if not reach or min(reach) < 0 or head_dim < 1:
            raise OptionError(
                f"Need reaches of at least 0 and a head_dim of at least 1; got {tuple(reach)}, {head_dim}."
            )
        self.reach, self.head_dim = tuple(reach), head_dim
        self.tables = nn.ParameterList(torch.randn(2 * far + 1, head_dim) * head_dim**-0.5 for far in self.reach)

    def extra_repr(self) -> str:
        return f"reach={self.reach}, head_dim={self.head_dim}"

    def forward(self, query: Tensor, offsets: Sequence[Tensor]) -> Tensor:
        """Logits of keys that fill a grid of ``sides``: ``query (..., q_len, head_dim)`` -> ``(..., q_len,
        prod(sides))``, row-major, not scaled, in the accumulation dtype.

        offsets: for each axis an integer ``(q_len, side)``, from each query to each coordinate of the keys.
        """
        total, *others = _axis_logits(query, tuple(self.tables), offsets)
        for part in others:
            total = (total[..., :, None] + part[..., None, :]).flatten(-2)
        return total


def fold_positions(
    query: Tensor, key: Tensor, tables: Sequence[Tensor], offsets: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Query and key with further coordinates, so that ``scale q' . k'`` is ``scale q . k`` plus the logits of
    :class:`RowColumnPositions`, and a fused kernel needs no bias for every pair.

    A query gets its logit of each coordinate of the keys, axis by axis, and a key the indicator of its coordinates.
    query ``(..., q_len, head_dim)``; key ``(..., prod(sides), head_dim)``, row-major; tables and offsets as there.
    """
    parts = _axis_logits(query, tables, offsets)
    sides = [part.shape[-1] for part in parts]
    places = [torch.eye(side, dtype=key.dtype, device=key.device) for side in sides]
    columns = []
    for axis, place in enumerate(places):
        before, after = math.prod(sides[:axis]), math.prod(sides[axis + 1 :])
        columns.append(place.repeat_interleave(after, 0).repeat(before, 1))
    shown = torch.cat(columns, -1)
    logits = torch.cat(parts, -1) / scale
    return (
        torch.cat((query, logits.to(query.dtype)), -1),
        torch.cat((key, shown.expand(*key.shape[:-1], -1)), -1),
    )


def _axis_logits(query: Tensor, tables: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    """``q_i . r[o]`` for each axis, ``(..., q_len, side)``."""
    work = accumulation_dtype(query.dtype)
    found = []
    for table, offset in zip(tables, offsets, strict=True):
        reach = table.shape[0] // 2
        # On an accelerator reading the offsets back would stall it, and gather itself refuses what is out of range.
        if offset.device.type == "cpu" and int(offset.abs().max()) > reach:
            raise ShapeError(f"Offsets up to {int(offset.abs().max())} exceed the table's reach of {reach}.")
        logits = query.to(work) @ table.to(work).T
        found.append(logits.gather(-1, (offset + reach).expand(*logits.shape[:-1], -1)))
    return found


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
