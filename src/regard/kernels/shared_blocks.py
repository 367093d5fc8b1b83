"""Softmax attention over the blocks of a layout that is the same for every sequence and head.

What depends on positions alone (windows, neighbourhoods, stripes) needs its index work once: which key blocks each
query block visits and which pairs inside them are hidden is kept with the layout. ``fused``: for a few query blocks at
a time their key blocks are gathered and go through torch's fused CPU attention, forward and backward, so scores never
leave the cache; it needs no compiler. The general executor, :func:`regard.kernels.block_sparse_attention`, runs the
same layout where its native form is at hand, and where the fused one does not apply: another device, a layout per head,
values of another width, the gradient of the log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError
from regard.kernels import native
from regard.kernels.backends import resolve
from regard.kernels.block_sparse import block_sparse_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups, fold_groups, score_scale
from regard.layout import BlockLayout

__all__ = ["shared_block_attention"]

FORMS = ("reference", "gather", "native", "flex", "fused")

# Gathered keys of one group stay below this many elements.
_GROUP = 1 << 20
# Bytes of masks that are kept with a layout, and those above which the general executor evaluates them at each call.
_KEPT, _KEPT_ELSEWHERE = 1 << 27, 1 << 25


@overload
def shared_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def shared_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def shared_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` over the pairs of ``layout``; shapes as :func:`block_sparse_attention`."""
    form = resolve("shared_blocks", backend, FORMS)
    fits = _fits(query, key, value, layout, return_lse)
    if form == "fused" and not fits:
        raise BackendError(
            "The fused form needs CPU tensors, a layout shared by all sequences and heads whose masks are few enough "
            "to keep, values as wide as the keys, and no gradient of the log-sum-exp; use backend='auto'."
        )
    if form == "auto" and fits:
        fits = _mask_bytes(layout) > _KEPT_ELSEWHERE or not native.worthwhile(query, value, layout)
    if form not in ("auto", "fused") or not fits:
        return block_sparse_attention(query, key, value, layout, scale=scale, return_lse=return_lse, backend=backend)
    out, lse = _Fused.apply(query, key, value, layout, score_scale(query, scale))
    return (out, lse) if return_lse else out


def _fits(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, return_lse: bool) -> bool:
    shared = layout.visit.shape[:2] == (1, 1) and layout.mask.batch == layout.mask.heads == 1
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    same = layout.q_len == query.shape[2] and layout.k_len == key.shape[2] and query.shape[3] == value.shape[3] > 0
    return (
        query.device.type == "cpu" and shared and same and not (return_lse and tracked) and _mask_bytes(layout) <= _KEPT
    )


def _mask_bytes(layout: BlockLayout) -> int:
    """Bytes that the masks of this layout take: of all visited blocks of the rows that need one."""
    masked = layout.visit.sum(-1) * layout.partial.any(-1)
    return int(masked.sum()) * layout.block_q * layout.block_k


@dataclass(frozen=True)
class _Rows:
    """Query blocks that visit the same number of key blocks."""

    queries: Tensor  # (rows,) index of each query block
    keys: Tensor  # (rows, slots) index of each key block
    hidden: Tensor | None  # (rows, block_q, slots * block_k), True where a pair is not seen; None: all are


_plans: WeakKeyDictionary[BlockLayout, tuple[list[_Rows], Tensor | None]] = WeakKeyDictionary()


@torch.compiler.disable
@torch.inference_mode(False)
def _plan(layout: BlockLayout) -> tuple[list[_Rows], Tensor | None]:
    """Rows grouped by how many key blocks they visit and whether anything is hidden there, and the ``(q_len,)`` queries
    that see nothing (None: there are none)."""
    if layout in _plans:
        return _plans[layout]
    visit, partial = layout.visit[0, 0], layout.partial[0, 0]
    if layout.k_len % layout.block_k:
        partial = partial.clone()
        partial[:, -1] |= visit[:, -1]
    rule = layout.mask.mod(layout.q_len, layout.k_len)
    zero = torch.zeros((), dtype=torch.int64, device=visit.device)
    counts, masked = visit.sum(-1), partial.any(-1)
    plan: list[_Rows] = []
    empty = torch.ones(len(visit), layout.block_q, dtype=torch.bool, device=visit.device)
    in_q, in_k = (torch.arange(b, device=visit.device) for b in (layout.block_q, layout.block_k))
    for count, some in torch.stack((counts, masked.long()), 1).unique(dim=0).tolist():
        rows = ((counts == count) & (masked == bool(some))).nonzero()[:, 0]
        if not count:
            continue
        keys = visit[rows].to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :count]
        empty[rows] = False
        hidden = None
        if some:
            at_q = rows[:, None] * layout.block_q + in_q
            at_k = (keys[..., None] * layout.block_k + in_k).flatten(1)
            hidden = (at_k >= layout.k_len)[:, None] | ~rule(
                zero, zero, at_q.clamp_max(layout.q_len - 1)[..., None], at_k.clamp_max(layout.k_len - 1)[:, None]
            )
            nothing = hidden.all(-1)
            empty[rows] = nothing
            # A row with nothing to see is given every key and zeroed afterwards, so that nothing is ever NaN.
            hidden &= ~nothing[..., None]
        plan.append(_Rows(rows, keys, hidden))
    blind = empty.flatten()[: layout.q_len]
    _plans[layout] = plan, blind if bool(blind.any()) else None
    return _plans[layout]


def _blocks(tensor: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """``(heads, length, dim)`` -> ``(blocks, block * heads * dim)``: one gathered row is a block of all heads."""
    short = -tensor.shape[1] % block
    padded = F.pad(tensor, (0, 0, 0, short)) if short else tensor
    return padded.to(dtype).transpose(0, 1).reshape(-1, block * tensor.shape[0] * tensor.shape[2])


def _groups(plan: list[_Rows], width: int) -> list[_Rows]:
    """Rows cut so that their gathered keys, ``width`` elements a block, stay within a group's size."""
    parts = []
    for rows in plan:
        step = max(_GROUP // (rows.keys.shape[1] * width), 1)
        for start in range(0, len(rows.queries), step):
            cut = slice(start, start + step)
            parts.append(_Rows(rows.queries[cut], rows.keys[cut], None if rows.hidden is None else rows.hidden[cut]))
    return parts


def _bias(group: _Rows, heads: int, like: Tensor) -> Tensor | None:
    if group.hidden is None:
        return None
    bias = torch.zeros(group.hidden.shape, dtype=like.dtype).masked_fill_(group.hidden, float("-inf"))
    return bias[:, None].expand(-1, heads, -1, -1)


class _Fused(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward goes through torch's own fused backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        work, (batch, heads, q_len, dim) = accumulation_dtype(query.dtype), query.shape
        plan, blind = _plan(layout)
        groups = _groups(plan, layout.block_k * heads * dim)
        outs, lses = [], []
        for sequence in range(batch):
            queries, keys, values = _sequence(query, key, value, sequence, layout, work)
            out = torch.zeros_like(queries)
            lse = queries.new_full((len(queries), heads, layout.block_q), float("-inf"))
            for group in groups:
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *_heads_first(queries, keys, values, group, heads, dim),
                    attn_mask=_bias(group, heads, queries),
                    scale=scale,
                )
                out[group.queries] = part.transpose(1, 2).flatten(1)
                lse[group.queries] = part_lse.to(lse.dtype)
            outs.append(out.view(-1, heads, dim)[:q_len].transpose(0, 1))
            lses.append(lse.transpose(0, 1).reshape(heads, -1)[:, :q_len])
        whole, whole_lse = torch.stack(outs), torch.stack(lses)
        if blind is not None:
            whole, whole_lse = whole.masked_fill(blind[:, None], 0), whole_lse.masked_fill(blind, float("-inf"))
        whole = whole.to(query.dtype)
        ctx.save_for_backward(query, key, value, whole, whole_lse)
        ctx.layout, ctx.scale = layout, scale
        ctx.mark_non_differentiable(whole_lse)
        return whole, whole_lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, whole, whole_lse = ctx.saved_tensors
        layout: BlockLayout = ctx.layout
        work, (batch, heads, q_len, dim) = whole_lse.dtype, query.shape
        plan, blind = _plan(layout)
        groups = _groups(plan, layout.block_k * heads * dim)
        if blind is not None:
            grad_out, whole_lse = grad_out.masked_fill(blind[:, None], 0), whole_lse.masked_fill(blind, 0)
        grads: list[list[Tensor]] = [[], [], []]
        short = -q_len % layout.block_q
        for sequence in range(batch):
            queries, keys, values = _sequence(query, key, value, sequence, layout, work)
            out, grad = (_blocks(t[sequence], layout.block_q, work) for t in (whole, grad_out))
            lse = F.pad(whole_lse[sequence], (0, short)).view(heads, -1, layout.block_q).transpose(0, 1)
            totals = [torch.zeros_like(t) for t in (queries, keys, values)]
            for group in groups:
                rows = len(group.queries)
                grad_here, out_here = (t[group.queries].view(rows, -1, heads, dim).transpose(1, 2) for t in (grad, out))
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad_here,
                    *_heads_first(queries, keys, values, group, heads, dim),
                    out_here,
                    lse[group.queries].contiguous(),
                    0.0,
                    False,
                    attn_mask=_bias(group, heads, queries),
                    scale=ctx.scale,
                )
                grad_queries, *grad_pairs = (p.transpose(1, 2).flatten(1) for p in parts)
                totals[0][group.queries] = grad_queries
                for total, part in zip(totals[1:], grad_pairs, strict=True):
                    total.index_add_(0, group.keys.flatten(), part.reshape(-1, total.shape[1]))
            for kept, total, length in zip(grads, totals, (q_len, key.shape[2], key.shape[2]), strict=True):
                kept.append(total.view(-1, heads, dim)[:length].transpose(0, 1))
        grad_query, grad_key, grad_value = (torch.stack(kept) for kept in grads)
        kv_heads = key.shape[1]
        return (
            grad_query.to(query.dtype),
            fold_groups(grad_key, kv_heads).to(key.dtype),
            fold_groups(grad_value, kv_heads).to(value.dtype),
            None,
            None,
        )


def _sequence(
    query: Tensor, key: Tensor, value: Tensor, index: int, layout: BlockLayout, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence of the batch in blocks."""
    heads = query.shape[1]
    keys, values = (expand_groups(t[index : index + 1], heads)[0] for t in (key, value))
    return (
        _blocks(query[index], layout.block_q, work),
        _blocks(keys, layout.block_k, work),
        _blocks(values, layout.block_k, work),
    )


def _heads_first(
    queries: Tensor, keys: Tensor, values: Tensor, group: _Rows, heads: int, dim: int
) -> tuple[Tensor, ...]:
    """Queries of a group and the tokens of their key blocks, each ``(rows, heads, tokens, dim)``."""
    rows, flat = len(group.queries), group.keys.flatten()
    taken = (queries[group.queries], keys[flat], values[flat])
    return tuple(t.view(rows, -1, heads, dim).transpose(1, 2) for t in taken)
