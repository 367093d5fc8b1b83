"""How good a choice of blocks or tokens is, measured against full attention: what it keeps, and what heads agree on."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.kernels import accumulation_dtype, masked_softmax, score_scale
from regard.layout import BlockLayout, TokenLayout
from regard.masks import Boolean, Causal, Everything, Mask
from regard.sparse.scoring import grouped_scores

__all__ = ["head_agreement", "mass_recall"]

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
