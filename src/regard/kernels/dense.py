"""Softmax attention over all pairs that a mask admits.

``reference``: scores, softmax, product, written out. ``sdpa``: torch's fused kernel, whenever the request allows it.
A row with nothing to see gives zeros. Half precision accumulates in float32.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError
from regard.kernels.backends import resolve
from regard.kernels.shapes import accumulation_dtype, expand_groups, score_scale
from regard.masks import Causal, Mask

__all__ = ["dense_attention", "dense_weights", "masked_softmax"]

FORMS = ("reference", "sdpa")


@overload
def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = ...,
    mask: Mask | None = ...,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = ...,
    mask: Mask | None = ...,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` over the visible pairs.

    query ``(batch, num_heads, q_len, head_dim)``; key and value ``(batch, kv_heads, k_len, ...)``, ``kv_heads``
    dividing ``num_heads``; ``bias`` broadcastable to ``(batch, num_heads, q_len, k_len)``. Returns ``(batch, num_heads,
    q_len, value_dim)`` and, with ``return_lse``, the log-sum-exp of each row ``(batch, num_heads, q_len)``
    (accumulation dtype; ``-inf`` for a row with nothing to see).
    """
    form = resolve("dense", backend, FORMS)
    fusable = not return_lse and value.shape[-1] > 0
    if form == "sdpa" and not fusable:
        raise BackendError("sdpa cannot return the log-sum-exp; use backend='reference' or leave it at 'auto'.")
    if form == "sdpa" or (form == "auto" and fusable):
        return _sdpa(query, key, value, causal, mask, bias, scale)
    return _reference(query, key, value, causal, mask, bias, scale, return_lse)


def _visible(query: Tensor, key: Tensor, causal: bool, mask: Mask | None) -> Tensor | None:
    rule = Causal() if mask is None else mask & Causal() if causal else mask
    if mask is None and not causal:
        return None
    return rule.dense(query.shape[2], key.shape[2], query.device)


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the last axis where ``visible`` (None: everywhere); a row with nothing to see is all zeros."""
    if visible is None:
        return scores.softmax(-1)
    seen = visible.any(-1, keepdim=True)
    # An empty row is given every key and zeroed afterwards, so that neither value nor gradient is ever NaN.
    return scores.masked_fill(~(visible | ~seen), float("-inf")).softmax(-1) * seen


def dense_weights(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention matrix of :func:`dense_attention`, ``(batch, num_heads, q_len, k_len)``."""
    scores = _scores(query, key, bias, scale)
    return masked_softmax(scores, _visible(query, key, causal, mask)).to(query.dtype)


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    work = accumulation_dtype(query.dtype)
    keys = expand_groups(key, query.shape[1]).to(work)
    scores = (query.to(work) * score_scale(query, scale)) @ keys.transpose(-1, -2)
    return scores if bias is None else scores + bias.to(work)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Mask | None,
    bias: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    scores = _scores(query, key, bias, scale)
    visible = _visible(query, key, causal, mask)
    v = expand_groups(value, query.shape[1]).to(scores.dtype)
    out = (masked_softmax(scores, visible) @ v).to(query.dtype)
    if not return_lse:
        return out
    return out, (scores if visible is None else scores.masked_fill(~visible, float("-inf"))).logsumexp(-1)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Mask | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    q_len, k_len = query.shape[2], key.shape[2]
    # torch aligns its own causal flag at the top left; ours is at the bottom right, and one last query sees all.
    own_causal = causal and mask is None and bias is None and q_len == k_len
    if causal and q_len == 1:
        causal = False
    visible = None if own_causal else _visible(query, key, causal, mask)
    empty = None
    if visible is not None and (mask is not None or q_len > k_len):
        empty = ~visible.any(-1, keepdim=True)
        visible = visible | empty
    attn_mask = visible
    if bias is not None:
        attn_mask = bias.to(query.dtype)
        if visible is not None:
            attn_mask = torch.where(visible, attn_mask, float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], q_len, k_len)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    width = max(head_dim, value_dim)
    if not query.is_cuda and head_dim != value_dim and width <= 4 * min(head_dim, value_dim):
        # The fused CPU kernel needs equal widths; else torch would store all scores, which takes longer up to here.
        scale = score_scale(query, scale)
        query, key = F.pad(query, (0, width - head_dim)), F.pad(key, (0, width - head_dim))
        value = F.pad(value, (0, width - value_dim))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=own_causal, scale=scale, enable_gqa=gqa
    )[..., :value_dim]
    return out if empty is None else out.masked_fill(empty, 0)
