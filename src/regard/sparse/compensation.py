"""What stands for the blocks that a selector leaves out: their means, or the means of everything."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.kernels import accumulation_dtype, block_sparse_attention, merge_attentions
from regard.layout import BlockLayout
from regard.masks import Boolean, Everything
from regard.sparse.scoring import BlockView, block_counts, per_kv_head, pool_blocks

__all__ = ["pooled_attention", "pooled_background", "pooled_remainder"]


def pooled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visit: Tensor | None,
    block_q: int,
    block_k: int,
    *,
    keys: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention to the means of key blocks, each counted as often as it has tokens: output and log-sum-exp.

    visit: boolean ``(batch | 1, heads | 1, num_q_blocks, num_k_blocks)``, the key blocks of each block of queries
    (None: all). keys: tokens that count. The logit of a block is ``scale q . mean(k) + log(tokens)``, so that a block
    of equal keys is exact for any values. Returns ``(batch, heads, q_len, value_dim)`` and ``(batch, heads, q_len)``.
    """
    heads = query.shape[1]
    key, value = per_kv_head(key, keys), per_kv_head(value, keys)
    means, values = pool_blocks(key, block_k, keys), pool_blocks(value, block_k, keys)
    work = accumulation_dtype(query.dtype)
    counts = block_counts(key, block_k, keys)
    sizes = counts.clamp_min(1).log().expand(*means.shape[:2], -1)
    # One more channel carries the logarithm of the size: q' = (scale q, 1), k' = (mean, log size).
    queries = torch.cat((query.to(work) * scale, query.new_ones(*query.shape[:3], 1, dtype=work)), -1)
    extended = torch.cat((means, sizes[..., None]), -1)
    shown = (counts > 0)[:, :, None]
    if visit is None:
        rule = None if keys is None else Boolean(shown)
        layout = BlockLayout.of(rule, query.shape[2], means.shape[2], block_q, block_q, query.device)
    else:
        visit = visit & shown
        visit = visit.expand(-1, visit.shape[1] if visit.shape[1] in (1, heads) else heads, -1, -1)
        layout = BlockLayout(visit, visit, Everything(), query.shape[2], means.shape[2], block_q, 1)
    out, lse = block_sparse_attention(queries, extended, values, layout, scale=1.0, return_lse=True)
    return out.to(query.dtype), lse


def pooled_remainder(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, view: BlockView) -> Tensor:
    """Exact attention to the blocks of ``layout``, the means of all others that a block of queries sees whole, one
    softmax over both."""
    exact, exact_lse = block_sparse_attention(query, key, value, layout, scale=view.scale, return_lse=True)
    left = view.layout.full & view.seen & ~layout.visit
    rest, rest_lse = pooled_attention(
        query, key, value, left, view.block_q, view.block_k, keys=view.keys, scale=view.scale
    )
    return merge_attentions((exact, rest), (exact_lse, rest_lse))[0]


def pooled_background(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    gap: int,
    *,
    keys: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Exact attention to the blocks of ``layout`` and attention to the means of all runs of ``gap`` keys, in one
    softmax: what the layout keeps counts twice, once exactly and once pooled. keys: tokens that count."""
    exact, exact_lse = block_sparse_attention(query, key, value, layout, scale=scale, return_lse=True)
    pooled, pooled_lse = pooled_attention(query, key, value, None, layout.block_q, gap, keys=keys, scale=scale)
    return merge_attentions((exact, pooled), (exact_lse, pooled_lse))[0]
