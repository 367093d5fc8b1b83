"""Softmax attention of each query over its own list of keys.

``reference``: the dense form under the layout's mask. ``gather``: keys and values gathered for a stretch of queries at
a time, recomputed in the backward pass, so that memory grows with ``slots`` and not with ``q_len x k_len``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.kernels.backends import resolve
from regard.kernels.dense import dense_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups, fold_groups, score_scale
from regard.layout import TokenLayout
from regard.masks import Boolean

__all__ = ["token_sparse_attention"]

FORMS = ("reference", "gather")

# Gathered keys of one stretch stay below this many elements: a few megabytes, within the last-level cache.
_STRETCH = 1 << 21


def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + key_bias) v`` over the keys in ``layout``.

    Shapes as in :func:`regard.kernels.dense_attention`; ``key_bias`` ``(batch, kv_heads | num_heads, k_len)`` is added
    to the logits of each key. Returns the output and, with ``return_lse``, the log-sum-exp ``(batch, heads, q_len)``.
    """
    if layout.indices.shape[2] != query.shape[2] or layout.k_len != key.shape[2]:
        raise ShapeError(
            f"The layout is for {layout.indices.shape[2]} queries and {layout.k_len} keys; "
            f"got {query.shape[2]} and {key.shape[2]}."
        )
    if resolve("token_sparse", backend, FORMS) == "reference":
        bias = None if key_bias is None else expand_groups(key_bias, query.shape[1])[:, :, None]
        if return_lse:
            return dense_attention(
                query,
                key,
                value,
                mask=Boolean(layout.dense()),
                bias=bias,
                scale=scale,
                return_lse=True,
                backend="reference",
            )
        return dense_attention(
            query, key, value, mask=Boolean(layout.dense()), bias=bias, scale=scale, backend="reference"
        )
    batch, heads, q_len, _ = query.shape
    indices = layout.indices.expand(batch, heads, q_len, -1)
    bias = key.new_zeros(batch, heads, 0) if key_bias is None else expand_groups(key_bias, heads)
    out, lse = _Gather.apply(query, key, value, indices, bias, score_scale(query, scale))
    return (out, lse) if return_lse else out


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """``(batch, heads, length, dim)`` at ``index (batch, heads, queries, slots)`` -> ``(..., queries, slots, dim)``."""
    batch, heads, length, dim = tensor.shape
    base = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * length
    return tensor.reshape(-1, dim)[(base + index).flatten()].view(*index.shape, dim)


class _Gather(torch.autograd.Function):
    """Forward keeps only the log-sum-exp; backward gathers again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        work, heads = accumulation_dtype(query.dtype), query.shape[1]
        keys, values = expand_groups(key, heads).to(work), expand_groups(value, heads).to(work)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(query.shape[:3], dtype=work)
        for rows in _stretches(query, indices):
            scores, _, values_here = _scores(query[:, :, rows], keys, values, indices[:, :, rows], bias, scale)
            lse[:, :, rows] = scores.logsumexp(-1)
            weights = _weights(scores, lse[:, :, rows])
            out[:, :, rows] = (weights[..., None, :] @ values_here)[..., 0, :].to(out.dtype)
        ctx.save_for_backward(query, key, value, indices, bias, out, lse)
        ctx.scale = scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, indices, bias, out, lse = ctx.saved_tensors
        work, (batch, heads) = lse.dtype, query.shape[:2]
        keys, values = expand_groups(key, heads).to(work), expand_groups(value, heads).to(work)
        grad_query = torch.empty_like(query)
        # Written through flat views, so contiguous whatever the layout of the inputs.
        grad_key, grad_value, grad_bias = (
            torch.zeros_like(t, dtype=work, memory_format=torch.contiguous_format) for t in (keys, values, bias)
        )
        offset = torch.arange(batch * heads, device=query.device).view(batch, heads, 1, 1) * key.shape[2]
        for rows in _stretches(query, indices):
            index = indices[:, :, rows]
            scores, keys_here, values_here = _scores(query[:, :, rows], keys, values, index, bias, ctx.scale)
            weights = _weights(scores, lse[:, :, rows])
            grad = grad_out[:, :, rows].to(work)
            delta = (grad * out[:, :, rows].to(work)).sum(-1, keepdim=True) - grad_lse[:, :, rows, None]
            grad_scores = weights * ((values_here @ grad[..., None])[..., 0] - delta)
            grad_query[:, :, rows] = ((grad_scores[..., None, :] @ keys_here)[..., 0, :] * ctx.scale).to(query.dtype)
            where = (index.clamp_min(0) + offset).flatten()
            per_slot = grad_scores[..., None] * (query[:, :, rows, None].to(work) * ctx.scale)
            grad_key.view(-1, keys.shape[-1]).index_add_(0, where, per_slot.flatten(0, -2))
            per_slot = weights[..., None] * grad[..., None, :]
            grad_value.view(-1, values.shape[-1]).index_add_(0, where, per_slot.flatten(0, -2))
            if bias.numel():
                grad_bias.view(-1).index_add_(0, where, grad_scores.flatten())
        kv_heads = key.shape[1]
        return (
            grad_query,
            fold_groups(grad_key, kv_heads).to(key.dtype),
            fold_groups(grad_value, kv_heads).to(value.dtype),
            None,
            grad_bias.to(bias.dtype) if bias.numel() else None,
            None,
        )


def _stretches(query: Tensor, indices: Tensor) -> list[slice]:
    per_query = max(query.shape[0] * query.shape[1] * indices.shape[-1] * query.shape[-1], 1)
    step = max(_STRETCH // per_query, 1)
    return [slice(start, start + step) for start in range(0, query.shape[2], step)]


def _scores(
    query: Tensor, keys: Tensor, values: Tensor, index: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    safe = index.clamp_min(0)
    keys_here, values_here = _rows(keys, safe), _rows(values, safe)
    scores = (keys_here @ (query.to(keys.dtype) * scale)[..., None])[..., 0]
    if bias.numel():
        scores = scores + _rows(bias[..., None].to(keys.dtype), safe)[..., 0]
    return scores.masked_fill(index < 0, float("-inf")), keys_here, values_here


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Softmax from the saved log-sum-exp; rows with nothing to see give zeros."""
    return (scores - torch.where(lse.isfinite(), lse, torch.zeros_like(lse))[..., None]).exp()
