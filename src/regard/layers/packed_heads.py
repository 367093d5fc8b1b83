"""Query heads that share a key head as rows of one tile: row ``r`` of key head ``h`` is query ``r % q_len`` of head
``h group + r // q_len``. With a few queries this fills tiles that would each hold one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from regard.kernels.online import Custom, Index, ScoreRule
from regard.masks import Mask, Predicate

__all__ = ["PackedScore", "pack_custom", "pack_mask", "pack_queries", "unpack_rows"]


def pack_queries(query: Tensor, group: int) -> Tensor:
    """``(batch, num_heads, q_len, d)`` -> ``(batch, num_heads / group, group q_len, d)``."""
    return query if group == 1 else query.unflatten(1, (-1, group)).flatten(2, 3)


def unpack_rows(rows: Tensor, group: int) -> Tensor:
    """Back from it."""
    return rows if group == 1 else rows.unflatten(2, (group, -1)).flatten(1, 2)


def pack_custom(tensor: Tensor, num_heads: int, group: int, q_len: int) -> Tensor:
    """The same of ``(batch | 1, num_heads | 1, q_len | 1, k_len | 1)``."""
    if tensor.shape[1] == tensor.shape[2] == 1:
        return tensor
    return pack_queries(tensor.expand(-1, num_heads, q_len, -1), group)


def pack_mask(mask: Mask, group: int, q_len: int, k_len: int, kv_heads: int) -> Mask:
    """A mask of queries as one of rows."""
    rule = mask.wide_mod(q_len, k_len)

    def packed(b: Tensor, h: Tensor, row: Tensor, kv_idx: Tensor) -> Tensor:
        return rule(b, h * group + row // q_len, row % q_len, kv_idx)

    return Predicate(packed, mask.batch, kv_heads if mask.heads > 1 else 1)


@dataclass(frozen=True)
class PackedScore:
    """A score's rule over rows. offset: added to a query's place to give ``q_idx``."""

    rule: ScoreRule
    group: int
    q_len: int
    offset: int

    def __call__(self, scores: Tensor, custom: Custom, index: Index) -> Tensor:
        return self.rule(scores, custom, self._index(index))

    def gradient(
        self, grad: Tensor, scores: Tensor, custom: Custom, index: Index, needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        return self.rule.gradient(grad, scores, custom, self._index(index), needs)

    def _index(self, index: Index) -> Index:
        b, h, row, kv_idx = index
        return b, h * self.group + row // self.q_len, row % self.q_len + self.offset, kv_idx
