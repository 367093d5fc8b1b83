"""How good a choice of blocks or tokens is, measured against full attention: what it keeps, and what heads agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.kernels import accumulation_dtype, masked_softmax, score_scale
from regard.layout import BlockLayout, TokenLayout
from regard.masks import Boolean, Causal, Everything, Mask
from regard.mechanism import Mechanism, Request
from regard.sparse.scoring import grouped_scores

__all__ = ["attention_overlap", "head_agreement", "mass_recall", "topk_recall"]

# Scores that are formed at once.
_AREA = 1 << 24


@torch.no_grad()
def mass_recall(
    query: Tensor,
    key: Tensor,
    layout: BlockLayout | TokenLayout,
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    per_query: bool = False,
) -> Tensor:
    """Share of full attention's weight that lies on the pairs that ``layout`` computes: ``(batch, heads)``.

    Full attention is that under ``causal`` and ``mask`` (a mask, or a boolean tensor); the share is averaged over the
    queries that see anything. per_query: ``(batch, heads, q_len)`` instead, nan for a query that sees nothing. The
    scores are formed in stretches of queries, so memory grows with the number of keys alone.
    """
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    known = (layout.q_len if isinstance(layout, BlockLayout) else layout.indices.shape[2], layout.k_len)
    if known != (q_len, k_len):
        raise ShapeError(f"The layout is for {known[0]} x {known[1]} tokens, but there are {q_len} x {k_len}.")
    rule = Everything() if mask is None else mask if isinstance(mask, Mask) else Boolean(mask)
    rule = (rule & Causal() if causal else rule).to(query.device)
    work, factor = accumulation_dtype(query.dtype), score_scale(query, scale)
    columns = torch.arange(k_len, device=query.device).view(1, 1, 1, -1)
    step = max(_AREA // (batch * heads * k_len), 1)
    shares = []
    for start in range(0, q_len, step):
        rows = torch.arange(start, min(start + step, q_len), device=query.device)
        seen = rule.at(rows.view(1, 1, -1, 1), columns, q_len, k_len)
        weights = masked_softmax(grouped_scores(query[:, :, rows].to(work) * factor, key.to(work)), seen)
        share = (weights * _computed(layout, rows)).sum(-1)
        shares.append(share.masked_fill(~seen.any(-1), float("nan")))
    recall = torch.cat(shares, -1)
    return recall if per_query else recall.nanmean(-1)


def _computed(layout: BlockLayout | TokenLayout, rows: Tensor) -> Tensor:
    """The pairs of some queries that are computed, boolean ``(batch | 1, heads | 1, len(rows), k_len)``."""
    if isinstance(layout, TokenLayout):
        return TokenLayout(layout.indices[:, :, rows], layout.k_len).dense()
    blocks = layout.visit[:, :, rows.div(layout.block_q, rounding_mode="floor")]
    wide = blocks.repeat_interleave(layout.block_k, 3)[..., : layout.k_len]
    columns = torch.arange(layout.k_len, device=rows.device).view(1, 1, 1, -1)
    return wide & layout.mask.at(rows.view(1, 1, -1, 1), columns, layout.q_len, layout.k_len)


def head_agreement(weights: Tensor, top: int) -> Tensor:
    """How far heads agree on what matters: the share of the ``top`` keys of largest weight that two heads have in
    common, averaged over queries.

    ``weights`` ``(batch, heads, q_len, k_len)``; only queries with at least ``top`` keys of positive weight count.
    Returns ``(batch, heads, heads)``, ones on the diagonal; ``top / k_len`` is chance. nan where no query counts.
    """
    if weights.dim() != 4 or not 1 <= top <= weights.shape[-1]:
        raise ShapeError(
            f"Need weights (batch, heads, q_len, k_len) and top between 1 and k_len; got {tuple(weights.shape)}, {top}."
        )
    best = torch.zeros_like(weights, dtype=accumulation_dtype(weights.dtype))
    best.scatter_(-1, weights.topk(top, -1).indices, 1.0)
    counts = ((weights > 0).sum(-1) >= top).all(1).to(best.dtype)  # (batch, q_len)
    common = torch.einsum("bhqk,bgqk,bq->bhg", best, best, counts)
    return common / top / counts.sum(-1)[:, None, None]


def topk_recall(selected: Tensor, scores: Tensor, top_k: int) -> Tensor:
    """Share of the ``top_k`` largest of ``scores (..., keys)`` that is among ``selected (..., slots)``, indices without
    repetition, -1 for an empty slot: ``(...)``."""
    if not 1 <= top_k <= scores.shape[-1] or selected.shape[:-1] != scores.shape[:-1]:
        raise ShapeError(
            f"Need selected (..., slots) for scores (..., keys) and top_k between 1 and keys; got "
            f"{tuple(selected.shape)}, {tuple(scores.shape)}, {top_k}."
        )
    chosen = torch.zeros(*scores.shape[:-1], scores.shape[-1] + 1, dtype=torch.bool, device=scores.device)
    chosen.scatter_(-1, selected.where(selected >= 0, scores.shape[-1]), True)
    hits = chosen.gather(-1, scores.topk(top_k, -1).indices)
    return hits.to(torch.float64).mean(-1)


@torch.no_grad()
def attention_overlap(
    mechanism: Mechanism,
    query: Tensor,
    key: Tensor,
    *,
    columns: int | None = None,
    rows: int | None = None,
    first: int = 64,
    seed: int = 0,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Share of full attention's weight that a mechanism's weights have in common with it, ``sum_j min(a_ij, b_ij)``:
    ``(batch, heads)``, averaged over the queries that see anything.

    For softmax over a choice of keys this is the share of full attention's weight on the keys chosen; where left-out
    keys are stood for by others, it counts what comes out at the right place. columns: an estimate from the ``first``
    keys and a random choice of others, this many in all; rows: from a random choice of this many queries.
    """
    request = mechanism.request(query, key, key, causal, mask, grid, scale)
    batch, heads, q_len, _ = query.shape
    k_len, work = key.shape[2], accumulation_dtype(query.dtype)
    rule = (Everything() if request.visible is None else request.visible).to(query.device)
    generator = torch.Generator().manual_seed(seed)
    chosen, factor = torch.arange(k_len), torch.ones(k_len, dtype=work)
    if columns is not None and columns < k_len:
        first = min(first, columns)
        rest = torch.randperm(k_len - first, generator=generator)[: columns - first] + first
        chosen = torch.cat((torch.arange(first), rest.sort().values))
        factor = torch.cat((torch.ones(first), torch.full((len(rest),), (k_len - first) / max(len(rest), 1)))).to(work)
    asked = torch.randperm(q_len, generator=generator)[:rows].sort().values.to(query.device)
    chosen, factor = chosen.to(query.device), factor.to(query.device)
    every = torch.arange(k_len, device=query.device).view(1, 1, 1, -1)
    parts = chosen.split(512)
    implied = [_columns(mechanism, query, key, part, request)[:, :, asked] for part in parts]
    common, known = torch.zeros(2, batch, heads, dtype=work, device=query.device)
    step = max(_AREA // (batch * heads * k_len), 1)
    for start in range(0, len(asked), step):
        some = asked[start : start + step]
        seen = rule.at(some.view(1, 1, -1, 1), every, q_len, k_len)
        logits = grouped_scores(score_scale(query, request.scale) * query[:, :, some].to(work), key.to(work))
        weights = masked_softmax(logits, seen)
        for part, theirs, scaled in zip(parts, implied, factor.split(512), strict=True):
            here = weights[..., part]
            least = torch.minimum(here, theirs[:, :, start : start + step].to(work))
            common, known = common + (least @ scaled).sum(-1), known + (here @ scaled).sum(-1)
    return common / known


def _columns(mechanism: Mechanism, query: Tensor, key: Tensor, part: Tensor, request: Request) -> Tensor:
    """Some columns of the implied attention matrix, ``(batch, heads, q_len, len(part))``."""
    identity = key.new_zeros(key.shape[2], len(part))
    identity[part, torch.arange(len(part), device=part.device)] = 1
    return mechanism.attend(query, key, identity.expand(*key.shape[:2], -1, -1), request)
