"""A tree search for the best key blocks of blocks of queries: nodes are halved and the best kept, level by level, so
that of ``n`` key blocks some ``2 m log2(n / m)`` are scored to keep ``m``.

Lee et al., "HiP Attention", 2024, arXiv 2406.09827, algorithm 1 (:mod:`regard.sparse.hip_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regard.kernels import accumulation_dtype
from regard.kernels.shapes import cut_blocks, take_tokens
from regard.layout import block_members, num_blocks
from regard.masks import Mask

__all__ = ["BlockScorer", "Representative", "SearchTrace", "tree_levels", "tree_search"]

Representative = Literal["first", "center", "random"]
"""Which block of a node stands for it."""


def tree_levels(count: int, kept: int) -> int:
    """``ceil(log2(count / kept))``, in whole numbers."""
    return (-(-count // kept) - 1).bit_length() if count > kept else 0


@dataclass
class SearchTrace:
    """The nodes that each level kept: first block and size ``(batch, heads, query blocks, kept)``, level by level, the
    tiling first; scored ``(batch, heads, query blocks)``: how many representatives were."""

    starts: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    scored: Tensor = field(default_factory=lambda: torch.zeros(()))


def tree_search(
    scorer: BlockScorer,
    blocks: slice,
    count: Tensor,
    kept: int,
    representative: Representative,
    draws: Tensor,
    trace: SearchTrace | None,
) -> Tensor:
    """First blocks of the nodes that are left ``(batch, heads, query blocks, kept)``, single key blocks in no order.

    For some of the scorer's blocks of queries, which see ``count (query blocks, 1)`` key blocks each; those that see no
    more than ``kept`` are not searched, and what stands in their rows means nothing. draws ``(levels, 2 kept)``:
    between 0 and 1, where in a node its random representative stands.
    """
    edges = torch.arange(kept + 1, device=count.device) * count // kept
    start, size = (x.expand(*scorer.queries.shape[:2], -1, -1) for x in (edges[:, :-1], edges.diff()))
    if trace is not None:
        trace.starts.append(start)
        trace.sizes.append(size)
    scores = draws.new_empty(0)
    for level in range(tree_levels(int(count.max()), kept)):
        half = size // 2
        start = torch.stack((start, start + half), -1).flatten(-2)
        size = torch.stack((half, size - half), -1).flatten(-2)
        # A first child begins where its parent does, so its score is known where beginnings are scored.
        fresh = slice(1, None, 2) if representative == "first" and level else slice(None)
        at = start[..., fresh]
        if representative == "center":
            at = at + size // 2
        elif representative == "random":
            at = at + (draws[level] * size).long()
        # Blocks of queries that see few keys have nodes without any block from the start.
        found = scorer(blocks, at.clamp_max(scorer.num_key_blocks - 1))
        scores = torch.stack((scores, found), -1).flatten(-2) if fresh.start else found
        best = scores.masked_fill(size == 0, float("-inf")).topk(kept, -1, sorted=False)
        scored = (size[..., fresh] > 0) & (count > kept)
        scores, start, size = best.values, start.gather(-1, best.indices), size.gather(-1, best.indices)
        if trace is not None:
            trace.scored[:, :, blocks] += scored.sum(-1)
            trace.starts.append(start)
            trace.sizes.append(size)
    return start


class BlockScorer:
    """Scores of key blocks for blocks of queries: the largest product of any of their tokens.

    ends: how many keys each block of queries sees. skipped: so many first key blocks are not counted; block 0 is the
    one behind them.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        block_q: int,
        block_k: int,
        ends: list[int],
        mask: Mask | None,
        skipped: int = 0,
    ) -> None:
        work, device = accumulation_dtype(query.dtype), query.device
        self.key, self.skipped, total = key, skipped, num_blocks(key.shape[2], block_k)
        self.num_key_blocks = total - skipped
        # A single block of queries, as in decoding, reads a few keys; to lay out all would cost more.
        self.keys = cut_blocks(key, block_k, work) if len(ends) > 1 else None
        self.picked = block_members(query.shape[2], block_q, device)[:, int(block_q > 1) :: 2]
        self.queries = query.to(work)[:, :, self.picked]
        self.ends = torch.tensor(ends, device=device).view(-1, 1, 1)
        lane = torch.arange(query.shape[0] * query.shape[1], device=device).view(*query.shape[:2], 1, 1)
        self.lane = lane.div(query.shape[1] // key.shape[1], rounding_mode="floor") * total
        self.inside = torch.arange(block_k, device=device)
        self.hide = None if mask is None else (mask, mask.mod(query.shape[2], key.shape[2]))

    def __call__(self, blocks: slice, at: Tensor) -> Tensor:
        """Scores of the key blocks ``at (batch, heads, query blocks, slots)``; the least number for hidden ones."""
        queries, at = self.queries[:, :, blocks], at + self.skipped
        tokens = at[..., None] * len(self.inside) + self.inside
        if self.keys is None:
            keys = take_tokens(self.key, tokens.flatten(2).clamp_max(self.key.shape[2] - 1)).to(queries.dtype)
        else:
            keys = self.keys.index_select(0, (at + self.lane).flatten())
        keys = keys.view(-1, tokens[0, 0, 0].numel(), queries.shape[-1])
        scores = queries.flatten(0, 2) @ keys.transpose(-1, -2)
        least = torch.finfo(scores.dtype).min
        if self.hide is not None:
            mask, rule = self.hide
            batch, head = (torch.arange(n, device=at.device) for n in (mask.batch, mask.heads))
            rows, end = self.picked[blocks].view(1, 1, at.shape[2], -1, 1), self.ends[-1]
            columns = tokens.flatten(3)[:, :, :, None].clamp_max(end - 1)
            seen = rule(batch.view(-1, 1, 1, 1, 1), head.view(-1, 1, 1, 1), rows, columns)
            scores = scores.masked_fill_(~seen.expand(*at.shape[:3], -1, -1).flatten(0, 2), least)
        best = scores.amax(-2).view(tokens.shape)
        return best.masked_fill_(tokens >= self.ends[blocks], least).amax(-1)
