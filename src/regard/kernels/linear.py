"""Attention that is linear in length: ``o_t = q_t S_t`` with ``S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t``.

Queries and keys arrive as features (a mechanism applies its own map before). The log-decay ``g <= 0`` may be absent,
one per head ``(heads,)``, one per head and token ``(batch, heads, length)``, or one per channel of the state
``(batch, heads, length, feature_dim)``. Forms: ``parallel`` (the masked matrix, the reference), ``chunked`` (matrix
products inside a chunk, one state carried between chunks), ``recurrent`` (a token at a time) and ``native`` (chunks in
C++ on a CPU, for decays per head or token).
With ``normalize`` the output is divided by ``q_t z_t``, where ``z_t`` is the same recurrence over the keys alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError, OptionError, ShapeError
from regard.kernels import native_linear
from regard.kernels.backends import resolve
from regard.kernels.decay import fading, log_gap, running_decay
from regard.kernels.segments import in_segments, segment_length
from regard.kernels.shapes import accumulation_dtype, expand_groups

__all__ = ["LinearState", "linear_attention", "linear_step"]

FORMS = ("parallel", "chunked", "recurrent", "native")
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
    if log_decay is not None and not causal:
        raise OptionError("A decay needs causal=True: it weighs keys by how long ago they came.")
    if causal and query.shape[2] != key.shape[2]:
        raise ShapeError(
            f"Causal linear attention needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}; "
            "to continue a sequence pass the state of its earlier part."
        )
    if chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1, got {chunk_size}.")
    form = resolve("linear", backend, FORMS) if causal else "whole"
    _check_decay(log_decay, query)
    if form in ("auto", "native"):
        reason = native_linear.obstacle(query, value, log_decay, chunk_size, asked=form == "native")
        if reason is not None and backend == "native":
            raise BackendError(f"Linear attention cannot run natively: {reason}. Use backend='auto' or 'chunked'.")
        form = "native" if reason is None else "chunked"
    call = _Call(form, chunk_size, scale, normalize, eps)
    initial, length = None if state is None else state.sum, query.shape[2]
    # Decays of heads have no length.
    rows = log_decay if log_decay is not None and log_decay.dim() > 1 else None
    whole = None if rows is not None else log_decay
    step = max(length, 1)
    if form == "chunked" or (form == "native" and query.dtype != torch.float32):
        step = segment_length(
            query.shape[0] * query.shape[1] * max(query.shape[3], value.shape[3]), chunk_size, query.device
        )
    out, total = in_segments(call, (query, key, value, rows), (whole,), initial, step=step, dim=2)
    return out, LinearState(total)


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


@dataclass(frozen=True)
class _Call:
    """Options of one call; calling it runs one stretch of a sequence (see :mod:`regard.kernels.segments`)."""

    form: str
    chunk_size: int
    scale: float
    normalize: bool
    eps: float

    def __call__(
        self, rows: tuple[Tensor | None, ...], whole: tuple[Tensor | None, ...], initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        query, key, value, log_decay = *rows[:3], rows[3] if whole[0] is None else whole[0]
        assert query is not None and key is not None and value is not None
        if self.form == "native":
            if key.shape[1] != value.shape[1]:
                key, value = expand_groups(key, query.shape[1]), expand_groups(value, query.shape[1])
            parts = (query.float(), key.float(), value.float())
            out, total = native_linear.causal(
                *parts,
                log_decay,
                initial,
                chunk=self.chunk_size,
                scale=self.scale,
                normalize=self.normalize,
                eps=self.eps,
            )
            return out.to(query.dtype), total
        heads, work = query.shape[1], accumulation_dtype(query.dtype)
        q, k = query.to(work) * self.scale, expand_groups(key, heads).to(work)
        v = expand_groups(value, heads).to(work)
        if self.normalize:
            v = F.pad(v, (0, 1), value=1.0)
        eps = self.eps if self.normalize else None
        if self.form == "whole":
            total = k.transpose(-1, -2) @ v
            total = total if initial is None else total + initial
            out = _read(q, total, eps)
        else:
            decay = _expand_decay(log_decay, q)
            if self.form == "parallel":
                out, total = _parallel(q, k, v, decay, initial, eps)
            elif self.form == "recurrent":
                out, total = _recurrent(q, k, v, decay, initial, eps)
            else:
                out, total = _chunked(q, k, v, decay, initial, eps, self.chunk_size)
        return out.to(query.dtype), total


def _read(q: Tensor, state: Tensor, eps: float | None) -> Tensor:
    """``q S``, or ``q S / (q z + eps)`` with the sum of keys ``z`` as the state's last column.

    Queries are divided, not outputs: the two parts of their gradient, which nearly cancel where one key dominates, are
    then made of the same rounded products.
    """
    if eps is None:
        return q @ state
    return (q / (q @ state[..., -1:] + eps)) @ state[..., :-1]


def _read_pairs(scores: Tensor, v: Tensor, reach: Tensor, state: Tensor | None, eps: float | None) -> Tensor:
    """The same for scores among tokens beside a state from before them."""
    if eps is not None:
        total = scores.sum(-1, keepdim=True)
        total = total + eps if state is None else total + reach @ state[..., -1:] + eps
        scores, reach, v = scores / total, reach / total, v[..., :-1]
        state = None if state is None else state[..., :-1]
    out = scores @ v
    return out if state is None else out + reach @ state


def _check_decay(log_decay: Tensor | None, query: Tensor) -> None:
    batch, heads, length, features = query.shape
    known = ((heads,), (batch, heads, length), (batch, heads, length, features))
    if log_decay is not None and tuple(log_decay.shape) not in known:
        raise ShapeError(
            f"log_decay of shape {tuple(log_decay.shape)} is none of (heads,) = ({heads},), (batch, heads, length) = "
            f"({batch}, {heads}, {length}) and (batch, heads, length, feature_dim) = {tuple(query.shape)}."
        )


def _expand_decay(log_decay: Tensor | None, query: Tensor) -> Tensor | None:
    """To ``(batch | 1, heads, length, 1 | feature_dim)`` in the working dtype."""
    if log_decay is None:
        return None
    decay = log_decay.to(query.dtype)
    if decay.dim() == 1:
        return decay.view(1, -1, 1, 1).expand(1, -1, query.shape[2], 1)
    return decay[..., None] if decay.dim() == 3 else decay


def _parallel(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if decay is None:
        scores = (q @ k.transpose(-1, -2)).masked_fill(~past, 0)
        total = k.transpose(-1, -2) @ v
        return _read_pairs(scores, v, q, initial, eps), total if initial is None else total + initial
    run = running_decay(decay, 2)
    gap = log_gap(run[:, :, :, None], run[:, :, None], q.dtype).masked_fill(~past[..., None], float("-inf")).exp()
    scores = torch.einsum("bhic,bhjc,bhijc->bhij", q, k, gap.expand(*gap.shape[:-1], q.shape[-1]))
    fade, leave = run.to(q.dtype).exp(), (run[:, :, -1:] - run).to(q.dtype).exp()
    total = (k * leave).transpose(-1, -2) @ v
    if initial is not None:
        total = total + fade[:, :, -1, :, None] * initial
    return _read_pairs(scores, v, q * fade, initial, eps), total


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    batch, heads, length, features = q.shape
    total = q.new_zeros(batch, heads, features, v.shape[-1]) if initial is None else initial
    outs = []
    kept = None if decay is None else fading(decay[..., None], q.dtype)
    for t in range(length):
        new = k[:, :, t, :, None] * v[:, :, t, None]
        total = total + new if kept is None else _faded(total, kept[0][:, :, t], kept[1][:, :, t], new)
        outs.append(_read(q[:, :, t, None], total, eps)[:, :, 0])
    width = v.shape[-1] - (eps is not None)
    return (torch.stack(outs, 2) if outs else q.new_zeros(batch, heads, 0, width)), total


def _faded(total: Tensor, factor: Tensor, rest: Tensor, new: Tensor) -> Tensor:
    return torch.addcmul(new, total, rest).addcmul(total, factor)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial: Tensor | None,
    eps: float | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Whole chunks first, then the short one that may be left."""
    length = q.shape[2]
    if not length:
        return _recurrent(q, k, v, decay, initial, eps)
    whole = length - length % chunk_size
    if whole == length:
        return _chunks(q, k, v, decay, initial, eps, chunk_size)
    total, outs = initial, []
    for rows in (slice(0, whole), slice(whole, length)):
        if rows.stop > rows.start:
            size, here = min(chunk_size, rows.stop - rows.start), None if decay is None else decay[:, :, rows]
            out, total = _chunks(q[:, :, rows], k[:, :, rows], v[:, :, rows], here, total, eps, size)
            outs.append(out)
    assert total is not None
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)), total


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial: Tensor | None,
    eps: float | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """One pass over chunk states, then all chunks at once: what happens inside them, and what their states add."""
    q, k, v = (t.unflatten(2, (-1, size)) for t in (q, k, v))
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if decay is None:
        scores = (q @ k.transpose(-1, -2)).masked_fill(~past, 0)
        reach, leave, kept = q, k, None
    else:
        # A decay that does not change with time is the same in every chunk.
        constant = decay.shape[-1] == 1 and decay.stride(2) == 0
        run = running_decay((decay[:, :, :size] if constant else decay).unflatten(2, (-1, size)), 3)
        if run.shape[-1] == 1:
            gap = log_gap(run, run.transpose(-1, -2), q.dtype).masked_fill(~past, float("-inf")).exp()
            scores = q @ k.transpose(-1, -2) * gap
        else:
            scores = _channel_scores(q, k, run)
        # Powers are taken relative to a chunk's end or start, so no exponent is ever positive.
        leave = k * (run[:, :, :, -1:] - run).to(q.dtype).exp()
        reach, kept = q * run.to(q.dtype).exp(), fading(run[:, :, :, -1, :, None], q.dtype)
    added = leave.transpose(-1, -2) @ v
    total = torch.zeros_like(added[:, :, 0]) if initial is None else initial
    before = []
    for index in range(q.shape[2]):
        before.append(total)
        new = added[:, :, index]
        if kept is None:
            total = total + new
        else:
            factor, rest = (part[:, :, min(index, part.shape[2] - 1)] for part in kept)
            total = _faded(total, factor, rest, new)
    return _read_pairs(scores, v, reach, torch.stack(before, 2), eps).flatten(2, 3), total


def _channel_scores(q: Tensor, k: Tensor, run: Tensor) -> Tensor:
    """Causal scores ``sum_c q_ic k_jc exp(run_ic - run_jc)`` of each chunk, ``(..., size, size)``: a decay per channel.

    Sub-blocks off the diagonal are products relative to the query sub-block's start, where both exponents are at most
    zero; those on it are formed with the exponent of the difference itself.
    """
    size = q.shape[-2]
    rows = []
    for start in range(0, size, _SUB):
        stop = min(start + _SUB, size)
        here, run_here = slice(start, stop), run[..., start:stop, :]
        gap = log_gap(run_here[..., :, None, :], run_here[..., None, :, :], q.dtype)
        past = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril()
        gap = gap.masked_fill(~past[..., None], float("-inf")).exp()
        near = (q[..., here, None, :] * k[..., None, here, :] * gap).sum(-1)
        row = [near, q.new_zeros(*near.shape[:-1], size - stop)]
        if start:
            anchor = run[..., start - 1 : start, :]
            far_k = k[..., :start, :] * (anchor - run[..., :start, :]).to(q.dtype).exp()
            row.insert(0, (q[..., here, :] * (run_here - anchor).to(q.dtype).exp()) @ far_k.transpose(-1, -2))
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)
