"""Swin: attention inside windows that are shifted by half a window from one layer to the next.

The map is cut into windows of ``w x w`` tokens; each token attends to its own window with a learned bias per relative
position: ``softmax(q k^T / sqrt(d) + B) v``, ``B_ij = table[offset(i, j)]`` (arXiv 2103.14030, equation 4). In every
second layer the map is first rolled by ``-floor(w / 2)``, so that the new windows straddle the old borders; tokens that
meet in a window only because the roll wraps around (different *regions*) do not see each other. A side no longer than
the window becomes the window, without shift. Maps that are no multiple of it are filled up at the bottom and right.

The released code leaves filled-up keys visible and separates regions by adding -100 to the logits, which leaks about
4e-44 of the weight; here both are hidden exactly, and ``official=True`` gives the released behaviour.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021, arXiv 2103.14030.
Multiply-adds of a layer on ``N = H W`` tokens of ``C`` channels: ``4 N C^2 + 2 w^2 N C``, against ``4 N C^2 + 2 N^2 C``
for global attention. The backbone is :class:`regard.models.swin.Swin`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import flash_window_attention
from regard.layers.drop_path import DropPath
from regard.layers.maps import merge_heads, space_of, split_heads
from regard.layers.mlp import Mlp
from regard.layers.position_bias import ContinuousPositionBias, RelativePositionBias, resize_rel_bias
from regard.local.windows import (
    WindowKernel,
    WindowPlan,
    dense_windows,
    pad_to_windows,
    window_partition,
    window_plan,
    window_reverse,
    windowed_attention,
)
from regard.mechanism import Layer, Mechanism, Request, per_axis
from regard.registry import register

__all__ = [
    "PatchMerging",
    "SwinAttention",
    "SwinBlock",
    "SwinMLPBlock",
    "WindowAttention",
    "WindowBlock",
    "fit_window",
    "global_attention_macs",
    "resize_rel_bias",
    "shift_mask",
    "window_attention_macs",
    "window_partition",
    "window_reverse",
]

_APART = -100.0

_BIASES = {"table": RelativePositionBias, "continuous": ContinuousPositionBias}

_KERNELS: dict[str, WindowKernel] = {
    "math": partial(dense_windows, backend="reference"),
    "sdpa": partial(dense_windows, backend="sdpa"),
    "flash_window": flash_window_attention,
}


def fit_window(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and shift on this grid: an axis no longer than the window is one window, without shift."""
    sides = tuple(min(w, n) for w, n in zip(window, grid, strict=True))
    moves = tuple(0 if n <= w else s for s, w, n in zip(shift, window, grid, strict=True))
    return sides, moves


def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Additive mask ``(windows, n, n)`` of the shifted windows: 0 within a region, -100 across, as released."""
    grid = (-(-height // window) * window, -(-width // window) * window)
    region = window_plan(grid, (window, window), (shift, shift), torch.device("cpu")).region
    return (region[:, :, None] != region[:, None]).float() * _APART


def window_attention_macs(height: int, width: int, channels: int, window: int) -> int:
    """Multiply-adds of window attention with its projections on a map that windows divide (equation 2)."""
    tokens = height * width
    return 4 * tokens * channels**2 + 2 * window**2 * tokens * channels


def global_attention_macs(height: int, width: int, channels: int) -> int:
    """Multiply-adds of global attention with its projections (equation 1)."""
    tokens = height * width
    return 4 * tokens * channels**2 + 2 * tokens**2 * channels


@register("swin")
class SwinAttention(Mechanism):
    """window: one value or one per axis. shift: of the windows; by default 0 on even layers, half a window on odd ones.
    axes: of the grid, which the bias must know. position_bias: per offset and head, read from a learned ``"table"`` or
    computed by a small ``"continuous"`` network of the offset (Swin V2), or None. official: the released code's
    handling of regions and filling (see the module)."""

    patterns = frozenset(("self",))
    growth = "N w^2"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(
        self,
        window: int | Sequence[int] = 7,
        shift: int | Sequence[int] | None = None,
        axes: int = 2,
        position_bias: Literal["table", "continuous"] | None = "table",
        official: bool = False,
        num_heads: int = 1,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        if axes < 1:
            raise OptionError(f"A grid has at least one axis, got axes={axes}.")
        self.window = per_axis("window", window, axes)
        half = tuple(w // 2 if layer_index % 2 else 0 for w in self.window)
        self.shift = half if shift is None else per_axis("shift", shift, axes)
        if min(self.window) < 1 or any(not 0 <= s < w for s, w in zip(self.shift, self.window, strict=True)):
            raise OptionError(f"Need window >= 1 and 0 <= shift < window, got {self.window} and {self.shift}.")
        if position_bias is not None and position_bias not in _BIASES:
            raise OptionError(f"position_bias is 'table', 'continuous' or None, got {position_bias!r}.")
        self.axes, self.official = axes, official
        self.kernel: WindowKernel = dense_windows
        if axes != 2:
            # A sequence is its own grid; other numbers of axes are declared for this instance.
            self.grid_axes = frozenset((axes,))  # type: ignore[misc]
            self.needs_grid = axes > 1  # type: ignore[misc]
        self.position_bias = None if position_bias is None else _BIASES[position_bias](self.window, num_heads)

    def extra_repr(self) -> str:
        return f"window={self.window}, shift={self.shift}, official={self.official}"

    def plan(self, grid: Sequence[int] | None, length: int, device: torch.device) -> WindowPlan:
        """The windows of a grid."""
        space = (length,) if grid is None else tuple(grid)
        if len(space) != self.axes:
            raise ShapeError(
                f"This swin works on grids of {self.axes} axes, got {'none' if grid is None else space}. Pass "
                f"grid=(height, width) with the call, or build it with axes={len(space)}."
            )
        return window_plan(space, *fit_window(space, self.window, self.shift), device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        plan = self.plan(request.grid, query.shape[2], query.device)
        bias = None if self.position_bias is None else self.position_bias(plan.window)
        if bias is not None and bias.shape[0] not in (1, query.shape[1]):
            raise ShapeError(
                f"This swin has a bias for {bias.shape[0]} heads, but the queries have {query.shape[1]}; "
                "build it with num_heads."
            )
        return windowed_attention(
            query,
            key,
            value,
            plan,
            bias=None if bias is None else bias.to(query.dtype),
            mask=request.mask,
            scale=request.scale,
            fill_logit=_APART if self.official else None,
            kernel=self.kernel,
        )

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float:
        plan = self.plan(request.grid, query.shape[2], query.device)
        return plan.pairs / query.shape[2] ** 2

    def cost(self, shape: AttentionShape) -> Cost:
        grid = shape.grid
        if grid is None or len(grid) != self.axes:
            inner = math.prod(self.window)
            return dense_cost(shape, min(inner / shape.k_len, 1.0))
        sides, _ = fit_window(grid, self.window, self.shift)
        filled = math.prod(-(-n // w) * w for n, w in zip(grid, sides, strict=True))
        return dense_cost(shape, filled * math.prod(sides) / (shape.q_len * shape.k_len))


class WindowAttention(nn.Module):
    """Multi-head attention inside given windows ``(windows, n, channels)``, with relative position bias.

    impl: ``"math"`` (written out), ``"sdpa"`` (torch's fused kernel), ``"flash_window"`` (scores kept in fast memory,
    :mod:`regard.kernels.flash_window`), or a function as :data:`regard.local.windows.WindowKernel`.
    """

    def __init__(
        self,
        embed_dim: int,
        window: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        impl: str | WindowKernel = "sdpa",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}.")
        if isinstance(impl, str) and impl not in _KERNELS:
            raise OptionError(f"impl is a function or one of {', '.join(_KERNELS)}; got {impl!r}.")
        self.window = per_axis("window", window, 2)
        self.num_heads, self.impl = num_heads, impl
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.position_bias = RelativePositionBias(self.window, num_heads)

    def forward(self, windows: Tensor, mask: Tensor | None = None, window: Sequence[int] | None = None) -> Tensor:
        """mask: ``(distinct windows, n, n)``, boolean (True: visible) or added to the logits; the windows of each
        example follow one another. window: their sides, where smaller than the table's."""
        query, key, value = split_heads(self.qkv(windows), self.num_heads, 3)
        bias = self.position_bias(window).to(windows.dtype)
        kernel = _KERNELS[self.impl] if isinstance(self.impl, str) else self.impl
        out: Tensor = self.proj(merge_heads(kernel(query, key, value, bias, mask, query.shape[-1] ** -0.5)))
        return out


class WindowBlock(Layer):
    """``x + DropPath(mix(norm(x)))``, then ``x + DropPath(mlp(norm(x)))``, on ``(batch, length, channels)``.

    A subclass says how the tokens of windows mix, and makes the MLP. shift: 0 or ``window // 2``.
    """

    mlp_norm: nn.LayerNorm
    mlp: Mlp

    patterns = frozenset(("self",))
    growth = "N w^2"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(self, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        if not 0 <= shift < window:
            raise OptionError(f"Need 0 <= shift < window, got {shift} and {window}.")
        self.window, self.shift = window, shift
        self.drop_path = DropPath(drop_path)

    @abstractmethod
    def mix(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        """The first branch, its norm included: ``(batch, length, channels)`` in and out."""

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width)."""
        x = x + self.drop_path(self.mix(x, space_of(x, grid)))
        out: Tensor = x + self.drop_path(self.mlp(self.mlp_norm(x)))
        return out


class SwinBlock(WindowBlock):
    """The block whose windows attend. official: the released handling of regions and filling."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int = 7,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
        official: bool = False,
        impl: str | WindowKernel = "sdpa",
    ) -> None:
        super().__init__(window, shift, drop_path)
        self.official = official
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = WindowAttention(embed_dim, window, num_heads, qkv_bias, impl)
        self.mlp_norm, self.mlp = nn.LayerNorm(embed_dim), Mlp(embed_dim, mlp_ratio)

    def mix(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        sides, moves = fit_window(space, (self.window,) * 2, (self.shift,) * 2)
        plan = window_plan(space, sides, moves, x.device)
        mask = plan.visible
        if self.official:
            apart = plan.region[:, :, None] != plan.region[:, None]
            mask = apart.to(x.dtype) * _APART if bool(apart.any()) else None
        filled = pad_to_windows(self.attention_norm(x).unflatten(1, space), sides)
        extent = filled.shape[1:-1]
        rolled = filled.roll([-s for s in moves], (1, 2)) if any(moves) else filled
        windows = window_partition(rolled, sides).flatten(1, 2)
        out = window_reverse(self.attention(windows, mask, sides).unflatten(1, sides), sides, extent)
        out = out.roll(moves, (1, 2)) if any(moves) else out
        return out[:, : space[0], : space[1]].flatten(1, 2)


class SwinMLPBlock(WindowBlock):
    """Swin's block with attention replaced by a fixed mixing of the tokens of each window, one matrix per head."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int = 7,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(window, shift, drop_path)
        if embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}.")
        self.num_heads = num_heads
        tokens = num_heads * window**2
        self.mixing_norm = nn.LayerNorm(embed_dim)
        self.mixing = nn.Conv1d(tokens, tokens, kernel_size=1, groups=num_heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(embed_dim), Mlp(embed_dim, mlp_ratio)

    def mix(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        # A shift is a border of zeros here, not a roll: a fixed matrix cannot leave tokens out.
        before = self.window - self.shift if self.shift and min(space) > self.window else 0
        sides = (self.window,) * 2
        image = F.pad(self.mixing_norm(x).unflatten(1, space), (0, 0, before, 0, before, 0))
        filled = pad_to_windows(image, sides)
        windows = window_partition(filled, sides).flatten(1, 2)
        heads = windows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(1, 2)
        mixed = self.mixing(heads).unflatten(1, (self.num_heads, -1)).transpose(1, 2).flatten(2)
        out = window_reverse(mixed.unflatten(1, sides), sides, filled.shape[1:-1])
        return out[:, before : before + space[0], before : before + space[1]].flatten(1, 2)


class PatchMerging(nn.Module):
    """Half the resolution: the four neighbours of each 2 x 2 cell, in order (0, 0), (1, 0), (0, 1), (1, 1), become
    ``4 C`` channels, normed and projected to ``2 C``. Odd sides are filled up with zeros."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * embed_dim)
        self.reduction = nn.Linear(4 * embed_dim, 2 * embed_dim, bias=False)

    def forward(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """``(batch, length, C)`` and its grid -> ``(batch, length / 4, 2 C)`` and the new grid."""
        image = pad_to_windows(x.unflatten(1, space_of(x, grid)), (2, 2))
        cells = torch.cat([image[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        merged = self.reduction(self.norm(cells))
        return merged.flatten(1, 2), (merged.shape[1], merged.shape[2])
