"""HiP: hierarchically pruned attention; a tree search finds the best keys of a block of queries without scoring all.

Keys behind the sinks and before the sliding window are cut into ``n`` blocks of ``block_k`` tokens, of which ``m =
mask_k / block_k`` are to be kept. For each block of ``block_q`` queries, ``m`` nodes tile them: node ``i`` covers
``floor(i n / m) .. floor((i + 1) n / m) - 1``. Until all nodes are single blocks:

- each node is split at its middle into two children (a single block stays one);
- a child is scored by its representative block, ``max q . k`` over every other query of the block and the tokens of
  that block: its first one, its centre one, or one drawn at random;
- the ``m`` best children are kept.

Attention is exact, in one softmax, over the tokens of the kept blocks, the last ``window`` keys of each query and the
first ``sinks`` keys. That works where keys that lie together score alike: then a representative tells of its node, and
of two halves the one with the better centre holds the best key more often than not (:func:`locality_theorem`). No
parameters, no training; the choice is not differentiated.

Lee et al., "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning", 2024, arXiv 2406.09827
(version 2: "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention"), section 3, algorithm 1. Query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads,
k_len, ...), each query head with a search of its own. A block of queries takes about ``log2(n / m)`` levels of ``2 m``
scores: time ``O(N log N)``, memory ``O(N)``. The paper leaves the first three layers dense (``dense_layers=3``);
queries with no more than ``mask_k`` keys before their window lose nothing and are computed densely. Causal: a block of
queries is scored as one, so its later tokens take part in the choice of its earlier ones; nothing behind it does. The
released code takes every second query from the second one on, which leaves none of a block of one query; here that one
counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from regard.cache import KeyValueCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError
from regard.kernels import block_sparse_attention, dense_attention, merge_attentions
from regard.kernels.shapes import take_tokens
from regard.kernels.token_lists import token_list_attention
from regard.layout import BlockLayout, kept_layout, num_blocks
from regard.masks import Boolean, Causal, Mask, Predicate, Sinks, SlidingWindow
from regard.mechanism import Request, SparseMechanism
from regard.registry import register
from regard.sparse.tree import BlockScorer, Representative, SearchTrace, tree_levels, tree_search

__all__ = [
    "HiPAttention",
    "HiPState",
    "Locality",
    "count_score_evaluations",
    "hip_attention",
    "hip_topk",
    "locality_theorem",
    "smooth_scores",
]

# Gathered representatives of one stretch of query blocks stay below this many elements.
_STRETCH = 1 << 21
# Blocks of the layout of window and sinks, which are the same for all heads.
_NEAR_BLOCK = 64


def count_score_evaluations(num_key_blocks: int, kept: int, representative: Representative = "center") -> int:
    """Representatives that a search for ``kept`` of ``num_key_blocks`` scores at most: ``2 kept`` a level. Where they
    are first blocks, the first child of each node but the tiling's has its parent's score already."""
    levels = tree_levels(num_key_blocks, kept)
    return kept * (levels + 1 if representative == "first" and levels else 2 * levels)


def _regions(q_len: int, k_len: int, block_q: int, window: int, causal: bool, skipped: int) -> list[tuple[int, int]]:
    """For each block of queries, how many keys behind the skipped ones are searched, and how many first keys any of its
    queries may see."""
    if not causal:
        return [(max(k_len - skipped, 0), k_len)] * num_blocks(q_len, block_q)
    ends = [min(last, q_len) + k_len - q_len for last in range(block_q, q_len + block_q, block_q)]
    return [(max(end - window - skipped, 0), max(end, 0)) for end in ends]


@torch.compiler.disable
@torch.no_grad()
def hip_topk(
    query: Tensor,
    key: Tensor,
    mask_k: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    representative: Representative = "first",
    window: int = 128,
    sinks: int = 0,
    causal: bool = True,
    *,
    mask: Mask | None = None,
    seed: int = 0,
    return_trace: bool = False,
) -> Any:
    """Kept key blocks of each block of queries, ``(batch, num_heads, query blocks, mask_k / block_k)`` int64, ascending
    behind the empty slots (-1).

    sinks: that many first keys are seen in any case, so blocks of nothing else are not searched. mask: what queries may
    see besides causality; hidden pairs score least. seed: of random representatives, which are
    drawn once for all blocks and heads. return_trace: also a :class:`~regard.sparse.tree.SearchTrace`.
    """
    _check(mask_k, block_q, block_k, representative, window)
    (batch, heads, q_len, _), k_len, kept = query.shape, key.shape[2], mask_k // block_k
    skipped = sinks // block_k
    regions = _regions(q_len, k_len, block_q, window, causal, skipped * block_k)
    counts = torch.tensor([num_blocks(region, block_k) for region, _ in regions], device=query.device)
    scorer = BlockScorer(query, key, block_q, block_k, [end for _, end in regions], mask, skipped)
    deepest = tree_levels(int(counts.max()), kept)
    draws = torch.rand(deepest, 2 * kept, generator=torch.Generator().manual_seed(seed)).to(query.device)
    step = len(regions) if return_trace else max(_STRETCH // (batch * heads * 2 * mask_k * query.shape[3]), 1)
    found = query.new_full((batch, heads, len(regions), kept), -1, dtype=torch.int64)
    trace = SearchTrace(scored=torch.zeros_like(found[..., 0])) if return_trace else None
    for first in range(0, len(regions), step):
        blocks = slice(first, min(first + step, len(regions)))
        start = tree_search(scorer, blocks, counts[blocks, None], kept, representative, draws, trace)
        few, slots = counts[blocks, None] <= kept, torch.arange(kept, device=query.device)
        start = torch.where(few, slots, start) + skipped
        start = start.masked_fill(few & (slots >= counts[blocks, None]), -1)
        found[:, :, blocks] = start.sort(-1).values
    return (found, trace) if return_trace else found


def hip_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True, scale: float | None = None, **options: Any
) -> Tensor:
    """HiP as a function; options as in :class:`HiPAttention`."""
    return HiPAttention(**options)(query, key, value, causal=causal, scale=scale)


@dataclass
class HiPState:
    """The key-value cache; the kept blocks ``(batch, heads, 1, kept)``, found when ``region`` keys were searched, and
    how many steps ago that was."""

    cache: KeyValueCache
    indices: Tensor | None = None
    region: int = 0
    age: int = 0


def _check(mask_k: int, block_q: int, block_k: int, representative: str, window: int) -> None:
    if block_q < 1 or block_k < 1 or mask_k < block_k or mask_k % block_k or window < 1:
        raise OptionError(
            "Need block_q, block_k and window of at least 1 and mask_k a multiple of block_k; got "
            f"mask_k={mask_k}, block_q={block_q}, block_k={block_k}, window={window}."
        )
    if representative not in get_args(Representative):
        raise OptionError(f"representative is one of {get_args(Representative)}, not {representative!r}.")


@register("hip_attention")
class HiPAttention(SparseMechanism):
    """mask_k: keys kept by the search, in blocks of ``block_k``, for each block of ``block_q`` queries. representative:
    ``"first"``, ``"center"`` or ``"random"`` block of a node. window, sinks: last and first keys that are always kept.
    dense_layers: so many first layers of the model are dense. refresh: :meth:`step` searches anew only every so many
    steps, and keeps every key since the last search meanwhile.

    A step of one token searches for that token alone, so it gives the numbers of the parallel form where ``block_q``
    and ``refresh`` are 1.
    """

    decodes = True
    growth: ClassVar[str] = "N log N"

    def __init__(
        self,
        mask_k: int = 512,
        block_q: int = 32,
        block_k: int = 2,
        representative: Representative = "first",
        window: int = 128,
        sinks: int = 16,
        *,
        dense_layers: int = 0,
        refresh: int = 1,
        seed: int = 0,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        _check(mask_k, block_q, block_k, representative, window)
        if sinks < 0 or dense_layers < 0 or refresh < 1:
            raise OptionError(
                f"Need sinks >= 0, dense_layers >= 0, refresh >= 1; got {sinks}, {dense_layers}, {refresh}."
            )
        self.mask_k, self.block_q, self.block_k, self.representative = mask_k, block_q, block_k, representative
        self.window, self.sinks, self.refresh, self.seed = window, sinks, refresh, seed
        self.dense, self.skipped = layer_index < dense_layers, sinks // block_k * block_k
        self.near: Mask = SlidingWindow(window) | Sinks(sinks) if sinks else SlidingWindow(window)

    def extra_repr(self) -> str:
        return (
            f"mask_k={self.mask_k}, block_q={self.block_q}, block_k={self.block_k}, "
            f"representative={self.representative!r}, window={self.window}, sinks={self.sinks}"
        )

    @property
    def strictly_causal(self) -> bool:
        return self.block_q == 1 or self.dense

    def indices(self, query: Tensor, key: Tensor, causal: bool, mask: Mask | None = None) -> Tensor:
        """:func:`hip_topk` with this mechanism's options."""
        choice = (self.mask_k, min(self.block_q, query.shape[2]), self.block_k, self.representative)
        found: Tensor = hip_topk(query, key, *choice, self.window, self.sinks, causal, mask=mask, seed=self.seed)
        return found

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        """The layout, with the pairs of kept blocks, window and sinks; for looking at: ``attend`` needs none."""
        q_len, k_len = query.shape[2], key.shape[2]
        block_q = min(self.block_q, q_len)
        sizes = (q_len, k_len, block_q, self.block_k, query.device)
        base = BlockLayout.of(request.visible, *sizes)
        if self.dense:
            return base
        near = BlockLayout.of(self.near, *sizes)
        found = self.indices(query, key, request.causal, request.mask)
        shape = (*found.shape[:3], num_blocks(k_len, self.block_k) + 1)
        kept = torch.zeros(shape, dtype=torch.bool, device=query.device)
        kept = kept.scatter_(-1, found.where(found >= 0, shape[-1] - 1), True)[..., :-1]
        pairs = Predicate(lambda b, h, q, k: kept[b, h, q // block_q, k // self.block_k], *kept.shape[:2])
        rule = self.near | pairs if request.visible is None else request.visible & (self.near | pairs)
        visit, full = base.visit & (kept | near.visit), base.full & (kept | near.full)
        return BlockLayout(visit, full, rule, *sizes[:4])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        q_len, k_len, causal, mask = query.shape[2], key.shape[2], request.causal, request.mask
        regions = _regions(q_len, k_len, min(self.block_q, q_len), self.window, causal, self.skipped)
        whole = min(sum(region <= self.mask_k for region, _ in regions) * self.block_q, q_len)
        if self.dense or whole == q_len:
            return dense_attention(query, key, value, causal=causal, mask=mask, scale=request.scale)
        if mask is not None or not whole or q_len > k_len:
            return self._pruned(query, key, value, request)
        early = slice(0, whole + k_len - q_len)
        first = dense_attention(
            query[:, :, :whole], key[:, :, early], value[:, :, early], causal=True, scale=request.scale
        )
        return torch.cat((first, self._pruned(query[:, :, whole:], key, value, request)), 2)

    def _pruned(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        """Kept keys outside of window and sinks, and these two, merged by their log-sum-exp."""
        q_len, k_len, visible = query.shape[2], key.shape[2], request.visible
        block_q = min(self.block_q, q_len)
        found = self.indices(query, key, request.causal, request.mask)[..., None]
        tokens = found * self.block_k + torch.arange(self.block_k, device=query.device)
        tokens = tokens.masked_fill_((found < 0) | (tokens < self.sinks) | (tokens >= k_len), -1).flatten(-2)
        # Ascending lists: only the last tokens may stand in the window of some query of the block.
        edge = block_q + self.block_k if request.causal and request.mask is None else self.mask_k
        far = ~self.near if visible is None else visible & ~self.near
        out, lse = token_list_attention(
            query,
            key,
            value,
            tokens,
            block_q,
            mask=far,
            settled=max(self.mask_k - edge, 0),
            scale=request.scale,
            return_lse=True,
        )
        sizes = (q_len, k_len, _NEAR_BLOCK, _NEAR_BLOCK, query.device)
        if request.mask is None:
            layout = kept_layout(self.near & Causal() if request.causal else self.near, *sizes)
        else:
            layout = BlockLayout.of(self.near if visible is None else visible & self.near, *sizes)
        near, near_lse = block_sparse_attention(query, key, value, layout, scale=request.scale, return_lse=True)
        return merge_attentions((out, near), (lse, near_lse))[0]

    def cost(self, shape: AttentionShape) -> Cost:
        if self.dense:
            return dense_cost(shape)
        block_q = min(self.block_q, shape.q_len)
        regions = _regions(shape.q_len, shape.k_len, block_q, self.window, shape.causal, self.skipped)
        searches = sum(
            count_score_evaluations(num_blocks(r, self.block_k), self.mask_k // self.block_k) for r, _ in regions
        )
        rows = max(block_q // 2, 1) * self.block_k
        width = self.window if shape.causal else 2 * self.window - 1
        seen = sum(min(self.mask_k + width + self.sinks, end) for _, end in regions) / len(regions) / shape.k_len
        scoring = 2 * shape.batch * shape.num_heads * searches * rows * shape.head_dim
        return dense_cost(shape, max(seen, 1 / shape.k_len), scoring)

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> HiPState:
        return HiPState(super().init_state(batch, like=like, cache=cache))

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, HiPState]:
        kept = state.cache.append(key, value)
        region = max(state.cache.seen - self.window, 0)
        if query.shape[2] > 1 or self.dense or region - self.skipped <= self.mask_k:
            return self(query, kept.key, kept.value, causal=True), HiPState(state.cache)
        self.request(query, kept.key, kept.value, causal=True)
        indices, age = state.indices, state.age + 1
        if indices is None or age >= self.refresh:
            indices, age = self.indices(query, kept.key, True), 0
        else:
            region = state.region
        tokens = indices[..., None] * self.block_k + torch.arange(self.block_k, device=key.device)
        tokens = tokens.flatten(2)
        tokens = tokens.masked_fill((tokens < self.sinks) | (tokens >= region), -1)
        near = torch.cat((torch.arange(min(self.sinks, region)), torch.arange(region, state.cache.seen)))
        tokens = torch.cat((tokens, near.to(key.device).expand(*tokens.shape[:2], -1)), -1)
        keys, values = (take_tokens(x, tokens.clamp_min(0)) for x in (kept.key, kept.value))
        out = dense_attention(query, keys, values, mask=Boolean((tokens >= 0)[:, :, None]))
        return out, HiPState(state.cache, indices, region, age)


class Locality(NamedTuple):
    """levels: how often, at each level of a descent, the half chosen by its centre held the largest score, among the
    descents that had not lost it before (1/2 by chance). found, chance: how often the whole descent ended at the
    largest score, and how often one by coin tosses does."""

    levels: list[float]
    found: float
    chance: float


def smooth_scores(count: int, length: int, correlation: float, seed: int = 0) -> Tensor:
    """Normal numbers ``(count, length)``, stationary, correlated by ``exp(-distance^2 / (2 correlation^2))`` around a
    circle; correlation 0 is white noise."""
    white = torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    frequency = 2 * math.pi * torch.fft.rfftfreq(length, dtype=torch.float64)
    smooth = torch.fft.irfft(torch.fft.rfft(white) * (-((frequency * correlation) ** 2) / 4).exp(), length)
    return smooth / smooth.square().mean().sqrt()


def locality_theorem(length: int, correlation: float, samples: int = 4096, seed: int = 0) -> Locality:
    """The paper's argument on random scores: a descent by halves, each represented by its centre, towards the largest
    of ``length`` (a power of two) smooth scores."""
    if length < 2 or length & (length - 1) or correlation < 0 or samples < 1:
        raise OptionError(
            f"Need a length of 2, 4, 8, ..., correlation >= 0, samples >= 1; got {length}, {correlation}."
        )
    scores = smooth_scores(samples, length, correlation, seed)
    best, start = scores.argmax(-1), torch.zeros(samples, dtype=torch.int64)
    alive, levels = torch.ones(samples, dtype=torch.bool), []
    half = length // 2
    while half:
        centers = torch.stack((start + half // 2, start + half + half // 2), -1)
        start = start + half * scores.gather(-1, centers).argmax(-1)
        held = alive & (best >= start) & (best < start + half)
        levels.append(float(held.sum() / alive.sum().clamp_min(1)))
        alive, half = held, half // 2
    return Locality(levels, float(alive.double().mean()), 1 / length)
