"""The form of block-sparse attention that runs anywhere: key blocks gathered for groups of query blocks, plain matrix
products, recomputed in a hand-written backward pass. Memory grows with the visited blocks of one group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.kernels.block_plan import Group, Plan, plan_of
from regard.kernels.score_bias import TableBias
from regard.kernels.shapes import accumulation_dtype, cut_blocks, take_blocks
from regard.layout import BlockLayout

__all__ = ["GatheredBlocks"]


def _area(device: torch.device) -> int:
    """Pairs of one group: on a CPU its scores stay in the cache of each core between the two products."""
    return (1 << 18) * torch.get_num_threads() if device.type == "cpu" else 1 << 24


def _scores(
    layout: BlockLayout, plan: Plan, group: Group, queries: Tensor, keys: Tensor, entries: Tensor | None, table: Tensor
) -> Tensor:
    """Masked scores ``(rows, block_q, slots * block_k)``; queries are already scaled. entries: of the flat table."""
    scores = queries @ keys.transpose(-1, -2)
    if entries is not None:
        scores += table.flatten()[entries]
    tiles = scores.view(*scores.shape[:2], -1, layout.block_k)
    if len(group.tiles):
        row, slot = group.partial
        tiles[row, :, slot] = tiles[row, :, slot].masked_fill_(~plan.visible(layout, group.tiles), float("-inf"))
    if group.empty is not None:
        tiles.masked_fill_(group.empty[:, None, :, None], float("-inf"))
    return scores


def _entries(layout: BlockLayout, group: Group, heads: int, bias: TableBias | None) -> Tensor | None:
    """Places ``(rows, block_q, slots * block_k)`` in the flat table."""
    if bias is None:
        return None
    nq, nk = layout.visit.shape[-2:]
    device = group.queries.device
    query = (group.queries % nq)[:, None] * layout.block_q + torch.arange(layout.block_q, device=device)
    key = ((group.keys % nk)[..., None] * layout.block_k + torch.arange(layout.block_k, device=device)).flatten(1)
    entries = bias.entries(query.clamp_max(layout.q_len - 1)[..., None], key.clamp_max(layout.k_len - 1)[:, None])
    head = group.queries.div(nq, rounding_mode="floor") % heads if bias.table.shape[0] > 1 else group.queries * 0
    return entries + (head * bias.table.shape[1])[:, None, None]


class GatheredBlocks(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward forms the scores again, group by group."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        layout: BlockLayout,
        scale: float,
        bias: TableBias | None,
    ) -> tuple[Tensor, Tensor]:
        work, (batch, heads, q_len, _) = accumulation_dtype(query.dtype), query.shape
        queries = cut_blocks(query, layout.block_q, work) * scale
        keys, values = cut_blocks(key, layout.block_k, work), cut_blocks(value, layout.block_k, work)
        out = queries.new_zeros(*queries.shape[:2], value.shape[-1])
        lse = queries.new_full(queries.shape[:2], float("-inf"))
        plan, added = plan_of(layout), queries.new_empty(0) if table is None else table.to(work)
        for group in plan.groups(layout, batch, heads, key.shape[1], _area(query.device)):
            entries = _entries(layout, group, heads, bias)
            scores = _scores(layout, plan, group, queries[group.queries], take_blocks(keys, group.keys), entries, added)
            top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(work).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            part = weights @ take_blocks(values, group.keys)
            out[group.queries] = part.div_(torch.where(total > 0, total, 1))
            lse[group.queries] = torch.where(total > 0, top + total.log(), float("-inf"))[..., 0]
        out = out.view(batch, heads, -1, value.shape[-1])[:, :, :q_len].to(query.dtype)
        lse = lse.view(batch, heads, -1)[:, :, :q_len]
        ctx.save_for_backward(query, key, value, out, lse, table)
        ctx.layout, ctx.scale, ctx.bias = layout, scale, bias
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, table = ctx.saved_tensors
        layout: BlockLayout = ctx.layout
        work, (batch, heads) = lse.dtype, query.shape[:2]
        queries = cut_blocks(query, layout.block_q, work) * ctx.scale
        keys, values = cut_blocks(key, layout.block_k, work), cut_blocks(value, layout.block_k, work)
        grads = cut_blocks(grad_out, layout.block_q, work)
        delta = (grad_out.to(work) * out.to(work)).sum(-1) - grad_lse
        deltas = cut_blocks(delta[..., None], layout.block_q, work)
        lses = cut_blocks(torch.where(lse.isfinite(), lse, 0)[..., None], layout.block_q, work)
        grad_queries = torch.zeros_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        plan, added = plan_of(layout), queries.new_empty(0) if table is None else table.to(work)
        grad_table = torch.zeros_like(added)
        for group in plan.groups(layout, batch, heads, key.shape[1], _area(query.device)):
            entries = _entries(layout, group, heads, ctx.bias)
            queries_here, grads_here = queries[group.queries], grads[group.queries]
            keys_here, values_here = take_blocks(keys, group.keys), take_blocks(values, group.keys)
            scores = _scores(layout, plan, group, queries_here, keys_here, entries, added)
            weights = scores.sub_(lses[group.queries]).exp_()
            flat = group.keys.flatten()
            grad_values.index_add_(
                0, flat, (weights.transpose(-1, -2) @ grads_here).view(-1, layout.block_k, values.shape[-1])
            )
            grad_scores = (grads_here @ values_here.transpose(-1, -2)).sub_(deltas[group.queries]).mul_(weights)
            if entries is not None:
                grad_table.view(-1).index_add_(0, entries.flatten(), grad_scores.flatten())
            grad_queries[group.queries] = grad_scores @ keys_here
            grad_keys.index_add_(
                0, flat, (grad_scores.transpose(-1, -2) @ queries_here).view(-1, layout.block_k, keys.shape[-1])
            )

        def restore(blocks: Tensor, like: Tensor) -> Tensor:
            return blocks.view(*like.shape[:2], -1, like.shape[-1])[:, :, : like.shape[2]].to(like.dtype)

        grad_query = restore(grad_queries, query) * ctx.scale
        grad_bias = None if table is None else grad_table.to(table.dtype)
        return grad_query, restore(grad_keys, key), restore(grad_values, value), grad_bias, None, None, None
