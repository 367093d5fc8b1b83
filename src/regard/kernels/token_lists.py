"""Softmax attention of blocks of queries, each block over its own list of key tokens.

``gather``: the listed keys are gathered once for all queries of a block (and all query heads of a group), plain matrix
products, recomputed in a hand-written backward pass; memory grows with the lists, not with ``q_len x k_len``.
``reference``: the dense form under the same mask. Where every query has its own list, use
:func:`regard.kernels.token_sparse_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import ShapeError
from regard.kernels.backends import resolve
from regard.kernels.dense import dense_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups, score_scale
from regard.layout import num_blocks
from regard.masks import Boolean, Everything, Mask

__all__ = ["token_list_attention"]

FORMS = ("reference", "gather")

# Scores, and gathered keys, of one group stay below this many elements, so that they live in the cache.
_GROUP = 1 << 19


def token_list_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    block_q: int,
    *,
    mask: Mask | None = None,
    settled: int = 0,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + key_bias) v`` over the listed keys that ``mask`` admits.

    query ``(batch, num_heads, q_len, head_dim)``; key and value ``(batch, kv_heads, k_len, ...)``. indices ``(batch |
    1, heads | 1, query blocks, slots)`` int64, -1 for an empty slot, no key twice in a list; ``heads`` is
    ``kv_heads`` (query heads of a group share their list) or ``num_heads``. mask: a rule whose heads are those of
    ``indices`` (or 1), or None. settled: this many first slots of every list are visible to all queries of their
    block, so that the mask is not evaluated there. key_bias ``(batch, kv_heads, k_len)`` is added to the logits of
    each key. Returns the output ``(batch, num_heads, q_len, value_dim)`` and, with ``return_lse``, the log-sum-exp
    ``(batch, num_heads, q_len)``.
    """
    heads, kv_heads, q_len, k_len = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    if indices.shape[2] != num_blocks(q_len, block_q) or indices.shape[1] not in (1, kv_heads, heads):
        raise ShapeError(
            f"{q_len} queries in blocks of {block_q} with {kv_heads} key heads and {heads} query heads need indices "
            f"(batch, {kv_heads} or {heads}, {num_blocks(q_len, block_q)}, slots); got {tuple(indices.shape)}."
        )
    if indices.shape[1] == heads != kv_heads:
        key, value = expand_groups(key, heads), expand_groups(value, heads)
        key_bias = None if key_bias is None else expand_groups(key_bias, heads)
    indices = indices.expand(query.shape[0], key.shape[1], -1, -1)
    if resolve("token_lists", backend, FORMS) == "reference":
        seen = Boolean(expand_groups(_dense(indices, block_q, q_len, k_len, mask), heads))
        bias = None if key_bias is None else expand_groups(key_bias, heads)[:, :, None]
        if return_lse:
            return dense_attention(
                query, key, value, mask=seen, bias=bias, scale=scale, return_lse=True, backend="reference"
            )
        return dense_attention(query, key, value, mask=seen, bias=bias, scale=scale, backend="reference")
    plan = _Plan(
        indices, block_q, Everything() if mask is None else mask, indices.shape[-1] if mask is None else settled
    )
    bias = key.new_empty(0) if key_bias is None else key_bias
    out, lse = _Gather.apply(query, key, value, bias, plan, score_scale(query, scale))
    return (out, lse) if return_lse else out


def _dense(indices: Tensor, block_q: int, q_len: int, k_len: int, mask: Mask | None) -> Tensor:
    """Boolean ``(batch, heads, q_len, k_len)``: the pairs that are seen."""
    listed = torch.zeros(*indices.shape[:3], k_len + 1, dtype=torch.bool, device=indices.device)
    listed.scatter_(3, torch.where(indices < 0, k_len, indices), True)
    seen = listed[..., :k_len].repeat_interleave(block_q, 2)[:, :, :q_len]
    return seen if mask is None else seen & mask.dense(q_len, k_len, indices.device)


@dataclass(frozen=True)
class _Plan:
    """Lists of all (batch, head, query block) units, and how to cut them."""

    indices: Tensor
    block_q: int
    mask: Mask
    settled: int

    def groups(self, group_heads: int, dim: int) -> Iterator[slice]:
        """Ranges of units that are computed together."""
        units, slots = self.indices[..., 0].numel(), self.indices.shape[-1]
        step = max(_GROUP // max(slots * max(group_heads * self.block_q, dim), 1), 1)
        return (slice(start, start + step) for start in range(0, units, step))

    def hidden(self, units: slice, keys: Tensor, q_len: int, k_len: int) -> Tensor | None:
        """``(units, block_q, slots - settled)``, True where the mask hides a pair behind the settled slots."""
        if self.settled >= keys.shape[-1]:
            return None
        _, heads, blocks, _ = self.indices.shape
        unit = torch.arange(self.indices[..., 0].numel(), device=keys.device)[units]
        head = (unit // blocks)[:, None, None]
        token = (unit % blocks)[:, None] * self.block_q + torch.arange(self.block_q, device=keys.device)
        rule = self.mask.mod(q_len, k_len)
        return ~rule(
            torch.zeros_like(head) if self.mask.batch == 1 else head // heads,
            torch.zeros_like(head) if self.mask.heads == 1 else head % heads,
            token.clamp_max(q_len - 1)[..., None],
            keys[:, None, self.settled :].clamp_min(0),
        )


def _fold(x: Tensor, heads: int, block: int, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """Query-side ``(batch, num_heads, q_len, dim)`` -> ``(units, group * block, dim)``, ``fill`` after the end."""
    short = -x.shape[2] % block
    x = F.pad(x, (0, 0, 0, short), value=fill) if short else x
    batch, num_heads, length, dim = x.shape
    blocks = x.to(dtype).view(batch, heads, num_heads // heads, length // block, block, dim)
    return blocks.transpose(2, 3).reshape(-1, num_heads // heads * block, dim)


def _unfold(x: Tensor, batch: int, heads: int, num_heads: int, block: int, q_len: int) -> Tensor:
    """The inverse of :func:`_fold`."""
    blocks = x.view(batch, heads, -1, num_heads // heads, block, x.shape[-1])
    return blocks.transpose(2, 3).reshape(batch, num_heads, -1, x.shape[-1])[:, :, :q_len]


class _Work:
    """What forward and backward share: folded queries, flat keys and values, and the scores of a group."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, plan: _Plan, scale: float) -> None:
        self.work = accumulation_dtype(query.dtype)
        self.plan, self.q_len, self.k_len, self.heads = plan, query.shape[2], key.shape[2], key.shape[1]
        self.queries = _fold(query, self.heads, plan.block_q, self.work) * scale
        self.keys = key.to(self.work).reshape(-1, key.shape[-1])
        self.values = value.to(self.work).reshape(-1, value.shape[-1])
        self.bias = bias.to(self.work).reshape(-1)
        self.lists = plan.indices.reshape(-1, plan.indices.shape[-1])
        self.blocks = plan.indices.shape[2]
        self.group_heads = query.shape[1] // self.heads
        # One workspace serves the scores of all groups, so that its pages stay warm.
        most = max((len(self.lists[units]) for units in self.groups()), default=0)
        self.space = self.queries.new_empty(most * self.queries.shape[1] * self.lists.shape[1])

    def groups(self) -> Iterator[slice]:
        return self.plan.groups(self.group_heads, max(self.keys.shape[-1], self.values.shape[-1]))

    def rows(self, units: slice) -> tuple[Tensor, Tensor]:
        """The lists of some units, and where their keys stand among all keys."""
        keys = self.lists[units]
        lane = torch.arange(len(self.lists), device=keys.device)[units] // self.blocks
        return keys, keys.clamp_min(0) + lane[:, None] * self.k_len

    def take(self, tensor: Tensor, at: Tensor) -> Tensor:
        return tensor.index_select(0, at.flatten()).view(*at.shape, -1)

    def scores(self, units: slice, keys: Tensor, at: Tensor, gathered: Tensor) -> Tensor:
        queries = self.queries[units]
        scores = self.space[: len(keys) * queries.shape[1] * keys.shape[1]].view(len(keys), queries.shape[1], -1)
        torch.bmm(queries, gathered.transpose(-1, -2), out=scores)
        offset = torch.zeros_like(at, dtype=self.work)
        if self.bias.numel():
            offset = self.take(self.bias, at)[..., 0]
        scores.add_(offset.masked_fill(keys < 0, float("-inf"))[:, None])
        hidden = self.plan.hidden(units, keys, self.q_len, self.k_len)
        if hidden is not None:
            tiles = scores.view(len(keys), self.group_heads, self.plan.block_q, -1)[..., self.plan.settled :]
            tiles.masked_fill_(hidden[:, None], float("-inf"))
        return scores


class _Gather(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward forms the scores again, group by group."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, plan: _Plan, scale: float
    ) -> tuple[Tensor, Tensor]:
        run = _Work(query, key, value, bias, plan, scale)
        shape = (query.shape[0], run.heads, query.shape[1], plan.block_q, run.q_len)
        out = run.queries.new_zeros(*run.queries.shape[:2], value.shape[-1])
        lse = run.queries.new_full((*run.queries.shape[:2], 1), float("-inf"))
        for units in run.groups():
            keys, at = run.rows(units)
            scores = run.scores(units, keys, at, run.take(run.keys, at))
            top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(run.work).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            out[units] = (weights @ run.take(run.values, at)).div_(torch.where(total > 0, total, 1))
            lse[units] = torch.where(total > 0, top + total.log(), float("-inf"))
        result = _unfold(out, *shape).to(query.dtype)
        row_lse = _unfold(lse, *shape)[..., 0]
        ctx.save_for_backward(query, key, value, bias, result, row_lse)
        ctx.plan, ctx.scale = plan, scale
        return result, row_lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, lse = ctx.saved_tensors
        plan: _Plan = ctx.plan
        run = _Work(query, key, value, bias, plan, ctx.scale)
        shape = (query.shape[0], run.heads, query.shape[1], plan.block_q, run.q_len)

        def fold(x: Tensor, fill: float = 0.0) -> Tensor:
            return _fold(x, run.heads, plan.block_q, run.work, fill)

        grads = fold(grad_out)
        deltas = fold(((grad_out.to(run.work) * out.to(run.work)).sum(-1) - grad_lse)[..., None])
        # A row that sees nothing, or stands for none, gets an infinite log-sum-exp: its weights are zeros.
        lses = fold(torch.where(lse.isfinite(), lse, float("inf"))[..., None], float("inf"))
        grad_queries = torch.zeros_like(run.queries)
        grad_keys, grad_values = torch.zeros_like(run.keys), torch.zeros_like(run.values)
        grad_bias = torch.zeros_like(run.bias)
        for units in run.groups():
            keys, at = run.rows(units)
            gathered = run.take(run.keys, at)
            weights = run.scores(units, keys, at, gathered).sub_(lses[units]).exp_()
            flat = at.flatten()
            grad_values.index_add_(0, flat, (weights.transpose(-1, -2) @ grads[units]).flatten(0, 1))
            slope = (grads[units] @ run.take(run.values, at).transpose(-1, -2)).sub_(deltas[units]).mul_(weights)
            grad_queries[units] = slope @ gathered
            grad_keys.index_add_(0, flat, (slope.transpose(-1, -2) @ run.queries[units]).flatten(0, 1))
            if bias.numel():
                grad_bias.index_add_(0, flat, slope.sum(1).flatten())
        return (
            (_unfold(grad_queries, *shape) * ctx.scale).to(query.dtype),
            grad_keys.view(key.shape).to(key.dtype),
            grad_values.view(value.shape).to(value.dtype),
            grad_bias.view(bias.shape).to(bias.dtype) if bias.numel() else None,
            None,
            None,
        )
