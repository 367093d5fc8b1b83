"""Attention from any score and any normaliser, a tile of queries at a time.

``weights = normalize(score(q, k), visible)``, ``out = weights v`` (or another read-out). A score and a normaliser work
row by row: what a query's weights are depends on that query and on all keys alone. So queries can be taken in tiles,
which the backward pass computes again: memory is that of one tile's map, ``O(k_len)``, and of inputs and outputs. Form
``whole`` keeps the full map, ``tiled`` does not; ``"auto"`` tiles long inputs.

A map may also be made from neighbouring rows (:func:`mapped_attention`): a tile then forms so many rows more on either
side, and drops them. Where any row may enter, the map is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.errors import ShapeError
from regard.kernels.backends import resolve
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.masks import Mask

__all__ = [
    "HandOut",
    "Maps",
    "Normalizer",
    "ReadOut",
    "Score",
    "Tile",
    "handed_out",
    "mapped_attention",
    "mapped_weights",
    "scored_attention",
    "scored_transport",
    "scored_weights",
    "tile_rows",
    "weighted_sum",
]

FORMS = ("whole", "tiled")
# Numbers of a tile's map, times what a score needs per pair.
_TILE = 1 << 22


@dataclass(frozen=True)
class Tile:
    """Which queries a call holds: ``start`` to ``start + rows`` of ``q_len``, against all ``k_len`` keys. The last
    query stands where the last key stands."""

    start: int
    rows: int
    q_len: int
    k_len: int

    def positions(self, device: torch.device) -> Tensor:
        """Of the queries, counted as the keys are, ``(rows,)``."""
        return torch.arange(self.start, self.start + self.rows, device=device) + self.k_len - self.q_len

    def visible(self, rule: Mask | None, device: torch.device) -> Tensor | None:
        """The rule for these queries, ``(batch | 1, heads | 1, rows, k_len)``; None where all is seen."""
        if rule is None:
            return None
        query = torch.arange(self.start, self.start + self.rows, device=device).view(1, 1, -1, 1)
        key = torch.arange(self.k_len, device=device).view(1, 1, 1, -1)
        seen = rule.to(device).at(query, key, self.q_len, self.k_len)
        return seen.expand(*seen.shape[:2], self.rows, self.k_len)


Score = Callable[[Tensor, Tensor, Tile], Tensor]
"""``(query (batch, heads, rows, d), key (batch, heads, k_len, d), tile) -> scores (batch, heads, rows, k_len)``."""
Normalizer = Callable[[Tensor, Tensor | None], Tensor]
"""``(scores, visible) -> weights``, both row by row; what is not visible has weight zero."""
Maps = Callable[[Tensor, Tensor, Tile], Tensor]
"""``(query (batch, heads, rows, d), key (batch, heads, k_len, d), tile) -> weights (batch, heads, rows, k_len)``."""
ReadOut = Callable[[Tensor, Tensor, Tensor, Tensor, Tile], Tensor]
"""``(weights, query, key, value, tile) -> out (batch, heads, rows, d_v)``."""
HandOut = Callable[[Tensor, Tensor, Tile], Tensor]
"""``(weights, mass (batch, heads, rows, m), tile) -> received (batch, heads, k_len, m)``, summed over tiles."""


def weighted_sum(weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
    """``weights v``, the usual read-out."""
    return weights @ value


def handed_out(weights: Tensor, mass: Tensor, tile: Tile) -> Tensor:
    """``weights^T mass``, what keys receive."""
    return weights.transpose(-1, -2) @ mass


def tile_rows(maps: int, k_len: int, per_pair: int = 1) -> int:
    """Queries of a tile: for ``maps`` (batch times heads) against ``k_len`` keys."""
    return max(_TILE // max(maps * k_len * per_pair, 1), 1)


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Score,
    normalize: Normalizer,
    *,
    rule: Mask | None = None,
    read: ReadOut = weighted_sum,
    per_pair: int = 1,
    rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Output ``(batch, num_heads, q_len, value_dim)`` for query ``(batch, num_heads, q_len, d)``, key and value
    ``(batch, kv_heads, k_len, ...)``.

    rule: who sees whom (None: all). per_pair: numbers that the score forms for each pair, which sets the size of tiles.
    rows: queries of a tile, instead of what that gives. Half precision is computed in float32. Gradients reach whatever
    score, normaliser and read-out hold.
    """
    return mapped_attention(
        query, key, value, _maps(score, normalize, rule), read=read, per_pair=per_pair, rows=rows, backend=backend
    )


def mapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: Maps,
    *,
    read: ReadOut = weighted_sum,
    reach: tuple[int, int] | None = (0, 0),
    per_pair: int = 1,
    rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """As :func:`scored_attention`, for weights that come from ``maps`` in one go.

    reach: how many queries before and after its own a row of the map is made from; None: any, so that it is whole.
    """
    query_, key_, value_ = _wide(query, key, value)
    q_len, k_len = query.shape[2], key.shape[2]
    rows = _rows(query, k_len, per_pair, rows, "whole" if reach is None else backend)
    before, after = reach or (0, 0)

    def run(part: Tensor, key: Tensor, value: Tensor, first: int, start: int, stop: int) -> Tensor:
        weights = maps(part, key, Tile(first, part.shape[2], q_len, k_len))
        inner = slice(start - first, stop - first)
        return read(weights[:, :, inner], part[:, :, inner], key, value, Tile(start, stop - start, q_len, k_len))

    if rows >= q_len:
        return run(query_, key_, value_, 0, 0, q_len).to(query.dtype)
    outs = []
    for start in range(0, q_len, rows):
        first, stop = max(start - before, 0), min(start + rows, q_len)
        part = query_[:, :, first : stop + after]
        out = (
            checkpoint(run, part, key_, value_, first, start, stop, use_reentrant=False)
            if torch.is_grad_enabled()
            else run(part, key_, value_, first, start, stop)
        )
        outs.append(out)
    return torch.cat(outs, 2).to(query.dtype)


def scored_transport(
    query: Tensor,
    key: Tensor,
    mass: Tensor,
    score: Score,
    normalize: Normalizer,
    *,
    rule: Mask | None = None,
    give: HandOut = handed_out,
    per_pair: int = 1,
    rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """What keys receive when every query hands its ``mass (batch, num_heads, q_len, m)`` out by its weights.

    ``(batch, num_heads, k_len, m)``, in the accumulation dtype; ``weights^T mass`` unless ``give`` does otherwise.
    Arguments and memory as in :func:`scored_attention`.
    """
    wide, keys, _ = _wide(query, key, key)
    handed, q_len, k_len = mass.to(wide.dtype), query.shape[2], key.shape[2]
    rows = _rows(query, k_len, per_pair, rows, backend)

    def run(part: Tensor, key: Tensor, mass: Tensor, start: int) -> Tensor:
        tile = Tile(start, part.shape[2], q_len, k_len)
        return give(normalize(score(part, key, tile), tile.visible(rule, part.device)), mass, tile)

    if rows >= q_len:
        return run(wide, keys, handed, 0)
    received = wide.new_zeros(1)
    for start in range(0, q_len, rows):
        part, share = wide[:, :, start : start + rows], handed[:, :, start : start + rows]
        received = received + (
            checkpoint(run, part, keys, share, start, use_reentrant=False)
            if torch.is_grad_enabled()
            else run(part, keys, share, start)
        )
    return received


def scored_weights(
    query: Tensor, key: Tensor, score: Score, normalize: Normalizer, *, rule: Mask | None = None
) -> Tensor:
    """The map of :func:`scored_attention`, ``(batch, num_heads, q_len, k_len)``, whole."""
    return mapped_weights(query, key, _maps(score, normalize, rule))


def mapped_weights(query: Tensor, key: Tensor, maps: Maps) -> Tensor:
    """The map of :func:`mapped_attention`, ``(batch, num_heads, q_len, k_len)``, whole."""
    wide, keys, _ = _wide(query, key, key)
    return maps(wide, keys, Tile(0, query.shape[2], query.shape[2], key.shape[2])).to(query.dtype)


def _maps(score: Score, normalize: Normalizer, rule: Mask | None) -> Maps:
    return lambda query, key, tile: normalize(score(query, key, tile), tile.visible(rule, query.device))


def _rows(query: Tensor, k_len: int, per_pair: int, rows: int | None, backend: str | None) -> int:
    """Queries of a tile under the form that is asked for; all of them where the map is kept whole."""
    form, q_len = resolve("scored", backend, FORMS), query.shape[2]
    if rows is None:
        rows = tile_rows(query.shape[0] * query.shape[1], k_len, per_pair)
    if form == "whole" or (form == "auto" and rows >= q_len):
        return max(q_len, 1)
    return min(rows, max(q_len // 2, 1)) if form == "tiled" else rows


def _wide(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, work = query.shape[1], accumulation_dtype(query.dtype)
    if key.shape[1] != value.shape[1] or heads % key.shape[1]:
        raise ShapeError(
            f"{heads} query heads, {key.shape[1]} key and {value.shape[1]} value heads do not go together."
        )
    return query.to(work), expand_groups(key, heads).to(work), expand_groups(value, heads).to(work)
