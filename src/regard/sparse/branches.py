"""Sparse attention that a hybrid can fall back on: the first and the recent blocks, and the best keys of each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.kernels import accumulation_dtype, score_scale
from regard.layout import BlockLayout, TokenLayout, kept_layout
from regard.masks import Bounds, Mask, MaskMod
from regard.mechanism import Request, SparseMechanism
from regard.sparse.scoring import grouped_scores, per_kv_head
from regard.sparse.selection import settle_mask

__all__ = ["BlockStreaming", "StreamingBlocks", "TopKeys"]


@dataclass(frozen=True)
class BlockStreaming(Mask):
    """The first ``sink`` keys and the ``local`` blocks of ``block_size`` keys up to the query's own; the ``last``
    queries see everything. Meant together with ``Causal()``."""

    sink: int
    local: int
    block_size: int
    last: int = 0

    def seen(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The rule for positions, without the last queries."""
        gap = query_position // self.block_size - key_position // self.block_size
        return (gap < self.local) | (key_position < self.sink)

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        offset, full = k_len - q_len, q_len - self.last
        return lambda b, h, q, k: self.seen(q + offset, k) | (q >= full)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        early, late = q_blocks.amin(-1)[:, None], q_blocks.amax(-1)[:, None]
        first, final = k_blocks.amin(-1)[None], k_blocks.amax(-1)[None]
        offset, full = k_len - q_len, q_len - self.last
        near = early + offset, late + offset
        possible = ((near[0] // self.block_size - final // self.block_size) < self.local) | (first < self.sink)
        certain = ((near[1] // self.block_size - first // self.block_size) < self.local) | (final < self.sink)
        return (possible | (late >= full))[None, None], (certain | (early >= full))[None, None]


class StreamingBlocks(SparseMechanism):
    """Attention under a :class:`BlockStreaming` rule, in its blocks."""

    growth = "N w"

    def __init__(self, rule: BlockStreaming) -> None:
        super().__init__()
        self.rule = rule

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        rule = self.rule if request.visible is None else self.rule & request.visible
        make = kept_layout if request.mask is None else BlockLayout.of
        size = self.rule.block_size
        return make(rule, query.shape[2], key.shape[2], size, size, query.device)


class TopKeys(SparseMechanism):
    """Each query attends to the ``top_k`` keys of largest logit among those that it may see. All logits are formed."""

    growth = "N^2"

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    @torch.no_grad()
    def select(self, query: Tensor, key: Tensor, request: Request) -> TokenLayout:
        q_len, k_len = query.shape[2], key.shape[2]
        visible, keys = settle_mask(request, q_len, k_len)
        work, factor = accumulation_dtype(query.dtype), score_scale(query, request.scale)
        wide = per_kv_head(key, keys).to(work)
        columns = torch.arange(k_len, device=query.device)
        chosen = []
        # Some queries at a time: of their logits only the largest are kept.
        for rows in torch.arange(q_len, device=query.device).split(max((1 << 22) // (query.shape[1] * k_len), 1)):
            logits = grouped_scores(query[:, :, rows].to(work) * factor, wide)
            if visible is not None:
                logits = logits.masked_fill(~visible.at(rows[:, None], columns, q_len, k_len), float("-inf"))
            best = logits.topk(min(self.top_k, k_len), -1)
            chosen.append(best.indices.masked_fill(best.values == float("-inf"), -1))
        return TokenLayout(torch.cat(chosen, 2), k_len)
