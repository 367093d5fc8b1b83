"""Rectangular windows on grids of any number of axes: partition, halos, cyclic shift, who may see whom, and attention
inside.

Used by all papers that cut a map into windows or stripes. A grid that is no multiple of the window is filled up at the
end of each axis; filling is never seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention
from regard.masks import Mask
from regard.mechanism import per_axis

__all__ = [
    "WindowKernel",
    "WindowPlan",
    "dense_windows",
    "halo_gather",
    "pad_to_windows",
    "pool_windows",
    "window_partition",
    "window_plan",
    "window_reverse",
    "windowed_attention",
]

WindowKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float | None], Tensor]
"""``(query, key, value, bias, mask, scale)`` on ``(windows, heads, n, head_dim)``, with a bias ``(heads, n, n)`` and a
mask ``(distinct windows, n, n)`` or ``(distinct windows, heads | 1, n, n)``, boolean (True: visible) or added to the
logits; the windows of each example follow one another. A row with nothing to see gives zeros."""


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


_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def pool_windows(x: Tensor, window: Sequence[int], count_filling: bool = False) -> Tensor:
    """Mean of each window: ``(batch, *space, channels)`` on one to three axes -> ``(batch, windows, channels)``.

    A window that sticks out is averaged over its real tokens, or with ``count_filling`` over zeros there as well.
    """
    if x.dim() - 2 not in _POOLS or len(window) != x.dim() - 2:
        raise ShapeError(f"Windows {tuple(window)} are no windows of a map {tuple(x.shape)} of one to three axes.")
    filled = pad_to_windows(x, window) if count_filling else x
    pooled = _POOLS[x.dim() - 2](filled.movedim(-1, 1), tuple(window), ceil_mode=True)
    return pooled.flatten(2).transpose(1, 2)


def halo_gather(x: Tensor, block: int | Sequence[int], halo: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Each block of a map, grown by ``halo`` positions on every side: ``(batch, *space, channels)`` -> ``(batch,
    blocks, n, channels)`` with ``n = prod(block + 2 halo)``, and which of them lie on the map, boolean ``(blocks, n)``.

    Blocks, and positions in each, are in row-major order. What lies outside is zeros; a map that blocks do not divide
    is filled up at the end of each axis.
    """
    axes = x.dim() - 2
    sides, rims = per_axis("block", block, axes), per_axis("halo", halo, axes)
    if min(sides) < 1 or min(rims) < 0:
        raise OptionError(f"Need blocks of at least 1 and a halo of at least 0, got {sides} and {rims}.")
    space = tuple(x.shape[1:-1])
    place, real = _halo_places(space, sides, rims, x.device)
    border = [(rim, -n % side + rim) for n, side, rim in zip(space, sides, rims, strict=True)]
    filled = F.pad(x, [0, 0, *itertools.chain.from_iterable(reversed(border))])
    taken = filled.flatten(1, -2).index_select(1, place)
    return taken.view(x.shape[0], *real.shape, x.shape[-1]), real


@torch.compiler.disable
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _halo_places(
    space: tuple[int, ...], block: tuple[int, ...], halo: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Index into the filled map's tokens, blocks one after the other, and which are of the map itself."""
    axes = len(space)
    place = torch.zeros((1,) * (2 * axes), dtype=torch.int64)
    real = torch.ones((1,) * (2 * axes), dtype=torch.bool)
    for axis, (length, side, rim) in enumerate(zip(space, block, halo, strict=True)):
        count, width = -(-length // side), side + 2 * rim
        at = torch.arange(count)[:, None] * side + torch.arange(width)
        form = [1] * (2 * axes)
        form[axis], form[axes + axis] = count, width
        place = place * (count * side + 2 * rim) + at.view(form)
        real = real & ((at >= rim) & (at < rim + length)).view(form)
    inner = math.prod(side + 2 * rim for side, rim in zip(block, halo, strict=True))
    return place.flatten().to(device), real.reshape(-1, inner).to(device)


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """Where the tokens of a grid go when it is filled up, shifted cyclically and cut into windows of ``n`` tokens.

    ``token`` ``(windows, n)``: the token at each place (any, where ``valid`` ``(windows, n)`` is False: filling).
    ``inverse`` ``(length,)``: the place of each token among all windows'. ``region`` ``(windows, n)``: tokens of one
    window that were neighbours before the shift have the same number. ``window``: its sides. ``visible``
    ``(windows, n, n)``: True for real keys of the query's own region; None if all pairs are. ``whole``: no filling.
    ``grid``: sides of the map. ``plain``: neither filling nor shift.
    """

    token: Tensor
    valid: Tensor
    inverse: Tensor
    region: Tensor
    window: tuple[int, ...]
    visible: Tensor | None
    whole: bool
    grid: tuple[int, ...]
    plain: bool

    @property
    def pairs(self) -> int:
        """Pairs of real tokens that share a window."""
        return int(self.valid.sum(-1).square().sum())

    def apply(self, x: Tensor) -> Tensor:
        """``(batch, heads, length, dim)`` -> ``(batch * windows, heads, n, dim)``; filling is zeros."""
        if self.plain:
            cut = window_partition(x.transpose(1, 2).flatten(2).unflatten(1, self.grid), self.window)
            return cut.flatten(1, -2).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
        # Heads stay beside their channels: a token is copied as one piece, and once.
        taken = x.transpose(1, 2).index_select(1, self.token.flatten())
        if not self.whole:
            taken = taken.masked_fill(~self.valid.flatten()[:, None, None], 0)
        return taken.reshape(-1, self.token.shape[1], *taken.shape[2:]).transpose(1, 2)

    def undo(self, windows: Tensor) -> Tensor:
        """``(batch * windows, heads, n, dim)`` -> ``(batch, heads, length, dim)``."""
        heads, dim = windows.shape[1], windows.shape[-1]
        if self.plain:
            whole = window_reverse(windows.transpose(1, 2).flatten(2), self.window, self.grid)
            return whole.flatten(1, -2).unflatten(-1, (heads, dim)).transpose(1, 2)
        x = windows.transpose(1, 2).reshape(-1, self.token.numel(), heads, dim)
        return x.index_select(1, self.inverse).transpose(1, 2)


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
    token, valid, inverse, region = (t.to(device) for t in (token, valid, inverse, region))
    whole, apart = bool(valid.all()), bool((region != region[:, :1]).any())
    visible = None if whole else valid[:, None].expand(-1, inner, -1)
    if apart:
        visible = (region[:, :, None] == region[:, None]) & valid[:, None]
    return WindowPlan(token, valid, inverse, region, window, visible, whole, grid, whole and not any(shift))


def dense_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The :data:`WindowKernel` that is :func:`~regard.kernels.dense_attention` on a batch of windows."""
    if mask is None:
        return dense_attention(
            query, key, value, bias=None if bias is None else bias[None], scale=scale, backend=backend
        )
    own = mask[:, None] if mask.dim() == 3 else mask
    visible = own if own.dtype == torch.bool else own > float("-inf")
    logits = torch.zeros_like(own, dtype=query.dtype) if own.dtype == torch.bool else own.to(query.dtype)
    logits = logits if bias is None else logits + bias.to(query.dtype)
    empty = ~visible.any(-1, keepdim=True)
    # A row with nothing to see is given every key and zeroed afterwards, so that neither value nor gradient is NaN.
    logits = torch.where(visible, logits, float("-inf")).masked_fill(empty, 0)
    # Example by example: their windows have one mask in common, which need not be repeated.
    parts = zip(*(t.split(len(own)) for t in (query, key, value)), strict=True)
    out = torch.cat([dense_attention(q, k, v, bias=logits, scale=scale, backend=backend) for q, k, v in parts])
    if bool(empty.any()):
        out = out.masked_fill(empty.repeat(len(query) // len(own), 1, 1, 1), 0)
    return out


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
    kernel: WindowKernel = dense_windows,
) -> Tensor:
    """Attention inside each window of ``plan``: ``(batch, heads, length, dim)`` in and out.

    bias: ``(heads, n, n)`` added to the logits of each window. mask: on the grid's tokens. fill_logit: where given,
    pairs of different regions get it added instead of being hidden, and filling is visible, as in early releases.
    kernel: what runs the windows.
    """
    length = query.shape[2]
    rule: Tensor | None = None
    if fill_logit is None:
        rule = plan.visible
    elif bool(plan.region.any()):
        rule = (plan.region[:, :, None] != plan.region[:, None]) * fill_logit
    if mask is not None:
        seen = mask.at(plan.token[None, None, :, :, None], plan.token[None, None, :, None, :], length, length)
        pairs = (*plan.token.shape, plan.token.shape[1])
        allowed = seen.expand(*seen.shape[:2], *pairs).transpose(1, 2).flatten(0, 1)
        if rule is None:
            rule = allowed
        else:
            every = rule.repeat(len(allowed) // len(rule), 1, 1)[:, None]
            rule = every & allowed if fill_logit is None else every.masked_fill(~allowed, float("-inf"))
    q, k, v = (plan.apply(x) for x in (query, key, value))
    return plan.undo(kernel(q, k, v, bias, rule, scale))
