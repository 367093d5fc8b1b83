"""Neighbourhoods of grids in front of the block-sparse executor: tile order, layout, relative positions.

Used by all papers whose queries see a window of nearby keys. What depends on sizes alone is made once and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.kernels import TableBias, block_sparse_attention, merge_attentions
from regard.layers.position_bias import RelativePositionBias
from regard.layers.tiles import TileOrder, balanced_tile, tile_order
from regard.layout import BlockLayout
from regard.masks import Border, Causal, Mask, Neighborhood, Reindexed, axis_windows
from regard.mechanism import per_axis

__all__ = [
    "NeighborhoodPlan",
    "bias_table",
    "check_neighborhood",
    "fitted_neighborhood",
    "neighborhood_plan",
    "offset_entries",
    "visible_pairs",
    "with_zero_keys",
]

Axes = int | Sequence[int]

# Elements of the queries that are put into tile order at once where no gradient needs them afterwards.
_PART = 1 << 17


def check_neighborhood(name: str, border: str, **sizes: Axes | None) -> None:
    """Refuse a border that is none, and sizes below 1 on any axis (None: not given)."""
    for size, value in sizes.items():
        if value is not None and any(v < 1 for v in ([value] if isinstance(value, int) else value)):
            raise OptionError(f"{name}'s {size} must be at least 1 on every axis, got {value}.")
    if border not in get_args(Border):
        raise OptionError(f"{name}'s border is one of {', '.join(get_args(Border))}; got {border!r}.")


def fitted_neighborhood(
    grid: Sequence[int],
    window: Axes,
    stride: Axes = 1,
    dilation: Axes = 1,
    causal_axes: bool | Sequence[bool] = False,
    border: Border = "clamp",
    causal: bool = False,
) -> Neighborhood:
    """The neighbourhood on ``grid``, as far as its axes allow: dilation gives way first, then the window, then the
    stride. causal: the first axis is causal in any case."""
    axes = len(grid)
    flags = (causal_axes,) * axes if isinstance(causal_axes, bool) else tuple(causal_axes)
    if len(flags) != axes:
        raise OptionError(f"causal_axes {flags} has {len(flags)} values, but the grid has {axes} axes.")
    windows, rates = per_axis("window", window, axes), per_axis("dilation", dilation, axes)
    rate = tuple(max(min(d, n // w), 1) for n, w, d in zip(grid, windows, rates, strict=True))
    size = tuple(min(w, n // d) for n, w, d in zip(grid, windows, rate, strict=True))
    step = tuple(min(s, w) for s, w in zip(per_axis("stride", stride, axes), size, strict=True))
    return Neighborhood(tuple(grid), size, step, rate, (causal or flags[0], *flags[1:]), border)


def visible_pairs(rule: Neighborhood) -> int:
    """Pairs of a neighbourhood: the product over axes of what each admits."""
    pairs = 1
    for length, window, stride, dilation, causal in zip(
        rule.grid, rule.window, rule.stride, rule.dilation, rule.causal, strict=True
    ):
        start, stop = axis_windows(length, window, stride, dilation, causal, rule.border)
        pairs *= int((stop - start + dilation - 1).div(dilation, rounding_mode="floor").sum())
    return pairs


def offset_entries(query: Tensor, key: Tensor, rule: Neighborhood, window: Sequence[int]) -> Tensor:
    """Place of the offset between two tokens in a table ``prod(2 window - 1)``, row-major.

    query, key: tokens of ``rule``'s grid in row-major order. The offset on an axis is key minus query in steps of the
    dilation, from ``-(w - 1)`` to ``w - 1``; ``window`` may be larger than the rule's.
    """
    entry, step = torch.zeros_like(query + key), 1
    place = 1
    for length, rate, side in reversed(list(zip(rule.grid, rule.dilation, window, strict=True))):
        offset = ((key // step) % length - (query // step) % length).div(rate, rounding_mode="floor")
        # Pairs further apart are not seen; their place must only stay on its own axis.
        entry = entry + (offset.clamp(1 - side, side - 1) + side - 1) * place
        step, place = step * length, place * (2 * side - 1)
    return entry


def bias_table(bias: RelativePositionBias, rule: Neighborhood) -> Tensor:
    """The part of a learned table that a neighbourhood uses, ``(heads, prod(2 window - 1))``: all of it, unless the
    map made the window smaller."""
    if bias.window == rule.window:
        return bias.table.T
    part = bias.table.T.unflatten(1, [2 * side - 1 for side in bias.window])
    for axis, (side, own) in enumerate(zip(bias.window, rule.window, strict=True), start=1):
        part = part.narrow(axis, side - own, 2 * own - 1)
    return part.flatten(1)


def with_zero_keys(out: Tensor, lse: Tensor, rule: Neighborhood) -> tuple[Tensor, Tensor]:
    """Attention over what ``rule`` shows, with the keys that the border cut off as zeros: each takes part in the
    softmax with a logit of zero and adds nothing."""
    missing = _missing(rule, lse.device).to(lse.dtype).log().expand_as(lse)
    return merge_attentions((out, torch.zeros_like(out)), (lse, missing))


@torch.compiler.disable
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _missing(rule: Neighborhood, device: torch.device) -> Tensor:
    """How many keys of each query's window lie outside the grid, ``(tokens,)``."""
    shown = torch.ones(1, dtype=torch.int64)
    for length, window, stride, rate in zip(rule.grid, rule.window, rule.stride, rule.dilation, strict=True):
        start, stop = axis_windows(length, window, stride, rate, False, rule.border)
        shown = (shown[:, None] * (stop - start + rate - 1).div(rate, rounding_mode="floor")).flatten()
    return (math.prod(rule.window) - shown).to(device)


@dataclass(frozen=True, eq=False)
class NeighborhoodPlan:
    """Queries and keys in tile order, and the blocks that a neighbourhood needs there."""

    rule: Neighborhood
    visible: Mask
    """The rule and what else hides keys, on the grid's tokens."""
    queries: TileOrder
    keys: TileOrder
    layout: BlockLayout
    entries: Callable[[Tensor, Tensor], Tensor]
    """Places in a bias table of the rule's own window, by tokens in tile order."""

    def restricted(self, mask: Mask) -> NeighborhoodPlan:
        """With ``mask``, on the grid's tokens, as well."""
        visible = self.visible & mask
        layout = _layout(visible, self.queries, self.keys)
        return NeighborhoodPlan(self.rule, visible, self.queries, self.keys, layout, self.entries)

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        table: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: ``(batch, heads, tokens, dim)`` in and out, in the grid's order; the log-sum-exp if asked for.

        table: a bias ``(heads | 1, prod(2 window - 1))`` for the rule's window (see :func:`offset_entries`).
        """
        if self.rule.border == "zero":
            inner, inner_lse = self._run(query, key, value, scale, table, True)
            assert inner_lse is not None
            out, lse = with_zero_keys(inner, inner_lse, self.rule)
            return out, lse if return_lse else None
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if self.queries.identity or tracked or return_lse or not self._shared:
            return self._run(query, key, value, scale, table, return_lse)
        # Tile order is a copy of everything; a few heads at a time it stays small beside the input.
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for rows, heads, kv_heads in _parts(query, key):
            bias = table if table is None or len(table) == 1 else table[heads]
            part, _ = self._run(query[rows, heads], key[rows, kv_heads], value[rows, kv_heads], scale, bias, False)
            out[rows, heads] = part
        return out, None

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, table: Tensor | None, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        bias = None if table is None else TableBias(table, self.entries)
        q, k, v = self.queries.apply(query), self.keys.apply(key), self.keys.apply(value)
        if not return_lse:
            return self.queries.undo(block_sparse_attention(q, k, v, self.layout, scale=scale, bias=bias)), None
        out, lse = block_sparse_attention(q, k, v, self.layout, scale=scale, bias=bias, return_lse=True)
        return self.queries.undo(out), self.queries.undo(lse)

    @property
    def _shared(self) -> bool:
        """Whether all sequences and heads have the same layout."""
        return self.layout.visit.shape[:2] == (1, 1) and self.layout.mask.batch == self.layout.mask.heads == 1

    def computed(self) -> float:
        """Query-key pairs that the executor forms, filling of tiles not counted."""
        rows, columns = (order.block_tokens().to(torch.float64) for order in (self.queries, self.keys))
        return float((self.layout.visit.to(torch.float64) * rows[:, None] * columns).sum((-2, -1)).mean())


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Ranges of sequences, heads and key heads whose queries stay within ``_PART`` elements, as far as cuts go."""
    batch, groups = query.shape[0], query.shape[1] // key.shape[1]
    per_group = groups * query.shape[2] * query.shape[3]
    kv_step = max(min(_PART // per_group, key.shape[1]), 1)
    step = max(_PART // (per_group * key.shape[1]), 1)
    for row in range(0, batch, step):
        for head in range(0, key.shape[1], kv_step):
            stop = min(head + kv_step, key.shape[1])
            yield slice(row, row + step), slice(head * groups, stop * groups), slice(head, stop)


def neighborhood_plan(
    rule: Neighborhood,
    device: torch.device,
    *,
    raster: bool = False,
    tile: Axes | None = None,
    kv_tile: Axes | None = None,
) -> NeighborhoodPlan:
    """The plan of ``rule``. raster: later tokens in row-major order are hidden as well. tile, kv_tile: tokens per axis
    computed together (of one residue class, where the rule is dilated), by default about a cube of 64 and the same."""
    inner = tuple(-(-n // d) for n, d in zip(rule.grid, rule.dilation, strict=True))
    sides = balanced_tile(inner) if tile is None else per_axis("tile", tile, len(inner))
    key_sides = sides if kv_tile is None else per_axis("kv_tile", kv_tile, len(inner))
    fitted = (tuple(min(a, b) for a, b in zip(part, inner, strict=True)) for part in (sides, key_sides))
    return _plan(rule, raster, *fitted, device)


@torch.compiler.disable
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _plan(
    rule: Neighborhood, raster: bool, tile: tuple[int, ...], kv_tile: tuple[int, ...], device: torch.device
) -> NeighborhoodPlan:
    queries = tile_order(rule.grid, tile, rule.dilation, device)
    keys = tile_order(rule.grid, kv_tile, rule.dilation, device)

    def entries(query: Tensor, key: Tensor) -> Tensor:
        return offset_entries(queries.order[query], keys.order[key], rule, rule.window)

    visible: Mask = rule & Causal() if raster else rule
    return NeighborhoodPlan(rule, visible, queries, keys, _layout(visible, queries, keys), entries)


def _layout(rule: Mask, queries: TileOrder, keys: TileOrder) -> BlockLayout:
    if not (queries.identity and keys.identity):
        # A filling query may see what its model sees: its row is cut off, and tiles stay without a mask inside.
        rule = Reindexed(rule, queries.order, keys.order, None, keys.valid, queries.length, keys.length)
    return BlockLayout.of(rule, queries.padded, keys.padded, queries.block, keys.block, queries.order.device)
