"""Rectangular windows on grids of any number of axes: partition, cyclic shift, who may see whom, and attention inside.

Used by all papers that cut a map into windows or stripes. A grid that is no multiple of the window is filled up at the
end of each axis; filling is never seen.
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
from regard.kernels import dense_attention
from regard.masks import Boolean, Mask

__all__ = [
    "WindowPlan",
    "pad_to_windows",
    "pool_windows",
    "window_partition",
    "window_plan",
    "window_reverse",
    "windowed_attention",
]


def pad_to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """``(batch, *space, channels)`` with zeros at the end of each axis, up to whole windows."""
    missing = [-length % side for length, side in zip(x.shape[1:-1], window, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [0, 0, *itertools.chain.from_iterable((0, m) for m in reversed(missing))])


def window_partition(x: Tensor, window: int | Sequence[int]) -> Tensor:
    """``(batch, *space, channels)`` -> ``(batch * windows, *window, channels)``, windows in row-major order."""
    axes = x.dim() - 2
    sides = (window,) * axes if isinstance(window, int) else tuple(window)
    if len(sides) != axes or any(length % side for length, side in zip(x.shape[1:-1], sides, strict=True)):
        raise ShapeError(f"Space {tuple(x.shape[1:-1])} does not divide into windows of {sides}; see pad_to_windows.")
    counts = [length // side for length, side in zip(x.shape[1:-1], sides, strict=True)]
    x = x.reshape(x.shape[0], *itertools.chain.from_iterable(zip(counts, sides, strict=True)), x.shape[-1])
    x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(-1, *sides, x.shape[-1])


def window_reverse(windows: Tensor, window: int | Sequence[int], space: Sequence[int]) -> Tensor:
    """The inverse of :func:`window_partition`: back to ``(batch, *space, channels)``."""
    axes = len(space)
    sides = (window,) * axes if isinstance(window, int) else tuple(window)
    counts = [length // side for length, side in zip(space, sides, strict=True)]
    x = windows.reshape(-1, *counts, *sides, windows.shape[-1])
    x = x.permute(0, *itertools.chain.from_iterable((1 + a, 1 + axes + a) for a in range(axes)), 2 * axes + 1)
    return x.reshape(x.shape[0], *space, x.shape[-1])


def pool_windows(x: Tensor, window: Sequence[int], count_filling: bool = False) -> Tensor:
    """Mean of each window: ``(batch, *space, channels)`` -> ``(batch, windows, channels)``.

    A window that sticks out is averaged over its real tokens, or with ``count_filling`` over zeros there as well.
    """
    sides, batch = tuple(window), x.shape[0]
    total = window_partition(pad_to_windows(x, sides), sides).flatten(1, -2).sum(1)
    count: Tensor | int = math.prod(sides)
    if not count_filling:
        real = torch.ones(1, *x.shape[1:-1], 1, dtype=total.dtype, device=x.device)
        count = window_partition(pad_to_windows(real, sides), sides).flatten(1, -2).sum(1).repeat(batch, 1)
    return (total / count).view(batch, -1, x.shape[-1])


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """Where the tokens of a grid go when it is filled up, shifted cyclically and cut into windows of ``n`` tokens.

    ``token`` ``(windows, n)``: the token at each place (any, where ``valid`` ``(windows, n)`` is False: filling).
    ``inverse`` ``(length,)``: the place of each token among all windows'. ``region`` ``(windows, n)``: tokens of one
    window that were neighbours before the shift have the same number. ``window``: its sides.
    """

    token: Tensor
    valid: Tensor
    inverse: Tensor
    region: Tensor
    window: tuple[int, ...]

    def visible(self) -> Tensor | None:
        """Boolean ``(windows, n, n)``, True for real keys of the query's own region; None if all pairs are."""
        seen = (self.region[:, :, None] == self.region[:, None]) & self.valid[:, None]
        return None if bool(seen.all()) else seen

    @property
    def pairs(self) -> int:
        """Pairs of real tokens that share a window."""
        return int(self.valid.sum(-1).square().sum())

    def apply(self, x: Tensor) -> Tensor:
        """``(batch, heads, length, dim)`` -> ``(batch * windows, heads, n, dim)``; filling is zeros."""
        batch, heads, _, dim = x.shape
        taken = x.index_select(2, self.token.flatten())
        if not bool(self.valid.all()):
            taken = taken.masked_fill(~self.valid.flatten()[:, None], 0)
        return taken.view(batch, heads, *self.token.shape, dim).transpose(1, 2).flatten(0, 1)

    def undo(self, windows: Tensor) -> Tensor:
        """``(batch * windows, heads, n, dim)`` -> ``(batch, heads, length, dim)``."""
        heads, dim = windows.shape[1], windows.shape[-1]
        x = windows.view(-1, len(self.token), *windows.shape[1:]).transpose(1, 2)
        return x.reshape(len(x), heads, -1, dim).index_select(2, self.inverse)


@torch.compiler.disable
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def window_plan(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device
) -> WindowPlan:
    """The plan of ``grid``; the map moves by ``-shift`` (so the windows by ``+shift``) before it is cut."""
    axes = len(grid)
    shape = (1,) * (2 * axes)
    token, region = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    valid = torch.ones(shape, dtype=torch.bool)
    for axis, (length, side, move) in enumerate(zip(grid, window, shift, strict=True)):
        if side < 1 or not 0 <= move < side:
            raise OptionError(f"Axis {axis}: a window of {side} cannot be shifted by {move}; need 0 <= shift < window.")
        count = -(-length // side)
        place = torch.arange(count * side) + move
        at = place % (count * side)
        form = [1] * (2 * axes)
        form[axis], form[axes + axis] = count, side
        token = token * length + at.clamp_max(length - 1).view(form)
        region = region * 2 + (place >= count * side).long().view(form)
        valid = valid & (at < length).view(form)
    inner = math.prod(window)
    token, region, valid = (t.reshape(-1, inner) for t in (token, region, valid))
    real = valid.flatten()
    inverse = torch.empty(math.prod(grid), dtype=torch.int64)
    inverse[token.flatten()[real]] = torch.arange(len(real))[real]
    return WindowPlan(token.to(device), valid.to(device), inverse.to(device), region.to(device), window)


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: WindowPlan,
    *,
    bias: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    fill_logit: float | None = None,
) -> Tensor:
    """Attention inside each window of ``plan``: ``(batch, heads, length, dim)`` in and out.

    bias: ``(heads, n, n)`` added to the logits of each window. mask: on the grid's tokens. fill_logit: where given,
    pairs of different regions get it added instead of being hidden, and filling is visible, as in early releases.
    """
    batch, length = query.shape[0], query.shape[2]
    windows, n = plan.token.shape
    seen = plan.visible() if fill_logit is None else None
    logits = None if bias is None else bias[None]
    if fill_logit is not None and bool(plan.region.any()):
        apart = (plan.region[:, :, None] != plan.region[:, None])[:, None] * fill_logit
        logits = (apart if logits is None else logits + apart).to(query.dtype).repeat(batch, 1, 1, 1)
    visible = None if seen is None else seen[None, None]
    if mask is not None:
        allowed = mask.at(plan.token[None, None, :, :, None], plan.token[None, None, :, None, :], length, length)
        visible = allowed if visible is None else visible & allowed
    rule = None
    if visible is not None:
        whole = visible.expand(batch, -1, windows, n, n).transpose(1, 2).flatten(0, 1)
        rule = Boolean(whole)

    q, k, v = (plan.apply(x) for x in (query, key, value))
    return plan.undo(dense_attention(q, k, v, bias=logits, mask=rule, scale=scale))
