"""Softmax attention over the blocks of a layout, any layout, per batch and head.

``reference``: the dense form under the layout's mask. ``gather``: visited key blocks gathered for groups of query blocks,
plain matrix products, recomputed in a hand-written backward pass; memory grows with the visited blocks of one group.
``flex``: compiled FlexAttention (forward and backward on a GPU, forward alone on a CPU).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError, ShapeError
from regard.kernels.backends import resolve
from regard.kernels.dense import dense_attention
from regard.kernels.shapes import accumulation_dtype, score_scale
from regard.layout import BlockLayout
from regard.masks import Boolean

__all__ = ["block_sparse_attention"]

FORMS = ("reference", "gather", "flex")

# Scores of one group stay below this many elements, so that they live in the cache between the two products.
_GROUP = 1 << 20


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` over the pairs of ``layout``.

    query ``(batch, num_heads, q_len, head_dim)``; key and value ``(batch, kv_heads, k_len, ...)``, ``kv_heads`` dividing
    ``num_heads``. Returns ``(batch, num_heads, q_len, value_dim)`` and, with ``return_lse``, the log-sum-exp of each row
    ``(batch, num_heads, q_len)``. Rows with nothing to see give zeros (and ``-inf``).
    """
    if layout.q_len != query.shape[2] or layout.k_len != key.shape[2]:
        raise ShapeError(
            f"The layout is for {layout.q_len} queries and {layout.k_len} keys; got {query.shape[2]} and {key.shape[2]}."
        )
    form = resolve("block_sparse", backend, FORMS)
    if form == "reference":
        mask = Boolean(layout.dense())
        if return_lse:
            return dense_attention(query, key, value, mask=mask, scale=scale, return_lse=True, backend="reference")
        return dense_attention(query, key, value, mask=mask, scale=scale, backend="reference")
    if form == "flex" or (form == "auto" and query.is_cuda and not return_lse):
        if return_lse:
            raise BackendError("The flex form does not return the log-sum-exp; use backend='gather'.")
        return _flex(query, key, value, layout, score_scale(query, scale))
    out, lse = _Gather.apply(query, key, value, layout, score_scale(query, scale))  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    if not query.is_cuda and any(t.requires_grad for t in (query, key, value)):
        raise BackendError("FlexAttention has no backward pass on CPU; use backend='gather'.")
    return _compiled_flex()(
        query,
        key,
        value,
        block_mask=layout.block_mask(),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@dataclass(frozen=True)
class _Group:
    """Query blocks that are computed together, with their key blocks."""

    queries: Tensor  # (rows,) index of each query block among all (batch, head, block)
    keys: Tensor  # (rows, slots) index of each key block among all (batch, kv head, block)
    empty: Tensor | None  # (rows, slots), True where a slot only fills up the group
    partial: tuple[Tensor, Tensor]  # row and slot of each block that needs a mask inside
    hidden: Tensor | None  # (partial blocks, block_q, block_k), True where a pair is not seen


def _groups(layout: BlockLayout, batch: int, heads: int, kv_heads: int) -> Iterator[_Group]:
    """Query blocks sorted by how many key blocks they visit, cut so that a group's scores stay small."""
    nq, nk = layout.visit.shape[-2:]
    device = layout.visit.device
    visit = layout.visit.expand(batch, heads, nq, nk).reshape(-1, nk)
    masked = layout.partial
    if layout.k_len % layout.block_k:
        masked = masked.clone()
        masked[..., -1] |= layout.visit[..., -1]
    masked = masked.expand(batch, heads, nq, nk).reshape(-1, nk)
    counts = visit.sum(-1)
    order = counts.argsort(stable=True)
    sorted_counts = counts[order].tolist()
    rule = layout.mask.mod(layout.q_len, layout.k_len)
    one_batch, one_head = layout.mask.batch == 1, layout.mask.heads == 1
    start = next((i for i, count in enumerate(sorted_counts) if count), len(sorted_counts))
    while start < len(sorted_counts):
        stop = start + 1
        while stop < len(sorted_counts):
            area = (stop + 1 - start) * sorted_counts[stop] * layout.block_q * layout.block_k
            if area > _GROUP or sorted_counts[stop] > 1.25 * sorted_counts[start] + 1:
                break
            stop += 1
        rows, slots = order[start:stop], sorted_counts[stop - 1]
        chosen = visit[rows].to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :slots]
        empty = torch.arange(slots, device=device) >= counts[rows][:, None]
        head = rows // nq
        kv_row = (head // heads) * kv_heads + (head % heads) // (heads // kv_heads)
        row, slot = (masked[rows].gather(1, chosen) & ~empty).nonzero(as_tuple=True)
        hidden = None
        if row.numel():
            token_q = (rows[row] % nq)[:, None] * layout.block_q + torch.arange(layout.block_q, device=device)
            token_k = chosen[row, slot][:, None] * layout.block_k + torch.arange(layout.block_k, device=device)
            at = head[row][:, None, None]
            hidden = ~rule(
                torch.zeros_like(at) if one_batch else at // heads,
                torch.zeros_like(at) if one_head else at % heads,
                token_q.clamp_max(layout.q_len - 1)[:, :, None],
                token_k.clamp_max(layout.k_len - 1)[:, None],
            ) | (token_k >= layout.k_len)[:, None]
        yield _Group(
            rows, kv_row[:, None] * nk + chosen, empty if bool(empty.any()) else None, (row, slot), hidden
        )
        start = stop


def _blocks(tensor: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """``(batch, heads, length, dim)`` -> ``(all blocks, block, dim)``, zeros after the end."""
    short = -tensor.shape[2] % block
    padded = F.pad(tensor, (0, 0, 0, short)) if short else tensor
    return padded.to(dtype).reshape(-1, block, tensor.shape[-1])


def _scores(group: _Group, queries: Tensor, keys: Tensor, block_k: int) -> Tensor:
    """Masked scores ``(rows, block_q, slots * block_k)``; queries are already scaled."""
    scores = queries @ keys.transpose(-1, -2)
    tiles = scores.view(*scores.shape[:2], -1, block_k)
    if group.hidden is not None:
        row, slot = group.partial
        tiles[row, :, slot] = tiles[row, :, slot].masked_fill(group.hidden, float("-inf"))
    if group.empty is not None:
        tiles.masked_fill_(group.empty[:, None, :, None], float("-inf"))
    return scores


def _take(blocks: Tensor, index: Tensor) -> Tensor:
    return blocks[index.flatten()].view(len(index), -1, blocks.shape[-1])


class _Gather(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward forms the scores again, group by group."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        work, (batch, heads, q_len, _) = accumulation_dtype(query.dtype), query.shape
        queries = _blocks(query, layout.block_q, work) * scale
        keys, values = _blocks(key, layout.block_k, work), _blocks(value, layout.block_k, work)
        out = queries.new_zeros(*queries.shape[:2], value.shape[-1])
        lse = queries.new_full(queries.shape[:2], float("-inf"))
        for group in _groups(layout, batch, heads, key.shape[1]):
            scores = _scores(group, queries[group.queries], _take(keys, group.keys), layout.block_k)
            top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(work).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            part = weights @ _take(values, group.keys)
            out[group.queries] = part.div_(torch.where(total > 0, total, 1))
            lse[group.queries] = torch.where(total > 0, top + total.log(), float("-inf"))[..., 0]
        out = out.view(batch, heads, -1, value.shape[-1])[:, :, :q_len].to(query.dtype)
        lse = lse.view(batch, heads, -1)[:, :, :q_len]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        layout: BlockLayout = ctx.layout
        work, (batch, heads, q_len, _) = lse.dtype, query.shape
        queries = _blocks(query, layout.block_q, work) * ctx.scale
        keys, values = _blocks(key, layout.block_k, work), _blocks(value, layout.block_k, work)
        grads = _blocks(grad_out, layout.block_q, work)
        delta = (grad_out.to(work) * out.to(work)).sum(-1) - grad_lse
        deltas = _blocks(delta[..., None], layout.block_q, work)
        lses = _blocks(torch.where(lse.isfinite(), lse, 0)[..., None], layout.block_q, work)
        grad_queries = torch.zeros_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for group in _groups(layout, batch, heads, key.shape[1]):
            queries_here, grads_here = queries[group.queries], grads[group.queries]
            keys_here, values_here = _take(keys, group.keys), _take(values, group.keys)
            weights = _scores(group, queries_here, keys_here, layout.block_k).sub_(lses[group.queries]).exp_()
            flat = group.keys.flatten()
            grad_values.index_add_(
                0, flat, (weights.transpose(-1, -2) @ grads_here).view(-1, layout.block_k, values.shape[-1])
            )
            grad_scores = (grads_here @ values_here.transpose(-1, -2)).sub_(deltas[group.queries]).mul_(weights)
            grad_queries[group.queries] = grad_scores @ keys_here
            grad_keys.index_add_(
                0, flat, (grad_scores.transpose(-1, -2) @ queries_here).view(-1, layout.block_k, keys.shape[-1])
            )

        def restore(blocks: Tensor, like: Tensor) -> Tensor:
            return blocks.view(*like.shape[:2], -1, like.shape[-1])[:, :, : like.shape[2]].to(like.dtype)

        grad_query = restore(grad_queries, query) * ctx.scale
        return grad_query, restore(grad_keys, key), restore(grad_values, value), None, None
