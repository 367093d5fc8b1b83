"""Generalized neighborhood attention: every query sees a window of nearby keys, in one, two or three dimensions.

Along each axis of length ``L``, with window ``w``, stride ``s`` and dilation ``D`` (arXiv 2504.16922, section 3):

- queries go in groups of ``s``; the leader of query ``i`` is ``l = min((i // s) s + s // 2, L - 1)``;
- its window is ``[start, start + w)`` with ``start = max(l - w // 2, 0)``, or ``L - w`` where it would stick out, so it
  is moved inward at the border and every query has exactly ``w`` keys (even windows are allowed);
- a causal axis ends at the query: ``l = min((i // s) s + s - 1, L - 1)``, ``start = max(l - w + 1, 0)``, end ``i + 1``;
- with dilation the rule holds inside each residue class ``i mod D``.

The neighbourhood is the product of the axes' windows. ``s = 1`` is neighborhood attention, ``s = w`` blocked (window)
attention, ``1 < s < w`` lies between. Larger strides let all queries of a tile share one window, and when tiles of keys
divide it too, nothing is masked (*perfectly block-sparse*): the whole FLOP bound ``prod(L) / prod(w)`` becomes speed.
:class:`GNASimulator` tells how much of it a choice of tiles can reach. Extra (text) keys are seen by all queries.

Source: Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
2025, arXiv 2504.16922. Tokens are put into tile order and run through the block-sparse executor. Time
``O(N prod(w) d)``. Queries and keys ``(batch, heads, N, head_dim)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention, merge_attentions
from regard.layout import BlockLayout, block_members
from regard.local.neighborhood import (
    NeighborhoodPlan,
    check_neighborhood,
    fitted_neighborhood,
    neighborhood_plan,
    visible_pairs,
)
from regard.masks import Border, Mask, Neighborhood, Reindexed, axis_windows
from regard.mechanism import Request, SparseMechanism, per_axis
from regard.registry import register

__all__ = [
    "GNASimulator",
    "GeneralizedNeighborhoodAttention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_mask",
    "window_bounds",
]

Axes = int | Sequence[int]
Flags = bool | Sequence[bool]


def window_bounds(index: int, length: int, window: int, stride: int = 1, causal: bool = False) -> tuple[int, int]:
    """First and one-past-last key of query ``index`` on one axis."""
    if not 0 <= index < length:
        raise OptionError(f"Query {index} is not on an axis of length {length}.")
    Neighborhood.of((length,), window, stride, 1, causal)
    start, stop = axis_windows(length, window, stride, 1, causal)
    return int(start[index]), int(stop[index])


def neighborhood_mask(
    space: Sequence[int], window: Axes, stride: Axes = 1, dilation: Axes = 1, causal: Flags = False
) -> Tensor:
    """Boolean ``(tokens, tokens)``: the pairs of a neighbourhood on ``space``, tokens in row-major order."""
    count = math.prod(space)
    return Neighborhood.of(space, window, stride, dilation, causal).dense(count, count)[0, 0]


def _keys(mask: Mask, first: int, stop: int, q_len: int, k_len: int, device: torch.device) -> Mask:
    """``mask`` for the keys from ``first`` to ``stop`` alone."""
    queries, keys = torch.arange(q_len, device=device), torch.arange(first, stop, device=device)
    return Reindexed(mask, queries, keys, q_len=q_len, k_len=k_len)


@register("gna")
class GeneralizedNeighborhoodAttention(SparseMechanism):
    """window, stride, dilation, causal_axes: one value, or one per axis of the grid (without a grid the sequence is one
    axis). A window is never larger than its axis: dilation gives way first, then the window, then the stride.
    extra_tokens: so many last keys and values are not on the grid and are seen by all queries (text beside an image).
    border: a window that sticks out is moved inward (``"clamp"``), loses what lies outside (``"mask"``), or sees zeros
    there that take their share of the softmax (``"zero"``). tile: tokens per axis computed together; it changes speed,
    not the result.

    With ``causal=True`` the first axis is causal and, on a grid of several axes, later tokens in row-major order are
    hidden as well.
    """

    patterns = frozenset(("self", "causal-self"))
    growth = "N w"
    grid_axes = frozenset((1, 2, 3))

    def __init__(
        self,
        window: Axes = 13,
        stride: Axes = 1,
        dilation: Axes = 1,
        causal_axes: Flags = False,
        extra_tokens: int = 0,
        border: Border = "clamp",
        tile: Axes | None = None,
    ) -> None:
        super().__init__()
        check_neighborhood("gna", border, window=window, stride=stride, dilation=dilation, tile=tile)
        if isinstance(window, int) and isinstance(stride, int) and stride > window:
            raise OptionError(f"gna's stride {stride} must not exceed its window {window}.")
        if extra_tokens < 0:
            raise OptionError(f"extra_tokens counts keys, so it cannot be {extra_tokens}.")
        self.window, self.stride, self.dilation, self.causal_axes = window, stride, dilation, causal_axes
        self.extra_tokens, self.border, self.tile = extra_tokens, border, tile
        if extra_tokens:
            # Keys then outnumber queries, in this one way; `attend` checks the count.
            self.patterns = frozenset(("cross", "causal-cross"))  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"window={self.window}, stride={self.stride}, dilation={self.dilation}, causal_axes={self.causal_axes}"

    def rule(self, grid: Sequence[int], causal: bool = False) -> Neighborhood:
        """The neighbourhood on ``grid``, with window, dilation and stride as large as the axes allow."""
        return fitted_neighborhood(grid, self.window, self.stride, self.dilation, self.causal_axes, self.border, causal)

    def plan(self, grid: Sequence[int], causal: bool, device: torch.device) -> NeighborhoodPlan:
        """The tile order of the tokens and the layout of the neighbourhood in that order."""
        return neighborhood_plan(self.rule(grid, causal), device, raster=causal and len(grid) > 1, tile=self.tile)

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        """The layout of the tokens in tile order (see :meth:`plan`), extra tokens apart."""
        return self._planned(query, key, request).layout

    def _planned(self, query: Tensor, key: Tensor, request: Request) -> NeighborhoodPlan:
        q_len, k_len = query.shape[2], key.shape[2]
        if k_len != q_len + self.extra_tokens:
            raise ShapeError(
                f"gna with extra_tokens={self.extra_tokens} takes {q_len + self.extra_tokens} keys for {q_len} "
                f"queries, got {k_len}."
            )
        plan = self.plan((q_len,) if request.grid is None else request.grid, request.causal, query.device)
        if request.mask is None:
            return plan
        mask = request.mask
        if self.extra_tokens:
            mask = _keys(mask, 0, q_len, q_len, k_len, query.device)
        return plan.restricted(mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        plan, grid_len = self._planned(query, key, request), query.shape[2]
        out, lse = plan.run(
            query,
            key[:, :, :grid_len],
            value[:, :, :grid_len],
            scale=request.scale,
            return_lse=self.extra_tokens > 0,
        )
        if lse is None:
            return out
        extra_mask = None
        if request.mask is not None:
            extra_mask = _keys(request.mask, grid_len, key.shape[2], grid_len, key.shape[2], query.device)
        extra, extra_lse = dense_attention(
            query,
            key[:, :, grid_len:],
            value[:, :, grid_len:],
            mask=extra_mask,
            scale=request.scale,
            return_lse=True,
        )
        return merge_attentions((out, extra), (lse, extra_lse))[0]

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float:
        plan, grid_len = self._planned(query, key, request), query.shape[2]
        return (plan.computed() + grid_len * self.extra_tokens) / (grid_len * key.shape[2])

    def cost(self, shape: AttentionShape) -> Cost:
        rule = self.rule(shape.grid or (shape.q_len,), shape.causal)
        return dense_cost(shape, (visible_pairs(rule) / shape.q_len + self.extra_tokens) / shape.k_len)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Axes,
    stride: Axes = 1,
    dilation: Axes = 1,
    causal: Flags = False,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    tile: Axes | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on ``(batch, heads, *space, head_dim)`` with one to three axes of space.

    Parameters are one value or one per axis, with ``1 <= stride <= window`` and ``window * dilation <= length``.
    ``extra_key`` and ``extra_value`` ``(batch, heads, tokens, head_dim)`` are seen by every query. Returns the output
    ``(batch, heads, *space, value_dim)`` and with ``return_lse`` the log-sum-exp ``(batch, heads, *space)``.
    """
    if query.dim() not in (4, 5, 6) or query.shape[2:-1] != key.shape[2:-1] or key.shape[:-1] != value.shape[:-1]:
        raise ShapeError(
            "Neighborhood attention takes (batch, heads, *space, head_dim) with one to three axes of space, the same "
            f"for all; got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if (extra_key is None) != (extra_value is None):
        raise ShapeError("Extra keys and extra values come together: give both extra_key and extra_value, or neither.")
    space = tuple(query.shape[2:-1])
    plan = neighborhood_plan(Neighborhood.of(space, window, stride, dilation, causal), query.device, tile=tile)
    flat = query.flatten(2, -2)
    with_lse = return_lse or extra_key is not None
    out, lse = plan.run(flat, key.flatten(2, -2), value.flatten(2, -2), scale=scale, return_lse=with_lse)
    if lse is None:
        return out.unflatten(2, space)
    if extra_key is not None and extra_value is not None:
        extra, extra_lse = dense_attention(flat, extra_key, extra_value, scale=scale, return_lse=True)
        out, lse = merge_attentions((out, extra), (lse, extra_lse))
    out, lse = out.unflatten(2, space), lse.unflatten(2, space)
    return (out, lse) if return_lse else out


def _of_axes(axes: int, query: Tensor) -> None:
    if query.dim() != axes + 3:
        raise ShapeError(f"na{axes}d takes (batch, heads, {axes} axes of space, head_dim), got {tuple(query.shape)}.")


def na1d(query: Tensor, key: Tensor, value: Tensor, window: Axes, **options: object) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`neighborhood_attention` on sequences."""
    _of_axes(1, query)
    return neighborhood_attention(query, key, value, window, **options)  # type: ignore[arg-type]


def na2d(query: Tensor, key: Tensor, value: Tensor, window: Axes, **options: object) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`neighborhood_attention` on images."""
    _of_axes(2, query)
    return neighborhood_attention(query, key, value, window, **options)  # type: ignore[arg-type]


def na3d(query: Tensor, key: Tensor, value: Tensor, window: Axes, **options: object) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`neighborhood_attention` on videos."""
    _of_axes(3, query)
    return neighborhood_attention(query, key, value, window, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GNASimulator:
    """How much of a neighbourhood's sparsity tiles can turn into speed, counted without computing attention.

    A tile of queries must visit every tile of keys that one of its windows touches. tiling: ``"multi"`` cuts the grid
    itself into tiles; ``"flat"`` cuts the row-major sequence into runs of as many tokens, as kernels for text do.
    kv_start: tiles of keys lie on a fixed lattice (``"static"``), or begin where the queries' windows do
    (``"dynamic"``).
    """

    shape: tuple[int, ...]
    window: Axes
    stride: Axes = 1
    causal: Flags = False
    q_tile: Axes = 8
    kv_tile: Axes = 8
    tiling: Literal["multi", "flat"] = "multi"
    kv_start: Literal["static", "dynamic"] = "static"

    def __post_init__(self) -> None:
        if self.tiling not in ("multi", "flat") or self.kv_start not in ("static", "dynamic"):
            raise OptionError(
                "tiling is 'multi' or 'flat' and kv_start 'static' or 'dynamic'; "
                f"got {self.tiling!r} and {self.kv_start!r}."
            )
        if min(*self._q_tile, *self._kv_tile) < 1:
            raise OptionError(f"Tiles hold at least one token per axis, got {self.q_tile} and {self.kv_tile}.")

    @property
    def rule(self) -> Neighborhood:
        """The neighbourhood that is simulated."""
        return Neighborhood.of(self.shape, self.window, self.stride, 1, self.causal)

    @property
    def _q_tile(self) -> tuple[int, ...]:
        return per_axis("q_tile", self.q_tile, len(self.shape))

    @property
    def _kv_tile(self) -> tuple[int, ...]:
        return per_axis("kv_tile", self.kv_tile, len(self.shape))

    def _axis(self, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each tile of queries along an axis: first and last key of the union, and whether all windows are alike."""
        rule = self.rule
        start, stop = axis_windows(rule.grid[axis], rule.window[axis], rule.stride[axis], 1, rule.causal[axis])
        tiles = block_members(len(start), self._q_tile[axis])
        start, stop = start[tiles], stop[tiles]
        alike = (start == start[:, :1]).all(-1) & (stop == stop[:, :1]).all(-1)
        return start.amin(-1), stop.amax(-1), alike

    def visited(self) -> Tensor:
        """Tiles of keys that each tile of queries visits, ``(query tiles per axis)`` or ``(query tiles,)`` if flat."""
        if self.tiling == "flat":
            return self._visited_flat()
        counts = torch.ones((), dtype=torch.int64)
        for axis, side in enumerate(self._kv_tile):
            start, stop, _ = self._axis(axis)
            if self.kv_start == "static":
                touched = (stop + side - 1).div(side, rounding_mode="floor") - start.div(side, rounding_mode="floor")
            else:
                touched = (stop - start + side - 1).div(side, rounding_mode="floor")
            counts = counts[..., None] * touched
        return counts

    def _visited_flat(self) -> Tensor:
        q_run, kv_run = math.prod(self._q_tile), math.prod(self._kv_tile)
        rule, count, inner = self.rule, math.prod(self.shape), self.shape[-1]
        windows = [
            axis_windows(length, window, stride, 1, causal)
            for length, window, stride, causal in zip(rule.grid, rule.window, rule.stride, rule.causal, strict=True)
        ]
        start, stop = windows.pop()

        def rows_seen(row: int) -> Tensor:
            """Rows of keys that a row of queries sees, a row being what runs along the last axis."""
            rows, rest = torch.zeros(1, dtype=torch.int64), math.prod(self.shape[:-1])
            for length, (first, last) in zip(self.shape, windows, strict=False):
                rest //= length
                place = row // rest % length
                rows = (rows[:, None] * length + torch.arange(int(first[place]), int(last[place]))).flatten()
            return rows

        counts = []
        for begin in range(0, count, q_run):
            end = min(begin + q_run, count)
            lower, upper = [], []
            for row in range(begin // inner, (end - 1) // inner + 1):
                # Neighbours' windows touch, so the union along the last axis is an interval.
                own = slice(max(begin - row * inner, 0), min(end - row * inner, inner))
                keys = rows_seen(row) * inner
                lower.append(keys + start[own].min())
                upper.append(keys + stop[own].max() - 1)
            origin = min(int(keys.min()) for keys in lower) if self.kv_start == "dynamic" else 0
            first, last = ((torch.cat(keys) - origin).div(kv_run, rounding_mode="floor") for keys in (lower, upper))
            # Beginnings less ends so far: how many intervals cover a tile.
            cover = torch.zeros(count // kv_run + 2, dtype=torch.int64)
            cover.index_add_(0, first, torch.ones_like(first))
            cover.index_add_(0, last + 1, -torch.ones_like(last))
            counts.append(int((cover.cumsum(0) > 0).sum()))
        return torch.tensor(counts)

    @property
    def total_tiles(self) -> int:
        """Tiles of keys that dense attention visits."""
        if self.tiling == "flat":
            return -(-math.prod(self.shape) // math.prod(self._kv_tile))
        return math.prod(-(-n // side) for n, side in zip(self.shape, self._kv_tile, strict=True))

    @property
    def mean_visited(self) -> float:
        return float(self.visited().to(torch.float64).mean())

    @property
    def max_visited(self) -> int:
        return int(self.visited().max())

    @property
    def flop_bound(self) -> float:
        """Speedup if only visible pairs cost anything."""
        return math.prod(self.shape) ** 2 / visible_pairs(self.rule)

    @property
    def tile_bound(self) -> float:
        """Speedup that whole tiles allow, the tile of queries that visits most setting the pace."""
        return self.total_tiles / self.max_visited

    @property
    def mean_tile_bound(self) -> float:
        """Speedup that whole tiles allow on average over the tiles of queries."""
        return self.total_tiles / self.mean_visited

    @property
    def is_perfectly_block_sparse(self) -> bool:
        """Whether visited tiles hold nothing but visible pairs, so that no mask is needed."""
        if self.tiling == "flat":
            visible = visible_pairs(self.rule)
            q_run, kv_run = math.prod(self._q_tile), math.prod(self._kv_tile)
            return bool(self.visited().sum() * q_run * kv_run == visible)
        for axis, side in enumerate(self._kv_tile):
            start, stop, alike = self._axis(axis)
            aligned = (stop - start) % side == 0
            if self.kv_start == "static":
                aligned &= start % side == 0
            if not bool((alike & aligned).all()):
                return False
        return True
