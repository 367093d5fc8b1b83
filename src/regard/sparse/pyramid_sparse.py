"""Pyramid sparse attention: between computing a block of keys and skipping it stand levels at which it is pooled.

Keys and values are averaged over ``p = 1, 2, 4, 8`` neighbours. Each block of queries looks at each block of keys at
one level ``p``, or not at all (0); a block of ``B`` keys at level ``p`` takes part in the softmax with its ``B / p``
means, each counting as the tokens that it stands for,

    logit = scale q . mean(k) + log p,      value = mean(v),

so a group of equal keys is exact for any values, and costs ``1 / p``. Which level:

1. Importance of a pair of blocks: the largest of ``exp(s - row maximum)`` over a random quarter of the positions of
   both blocks, the row maximum being over all sampled keys. (The paper speaks of probabilities,
   ``probabilities=True``; its kernel leaves the row sum out.)
2. A row's blocks in order of importance: the first tenth exact, the next twentieth at level 2, a fifth at level 8, the
   rest skipped (``"topk"``), or the same by cumulative share of importance instead of rank (``"threshold"``; a block
   that crosses a bound still belongs below it). Level 1 gets at least ``int(0.06 n) + 1`` of a row's ``n`` blocks; the
   number at level ``p`` is rounded to a multiple of ``p``, so that they fill whole tiles.
3. On request, no level is higher than the keys are alike: level ``p`` is admitted to a block of keys if the mean
   cosine of the first and the last key of its groups of ``p`` exceeds ``t_p``.

"PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation", 2025, arXiv 2512.04025. Query (batch,
num_heads, q_len, head_dim), key and value (batch, num_kv_heads, k_len, ...). Time: ``sum over levels of share / p`` of
dense (0.15 as set here) and a sixteenth for importance. No parameters, no training needed; gradients pass the pooling,
each member getting ``1 / p``, and not the choice. A last group of fewer than ``p`` tokens is their mean and counts as
often as it has tokens; ``official=True`` fills it up with copies of its last token, which then count.

Under a mask or causality a block that only some queries of a block see is computed exactly, and so is one of the
others: no query is left without a key that it may see. Causal: what is chosen for a block of queries depends on its own
later tokens too; in :func:`pyramid_attention`, where levels are given, a mean is seen once its last member is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, block_sparse_attention, expand_groups, merge_attentions, score_scale
from regard.layers.curves import hilbert_order
from regard.layout import BlockLayout, num_blocks
from regard.masks import Causal, Reindexed
from regard.mechanism import Request
from regard.registry import register
from regard.sparse.frame import BlockSelector
from regard.sparse.scoring import BlockView, Reduction, block_counts, pool_blocks, sampled_scores
from regard.sparse.selection import reordered_request, top_k_mask

__all__ = [
    "TOPK_RATIOS",
    "VIDEO_THRESHOLDS",
    "PyramidSparseAttention",
    "assign_levels",
    "key_similarity_cap",
    "level_density",
    "pyramid_attention",
    "sampled_block_importance",
]

Ratios = Mapping[int, tuple[float, float]]

TOPK_RATIOS: Ratios = {1: (0, 0.1), 2: (0.1, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35), 0: (0.35, 1)}
"""From which share of a row's blocks to which each level reaches (0: skipped)."""
VIDEO_THRESHOLDS: Ratios = {1: (0, 0.4), 2: (0.4, 0.5), 4: (0.5, 0.6), 8: (0.6, 0.8), 0: (0.8, 1)}
"""The same in shares of importance, as set for video generation with ``mode="threshold"``."""


@torch.no_grad()
def sampled_block_importance(
    query: Tensor,
    key: Tensor,
    block_q: int = 128,
    block_k: int = 64,
    sample: float = 0.25,
    reduce: Reduction = "max",
    *,
    probabilities: bool = False,
    seed: int = 0,
    view: BlockView | None = None,
) -> Tensor:
    """How much a block of queries makes of a block of keys, by samples: ``(batch, num_heads, num_q_blocks,
    num_k_blocks)``.

    sample: share of the positions of a block that is drawn, the same in all blocks. reduce: the largest or the mean
    over the pairs. probabilities: of the softmax over all sampled keys, in place of ``exp(s - row maximum)``. view: the
    mask of a call (default: none); 0 where nothing is seen.
    """
    if view is None:
        layout = BlockLayout.of(None, query.shape[2], key.shape[2], block_q, block_k, query.device)
        view = BlockView(layout, None, False, score_scale(query, None))
    minus: Literal["max", "sum"] = "sum" if probabilities else "max"
    return sampled_scores(query, key, view, sample, seed, minus=minus, reduce=reduce).exp()


def assign_levels(
    importance: Tensor,
    ratios: Ratios = TOPK_RATIOS,
    mode: Literal["topk", "threshold"] = "topk",
    align: bool = True,
    *,
    seen: Tensor | None = None,
) -> Tensor:
    """The level of each block, int64 of the shape of ``importance (..., num_q_blocks, num_k_blocks)``; 0: skipped.

    ratios: for each level the interval of ranks (``"topk"``), or of cumulative importance (``"threshold"``), as shares
    of a row. align: numbers at level ``p`` are rounded to multiples of ``p``. seen: blocks that exist, boolean,
    broadcastable to ``importance``; shares are of those.
    """
    ends = _ends(ratios)
    if mode not in ("topk", "threshold"):
        raise OptionError(f"mode is 'topk' or 'threshold', got {mode!r}.")
    shown = torch.ones_like(importance, dtype=torch.bool) if seen is None else seen.expand_as(importance)
    ordered, order = importance.masked_fill(~shown, float("-inf")).sort(dim=-1, descending=True, stable=True)
    count = shown.sum(-1, keepdim=True)
    weights = torch.where(ordered > float("-inf"), ordered, 0)
    total = weights.sum(-1, keepdim=True)
    before = (weights.cumsum(-1) - weights) / torch.where(total > 0, total, 1)
    rank = torch.arange(importance.shape[-1], device=importance.device)
    levels, start, last = torch.zeros_like(order), torch.zeros_like(count), torch.zeros_like(count)
    for level, end in ends:
        if end >= 1:
            stop = count
        elif mode == "topk":
            stop = (end * count + 0.5).floor().long()
        else:
            stop = ((before < end) & (rank < count)).sum(-1, keepdim=True)
        length = (stop - last).clamp_min(0)
        if level == 1:
            length = torch.maximum(length, (0.06 * count).long() + 1)
        elif align and end < 1:
            length = (length + level // 2).div(level, rounding_mode="floor") * level
        reached = count if end >= 1 else start + length
        levels = torch.where((rank >= start) & (rank < torch.minimum(reached, count)), level, levels)
        start, last = reached, stop
    return torch.zeros_like(levels).scatter_(-1, order, levels)


def _ends(ratios: Ratios) -> list[tuple[int, float]]:
    """Levels above 0, from fine to coarse, and the share at which each ends."""
    chain = sorted(ratios.items(), key=lambda item: (item[0] == 0, item[0]))
    place = 0.0
    for level, (low, high) in chain:
        if level < 0 or level & (level - 1) or abs(low - place) > 1e-9 or not low <= high <= 1:
            raise OptionError(
                "ratios are intervals that follow one another from 0, fine levels first, for levels 1, 2, 4, ... and "
                f"last 0 (skipped); got {dict(ratios)}."
            )
        place = high
    if abs(place - 1) > 1e-9 or 1 not in ratios:
        raise OptionError(f"ratios name level 1 and reach up to 1 (what is skipped is level 0); got {dict(ratios)}.")
    return [(level, high) for level, (_, high) in chain if level]


@torch.no_grad()
def key_similarity_cap(key: Tensor, block: int = 64, t2: float = 0.0, t4: float = 0.0, t8: float = -1.0) -> Tensor:
    """The highest level that each block of keys admits, int64 ``(batch, kv_heads, num_k_blocks)``.

    Level ``p`` is admitted if the mean cosine of the first and last keys of the block's groups of ``p`` exceeds
    ``t_p``; -1 admits it always. A short last group is filled up with its last key.
    """
    length, dtype = key.shape[2], accumulation_dtype(key.dtype)
    unit = F.normalize(key.to(dtype), dim=-1)
    cap = torch.ones(*key.shape[:2], num_blocks(length, block), dtype=torch.int64, device=key.device)
    for level, least in ((2, t2), (4, t4), (8, t8)):
        if block % level:
            continue
        first = torch.arange(0, length, level, device=key.device)
        alike = (unit[:, :, first] * unit[:, :, (first + level - 1).clamp_max(length - 1)]).sum(-1, keepdim=True)
        mean = pool_blocks(alike, block // level)[..., 0]
        cap = torch.where((mean > least) | (least <= -1), level, cap)
    return cap


def level_density(levels: Tensor) -> float:
    """Pairs of a query with a token or a mean, as a share of all pairs: the mean of ``1 / level``, 0 where skipped."""
    return float(torch.where(levels > 0, 1 / levels.clamp_min(1).double(), 0).mean())


def pyramid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    causal: bool = False,
    *,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    official: bool = False,
) -> Tensor:
    """Attention at given levels, integers ``(batch | 1, num_heads | 1, num_q_blocks, num_k_blocks)``: 0, or a power of
    two that divides ``block_k``."""
    first = BlockLayout.of(Causal() if causal else None, query.shape[2], key.shape[2], block_q, block_k, query.device)
    if levels.dim() != 4 or levels.shape[-2:] != first.visit.shape[-2:]:
        raise ShapeError(
            f"{query.shape[2]} queries and {key.shape[2]} keys in blocks of {block_q} and {block_k} need levels of "
            f"shape (batch, heads, {first.visit.shape[-2]}, {first.visit.shape[-1]}); got {tuple(levels.shape)}."
        )
    present = [level for level in levels.unique().tolist() if level]
    if any(level < 1 or level & (level - 1) or block_k % level for level in present):
        raise OptionError(f"Levels are 0 or powers of two that divide block_k={block_k}; got {present}.")
    return _attend(query, key, value, levels, present or [1], first, causal, score_scale(query, scale), official)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    present: list[int],
    first: BlockLayout,
    causal: bool,
    scale: float,
    official: bool,
) -> Tensor:
    """One softmax over all levels. first: what level 1 may see; means know causality alone."""
    work, device, k_len = accumulation_dtype(query.dtype), query.device, key.shape[2]
    # One more channel carries the logarithm of the number: q' = (scale q, 1), k' = (mean, log number).
    queries = torch.cat((query.to(work) * scale, query.new_ones(*query.shape[:3], 1, dtype=work)), -1)
    outs, lses = [], []
    for level in present:
        if level == 1:
            chosen = first.only(levels == 1)
            out, lse = block_sparse_attention(query, key, value, chosen, scale=scale, return_lse=True)
        else:
            short = -k_len % level if official else 0
            keys, values = _filled(key, short), _filled(value, short)
            sizes = block_counts(keys, level).log().expand(*key.shape[:2], -1)
            means = torch.cat((pool_blocks(keys, level), sizes[..., None]), -1)
            rule = None
            if causal:
                members = (torch.arange(means.shape[2], device=device) * level + level - 1).clamp_max(k_len - 1)
                rule = Reindexed(Causal(), torch.arange(query.shape[2], device=device), members, k_len=k_len)
            layout = BlockLayout.of(
                rule, query.shape[2], means.shape[2], first.block_q, first.block_k // level, device
            ).only(levels == level)
            pooled = pool_blocks(values, level)
            out, lse = block_sparse_attention(queries, means, pooled, layout, scale=1.0, return_lse=True)
        outs.append(out.to(work))
        lses.append(lse)
    return merge_attentions(outs, lses)[0].to(query.dtype)


def _filled(x: Tensor, short: int) -> Tensor:
    """``short`` copies of the last token behind it."""
    return torch.cat((x, x[:, :, -1:].expand(-1, -1, short, -1)), 2) if short else x


def _levels(ratios: Mapping[Any, Sequence[float]]) -> Ratios:
    """Levels by number, also where a file has their names as text."""
    return {int(level): (float(low), float(high)) for level, (low, high) in ratios.items()}


@register("pyramid_sparse")
class PyramidSparseAttention(BlockSelector):
    """block_q, block_k: tokens a block; block_k is a multiple of the highest level. ratios, mode, align: as in
    :func:`assign_levels`, by default a tenth of the blocks exact and 0.15 of the work (``"topk"``), or
    :data:`VIDEO_THRESHOLDS`. sample, reduce, probabilities: as in :func:`sampled_block_importance`. t2, t4, t8: as in
    :func:`key_similarity_cap`; with t8 = -1 there is no cap.

    text: so many tokens at the end are text; their blocks are computed exactly, as queries and as keys. order:
    ``"hilbert"`` takes the tokens of a ``grid`` along a space-filling curve first, so that neighbours in a sequence are
    neighbours in space (self-attention without causality; else tokens stay as they come).
    """

    grid_axes: ClassVar[frozenset[int]] = frozenset({1, 2, 3})

    def __init__(
        self,
        block_q: int = 128,
        block_k: int = 64,
        ratios: Ratios | None = None,
        mode: Literal["topk", "threshold"] = "topk",
        *,
        align: bool = True,
        sample: float = 0.25,
        reduce: Reduction = "max",
        probabilities: bool = False,
        t2: float = 0.0,
        t4: float = 0.0,
        t8: float = -1.0,
        text: int = 0,
        order: Literal["hilbert"] | None = None,
        official: bool = False,
    ) -> None:
        super().__init__(block_q, block_k)
        if mode not in ("topk", "threshold"):
            raise OptionError(f"mode is 'topk' or 'threshold', got {mode!r}.")
        self.ratios = (VIDEO_THRESHOLDS if mode == "threshold" else TOPK_RATIOS) if ratios is None else _levels(ratios)
        self.level_names = [level for level, _ in _ends(self.ratios)]
        if block_k % self.level_names[-1]:
            raise OptionError(f"block_k={block_k} is no multiple of the highest level, {self.level_names[-1]}.")
        if not 0 < sample <= 1 or reduce not in ("max", "mean"):
            raise OptionError(f"sample is a share above 0, reduce 'max' or 'mean'; got {sample} and {reduce!r}.")
        if text < 0 or order not in (None, "hilbert"):
            raise OptionError(f"text counts tokens, order is 'hilbert' or None; got {text} and {order!r}.")
        self.mode, self.align, self.sample, self.reduce, self.probabilities = mode, align, sample, reduce, probabilities
        self.thresholds, self.text, self.order, self.official = (t2, t4, t8), text, order, official
        self.off_grid = text

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}, ratios={self.ratios}"

    @torch.no_grad()
    def levels(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        """The level of each block, int64 ``(batch, num_heads, num_q_blocks, num_k_blocks)``."""
        importance = sampled_block_importance(
            query,
            key,
            self.block_q,
            self.block_k,
            self.sample,
            self.reduce,
            probabilities=self.probabilities,
            view=view,
        )
        seen, whole = view.seen, view.layout.full & view.seen
        levels = assign_levels(importance, self.ratios, self.mode, self.align, seen=seen)
        if self.thresholds[-1] > -1:
            cap = key_similarity_cap(key, self.block_k, *self.thresholds)
            levels = torch.minimum(levels, expand_groups(cap, query.shape[1])[:, :, None])
        exact = seen & ~whole
        lacking = ~((levels > 0) & whole).any(-1, keepdim=True)
        exact = exact | (lacking & top_k_mask(importance.masked_fill(~whole, float("-inf")), 1))
        if self.text:
            exact = exact | _holds_text(query.shape[2], self.block_q, self.text, query.device)[:, None]
            exact = exact | _holds_text(key.shape[2], self.block_k, self.text, query.device)
        return torch.where(seen, torch.where(exact, 1, levels), 0)

    def choose(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        return self.levels(query, key, view) > 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        place = self._order(query, key, request)
        if place is not None:
            query, key, value = (t[:, :, place] for t in (query, key, value))
            request = reordered_request(request, place)
        view = self.view(query, key, request)
        levels = self.levels(query, key, view)
        out = _attend(
            query, key, value, levels, self.level_names, view.layout, request.causal, view.scale, self.official
        )
        return out if place is None else out[:, :, place.argsort()]

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        place = self._order(query, key, request)
        if place is not None:
            query, key, request = query[:, :, place], key[:, :, place], reordered_request(request, place)
        view = self.view(query, key, request)
        levels = self.levels(query, key, view)
        return sum(view.layout.only(levels == level).density() / level for level in self.level_names)

    def _order(self, query: Tensor, key: Tensor, request: Request) -> Tensor | None:
        """The token at each place, None where tokens stay."""
        length = query.shape[2]
        if self.order is None or request.grid is None or request.causal or key.shape[2] != length:
            return None
        curve = hilbert_order(request.grid).to(query.device)
        return torch.cat((curve, torch.arange(len(curve), length, device=query.device)))

    def most_blocks(self, num_k_blocks: int) -> float:
        if self.mode == "threshold":
            return num_k_blocks
        row = assign_levels(torch.arange(num_k_blocks, dtype=torch.float64), self.ratios, align=self.align)
        return min(level_density(row) * num_k_blocks + 1, num_k_blocks)

    def scoring_flops(self, shape: AttentionShape) -> int:
        pairs = int(self.sample * shape.q_len) * int(self.sample * shape.k_len)
        return 2 * shape.batch * shape.num_heads * pairs * shape.head_dim


def _holds_text(length: int, block: int, text: int, device: torch.device) -> Tensor:
    """Blocks with any of the last ``text`` tokens."""
    end = (torch.arange(num_blocks(length, block), device=device) + 1) * block
    return end > length - text
