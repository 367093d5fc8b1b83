"""MRA attention: the attention matrix at several resolutions, fine where it is large and one number a block elsewhere.

A block of ``s`` queries by ``s`` keys has the coefficient ``mu = exp(scale qbar . kbar)``, the exponential of its mean
logit, since the mean of products ``q . k`` is the product of means (by Jensen's inequality at most the mean of its
exponentials). From all blocks of the coarsest scale, one budget for the whole matrix of a head,

    refine the m largest into blocks of the next scale, of those the m' largest, and so on;
    A_hat[i, j] = coefficient of the finest block that covers (i, j),        output = A_hat v / A_hat 1.

With scales (32, 1), MRA-2, chosen blocks hold exact logits, and each other one is its coefficient, counted as often as
it has keys, times its mean value. MRA-2-s (``mode="sparse"``) drops those others. Blocks are ranked by their mean logit
less the largest in their row of the coarsest blocks, so that, with a budget of at least one block per row, no row goes
without; ``relative=False`` ranks by ``mu`` itself. Both parts are merged by their log-sum-exp; the choice has no
gradient, all else has.

"Multi Resolution Analysis (MRA) for Approximate Self-Attention", 2022, arXiv 2207.10284, sections 4 and 5. Query
(batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads, k_len, ...). Time: ``O(N^2 d / s^2 + m s^2 d)``
with ``m`` about ``N / s``; scales between the first and the last add their ``N^2 d / s^2``. No parameters.

Padding takes no part: means are over tokens that count, and a budget by rows counts blocks of queries that hold one.
With as many queries as keys, a query counts if its own key does. A block that the mask cuts otherwise has no one
number, so it is refined in any case, within the budget as long as that lasts: a mask without shape in it costs as much
as dense attention. The paper attends in both directions. Causal is an extension: blocks before that of the queries may
be coarse, and each row of blocks has its even share of the budget, since one for all would let later tokens decide
where earlier ones look.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention, dense_attention, expand_groups, merge_attentions, score_scale
from regard.layers.tiles import TileOrder, tile_order
from regard.layout import BlockLayout, num_blocks
from regard.masks import Boolean, Causal, Mask, Reindexed
from regard.mechanism import Request
from regard.registry import register
from regard.sparse.frame import BlockSelector
from regard.sparse.scoring import BlockView, block_counts, block_has, grouped_scores, per_kv_head, pool_blocks
from regard.sparse.selection import top_k_mask

__all__ = [
    "MRA_PRESETS",
    "ErrorsAtEqualCost",
    "MRAAttention",
    "PaddedView",
    "mra_attention",
    "mra_decompose",
    "mra_error",
]

Mode = Literal["full", "sparse"]

MRA_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mra-2": {"scales": (32, 1), "blocks_per_row": 4, "mode": "full"},
    "mra-2-s": {"scales": (32, 1), "blocks_per_row": 4, "mode": "sparse"},
}
"""Options of the paper's two forms; it also runs them with 8 blocks per row."""


@dataclass(frozen=True, eq=False)
class PaddedView(BlockView):
    """A call whose padding is known apart from the rest of its mask.

    rule: what the mask hides of queries and keys that count. queries: boolean ``(batch | 1, heads | 1, q_len)``, those
    that count (None: all). sees: those that see anything (None: all).
    """

    rule: Mask | None = None
    queries: Tensor | None = None
    sees: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Level:
    """All blocks of one scale: where they stand, their mean logits, which the mask shows whole; ``(batch | 1, heads |
    1, num_q_blocks, num_k_blocks)``. rows: query blocks that hold a token (None: all)."""

    view: BlockView
    logits: Tensor
    whole: Tensor
    rows: Tensor | None = None

    @property
    def scale(self) -> int:
        return self.view.block_k

    def inherit(self, blocks: Tensor, scale: int) -> Tensor:
        """Blocks of a coarser scale, spread over the blocks in them."""
        (rows, columns), ratio = self.logits.shape[-2:], scale // self.scale
        return blocks.repeat_interleave(ratio, -2)[..., :rows, :].repeat_interleave(ratio, -1)[..., :columns]


@dataclass(frozen=True)
class _Refinement:
    """How blocks are chosen; options as in :class:`MRAAttention`."""

    scales: tuple[int, ...]
    budgets: tuple[int, ...] | None
    first: int
    diagonal: int
    blocks_per_row: int
    relative: bool

    def __post_init__(self) -> None:
        chain = list(pairwise(self.scales))
        if not self.scales or self.scales[-1] < 1 or any(b >= a or a % b for a, b in chain):
            raise OptionError(f"scales fall, each a divisor of the one before, as (32, 1); got {self.scales}.")
        if self.budgets is not None and (len(self.budgets) != len(chain) or any(m < 0 for m in self.budgets)):
            raise OptionError(
                f"budgets are {len(chain)} numbers, one for each of the scales {self.scales} but the last; "
                f"got {self.budgets}."
            )
        if min(self.first, self.diagonal, self.blocks_per_row) < 0:
            raise OptionError(
                "first, diagonal and blocks_per_row cannot be negative; "
                f"got {self.first}, {self.diagonal} and {self.blocks_per_row}."
            )

    @torch.no_grad()
    def run(self, levels: Sequence[_Level]) -> list[tuple[Tensor, Tensor]]:
        """Of each level, the blocks that stay as they are, and those that are refined."""
        parts: list[tuple[Tensor, Tensor]] = []
        minus = float("-inf")
        for index, level in enumerate(levels):
            scores = level.logits
            if index == 0:
                candidates = level.view.seen.expand_as(scores)
                top = scores.masked_fill(~candidates, minus).amax(-1, keepdim=True)
                top, prior = torch.where(top.isfinite(), top, 0), self._prior(level)
            else:
                coarser = levels[index - 1].scale
                candidates = level.view.seen & level.inherit(parts[-1][1], coarser)
                top = top.repeat_interleave(coarser // level.scale, 2)[:, :, : scores.shape[2]]
                prior = None if prior is None else level.inherit(prior, coarser)
            counted = candidates if level.rows is None else candidates & level.rows[..., None]
            scores = (scores - top if self.relative else scores).masked_fill(~counted, minus)
            if prior is not None:
                spread = scores.masked_fill(~counted, 0).abs().amax((-2, -1), keepdim=True)
                scores = torch.where(prior, scores + 3 * spread + 1, scores)
            cut = candidates & ~level.whole
            scores = scores.masked_fill(cut & counted, float("inf"))
            refined = self._largest(index, scores, level) | cut
            parts.append((candidates & ~refined, refined))
        return parts

    def _prior(self, level: _Level) -> Tensor | None:
        """Coarsest blocks that come first in the budget, ``(num_q_blocks, num_k_blocks)``."""
        if self.first == self.diagonal == 0:
            return None
        rows = torch.arange(level.logits.shape[-2], device=level.logits.device)[:, None]
        prior = (rows < self.first) | level.view.first(self.first)
        return prior | level.view.nearest(self.diagonal // 2 + 1) if self.diagonal else prior

    def _largest(self, index: int, scores: Tensor, level: _Level) -> Tensor:
        """The blocks of largest score within the budget."""
        count, given = scores.shape[-2], None if self.budgets is None else self.budgets[index]
        if level.view.causal:
            if given is None:
                return top_k_mask(scores, self.blocks_per_row)
            ends = torch.arange(count + 1, device=scores.device) * given // count
            return top_k_mask(scores, ends.diff()[:, None])
        total: int | Tensor = self.blocks_per_row * count if given is None else given
        if given is None and level.rows is not None:
            total = self.blocks_per_row * level.rows.sum(-1, keepdim=True)
        return top_k_mask(scores.flatten(-2), total).view(scores.shape)


@register("mra_attention")
class MRAAttention(BlockSelector):
    """scales: block sizes from coarse to 1, each a divisor of the one before. budgets: blocks to refine, of a head, at
    each scale but the last; by default ``blocks_per_row`` times the number of rows of blocks there. mode: ``"full"``,
    or ``"sparse"`` without the coarse part; a query none of whose blocks is chosen then gives zeros.

    first: the first so many rows and columns of coarsest blocks come first in the budget; diagonal: so do bands of
    blocks on the diagonal, 1 the diagonal alone, 3 a block to each side. relative: how blocks are ranked (above). tile:
    a block of an image is a patch, say (4, 8), of the ``grid`` in place of a strip (self-attention without causality;
    else tokens stay as they come).
    """

    growth = "N^2 / B^2 + N B"
    grid_axes: ClassVar[frozenset[int]] = frozenset({1, 2, 3})

    def __init__(
        self,
        scales: Sequence[int] = (32, 1),
        budgets: Sequence[int] | None = None,
        mode: Mode = "full",
        first: int = 0,
        diagonal: int = 0,
        *,
        blocks_per_row: int = 4,
        relative: bool = True,
        tile: Sequence[int] | None = None,
    ) -> None:
        if mode not in ("full", "sparse"):
            raise OptionError(f"mode is 'full' or 'sparse', got {mode!r}.")
        own = None if budgets is None else tuple(budgets)
        refinement = _Refinement(tuple(scales), own, first, diagonal, blocks_per_row, relative)
        if scales[-1] != 1:
            raise OptionError(f"The last scale of attention is 1, single tokens; got {tuple(scales)}.")
        block = scales[-2] if len(scales) > 1 else 1
        super().__init__(block, block)
        self.refinement = refinement
        if tile is not None:
            if len(tile) not in self.grid_axes or math.prod(tile) != scales[0]:
                raise OptionError(f"A tile holds the {scales[0]} tokens of a coarsest block; got {tuple(tile)}.")
            self.grid_axes = frozenset({len(tile)})  # type: ignore[misc]
        self.scales, self.mode, self.tile = tuple(scales), mode, None if tile is None else tuple(tile)

    def extra_repr(self) -> str:
        chosen = self.refinement
        budget = f"blocks_per_row={chosen.blocks_per_row}" if chosen.budgets is None else f"budgets={chosen.budgets}"
        return f"scales={self.scales}, {budget}, mode={self.mode!r}"

    def view(self, query: Tensor, key: Tensor, request: Request) -> PaddedView:
        base = super().view(query, key, request)
        known = base.layout, base.keys, base.causal, base.scale
        rule = Causal() if request.causal else None
        if base.keys is None:
            return PaddedView(*known, rule=rule)
        own = base.keys if query.shape[2] == key.shape[2] else None
        if request.mask is None or request.keys is not None:
            return PaddedView(*known, rule=rule, queries=own)
        shown = request.mask.dense(query.shape[2], key.shape[2], query.device)
        sees = shown.any(-1)
        beside = Boolean(shown | ~base.keys[:, :, None] | ~sees[..., None])
        return PaddedView(
            *known,
            rule=beside if rule is None else beside & rule,
            queries=sees if own is None else sees & own,
            sees=sees,
        )

    def choose(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        if len(self.scales) == 1:
            return view.seen
        return self.refinement.run(self._levels(query, key, view))[-1][1]

    @torch.no_grad()
    def _levels(self, query: Tensor, key: Tensor, view: BlockView) -> list[_Level]:
        layout, levels = view.layout, []
        rule, queries = (view.rule, view.queries) if isinstance(view, PaddedView) else (layout.mask, None)
        keys = per_kv_head(key, view.keys)
        for scale in self.scales[:-1]:
            lengths = layout.q_len, layout.k_len, scale, scale, query.device
            here = BlockView(BlockLayout.of(layout.mask, *lengths), view.keys, view.causal, view.scale)
            logits = grouped_scores(pool_blocks(query, scale, queries), pool_blocks(keys, scale, view.keys))
            rows = None if queries is None else block_has(queries, scale)
            levels.append(_Level(here, logits * view.scale, BlockLayout.of(rule, *lengths).full, rows))
        return levels

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        order = self._order(query, key, request)
        if order is not None:
            query, key, value = (order.apply(t) for t in (query, key, value))
            request = _reordered(request, order)
        out = self._attend(query, key, value, self.view(query, key, request))
        return out if order is None else order.undo(out)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, view: PaddedView) -> Tensor:
        levels = self._levels(query, key, view)
        parts = self.refinement.run(levels)
        layout = view.layout.only(parts[-1][1]) if parts else view.layout
        if self.mode == "sparse":
            return block_sparse_attention(query, key, value, layout, scale=view.scale)
        out, lse = block_sparse_attention(query, key, value, layout, scale=view.scale, return_lse=True)
        outs, lses = [out], [lse]
        key, value = per_kv_head(key, view.keys), per_kv_head(value, view.keys)
        for level, (coarse, _) in zip(levels, parts, strict=True):
            size = level.scale
            means = pool_blocks(query, size, view.queries)
            keys, values = pool_blocks(key, size, view.keys), pool_blocks(value, size, view.keys)
            weight = block_counts(key, size, view.keys).clamp_min(1).log()[:, :, None]
            out, lse = dense_attention(
                means, keys, values, mask=Boolean(coarse), bias=weight, scale=view.scale, return_lse=True
            )
            outs.append(_per_query(out, size, query.shape[2]))
            lse = _per_query(lse, size, query.shape[2])
            lses.append(lse if view.sees is None else lse.masked_fill(~view.sees, float("-inf")))
        return merge_attentions(outs, lses)[0].to(query.dtype)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        order = self._order(query, key, request)
        if order is not None:
            query, key, request = order.apply(query), order.apply(key), _reordered(request, order)
        return self.select(query, key, request).density()

    def _order(self, query: Tensor, key: Tensor, request: Request) -> TileOrder | None:
        """The order of tokens patch by patch, None where they stay."""
        if self.tile is None or request.grid is None or request.causal or key.shape[2] != query.shape[2]:
            return None
        if len(request.grid) != len(self.tile):
            raise ShapeError(f"Patches of {self.tile} need a grid of {len(self.tile)} axes, got {request.grid}.")
        return tile_order(request.grid, self.tile, (1,) * len(self.tile), query.device)

    def most_blocks(self, num_k_blocks: int) -> float:
        if len(self.scales) == 1:
            return num_k_blocks
        # Of a square matrix, per row on average.
        budgets = self.refinement.budgets
        mean = self.refinement.blocks_per_row if budgets is None else budgets[-1] / num_k_blocks
        return min(mean, num_k_blocks)

    def scoring_flops(self, shape: AttentionShape) -> int:
        """Mean logits, once to choose and once more, with their values, for the coarse part."""
        pairs = sum(num_blocks(shape.q_len, s) * num_blocks(shape.k_len, s) for s in self.scales[:-1])
        width = shape.head_dim if self.mode == "sparse" else 2 * shape.head_dim + shape.v_dim
        return 2 * shape.batch * shape.num_heads * pairs * width


def _per_query(x: Tensor, scale: int, length: int) -> Tensor:
    return x.repeat_interleave(scale, 2)[:, :, :length]


def _reordered(request: Request, order: TileOrder) -> Request:
    """Filling places are padding."""
    valid = order.valid[None, None]
    place, filled = order.order, order.padded > order.length
    if request.keys is not None or (request.mask is None and filled):
        keys = valid if request.keys is None else request.keys[..., place] & valid
        return dataclasses.replace(request, mask=Boolean(keys[:, :, None]), keys=keys)
    if request.mask is None:
        return request
    mask = Reindexed(request.mask, place, place, None, order.valid if filled else None, order.length, order.length)
    return dataclasses.replace(request, mask=mask)


def mra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scales: Sequence[int] = (32, 1),
    budgets: Sequence[int] | None = None,
    mode: Mode = "full",
    first: int = 0,
    diagonal: int = 0,
    mask: Mask | Tensor | None = None,
    *,
    causal: bool = False,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """MRA as a function; options as in :class:`MRAAttention`."""
    module = MRAAttention(scales, budgets, mode, first, diagonal, **options)
    return module(query, key, value, causal=causal, mask=mask, grid=grid, scale=scale)


def mra_decompose(
    logits: Tensor,
    scales: Sequence[int] = (32, 1),
    budgets: Sequence[int] | None = None,
    mode: Mode = "full",
    first: int = 0,
    diagonal: int = 0,
    *,
    blocks_per_row: int = 4,
    relative: bool = True,
) -> Tensor:
    """The approximation of ``exp(logits)``, for analysis: ``(..., q_len, k_len)``, all of which is formed.

    The last scale need not be 1; then nothing is exact. Options as in :class:`MRAAttention`.
    """
    if logits.dim() < 2:
        raise ShapeError(f"logits are (..., q_len, k_len), got {tuple(logits.shape)}.")
    own = None if budgets is None else tuple(budgets)
    refinement = _Refinement(tuple(scales), own, first, diagonal, blocks_per_row, relative)
    if mode not in ("full", "sparse"):
        raise OptionError(f"mode is 'full' or 'sparse', got {mode!r}.")
    q_len, k_len = logits.shape[-2:]
    entries = logits.reshape(1, -1, q_len, k_len)
    levels = []
    for scale in scales:
        layout = BlockLayout.of(None, q_len, k_len, scale, scale, logits.device)
        means = pool_blocks(pool_blocks(entries, scale).transpose(-1, -2), scale).transpose(-1, -2)
        levels.append(_Level(BlockView(layout, None, False, 1.0), means, layout.full))
    parts = refinement.run(levels[:-1])
    finest = levels[-1].inherit(parts[-1][1], levels[-2].scale) if parts else levels[-1].whole
    kept = [coarse & (mode == "full") for coarse, _ in parts]
    out = torch.zeros_like(entries, dtype=levels[-1].logits.dtype)
    for level, blocks in zip(levels, (*kept, finest), strict=True):
        wide = torch.where(blocks, level.logits.exp(), 0).repeat_interleave(level.scale, -2)[..., :q_len, :]
        out = out + wide.repeat_interleave(level.scale, -1)[..., :k_len]
    return out.to(logits.dtype).view(logits.shape)


@dataclass(frozen=True)
class ErrorsAtEqualCost:
    """Relative errors, of ``A = exp(logits)`` in Frobenius norm (``matrix``) and of the output (``output``), by method:

    ``"full"`` and ``"sparse"`` MRA, ``"rank"``: the best approximation of a rank (of A, and of the softmax for the
    output), ``"topk"``: the largest entries of each row, ``"window"``: the nearest. Rank and top-k are found in the
    whole matrix, which no fast method has. pairs: pairs of vectors that MRA multiplies, per query; the others have as
    many, where a rank costs two, for its factors are computed too.
    """

    matrix: dict[str, float]
    output: dict[str, float]
    pairs: float


@torch.no_grad()
def mra_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scales: Sequence[int] = (32, 1),
    budgets: Sequence[int] | None = None,
    *,
    blocks_per_row: int = 4,
    relative: bool = True,
    scale: float | None = None,
) -> ErrorsAtEqualCost:
    """Errors of MRA and of others of equal cost, averaged over heads; tensors as in attention, without a mask.

    It forms whole matrices and their singular values, so it is for lengths of a few thousand at most.
    """
    key, value = (expand_groups(t, query.shape[1]).double() for t in (key, value))
    logits = query.double() @ key.transpose(-1, -2) * score_scale(query, scale)
    logits = logits - logits.amax((-2, -1), keepdim=True)
    exact, weights = logits.exp(), logits.softmax(-1)
    shown: dict[str, tuple[Tensor, Tensor]] = {}
    modes: tuple[Mode, ...] = ("full", "sparse")
    for mode in modes:
        found = mra_decompose(logits, scales, budgets, mode, blocks_per_row=blocks_per_row, relative=relative)
        shown[mode] = found, _normalised(found)
    module = MRAAttention(scales, budgets, blocks_per_row=blocks_per_row, relative=relative)
    q_len, k_len = logits.shape[-2:]
    coarse = sum(num_blocks(q_len, s) * num_blocks(k_len, s) for s in scales[:-1]) / q_len
    pairs = (module.pairs(query.double(), key, scale=scale) or 0.0) * k_len + coarse
    rank, number = max(int(pairs / 2), 1), min(max(round(pairs), 1), k_len)
    shown["rank"] = _low_rank(exact, rank), _low_rank(weights, rank)
    position = torch.arange(q_len, device=query.device)[:, None] + (k_len - q_len)
    distance = (torch.arange(k_len, device=query.device) - position).abs()
    for name, kept in (("topk", top_k_mask(logits, number)), ("window", distance <= (number - 1) // 2)):
        shown[name] = exact * kept, _normalised(exact * kept)
    wanted = weights @ value
    return ErrorsAtEqualCost(
        matrix={name: _relative(matrix, exact) for name, (matrix, _) in shown.items()},
        output={name: _relative(rows @ value, wanted) for name, (_, rows) in shown.items()},
        pairs=pairs,
    )


def _normalised(matrix: Tensor) -> Tensor:
    total = matrix.sum(-1, keepdim=True)
    return matrix / torch.where(total > 0, total, 1)


def _low_rank(matrix: Tensor, rank: int) -> Tensor:
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :]


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm(dim=(-2, -1)) / wanted.norm(dim=(-2, -1))).mean())
