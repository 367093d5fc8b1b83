"""Softmax attention over the blocks of a layout, any layout, per batch and head.

``reference``: the dense form under the layout's mask. ``gather``: key blocks gathered for groups of query blocks, plain
matrix products, recomputed in a hand-written backward pass; memory grows with the visited blocks of one group.
``native``: C++ for CPUs, see :mod:`regard.kernels.native`; half precision is converted, float64 is not taken.
``flex``: compiled FlexAttention (forward and backward on a GPU, forward alone on a CPU).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError, ShapeError
from regard.kernels import native
from regard.kernels.backends import resolve
from regard.kernels.block_plan import Group, Plan, plan_of
from regard.kernels.dense import dense_attention
from regard.kernels.shapes import accumulation_dtype, score_scale
from regard.layout import BlockLayout
from regard.masks import Boolean

__all__ = ["block_sparse_attention"]

FORMS = ("reference", "gather", "native", "flex")

# Up to so many queries (decoding) the whole rows cost less than finding out what to leave out.
_FEW = 8


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

    query ``(batch, num_heads, q_len, head_dim)``; key and value ``(batch, kv_heads, k_len, ...)``, ``kv_heads``
    dividing ``num_heads``. Returns ``(batch, num_heads, q_len, value_dim)`` and, with ``return_lse``, the log-sum-exp
    of each row ``(batch, num_heads, q_len)``. Rows with nothing to see give zeros (and ``-inf``).
    """
    if layout.q_len != query.shape[2] or layout.k_len != key.shape[2]:
        raise ShapeError(
            f"The layout is for {layout.q_len} queries and {layout.k_len} keys; "
            f"got {query.shape[2]} and {key.shape[2]}."
        )
    form = resolve("block_sparse", backend, FORMS)
    if form == "auto" and query.shape[2] <= _FEW and not return_lse:
        return dense_attention(query, key, value, mask=Boolean(layout.dense()), scale=scale)
    if form == "reference":
        mask = Boolean(layout.dense())
        if return_lse:
            return dense_attention(query, key, value, mask=mask, scale=scale, return_lse=True, backend="reference")
        return dense_attention(query, key, value, mask=mask, scale=scale, backend="reference")
    if form == "flex" or (form == "auto" and query.is_cuda and not return_lse):
        if return_lse:
            raise BackendError("The flex form does not return the log-sum-exp; use backend='gather'.")
        return _flex(query, key, value, layout, score_scale(query, scale))
    run = _Native if form == "native" or (form == "auto" and native.worthwhile(query, value, layout)) else _Gather
    out, lse = run.apply(query, key, value, layout, score_scale(query, scale))
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


def _area(device: torch.device) -> int:
    """Pairs of one group: on a CPU its scores stay in the cache of each core between the two products."""
    return (1 << 18) * torch.get_num_threads() if device.type == "cpu" else 1 << 24


def _blocks(tensor: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """``(batch, heads, length, dim)`` -> ``(all blocks, block, dim)``, zeros after the end."""
    short = -tensor.shape[2] % block
    padded = F.pad(tensor, (0, 0, 0, short)) if short else tensor
    return padded.to(dtype).reshape(-1, block, tensor.shape[-1])


def _scores(layout: BlockLayout, plan: Plan, group: Group, queries: Tensor, keys: Tensor) -> Tensor:
    """Masked scores ``(rows, block_q, slots * block_k)``; queries are already scaled."""
    scores = queries @ keys.transpose(-1, -2)
    tiles = scores.view(*scores.shape[:2], -1, layout.block_k)
    if len(group.tiles):
        row, slot = group.partial
        tiles[row, :, slot] = tiles[row, :, slot].masked_fill_(~plan.visible(layout, group.tiles), float("-inf"))
    if group.empty is not None:
        tiles.masked_fill_(group.empty[:, None, :, None], float("-inf"))
    return scores


def _take(blocks: Tensor, index: Tensor) -> Tensor:
    return blocks.index_select(0, index.flatten()).view(len(index), -1, blocks.shape[-1])


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
        plan = plan_of(layout)
        for group in plan.groups(layout, batch, heads, key.shape[1], _area(query.device)):
            scores = _scores(layout, plan, group, queries[group.queries], _take(keys, group.keys))
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
        work, (batch, heads) = lse.dtype, query.shape[:2]
        queries = _blocks(query, layout.block_q, work) * ctx.scale
        keys, values = _blocks(key, layout.block_k, work), _blocks(value, layout.block_k, work)
        grads = _blocks(grad_out, layout.block_q, work)
        delta = (grad_out.to(work) * out.to(work)).sum(-1) - grad_lse
        deltas = _blocks(delta[..., None], layout.block_q, work)
        lses = _blocks(torch.where(lse.isfinite(), lse, 0)[..., None], layout.block_q, work)
        grad_queries = torch.zeros_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        plan = plan_of(layout)
        for group in plan.groups(layout, batch, heads, key.shape[1], _area(query.device)):
            queries_here, grads_here = queries[group.queries], grads[group.queries]
            keys_here, values_here = _take(keys, group.keys), _take(values, group.keys)
            weights = _scores(layout, plan, group, queries_here, keys_here).sub_(lses[group.queries]).exp_()
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


class _Native(torch.autograd.Function):
    """The same bargain in C++, in float32."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        if query.device.type != "cpu" or query.dtype == torch.float64:
            raise BackendError(
                f"The native form runs on a CPU in float32 or half precision, not in {query.dtype} on {query.device}; "
                "use backend='gather'."
            )
        out, lse = native.forward(query.float(), key.float(), value.float(), layout, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.scale = layout, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = native.backward(
            query.float(),
            key.float(),
            value.float(),
            out.float(),
            lse,
            grad_out.float(),
            grad_lse,
            ctx.layout,
            ctx.scale,
        )
        return *(grad.to(like.dtype) for grad, like in zip(grads, (query, key, value), strict=True)), None, None
