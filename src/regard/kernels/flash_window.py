"""Softmax attention inside thousands of short windows, the scores of a window never leaving the fast memory.

Flash attention cuts a long sequence into tiles and rescales its softmax from tile to tile. A window of some fifty
tokens is one tile: its whole matrix of scores fits on chip, so its softmax is taken once, and what is cut is the
feature axis (Zhang, "Flash Window Attention", 2025, arXiv 2501.06480). With chunks ``r`` of the features:

    S = scale * sum_r Q_r K_r^T + bias + mask,    P = softmax(S),    O_r = P V_r

and backward, with ``P`` formed again from what was saved (query, key, value, bias and mask, no window's n x n):

    dV_r = P^T dO_r,    dP = sum_r dO_r V_r^T,    dS = P (dP - rowsum(P dP)),
    dQ_r = scale * dS K_r,    dK_r = scale * dS^T Q_r,    dbias = sum over windows of dS

``reference``: the formula on all windows at once, differentiated by torch. ``chunked``: the order above, with groups of
windows whose scores stay in the cache in place of one program per window and head. ``batched``: the same groups without
chunks, since a processor's matrix product cuts the feature axis itself; the form that ``auto`` takes. The paper's own
kernel for GPUs is not part. A row with nothing to see gives zeros. Half precision accumulates in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.errors import OptionError, PlacementError, ShapeError
from regard.kernels.backends import resolve
from regard.kernels.dense import masked_softmax
from regard.kernels.shapes import accumulation_dtype, expand_groups, score_scale

__all__ = ["flash_window_attention"]

FORMS = ("reference", "chunked", "batched")

# Scores of one group of windows, in elements: on a CPU those of each thread live in its cache between the two products,
# elsewhere the bound is one of memory.
_CACHED, _HELD = 1 << 18, 1 << 26


def flash_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 16,
    *,
    backend: str | None = None,
) -> Tensor:
    """``softmax(scale q k^T + bias + mask) v`` in each window.

    query ``(windows, num_heads, n, head_dim)``; key and value ``(windows, kv_heads, n, ...)``, ``kv_heads`` dividing
    ``num_heads``. bias: ``(num_heads | 1, n, n)``, the same for all windows. mask: ``(distinct, n, n)`` or ``(distinct,
    num_heads | 1, n, n)``, boolean (True: visible) or added to the scores (``-inf``: hidden; it gets no gradient),
    repeated when there are more windows: those of one example follow one another. chunk: features per step of
    ``backend="chunked"``. Returns ``(windows, num_heads, n, value_dim)``.
    """
    mask = _checked(query, key, value, bias, mask)
    if chunk < 1:
        raise OptionError(f"chunk is a number of features of at least 1, got {chunk}.")
    form, heads, factor = resolve("flash_window", backend, FORMS), query.shape[1], score_scale(query, scale)
    key, value = expand_groups(key, heads), expand_groups(value, heads)
    if form == "reference":
        return _reference(query, key, value, bias, mask, factor)
    step = chunk if form == "chunked" else max(query.shape[-1], value.shape[-1], 1)
    return _run(query, key, value, bias, mask, factor, step)


# Groups of windows are written in place: no graph, and a compiled model calls them as they are.
@torch.compiler.disable
def _run(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, chunk: int
) -> Tensor:
    out: Tensor = _Windows.apply(query, key, value, bias, mask, scale, chunk)
    return out


def _checked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Refuse what does not fit together; the mask with an axis of heads."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ShapeError(f"Windows are (windows, heads, n, head_dim); got {shapes}.")
    windows, heads, n, _ = query.shape
    if key.shape[:3] != value.shape[:3] or len(key) != windows or query.shape[3] != key.shape[3]:
        raise ShapeError(f"Query, key and value do not fit together: {shapes}.")
    if not key.shape[1] or heads % key.shape[1]:
        raise ShapeError(f"The number of key heads must divide that of query heads: {shapes}.")
    pairs = (n, key.shape[2])
    if bias is not None and (bias.dim() != 3 or bias.shape[0] not in (1, heads) or bias.shape[1:] != pairs):
        raise ShapeError(f"The bias is (heads, n, n) = {(heads, *pairs)}, got {tuple(bias.shape)}.")
    if mask is None:
        return None
    full = mask[:, None] if mask.dim() == 3 else mask
    if full.dim() != 4 or full.shape[1] not in (1, heads) or full.shape[2:] != pairs:
        raise ShapeError(f"The mask is (distinct windows, n, n) with n x n = {pairs}, got {tuple(mask.shape)}.")
    if not len(full) or windows % len(full):
        raise ShapeError(f"{windows} windows are no multiple of the {len(full)} that the mask knows.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise PlacementError(f"A mask is boolean (True: visible) or floating (added to the scores); got {mask.dtype}.")
    return full


def _reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    work = accumulation_dtype(query.dtype)
    scores = (query.to(work) @ key.to(work).transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.to(work)
    visible = None
    if mask is not None:
        mask = mask.repeat(len(query) // len(mask), 1, 1, 1)
        visible = mask if mask.dtype == torch.bool else mask > float("-inf")
        if mask.dtype != torch.bool:
            scores = scores + mask.to(work).masked_fill(~visible, 0)
    return (masked_softmax(scores, visible) @ value.to(work)).to(query.dtype)


class _Windows(torch.autograd.Function):
    """Saves its inputs alone; backward forms the weights again, group by group."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bias, mask)
        ctx.scale, ctx.chunk = scale, chunk
        windows, heads, n, _ = query.shape
        # Heads beside their channels in memory, as whoever merges them needs it.
        out = query.new_empty(windows, n, heads, value.shape[-1]).transpose(1, 2)
        for part in _groups(query, key):
            q, k, v = (_flat(x[part]) for x in (query, key, value))
            weights, seeing = _weights(q, k, bias, _of(mask, part), scale, chunk, heads)
            result = _times(weights, v, chunk).view(out[part].shape)
            out[part] = result if seeing is None else result.mul_(seeing)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask = ctx.saved_tensors
        scale, chunk, heads = ctx.scale, ctx.chunk, query.shape[1]
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        grad_bias = torch.zeros_like(bias, dtype=accumulation_dtype(query.dtype)) if ctx.needs_input_grad[3] else None
        for part in _groups(query, key):
            q, k, v = (_flat(x[part]) for x in (query, key, value))
            weights, seeing = _weights(q, k, bias, _of(mask, part), scale, chunk, heads)
            grad = _flat(grad_out[part])
            if seeing is not None:
                grad = (grad.unflatten(0, (-1, heads)) * seeing).flatten(0, 1)
            slope = _scores(grad, v, chunk)
            slope.sub_((weights * slope).sum(-1, keepdim=True)).mul_(weights)
            if grad_bias is not None:
                grad_bias += slope.unflatten(0, (-1, heads)).sum(0).sum_to_size(bias.shape)
            grad_value[part] = _times(weights.transpose(-1, -2), grad, chunk).view(value[part].shape)
            grad_query[part] = _times(slope, k * scale, chunk).view(query[part].shape)
            grad_key[part] = _times(slope.transpose(-1, -2), q * scale, chunk).view(key[part].shape)
        return grad_query, grad_key, grad_value, None if grad_bias is None else grad_bias.to(bias.dtype), *(None,) * 3


def _groups(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Windows that are computed together."""
    windows, heads, n, _ = query.shape
    bound = _CACHED * torch.get_num_threads() if query.device.type == "cpu" else _HELD
    step = max(bound // max(heads * n * key.shape[2], 1), 1)
    return (slice(start, min(start + step, windows)) for start in range(0, windows, step))


def _flat(x: Tensor) -> Tensor:
    """``(windows, heads, n, dim)`` -> ``(windows * heads, n, dim)`` in the dtype to accumulate in."""
    return x.to(accumulation_dtype(x.dtype)).flatten(0, 1)


def _of(mask: Tensor | None, part: slice) -> Tensor | None:
    """The mask of these windows."""
    if mask is None:
        return None
    return mask.index_select(0, torch.arange(part.start, part.stop, device=mask.device) % len(mask))


def _chunks(x: Tensor, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, x.shape[-1], chunk))


def _scores(rows: Tensor, columns: Tensor, chunk: int) -> Tensor:
    """``rows columns^T``, the features added up chunk by chunk."""
    first, *others = _chunks(rows, chunk)
    scores = torch.bmm(rows[..., first], columns[..., first].transpose(1, 2))
    for r in others:
        scores.baddbmm_(rows[..., r], columns[..., r].transpose(1, 2))
    return scores


def _times(weights: Tensor, x: Tensor, chunk: int) -> Tensor:
    """``weights x``, chunk by chunk of the features."""
    parts = [torch.bmm(weights, x[..., r]) for r in _chunks(x, chunk)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _weights(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, chunk: int, heads: int
) -> tuple[Tensor, Tensor | None]:
    """Weights ``(windows * heads, n, n)``, and a factor ``(windows, heads | 1, n, 1)``: zero for a row with nothing to
    see (its weights say nothing), else one."""
    scores = _scores(q, k, chunk)
    lanes = scores.unflatten(0, (-1, heads))
    if bias is None:
        lanes.mul_(scale)
    else:
        torch.add(bias.to(lanes.dtype), lanes, alpha=scale, out=lanes)
    if mask is None:
        return scores.softmax(-1), None
    # What is hidden goes to the lowest number: no row is NaN, and sums are ten times as fast as fills on a CPU.
    largest = torch.finfo(lanes.dtype).max
    if mask.dtype == torch.bool:
        visible, logits = mask, mask.to(lanes.dtype).sub_(1).mul_(largest)
    else:
        visible, logits = mask > float("-inf"), mask.to(lanes.dtype).clamp_min(-largest)
    lanes.add_(logits)
    return scores.softmax(-1), visible.any(-1, keepdim=True).to(lanes.dtype)
