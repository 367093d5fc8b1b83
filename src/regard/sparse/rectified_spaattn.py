"""Rectified SpaAttn: what block-sparse attention keeps is weighed by a pooled picture of full attention, and what it
leaves out is put back as means where means can be trusted.

Softmax over kept keys alone gives them 1 / (kept mass) too much weight, and left-out keys none. Here block means
``qbar_a``, ``kbar_b`` give an implicit full attention, in which a block counts as often as it has tokens,

    P_ab = softmax_b( scale qbar_a . kbar_b + log |b| ),

with text tokens, at the end of the sequence, un-pooled beside the blocks. Per head and block of queries

    C  critical: the largest P until their sum passes top_p, at least min_blocks; neighbours and text: computed exactly
    R  rectified: of the others, those with more gain than error (below): stand by their mean
    U  the others: left out

    output = r O_C + sum_{b in R} P_ab vbar_b,        r = sum of P over C and U,

where ``O_C`` is exact softmax attention to ``C``: weights sum to 1, and the mass of ``U`` goes back to ``C``. The gain
test asks whether the mean logit of two blocks exceeds what their deviations can make of it (un-scaled logits; ``dev``:
mean of ``|x - xbar|`` over a block, element by element):

    |qbar . kbar|  >  |dev(q) . kbar| + |qbar . dev(k)|.

"Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation", 2025, arXiv 2511.19835.
Query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads, k_len, ...). Time: the share of blocks
kept, of dense, and ``O((N / B)^2 d)`` for the means. No parameters, no training; the choice is no function to
differentiate, all else is. Text queries, and the first layers on request, attend to everything; the paper keeps the
first denoising steps dense too (10 of 100 calls), which is the caller's to do. A video's tokens should come in an order
in which blocks are compact in space and time (:mod:`regard.layers.tiles`).

The paper's models see everything. Under a mask or causality a block that only some queries of a block see is always
critical, since no one mean stands for it, and one of the others is too: no query is left without a key that it may
see. Causal: means of a block hold its later tokens, but nothing behind it, and values never reach back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.kernels import (
    accumulation_dtype,
    block_sparse_attention,
    dense_attention,
    expand_groups,
    masked_softmax,
    score_scale,
)
from regard.layout import BlockLayout, block_members, num_blocks
from regard.masks import Mask
from regard.mechanism import Request
from regard.registry import register
from regard.sparse.frame import BlockSelector
from regard.sparse.scoring import BlockView, block_counts, grouped_scores, per_kv_head, pool_blocks
from regard.sparse.selection import top_k_mask, top_p_mask

__all__ = [
    "RectificationReport",
    "RectifiedSpaAttention",
    "implicit_block_attention",
    "pooling_gain_mask",
    "rectification_report",
    "rectified_block_attention",
]

Part = Literal["critical", "noncritical"]


def _pooled_length(length: int, text: int, block_size: int) -> int:
    """Tokens that are pooled: all without text, else the whole blocks before it. What is left of the visual tokens is
    treated as text."""
    return length if text == 0 else max(length - text, 0) // block_size * block_size


def implicit_block_attention(
    query: Tensor,
    key: Tensor,
    block_size: int = 128,
    text: int = 0,
    *,
    scale: float | None = None,
    view: BlockView | None = None,
) -> Tensor:
    """The pooled picture of full attention ``P``, ``(batch, num_heads, num_q_blocks, num_k_blocks [+ 1])``.

    text: so many last queries and keys are text; blocks are then those before it, and one more column holds the share
    of all text keys. Rows sum to 1. view: the mask of a call (default: none).
    """
    if view is None:
        view = _view(query, key, block_size, scale)
    layout, key = view.layout, per_kv_head(key, view.keys)
    pooled_q = _pooled_length(query.shape[2], text, block_size)
    pooled_k = _pooled_length(key.shape[2], text, block_size)
    if min(pooled_q, pooled_k) == 0:
        raise ShapeError(
            f"{query.shape[2]} queries and {key.shape[2]} keys, {text} of them text, hold no block of {block_size} "
            "tokens; take a smaller block_size."
        )
    rows, columns = num_blocks(pooled_q, block_size), num_blocks(pooled_k, block_size)
    before = None if view.keys is None else view.keys[..., :pooled_k]
    q_means = pool_blocks(query[:, :, :pooled_q], block_size)
    k_means = pool_blocks(key[:, :, :pooled_k], block_size, before)
    counts = block_counts(key[:, :, :pooled_k], block_size, before)
    logits = grouped_scores(q_means, k_means) * view.scale + counts.clamp_min(1).log()[:, :, None]
    seen = view.seen[:, :, :rows, :columns]
    if text == 0:
        return masked_softmax(logits, seen)
    of_text = grouped_scores(q_means, key[:, :, pooled_k:].to(q_means.dtype)) * view.scale
    q_blocks = block_members(pooled_q, block_size, query.device)
    single = torch.arange(pooled_k, layout.k_len, device=query.device)[:, None]
    text_seen, _ = layout.mask.bounds(q_blocks, single, layout.q_len, layout.k_len)
    if view.keys is not None:
        text_seen = text_seen & view.keys[:, :, None, pooled_k:]
    common = torch.broadcast_shapes(seen.shape[:2], text_seen.shape[:2])
    seen, text_seen = seen.expand(*common, -1, -1), text_seen.expand(*common, -1, -1)
    shares = masked_softmax(torch.cat((logits, of_text), -1), torch.cat((seen, text_seen), -1))
    return torch.cat((shares[..., :columns], shares[..., columns:].sum(-1, keepdim=True)), -1)


@torch.no_grad()
def pooling_gain_mask(query: Tensor, key: Tensor, block_size: int = 128, *, keys: Tensor | None = None) -> Tensor:
    """Pairs of blocks whose means can be trusted, boolean ``(batch, num_heads, num_q_blocks, num_k_blocks)``: the mean
    logit is larger than the error of pooling. keys: tokens that count, as in
    :func:`~regard.sparse.scoring.pool_blocks`."""
    key = per_kv_head(key, keys)
    q_means, k_means = pool_blocks(query, block_size), pool_blocks(key, block_size, keys)
    q_deviation = pool_blocks(_distance(query, q_means, block_size), block_size)
    k_deviation = pool_blocks(_distance(key, k_means, block_size), block_size, keys)
    error = grouped_scores(q_deviation, k_means).abs() + grouped_scores(q_means, k_deviation).abs()
    return grouped_scores(q_means, k_means).abs() > error


def _distance(x: Tensor, means: Tensor, block_size: int) -> Tensor:
    return (x.to(means.dtype) - means.repeat_interleave(block_size, 2)[:, :, : x.shape[2]]).abs()


def _view(query: Tensor, key: Tensor, block_size: int, scale: float | None) -> BlockView:
    layout = BlockLayout.of(None, query.shape[2], key.shape[2], block_size, block_size, query.device)
    return BlockView(layout, None, False, score_scale(query, scale))


@dataclass(frozen=True)
class _Plan:
    """Of the first ``pooled_q`` queries and ``pooled_k`` keys: P (with the text's column, if any), C and R."""

    pooled_q: int
    pooled_k: int
    shares: Tensor
    critical: Tensor
    rectified: Tensor


@register("rectified_spaattn")
class RectifiedSpaAttention(BlockSelector):
    """block_size: tokens a block, of queries and of keys. top_p: share of the implicit attention to compute, text
    included; 0 leaves it to min_blocks. min_blocks: a block of queries computes at least so many. neighbours: a mask of
    tokens whose blocks are always critical, as ``Neighborhood(...) | Sinks(height * width)`` for what is near and for
    the first frame. text: so many tokens at the end of queries and keys are text.

    rectify: whether ``O_C`` is scaled by ``r`` (``"critical"``), whether the means are added (``"noncritical"``); with
    neither, ordinary block-sparse attention. gain_aware: False puts all that is not critical into ``R``. dense_layers:
    so many first layers attend to everything (2 in the paper's runs).
    """

    def __init__(
        self,
        block_size: int = 128,
        top_p: float = 0.5,
        min_blocks: int = 1,
        neighbours: Mask | None = None,
        text: int = 0,
        rectify: Sequence[Part] = ("critical", "noncritical"),
        gain_aware: bool = True,
        *,
        dense_layers: int = 0,
        layer_index: int | None = None,
    ) -> None:
        super().__init__(block_size, block_size)
        if not 0 <= top_p <= 1:
            raise OptionError(f"top_p is a share, between 0 and 1; got {top_p}.")
        if min_blocks < 1 or text < 0 or dense_layers < 0:
            raise OptionError(
                f"Need min_blocks >= 1, text >= 0 and dense_layers >= 0; got {min_blocks}, {text} and {dense_layers}."
            )
        if isinstance(rectify, str) or not set(rectify) <= {"critical", "noncritical"}:
            raise OptionError(f"rectify names 'critical' and 'noncritical', one, both or neither; got {rectify!r}.")
        if neighbours is not None and not isinstance(neighbours, Mask):
            raise OptionError(f"neighbours is a mask such as SlidingWindow(64); got {type(neighbours).__name__}.")
        if dense_layers and layer_index is None:
            raise OptionError("dense_layers needs layer_index, to know whether this layer is one of them.")
        self.top_p, self.min_blocks, self.neighbours, self.text = top_p, min_blocks, neighbours, text
        self.rectify, self.gain_aware = tuple(rectify), gain_aware
        self.dense = layer_index is not None and layer_index < dense_layers
        self.off_grid = text

    def extra_repr(self) -> str:
        return f"block_size={self.block_q}, top_p={self.top_p}, text={self.text}, gain_aware={self.gain_aware}"

    def _attends_to_all(self, view: BlockView) -> bool:
        """Whether it is a dense layer, or no whole block comes before the text."""
        lengths = view.layout.q_len, view.layout.k_len
        return self.dense or min(_pooled_length(n, self.text, self.block_q) for n in lengths) == 0

    def _plan(self, query: Tensor, key: Tensor, view: BlockView) -> _Plan:
        shares = implicit_block_attention(query, key, self.block_q, self.text, view=view)
        pooled_q, pooled_k = (_pooled_length(n, self.text, self.block_q) for n in (query.shape[2], key.shape[2]))
        with torch.no_grad():
            columns = num_blocks(pooled_k, self.block_k)
            window = slice(None), slice(None), slice(shares.shape[2]), slice(columns)
            seen, whole = view.seen[window], (view.layout.full & view.seen)[window]
            blocks = shares[..., :columns]
            if self.top_p == 1:
                critical = seen.expand_as(blocks)
            else:
                limit = self.top_p - shares[..., columns:].sum(-1, keepdim=True)
                critical = top_p_mask(blocks, limit, minimum=self.min_blocks) | (seen & ~whole)
                lacking = ~(critical & whole).any(-1, keepdim=True)
                critical = critical | (lacking & top_k_mask(blocks.masked_fill(~whole, float("-inf")), 1))
            if self.neighbours is not None:
                rule, lengths = self.neighbours.to(query.device), (view.layout.q_len, view.layout.k_len)
                near = BlockLayout.of(rule, *lengths, self.block_q, self.block_k, query.device)
                critical = critical | near.visit[window]
            critical = critical & seen
            rectified = whole & ~critical
            if self.gain_aware:
                keys = None if view.keys is None else view.keys[..., :pooled_k]
                visual = query[:, :, :pooled_q], key[:, :, :pooled_k]
                rectified = rectified & pooling_gain_mask(*visual, self.block_q, keys=keys)
        return _Plan(pooled_q, pooled_k, shares, critical, rectified)

    def _blocks(self, plan: _Plan, view: BlockView) -> Tensor:
        """The blocks of C, those of text included, among all."""
        rows, columns = plan.critical.shape[-2:]
        chosen = view.layout.visit.expand(*plan.critical.shape[:2], -1, -1).clone()
        chosen[:, :, :rows, :columns] &= plan.critical
        return chosen

    def choose(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        if self._attends_to_all(view):
            return view.seen
        return self._blocks(self._plan(query, key, view), view)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        view = self.view(query, key, request)
        if self._attends_to_all(view):
            return dense_attention(query, key, value, causal=request.causal, mask=request.mask, scale=request.scale)
        plan = self._plan(query, key, view)
        layout = view.layout.only(self._blocks(plan, view) & view.seen)
        out = block_sparse_attention(query, key, value, layout, scale=request.scale)
        if not self.rectify:
            return out
        means = plan.shares[..., : plan.rectified.shape[-1]] * plan.rectified
        # r and c are the same for all queries of a block; text queries have neither.
        visual = out[:, :, : plan.pooled_q].to(accumulation_dtype(out.dtype))
        if "critical" in self.rectify:
            visual = visual * self._per_query(1 - means.sum(-1, keepdim=True), plan.pooled_q)
        if "noncritical" in self.rectify:
            keys = None if view.keys is None else view.keys[..., : plan.pooled_k]
            values = pool_blocks(per_kv_head(value, view.keys)[:, :, : plan.pooled_k], self.block_k, keys)
            visual = visual + self._per_query(means @ expand_groups(values, query.shape[1]), plan.pooled_q)
        return torch.cat((visual.to(out.dtype), out[:, :, plan.pooled_q :]), 2)

    def _per_query(self, x: Tensor, length: int) -> Tensor:
        return x.repeat_interleave(self.block_q, 2)[:, :, :length]

    def scoring_flops(self, shape: AttentionShape) -> int:
        return 4 * super().scoring_flops(shape)  # the mean logits, two products of the gain test, the means' values


def rectified_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_p: float = 0.5,
    min_blocks: int = 1,
    neighbours: Mask | None = None,
    text: int = 0,
    rectify: Sequence[Part] = ("critical", "noncritical"),
    gain_aware: bool = True,
    *,
    block_size: int = 128,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """In place of ``scaled_dot_product_attention``; options as in :class:`RectifiedSpaAttention`."""
    module = RectifiedSpaAttention(block_size, top_p, min_blocks, neighbours, text, rectify, gain_aware)
    return module(query, key, value, causal=causal, scale=scale)


@dataclass(frozen=True)
class RectificationReport:
    """Relative L1 errors against full attention, at one choice of critical blocks.

    ``sparse``: softmax over them alone; ``scaled``: its output times their share of the implicit attention;
    ``pooled``: all other blocks added by their means; ``rectified``: only those that pass the gain test. ``density``:
    share of the pairs that is computed; ``trusted``: share of the other visible blocks that pass.
    """

    sparse: float
    scaled: float
    pooled: float
    rectified: float
    density: float
    trusted: float


@torch.no_grad()
def rectification_report(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, **options: Any
) -> RectificationReport:
    """What each step of the rectification does to the error; options as in :class:`RectifiedSpaAttention` except
    ``rectify`` and ``gain_aware``."""
    exact = dense_attention(query, key, value, causal=causal)

    def error(rectify: Sequence[Part], gain_aware: bool) -> float:
        module = RectifiedSpaAttention(rectify=rectify, gain_aware=gain_aware, **options)
        return float((module(query, key, value, causal=causal) - exact).abs().sum() / exact.abs().sum())

    module = RectifiedSpaAttention(**options)
    view = module.view(query, key, module.request(query, key, value, causal))
    plan = module._plan(query, key, view)
    left = (view.layout.full & view.seen)[:, :, : plan.critical.shape[2], : plan.critical.shape[3]] & ~plan.critical
    return RectificationReport(
        sparse=error((), False),
        scaled=error(("critical",), False),
        pooled=error(("critical", "noncritical"), False),
        rectified=error(("critical", "noncritical"), True),
        density=module.chosen(query, key, view).density(),
        trusted=float(plan.rectified.sum() / left.sum().clamp_min(1)),
    )
