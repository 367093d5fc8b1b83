"""How selectors score blocks: by means, by largest tokens, by samples, by anti-diagonals; and where blocks stand.

The frame of this folder is score -> select -> layout -> execute -> correct (:mod:`regard.sparse.frame`); this module
and :mod:`regard.sparse.selection` hold the first two steps as far as papers share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError
from regard.kernels import accumulation_dtype, expand_groups, masked_softmax
from regard.layout import BlockLayout, num_blocks
from regard.masks import Everything

__all__ = [
    "SCORES",
    "BlockView",
    "Reduction",
    "RowTotal",
    "Score",
    "antidiagonal_scores",
    "block_counts",
    "block_has",
    "block_index",
    "grouped_scores",
    "max_scores",
    "mean_scores",
    "per_kv_head",
    "pool_blocks",
    "sampled_scores",
    "split_blocks",
]


@dataclass(frozen=True, eq=False)
class BlockView:
    """What a step of the frame knows of a call besides the tensors.

    layout: the blocks that may be visible. keys: boolean ``(batch | 1, heads | 1, k_len)``, tokens that any query may
    see (None: all). scale: of the logits.
    """

    layout: BlockLayout
    keys: Tensor | None
    causal: bool
    scale: float

    @property
    def block_q(self) -> int:
        return self.layout.block_q

    @property
    def block_k(self) -> int:
        return self.layout.block_k

    @property
    def seen(self) -> Tensor:
        """Blocks that may be visible and hold a token that counts, ``(batch | 1, heads | 1, nq, nk)``."""
        if self.keys is None:
            return self.layout.visit
        return self.layout.visit & block_has(self.keys, self.block_k)[:, :, None]

    def first(self, count: int) -> Tensor:
        """The first key blocks, ``(1, nk)``."""
        return torch.arange(self.layout.visit.shape[-1], device=self.layout.visit.device)[None] < count

    def nearest(self, count: int) -> Tensor:
        """The key blocks in which the queries of a block stand, and the ``count - 1`` before them (without causality,
        behind them too), ``(nq, nk)``."""
        layout, device = self.layout, self.layout.visit.device
        start = torch.arange(layout.visit.shape[2], device=device) * layout.block_q + (layout.k_len - layout.q_len)
        low = start.div(layout.block_k, rounding_mode="floor")[:, None] - (count - 1)
        last = (start + layout.block_q - 1).clamp_max(layout.k_len - 1)
        high = last.div(layout.block_k, rounding_mode="floor")[:, None] + (0 if self.causal else count - 1)
        block = torch.arange(layout.visit.shape[3], device=device)
        return (block >= low) & (block <= high)


Score = Callable[[Tensor, Tensor, BlockView], Tensor]
"""``(query, key, view)`` -> how much a block of queries is likely to attend to a block of keys, on the scale of logits:
``(batch, heads, num_q_blocks, num_k_blocks)``. Blocks out of sight may have any score."""

RowTotal = Literal["max", "sum"]
Reduction = Literal["max", "mean"]

# Token scores that are formed at once on the way to block scores.
_AREA = 1 << 21


def split_blocks(x: Tensor, block_size: int) -> Tensor:
    """``(..., length, dim)`` -> ``(..., num_blocks, block_size, dim)``; a short last block is filled up with zeros."""
    short = -x.shape[-2] % block_size
    return (F.pad(x, (0, 0, 0, short)) if short else x).unflatten(-2, (-1, block_size))


def pool_blocks(x: Tensor, block_size: int, keys: Tensor | None = None) -> Tensor:
    """Means over blocks of tokens, ``(batch, heads, num_blocks, dim)`` in the accumulation dtype.

    ``x`` ``(batch, heads, length, dim)``; a short last block is averaged over the tokens it has. ``keys`` ``(batch | 1,
    heads | 1, length)`` boolean: tokens that count; a block without any gives zeros.
    """
    x = x.to(accumulation_dtype(x.dtype))
    if keys is None:
        sizes = torch.full((num_blocks(x.shape[2], block_size),), block_size, dtype=x.dtype, device=x.device)
        sizes[-1] -= -x.shape[2] % block_size
        return split_blocks(x, block_size).sum(-2) / sizes[:, None]
    shown = keys[..., None]
    counts = split_blocks(shown.to(x.dtype), block_size).sum(-2)
    return split_blocks(torch.where(shown, x, 0), block_size).sum(-2) / counts.clamp_min(1)


def block_counts(x: Tensor, block_size: int, keys: Tensor | None = None) -> Tensor:
    """How many tokens of each block of ``x (batch, heads, length, dim)`` count, ``(batch | 1, heads | 1, num_blocks)``
    in the accumulation dtype; ``keys`` as in :func:`pool_blocks`."""
    ones = x.new_ones(1, 1, x.shape[2], dtype=torch.bool) if keys is None else keys
    return split_blocks(ones[..., None].to(accumulation_dtype(x.dtype)), block_size).sum(-2)[..., 0]


def block_has(keys: Tensor, block_size: int) -> Tensor:
    """Whether a block has any token that counts: boolean ``(..., length)`` -> ``(..., num_blocks)``."""
    return split_blocks(keys[..., None], block_size)[..., 0].any(-1)


def block_index(q_len: int, k_len: int, block_size: int, device: torch.device | str | None = None) -> Tensor:
    """The key block in which each query stands ``(q_len,)``; negative for queries before the first key."""
    position = torch.arange(k_len - q_len, k_len, device=device)
    return position.div(block_size, rounding_mode="floor")


def per_kv_head(key: Tensor, keys: Tensor | None) -> Tensor:
    """``key`` with its heads repeated where ``keys`` ``(batch | 1, heads | 1, k_len)`` differs between query heads."""
    return key if keys is None or keys.shape[1] in (1, key.shape[1]) else expand_groups(key, keys.shape[1])


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """``q k^T`` ``(batch, num_heads, q_len, k_len)`` for key heads that divide the query's, without repeating keys."""
    batch, heads, q_len, dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, dim)
    return (folded @ key.transpose(-1, -2)).view(batch, heads, q_len, key.shape[2])


def mean_scores(query: Tensor, key: Tensor, view: BlockView) -> Tensor:
    """``scale mean(q) . mean(k)``: the mean of all token logits of a block."""
    means = pool_blocks(per_kv_head(key, view.keys), view.block_k, view.keys)
    return grouped_scores(pool_blocks(query, view.block_q), means) * view.scale


def max_scores(query: Tensor, key: Tensor, view: BlockView) -> Tensor:
    """The largest visible token logit of a block: the full product, without softmax or values."""
    return _largest(query, key, view, None)


def sampled_scores(
    query: Tensor,
    key: Tensor,
    view: BlockView,
    share: float = 0.25,
    seed: int = 0,
    *,
    minus: RowTotal | None = None,
    reduce: Reduction = "max",
) -> Tensor:
    """As :func:`max_scores`, over a random share of the positions in a block, the same in all blocks.

    minus: what is taken from the logits of each query first, over all its sampled keys: the largest (``"max"``), or
    the log-sum-exp (``"sum"``), which leaves log-probabilities. reduce: ``"mean"`` gives the logarithm of the mean of
    ``exp(score)`` over the visible pairs of a block instead of their largest score.
    """
    return _largest(query, key, view, (share, seed), minus, reduce)


@torch.no_grad()
def antidiagonal_scores(query: Tensor, key: Tensor, view: BlockView, stride: int = 16) -> Tensor:
    """The logarithm of the attention that a block of queries pays to a block of keys, told by anti-diagonals.

    Queries and keys are cut into groups of ``stride`` tokens; two groups have the logit ``scale / stride * sum_s
    q_(stride-1-s) . k_s``, one anti-diagonal of their square of token logits. It crosses every vertical, and slashes
    of odd lag (``stride`` being even): those of even lag go between its tokens. Each group of queries has a softmax
    over the groups of keys that it may see, summed over blocks. Where ``stride`` does not divide both block sizes,
    what it has in common with them does. Forms ``1 / stride^2`` of all logits, each over ``stride`` times as many
    numbers.

    Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", 2025, arXiv 2503.16428, section 2.1.
    """
    layout = view.layout
    if stride < 1:
        raise OptionError(f"stride counts the tokens of a group, at least 1; got {stride}.")
    stride = math.gcd(stride, view.block_q, view.block_k)
    work, device = accumulation_dtype(query.dtype), query.device
    key = per_kv_head(key, view.keys).to(work)
    groups = BlockLayout.of(layout.mask, layout.q_len, layout.k_len, stride, stride, device).visit
    if view.keys is not None:
        key = torch.where(view.keys[..., None], key, 0)
        groups = groups & block_has(view.keys, stride)[:, :, None]
    # One product of long vectors: the queries of a group backwards, the keys forwards.
    queries = split_blocks(query.to(work), stride).flip(-2).flatten(-2) * (view.scale / stride)
    keys = split_blocks(key, stride).flatten(-2)
    per_q, per_k = view.block_q // stride, view.block_k // stride
    room = num_blocks(layout.k_len, view.block_k) * per_k - keys.shape[2]
    step = max(_AREA // (query.shape[0] * query.shape[1] * per_q * keys.shape[2]), 1) * per_q
    rows = []
    for start in range(0, queries.shape[2], step):
        part = slice(start, start + step)
        shares = masked_softmax(grouped_scores(queries[:, :, part], keys), groups[:, :, part])
        shares = F.pad(shares, (0, room)).unflatten(-1, (-1, per_k)).sum(-1)
        rows.append(split_blocks(shares, per_q).sum(-2))
    return torch.cat(rows, 2).log()


SCORES: dict[str, Score] = {
    "mean": mean_scores,
    "max": max_scores,
    "sampled": sampled_scores,
    "antidiagonal": antidiagonal_scores,
}
"""Scores by name."""


def _positions(length: int, block: int, sample: tuple[float, int] | None, device: torch.device) -> Tensor:
    """Tokens that are scored, block by block ``(num_blocks, picked)``; past the end: ``length``."""
    inside = torch.arange(block)
    if sample is not None:
        share, seed = sample
        picked = torch.randperm(block, generator=torch.Generator().manual_seed(seed))
        inside = picked[: max(round(share * block), 1)].sort().values
    index = torch.arange(num_blocks(length, block))[:, None] * block + inside
    # A short last block whose own tokens were not picked is scored by its first one.
    index[-1, 0] = index[-1, 0].clamp_max(length - 1)
    return index.clamp_max(length).to(device)


def _largest(
    query: Tensor,
    key: Tensor,
    view: BlockView,
    sample: tuple[float, int] | None,
    minus: RowTotal | None = None,
    reduce: Reduction = "max",
) -> Tensor:
    layout, device = view.layout, query.device
    work = accumulation_dtype(query.dtype)
    key = per_kv_head(key, view.keys)
    at_q, at_k = (
        _positions(n, b, sample, device) for n, b in ((layout.q_len, view.block_q), (layout.k_len, view.block_k))
    )
    picked_q = at_q.clamp_max(layout.q_len - 1)
    keys = key.to(work)[:, :, at_k.clamp_max(layout.k_len - 1).flatten()] * view.scale
    rule = layout.mask.mod(layout.q_len, layout.k_len)
    batch, heads = query.shape[:2]
    b = torch.arange(layout.mask.batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(layout.mask.heads, device=device).view(1, -1, 1, 1)
    short = layout.q_len % view.block_q or layout.k_len % view.block_k
    everything = isinstance(layout.mask, Everything) and view.keys is None and not short
    step = max(_AREA // (batch * heads * at_q.shape[1] * at_k.numel()), 1)
    rows = []
    for start in range(0, len(at_q), step):
        part = picked_q[start : start + step]
        logits = grouped_scores(query.to(work)[:, :, part.flatten()], keys)
        if not everything:
            seen = rule(b, h, part.view(1, 1, -1, 1), at_k.clamp_max(layout.k_len - 1).view(1, 1, 1, -1))
            seen = seen & (at_k < layout.k_len).flatten() & (at_q[start : start + step] < layout.q_len).view(-1, 1)
            if view.keys is not None:
                seen = seen & view.keys[:, :, None, at_k.clamp_max(layout.k_len - 1).flatten()]
            logits = logits.masked_fill(~seen, float("-inf"))
        shaped = logits.unflatten(3, at_k.shape)
        # Over the keys of a block first: they lie side by side, and what follows is small.
        best = shaped.amax(-1)
        scores = best if reduce == "max" else shaped.logsumexp(-1)
        if minus is not None:
            total = best.amax(-1, keepdim=True) if minus == "max" else logits.logsumexp(-1, keepdim=True)
            scores = scores - torch.where(total.isfinite(), total, 0)
        scores = scores.unflatten(2, part.shape)
        if reduce == "max":
            rows.append(scores.amax(3))
        else:
            pairs = (shaped > float("-inf")).sum(-1).unflatten(2, part.shape).sum(3).clamp_min(1)
            rows.append(scores.logsumexp(3) - pairs.to(scores.dtype).log())
    return torch.cat(rows, 2)
