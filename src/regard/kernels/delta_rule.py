"""The (gated) delta rule: a linear memory that first takes away what it holds under a key, then writes.

``S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T``, ``o_t = q_t S_t`` (Schlag et al., "Linear
Transformers Are Secretly Fast Weight Programmers", 2021, arXiv 2102.11174; with a decay Yang et al., "Gated Delta
Networks", 2024, arXiv 2412.06464, with queries and keys as rows). With unit keys and ``beta = 1`` a value is replaced.

With ``u_t = beta_t (v_t - exp(g_t) k_t S_{t-1})`` the state is a plain sum, ``S_t = exp(g_t) S_{t-1} + k_t^T u_t``, and
within a chunk the ``u`` solve a unit triangular system (the WY form of Yang et al., 2024, arXiv 2406.06484). Forms:
``parallel`` (one system for all tokens), ``chunked`` and ``recurrent``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.backends import resolve
from regard.kernels.decay import fading, log_gap, running_decay
from regard.kernels.linear import LinearState
from regard.kernels.segments import in_segments, segment_length
from regard.kernels.shapes import accumulation_dtype, expand_groups

__all__ = ["delta_rule"]

FORMS = ("parallel", "chunked", "recurrent")


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    state: LinearState | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, LinearState]:
    """Output ``(batch, heads, length, value_dim)`` and the state ``(batch, heads, dim, value_dim)`` after the last
    token; always causal.

    query ``(batch, heads, length, dim)``, key and value ``(batch, kv_heads, length, ...)``, beta and log_decay (<= 0)
    ``(batch, heads, length)``. It stays bounded while ``beta_t |k_t|^2 <= 2``. ``state`` continues an earlier stretch.
    """
    batch, heads, length, _ = query.shape
    if key.shape[2] != length or value.shape[:3] != key.shape[:3]:
        raise ShapeError(
            f"The delta rule needs a key and a value per query, got query {tuple(query.shape)}, key "
            f"{tuple(key.shape)}, value {tuple(value.shape)}."
        )
    for name, gate in (("beta", beta), ("log_decay", log_decay)):
        if gate is not None and gate.shape != (batch, heads, length):
            raise ShapeError(f"{name} is (batch, heads, length) = {(batch, heads, length)}, got {tuple(gate.shape)}.")
    if chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1, got {chunk_size}.")
    form = resolve("delta_rule", backend, FORMS)
    work = accumulation_dtype(query.dtype)

    def stretch(
        rows: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...], before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v, strength = (expand_groups(row, heads).to(work) for row in rows[:4] if row is not None)
        gap = torch.zeros_like(strength) if rows[4] is None else rows[4].to(work)
        if before is None:
            before = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
        run = _recurrent if form == "recurrent" else _chunked
        size = q.shape[2] if form == "parallel" else chunk_size
        out, after = run(q * scale, k, v, strength, gap, before, size)
        return out.to(query.dtype), after

    rows = (query, key, value, beta, log_decay)
    initial = None if state is None else state.sum
    step = length
    if form in ("auto", "chunked"):
        per_token = batch * heads * max(query.shape[-1], value.shape[-1], chunk_size)
        step = segment_length(per_token, chunk_size, query.device)
    out, after = in_segments(stretch, rows, (), initial, step=step, dim=2)
    return out, LinearState(after)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gap: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    outs = []
    factor, rest = fading(gap[..., None, None], q.dtype)
    for t in range(q.shape[2]):
        state = torch.addcmul(state * factor[:, :, t], state, rest[:, :, t])
        here = k[:, :, t, None]
        new = beta[:, :, t, None, None] * (v[:, :, t, None] - here @ state)
        state = state + here.transpose(-1, -2) @ new
        outs.append((q[:, :, t, None] @ state)[:, :, 0])
    return (torch.stack(outs, 2) if outs else torch.zeros_like(v)), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gap: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Whole chunks, then the short one that may be left."""
    length, outs = q.shape[2], []
    whole = length - length % max(size, 1)
    for start, stop in ((0, whole), (whole, length)):
        if stop > start:

            def cut(t: Tensor, start: int = start, stop: int = stop) -> Tensor:
                return t[:, :, start:stop].unflatten(2, (-1, min(size, stop - start)))

            out, state = _chunks(cut(q), cut(k), cut(v), cut(beta), cut(gap), state)
            outs.append(out)
    return (torch.cat(outs, 2) if outs else torch.zeros_like(v)), state


def _chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gap: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors ``(batch, heads, chunks, size, ...)``. The triangular systems of all chunks at once, then one pass over
    chunks: ``U = U_0 - W S``, where ``S`` is the state before the chunk."""
    size = q.shape[3]
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    run = running_decay(gap, -1)
    fade = log_gap(run[..., None], run[..., None, :], q.dtype).masked_fill(~past, float("-inf")).exp()
    beta, reach = beta[..., None], run.to(q.dtype).exp()[..., None]
    system = (beta * (k @ k.transpose(-1, -2)) * fade).tril(-1)
    wanted = torch.cat((beta * v, beta * reach * k), -1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    own, taken = solved.split((v.shape[-1], k.shape[-1]), -1)
    scores, far = q @ k.transpose(-1, -2) * fade, q * reach
    leave = k * (run[..., -1:] - run).to(q.dtype).exp()[..., None]
    factor, rest = fading(run[..., -1:, None], q.dtype)
    outs = []
    for c in range(q.shape[2]):
        new = own[:, :, c] - taken[:, :, c] @ state
        outs.append(far[:, :, c] @ state + scores[:, :, c] @ new)
        new = leave[:, :, c].transpose(-1, -2) @ new
        state = torch.addcmul(new, state, rest[:, :, c]).addcmul(state, factor[:, :, c])
    return torch.cat(outs, 2), state
