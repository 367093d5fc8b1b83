"""Attention from any score and any normaliser, a tile of queries at a time.

``weights = normalize(score(q, k), visible)``, ``out = weights v`` (or another read-out). A score and a normaliser work
row by row: what a query's weights are depends on that query and on all keys alone. So queries can be taken in tiles,
which the backward pass computes again: memory is that of one tile's map, ``O(k_len)``, and of inputs and outputs. Form
``whole`` keeps the full map, ``tiled`` does not; ``"auto"`` tiles long inputs.
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

__all__ = ["Normalizer", "ReadOut", "Score", "Tile", "scored_attention", "scored_weights", "tile_rows", "weighted_sum"]

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
ReadOut = Callable[[Tensor, Tensor, Tensor, Tensor, Tile], Tensor]
"""``(weights, query, key, value, tile) -> out (batch, heads, rows, d_v)``."""


def weighted_sum(weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
    """``weights v``, the usual read-out."""
    return weights @ value


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
    form = resolve("scored", backend, FORMS)
    query_, key_, value_ = _wide(query, key, value)
    q_len, k_len = query.shape[2], key.shape[2]
    if rows is None:
        rows = tile_rows(query.shape[0] * query.shape[1], k_len, per_pair)
    if form == "whole" or (form == "auto" and rows >= q_len):
        rows = max(q_len, 1)
    elif form == "tiled":
        rows = min(rows, max(q_len // 2, 1))

    def run(part: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        tile = Tile(start, part.shape[2], q_len, k_len)
        weights = normalize(score(part, key, tile), tile.visible(rule, part.device))
        return read(weights, part, key, value, tile)

    if rows >= q_len:
        return run(query_, key_, value_, 0).to(query.dtype)
    outs = []
    for start in range(0, q_len, rows):
        part = query_[:, :, start : start + rows]
        out = (
            checkpoint(run, part, key_, value_, start, use_reentrant=False)
            if torch.is_grad_enabled()
            else run(part, key_, value_, start)
        )
        outs.append(out)
    return torch.cat(outs, 2).to(query.dtype)


def scored_weights(
    query: Tensor, key: Tensor, score: Score, normalize: Normalizer, *, rule: Mask | None = None
) -> Tensor:
    """The map of :func:`scored_attention`, ``(batch, num_heads, q_len, k_len)``, whole."""
    wide, keys, _ = _wide(query, key, key)
    tile = Tile(0, query.shape[2], query.shape[2], key.shape[2])
    return normalize(score(wide, keys, tile), tile.visible(rule, query.device)).to(query.dtype)


def _wide(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, work = query.shape[1], accumulation_dtype(query.dtype)
    if key.shape[1] != value.shape[1] or heads % key.shape[1]:
        raise ShapeError(
            f"{heads} query heads, {key.shape[1]} key and {value.shape[1]} value heads do not go together."
        )
    return query.to(work), expand_groups(key, heads).to(work), expand_groups(value, heads).to(work)
