"""The elementwise linear recurrence ``h_t = exp(g_t) h_{t-1} + x_t`` and the selective scan that stands on it.

Forms: ``recurrent`` (a token at a time), ``parallel`` (doubling: ``log2(length)`` passes over everything) and
``chunked`` (all chunks in step, then one pass over what they carry to each other), which ``"auto"`` takes. A decay is
given as its logarithm, so that none can be negative or grow; ``-inf`` forgets everything. No form divides by a decay.
Factors are rounded to the accumulation dtype: in float32 a rate ``|g|`` per token comes out right to ``3e-8 / |g|``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.errors import ShapeError
from regard.kernels.backends import resolve
from regard.kernels.segments import in_segments, segment_length
from regard.kernels.shapes import accumulation_dtype

__all__ = ["linear_scan", "selective_scan"]

FORMS = ("parallel", "chunked", "recurrent")
# Below this a loop over tokens is no slower than anything else.
_SHORT = 16


def linear_scan(
    log_decay: Tensor, increment: Tensor, initial: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """All states ``h_t = exp(log_decay_t) * h_{t-1} + increment_t``, ``(batch, length, *state)``.

    increment ``(batch, length, *state)``; log_decay of as many dimensions, broadcastable to it, at most 0; initial
    ``(batch, *state)``, by default zeros. States are in the accumulation dtype (float32 for half precision).
    """
    _check(log_decay, increment, initial)
    form = resolve("linear_scan", backend, FORMS)
    work = accumulation_dtype(increment.dtype)
    gap, increment = log_decay.to(work), increment.to(work)
    gap = gap.expand(-1, increment.shape[1], *gap.shape[2:])
    initial = None if initial is None else initial.to(work)
    if not increment.shape[1]:
        return increment
    if form == "parallel":
        return _doubling(gap, increment, initial)
    if form == "recurrent" or (form == "auto" and increment.shape[1] <= _SHORT):
        return _loop(gap, increment, initial)
    states: Tensor = _Scan.apply(gap, increment, initial)
    return states


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba's selective scan (Gu and Dao, 2023, arXiv 2312.00752, algorithm 2): output ``(batch, length, dim)`` and
    the state ``(batch, dim, n)`` after the last token.

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = C_t h_t + D u_t``, for each of ``dim`` channels with
    ``n`` numbers of state. u and delta (>= 0) ``(batch, length, dim)``, A (<= 0) ``(dim, n)``, B and C ``(batch,
    length, n)``, D ``(dim,)``. The states of all tokens are never there at once.
    """
    batch, length, dim = u.shape
    size = A.shape[-1]
    if delta.shape != u.shape or A.shape != (dim, size) or B.shape != (batch, length, size) or C.shape != B.shape:
        raise ShapeError(
            f"For u (batch, length, dim) = {tuple(u.shape)} delta has the same shape, A is (dim, n), B and C are "
            f"(batch, length, n); got delta {tuple(delta.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C "
            f"{tuple(C.shape)}."
        )
    work = accumulation_dtype(u.dtype)

    def stretch(
        rows: tuple[Tensor | None, ...], whole: tuple[Tensor | None, ...], before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        u_, delta_, B_, C_ = (row.to(work) for row in rows if row is not None)
        (A_,) = (tensor.to(work) for tensor in whole if tensor is not None)
        increment = (delta_ * u_)[..., None] * B_[:, :, None]
        states = linear_scan(delta_[..., None] * A_, increment, before, backend=backend)
        out = (states @ C_[..., None])[..., 0]
        # A state of its own: a view would keep the states of the whole stretch.
        return out.to(u.dtype), states[:, -1].clone()

    if not length:
        return torch.empty_like(u), u.new_zeros(batch, dim, size, dtype=work) if state is None else state
    step = segment_length(batch * dim * size, _SHORT, u.device)
    out, last = in_segments(stretch, (u, delta, B, C), (A,), state, step=step, dim=1)
    return (out if D is None else out + D * u), last


def _check(log_decay: Tensor, increment: Tensor, initial: Tensor | None) -> None:
    fits = log_decay.dim() == increment.dim() and all(
        size in (1, full) for size, full in zip(log_decay.shape, increment.shape, strict=True)
    )
    if increment.dim() < 2 or not fits:
        raise ShapeError(
            f"log_decay {tuple(log_decay.shape)} does not broadcast to the increments (batch, length, *state) = "
            f"{tuple(increment.shape)}; give it as many dimensions, each of the same size or 1."
        )
    expected = (increment.shape[0], *increment.shape[2:])
    if initial is not None and tuple(initial.shape) != expected:
        raise ShapeError(f"The initial state is (batch, *state) = {expected}, got {tuple(initial.shape)}.")


def _loop(gap: Tensor, increment: Tensor, initial: Tensor | None) -> Tensor:
    state, states = initial, []
    for t in range(increment.shape[1]):
        state = increment[:, t] if state is None else gap[:, t].exp() * state + increment[:, t]
        states.append(state)
    return torch.stack(states, 1)


def _doubling(gap: Tensor, increment: Tensor, initial: Tensor | None) -> Tensor:
    """Each pass lets every token see twice as far back."""
    if initial is not None:
        first = increment[:, :1] + (gap[:, 0].exp() * initial)[:, None]
        increment = torch.cat((first, increment[:, 1:]), 1)
    states, reach = increment, 1
    while reach < increment.shape[1]:
        later = states[:, reach:] + gap[:, reach:].exp() * states[:, :-reach]
        states = torch.cat((states[:, :reach], later), 1)
        gap = torch.cat((gap[:, :reach], gap[:, reach:] + gap[:, :-reach]), 1)
        reach *= 2
    return states


def _chunks(factor: Tensor, increment: Tensor, initial: Tensor | None) -> Tensor:
    """Without autograd: chunks of about ``sqrt(length)`` tokens in step, and what is left over token by token."""
    length = increment.shape[1]
    size = math.isqrt(length)
    whole = length // size * size
    states = torch.empty_like(increment, memory_format=torch.contiguous_format)
    local = states[:, :whole].unflatten(1, (-1, size))
    new, fade = (t[:, :whole].unflatten(1, (-1, size)) for t in (increment, factor))
    local[:, :, 0] = new[:, :, 0]
    for t in range(1, size):
        torch.addcmul(new[:, :, t], fade[:, :, t], local[:, :, t - 1], out=local[:, :, t])
    reach = fade.cumprod(2)
    carried = torch.empty_like(local[:, :, 0], memory_format=torch.contiguous_format)
    state = torch.zeros_like(increment[:, 0]) if initial is None else initial
    for chunk in range(local.shape[1]):
        carried[:, chunk] = state
        state = local[:, chunk, -1] + reach[:, chunk, -1] * state
    local += reach * carried[:, :, None]
    for t in range(whole, length):
        torch.addcmul(increment[:, t], factor[:, t], states[:, t - 1], out=states[:, t])
    return states


class _Scan(torch.autograd.Function):
    """The chunked form; its gradient is the same recurrence run backwards."""

    @staticmethod
    def forward(ctx: Any, gap: Tensor, increment: Tensor, initial: Tensor | None) -> Tensor:
        states = _chunks(gap.exp(), increment, initial)
        ctx.save_for_backward(gap, states, initial)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gap, states, initial = ctx.saved_tensors
        factor = gap.exp()
        # The gradient of state t comes back through the decay of t + 1.
        ahead = F.pad(factor.flip(1)[:, :-1].movedim(1, -1), (1, 0)).movedim(-1, 1)
        toward = _chunks(ahead, grad.flip(1), None).flip(1)
        grad_gap = grad_initial = None
        if ctx.needs_input_grad[0]:
            first = torch.zeros_like(states[:, :1]) if initial is None else initial[:, None]
            grad_gap = (toward * factor * torch.cat((first, states[:, :-1]), 1)).sum_to_size(gap.shape)
        if initial is not None and ctx.needs_input_grad[2]:
            grad_initial = toward[:, 0] * factor[:, 0]
        return grad_gap, toward if ctx.needs_input_grad[1] else None, grad_initial
