"""Attention that is linear in length: ``o_t = q_t S_t`` with ``S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t``.

Queries and keys arrive as features (a mechanism applies its own map before). The log-decay ``g <= 0`` may be absent,
one per head ``(heads,)``, one per head and token ``(batch, heads, length)``, or one per channel of the state
``(batch, heads, length, feature_dim)``. Forms: ``parallel`` (the masked matrix, the reference), ``chunked`` (matrix
products inside a chunk, one state carried between chunks) and ``recurrent`` (a token at a time).
With ``normalize`` the output is divided by ``q_t z_t``, where ``z_t`` is the same recurrence over the keys alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.backends import resolve
from regard.kernels.shapes import accumulation_dtype, expand_groups

__all__ = ["LinearState", "linear_attention", "linear_step"]

FORMS = ("parallel", "chunked", "recurrent")
_SUB = 16


@dataclass
class LinearState:
    """The running sum ``(batch, heads, feature_dim, value_dim)``, in the accumulation dtype; with a normaliser its last
    value channel holds the sum of keys."""

    sum: Tensor

    @classmethod
    def empty(
        cls, batch: int, heads: int, feature_dim: int, value_dim: int, *, normalize: bool = False, like: Tensor
    ) -> LinearState:
        """The state before the first token, on the device and in the accumulation dtype of ``like``."""
        width = value_dim + int(normalize)
        return cls(like.new_zeros(batch, heads, feature_dim, width, dtype=accumulation_dtype(like.dtype)))


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    log_decay: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    state: LinearState | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, LinearState]:
    """Output ``(batch, heads, q_len, value_dim)`` and the state after the last key.

    query ``(batch, heads, q_len, feature_dim)``, key ``(batch, kv_heads, k_len, feature_dim)``, value ``(batch,
    kv_heads, k_len, value_dim)``. Causal and decayed forms need ``q_len == k_len``; a decay implies ``causal``.
    ``state`` continues an earlier stretch of the same sequence. ``eps`` is added to the normaliser.
    """
    heads, dtype, work = query.shape[1], query.dtype, accumulation_dtype(query.dtype)
    q, k = query.to(work) * scale, expand_groups(key, heads).to(work)
    v = expand_groups(value, heads).to(work)
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    if log_decay is not None and not causal:
        raise OptionError("A decay needs causal=True: it weighs keys by how long ago they came.")
    if causal and q.shape[2] != k.shape[2]:
        raise ShapeError(
            f"Causal linear attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}; "
            "to continue a sequence pass the state of its earlier part."
        )
    initial = None if state is None else state.sum
    if not causal:
        total = k.transpose(-1, -2) @ v
        total = total if initial is None else total + initial
        out = q @ total
    else:
        decay = _expand_decay(log_decay, q)
        form = resolve("linear", backend, FORMS)
        run = {"parallel": _parallel, "recurrent": _recurrent}.get(form)
        out, total = _chunked(q, k, v, decay, initial, chunk_size) if run is None else run(q, k, v, decay, initial)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps)
    return out.to(dtype), LinearState(total)


def linear_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearState,
    *,
    log_decay: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
) -> tuple[Tensor, LinearState]:
    """One token (or a few, in order) of the causal form: shapes and results as :func:`linear_attention`."""
    return linear_attention(
        query,
        key,
        value,
        causal=True,
        log_decay=log_decay,
        normalize=normalize,
        eps=eps,
        scale=scale,
        state=state,
        backend="recurrent",
    )


def _expand_decay(log_decay: Tensor | None, query: Tensor) -> Tensor | None:
    """To ``(batch | 1, heads, length, 1 | feature_dim)`` in the working dtype."""
    if log_decay is None:
        return None
    batch, heads, length, features = query.shape
    decay = log_decay.to(query.dtype)
    if decay.shape == (heads,):
        return decay.view(1, heads, 1, 1).expand(1, heads, length, 1)
    if decay.shape == (batch, heads, length):
        return decay[..., None]
    if decay.shape == (batch, heads, length, features):
        return decay
    raise ShapeError(
        f"log_decay of shape {tuple(log_decay.shape)} is none of (heads,) = ({heads},), (batch, heads, length) = "
        f"({batch}, {heads}, {length}) and (batch, heads, length, feature_dim) = {tuple(query.shape)}."
    )


def _parallel(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if decay is None:
        out, total = (q @ k.transpose(-1, -2)).masked_fill(~past, 0) @ v, k.transpose(-1, -2) @ v
        return (out, total) if initial is None else (out + q @ initial, total + initial)
    run = decay.cumsum(2)
    gap = (run[:, :, :, None] - run[:, :, None]).masked_fill(~past[..., None], float("-inf")).exp()
    scores = torch.einsum("bhic,bhjc,bhijc->bhij", q, k, gap.expand(*gap.shape[:-1], q.shape[-1]))
    out, total = scores @ v, (k * (run[:, :, -1:] - run).exp()).transpose(-1, -2) @ v
    if initial is not None:
        out = out + (q * run.exp()) @ initial
        total = total + run[:, :, -1, :, None].exp() * initial
    return out, total


def _recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, length, features = q.shape
    total = q.new_zeros(batch, heads, features, v.shape[-1]) if initial is None else initial
    outs = []
    for t in range(length):
        if decay is not None:
            total = total * decay[:, :, t, :, None].exp()
        total = total + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, None] @ total)[:, :, 0])
    return (torch.stack(outs, 2) if outs else q.new_zeros(batch, heads, 0, v.shape[-1])), total


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """All chunks at once for what happens inside them, then one pass over chunk states."""
    batch, heads, length, features = q.shape
    if chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1, got {chunk_size}.")
    size = min(chunk_size, max(length, 1))
    short = -length % size
    if short:
        q, k, v = (F.pad(t, (0, 0, 0, short)) for t in (q, k, v))
        decay = None if decay is None else F.pad(decay, (0, 0, 0, short))
    q, k, v = (t.unflatten(2, (-1, size)) for t in (q, k, v))
    chunks = q.shape[2]
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if decay is None:
        inside = (q @ k.transpose(-1, -2)).masked_fill(~past, 0) @ v
        reach, leave, whole = q, k, None
    else:
        run = decay.unflatten(2, (-1, size)).cumsum(3)
        if run.shape[-1] == 1:
            gap = (run - run.transpose(-1, -2)).masked_fill(~past, float("-inf")).exp()
            inside = (q @ k.transpose(-1, -2) * gap) @ v
        else:
            inside = _channel_scores(q, k, run) @ v
        # Powers are taken relative to a chunk's end or start, so no exponent is ever positive.
        reach, leave, whole = q * run.exp(), k * (run[:, :, :, -1:] - run).exp(), run[:, :, :, -1, :, None].exp()
    added = leave.transpose(-1, -2) @ v
    total = q.new_zeros(batch, heads, features, v.shape[-1]) if initial is None else initial
    before = []
    for index in range(chunks):
        before.append(total)
        total = added[:, :, index] + (total if whole is None else total * whole[:, :, index])
    out = inside + reach @ torch.stack(before, 2) if before else inside
    return out.flatten(2, 3)[:, :, :length], total


def _channel_scores(q: Tensor, k: Tensor, run: Tensor) -> Tensor:
    """Causal scores ``sum_c q_ic k_jc exp(run_ic - run_jc)`` of each chunk, ``(..., size, size)``, for a decay per channel.

    Sub-blocks off the diagonal are products relative to the query sub-block's start, where both exponents are at most
    zero; those on it are formed with the exponent of the difference itself.
    """
    size = q.shape[-2]
    rows = []
    for start in range(0, size, _SUB):
        stop = min(start + _SUB, size)
        here, run_here = slice(start, stop), run[..., start:stop, :]
        gap = run_here[..., :, None, :] - run_here[..., None, :, :]
        past = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril()
        gap = gap.masked_fill(~past[..., None], float("-inf")).exp()
        near = (q[..., here, None, :] * k[..., None, here, :] * gap).sum(-1)
        row = [near, q.new_zeros(*near.shape[:-1], size - stop)]
        if start:
            anchor = run[..., start - 1 : start, :]
            far_k = k[..., :start, :] * (anchor - run[..., :start, :]).exp()
            row.insert(0, (q[..., here, :] * (run_here - anchor).exp()) @ far_k.transpose(-1, -2))
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)
