"""The gated linear recurrence over many ranks: what ZeCO and LASP share.

Per head ``S_t = diag(a_t) S_{t-1} + k_t^T v_t`` and ``o_t = q_t S_t``, with ``a_t = exp(log_decay_t)`` in [0, 1]. Rank
p holds a stretch of the tokens. From a zero state it comes to ``S_p`` and outputs ``o_t``, with total decay ``G_p``;
since all is linear, the true values with an incoming state ``R_p`` are

    R_{p+1} = S_p + diag(G_p) R_p        o_t + (q_t * A_t) R_p,    A_t the product of a from the stretch's start to t.

Backward, with ``D_p`` the gradient of ``R_p``: ``D_p = sum_t (q_t * A_t)^T do_t + diag(G_p) D_{p+1}``, the same
recurrence run from the last rank to the first; ``D_{p+1}`` is the gradient of ``S_p``, and that of ``G_p`` is the sum
of ``D_{p+1} * R_p`` over value channels. ``R_p`` is kept, so that the backward pass sends nothing but ``D``.

How the states travel is a :class:`Carry`; :func:`sequence_parallel` does the rest, in one of two schedules:

* overlapped: the carry runs while the rank computes its outputs from a zero state, to which the incoming state's part
  is added later. In a thread for CPU tensors, on a stream of its own for GPU tensors; nothing else may use the group
  meanwhile. In the backward pass autograd's own order does the same, latest first: the states' gradients leave before,
  and are awaited after, the gradients of the local outputs. It costs products of ``length x dk x dv``, two forward and
  four backward.
* not overlapped: the rank waits for its incoming state and then computes once. One such product each way, for what it
  has to pass on before.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.errors import OptionError, ShapeError
from regard.kernels.decay import running_decay
from regard.kernels.linear import LinearState, linear_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.parallel.group import Group

__all__ = ["Carry", "carry_states", "chunked_gla", "sequence_parallel"]


class Carry(Protocol):
    """How states travel from rank to rank; ``carry(group, state, decay, start, reverse)`` gives what arrives here.

    ``state (..., dk, dv)`` is the rank's own, ``decay (..., 1 | dk)`` (or None) what scales those arriving, ``start``
    what arrives at the first rank. ``reverse`` runs from the last rank to the first.
    """

    def __call__(
        self, group: Group, state: Tensor, decay: Tensor | None, start: Tensor | None, reverse: bool
    ) -> Tensor: ...


def chunked_gla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One stretch on one rank: outputs, the state after it, and its total decay ``(batch, heads, dk)``.

    query, key ``(batch, heads, length, dk)``, value ``(batch, heads, length, dv)``, states ``(batch, heads, dk, dv)``;
    log_decay ``(batch, heads, length, dk)``, ``(batch, heads, length)`` or ``(heads,)``, at most 0, or None for none.
    """
    state = None if initial_state is None else LinearState(initial_state)
    out, final = linear_attention(
        query,
        key,
        value,
        causal=True,
        log_decay=log_decay,
        scale=scale,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    work, shape = accumulation_dtype(query.dtype), (*query.shape[:2], query.shape[3])
    rows = _rows(log_decay, query)
    if rows is None:
        return out, final.sum, query.new_ones(shape, dtype=work)
    return out, final.sum, rows.sum(2, dtype=work).exp().expand(shape)


def sequence_parallel(
    carry: Carry,
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
    initial_state: Tensor | None,
    overlap: bool,
) -> tuple[Tensor, Tensor]:
    """This rank's outputs, and the state after its last token; differentiable, if every rank runs its backward pass."""
    _check_start(group, initial_state)
    if initial_state is not None:
        initial_state = initial_state.to(accumulation_dtype(query.dtype))
    if not query.shape[2] == key.shape[2] == value.shape[2]:
        raise ShapeError(
            f"Rank {group.rank} holds the same tokens of query, key and value, got {query.shape[2]}, {key.shape[2]} "
            f"and {value.shape[2]} of them."
        )
    key, value = expand_groups(key, query.shape[1]), expand_groups(value, query.shape[1])
    rows = _rows(log_decay, query)

    def local(query: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if not query.shape[2]:  # empty, but a part of the graph: the rank's backward pass passes gradients on
            run = None if rows is None else running_decay(rows, 2)
            own, total = _own_state(key, value, run)
            final = own if start is None else own + (start if total is None else start * total[..., None])
            return _reach(query, run, scale).to(query.dtype) @ final.to(query.dtype), final
        state = None if start is None else LinearState(start)
        out, last = linear_attention(
            query, key, value, causal=True, log_decay=log_decay, scale=scale, state=state, chunk_size=chunk_size
        )
        return out, last.sum

    if group.size == 1:
        return local(query, initial_state)
    if overlap:
        wide = query.to(accumulation_dtype(query.dtype))
        run = None if rows is None else running_decay(rows, 2)
        scan = _Scan(carry, group)
        token = _Depart.apply(*_own_state(key, value, run), initial_state, scan)
        out, _ = local(wide, None)
        incoming, outgoing = _Arrive.apply(token, scan)
        parts = (out, _reach(wide, run, scale), incoming)
        return torch.baddbmm(*(part.flatten(0, 1) for part in parts)).view_as(out).to(query.dtype), outgoing
    with torch.no_grad():
        state, total = _own_state(key, value, None if rows is None else running_decay(rows, 2))
        incoming = carry(group, state, total, initial_state, False)
    out, final = local(query, incoming if initial_state is None else initial_state)
    done: tuple[Tensor, Tensor] = _Return.apply(out, final, query, rows, total, scale, carry, group)
    return done


def _own_state(key: Tensor, value: Tensor, run: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a stretch adds up to from a zero state, and its total decay ``(batch, heads, 1 | dk)``."""
    work = accumulation_dtype(key.dtype)
    leaving, total = key.to(work), None
    if run is not None:
        last = run[:, :, -1:] if run.shape[2] else run.sum(2, keepdim=True)
        leaving = leaving * (last - run).to(work).exp()
        total = last[:, :, 0].to(work).exp().expand(len(key), -1, -1)
    return leaving.transpose(-1, -2) @ value.to(work), total


def _reach(query: Tensor, run: Tensor | None, scale: float) -> Tensor:
    """The queries as they meet the incoming state."""
    work = accumulation_dtype(query.dtype)
    return query.to(work) * (scale if run is None else run.to(work).exp() * scale)


def carry_states(
    carry: Carry, group: Group, state: Tensor, decay: Tensor | None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(incoming, outgoing)`` of the recurrence ``R_{p+1} = S_p + diag(G_p) R_p`` over the ranks, differentiable."""
    _check_start(group, initial_state)
    if decay is not None and (
        decay.shape[:-1] != state.shape[:-2]
        or decay.shape[-1] not in (1, state.shape[-2])
        or decay.dtype != state.dtype
    ):
        raise ShapeError(
            f"A state {tuple(state.shape)} of {state.dtype} decays by (..., dk) = {tuple(state.shape[:-1])} or "
            f"(..., 1) of the same dtype, got {tuple(decay.shape)} of {decay.dtype}."
        )
    scan = _Scan(carry, group)
    incoming, outgoing = _Arrive.apply(_Depart.apply(state, decay, initial_state, scan), scan)
    return incoming, outgoing


def _check_start(group: Group, initial_state: Tensor | None) -> None:
    if initial_state is not None and group.rank:
        raise OptionError(
            f"initial_state is what came before the whole sequence: only rank 0 has it, but rank {group.rank} got one."
        )


def _rows(log_decay: Tensor | None, query: Tensor) -> Tensor | None:
    """To ``(batch | 1, heads, length, 1 | dk)``."""
    if log_decay is None:
        return None
    if tuple(log_decay.shape) not in ((query.shape[1],), tuple(query.shape[:3]), tuple(query.shape)):
        raise ShapeError(
            f"log_decay of shape {tuple(log_decay.shape)} is none of (heads,) = ({query.shape[1]},), (batch, heads, "
            f"length) = {tuple(query.shape[:3])} and (batch, heads, length, dk) = {tuple(query.shape)}."
        )
    if log_decay.dim() == 1:
        return log_decay.view(1, -1, 1, 1).expand(1, -1, query.shape[2], 1)
    return log_decay[..., None] if log_decay.dim() == 3 else log_decay


class _Scan:
    """One scan over the ranks, forward and, later, backward, under way between its start and its end."""

    def __init__(self, carry: Carry, group: Group) -> None:
        self._carry, self._group = carry, group
        self._end: Callable[[], Tensor] | None = None
        # Detached: a tensor of the graph kept here would keep the graph alive.
        self.state: Tensor | None = None
        self.decay: Tensor | None = None
        self.incoming: Tensor | None = None
        self.grad_incoming: Tensor | None = None
        self.grad_outgoing: Tensor | None = None

    def start(self, state: Tensor, start: Tensor | None, reverse: bool) -> None:
        def run() -> Tensor:
            return self._carry(self._group, state, self.decay, start, reverse)

        if state.is_cuda:
            self._end = _on_own_stream(run, state)
        else:
            self._end = _in_background(run)

    def end(self) -> Tensor:
        assert self._end is not None, "a scan ends after it started"
        end, self._end = self._end, None
        return end()


def _in_background(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    found: list[Tensor] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                found.append(run())
        except BaseException as error:  # raised where the result is asked for
            failed.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()

    def end() -> Tensor:
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    return end


def _on_own_stream(run: Callable[[], Tensor], like: Tensor) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream(like.device)
    stream.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(stream):
        found = run()
    like.record_stream(stream)

    def end() -> Tensor:
        here = torch.cuda.current_stream(like.device)
        here.wait_stream(stream)
        found.record_stream(here)
        return found

    return end


class _Depart(torch.autograd.Function):
    """Sends the rank's state on its way; gives a token that :class:`_Arrive` takes."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, decay: Tensor | None, initial: Tensor | None, scan: _Scan) -> Tensor:
        ctx.scan = scan
        scan.state, scan.decay = state.detach(), None if decay is None else decay.detach()
        scan.start(scan.state, None if initial is None else initial.detach(), False)
        return state.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        scan = ctx.scan
        after = scan.end()  # D_{p+1}
        if scan.grad_outgoing is not None:
            after = after + scan.grad_outgoing
        grad_decay = grad_initial = None
        if scan.decay is not None and ctx.needs_input_grad[1]:
            grad_decay = (after * scan.incoming).sum(-1)
            if scan.decay.shape[-1] == 1:
                grad_decay = grad_decay.sum(-1, keepdim=True)
        if ctx.needs_input_grad[2]:
            grad_initial = scan.grad_incoming + (after if scan.decay is None else after * scan.decay[..., None])
        return after, grad_decay, grad_initial, None


class _Arrive(torch.autograd.Function):
    """The state that arrives, and the one that leaves; backward, the start of the scan the other way."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, scan: _Scan) -> tuple[Tensor, Tensor]:
        ctx.scan = scan
        ctx.set_materialize_grads(False)
        incoming = scan.end()
        assert scan.state is not None
        scan.incoming = incoming.detach()
        outgoing = scan.state + (incoming if scan.decay is None else incoming * scan.decay[..., None])
        return incoming, outgoing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_incoming: Tensor | None, grad_outgoing: Tensor | None) -> tuple[Tensor, None]:
        scan = ctx.scan
        own = torch.zeros_like(scan.state) if grad_incoming is None else grad_incoming
        scan.grad_incoming, scan.grad_outgoing = own, grad_outgoing
        if grad_outgoing is not None:
            own = own + (grad_outgoing if scan.decay is None else grad_outgoing * scan.decay[..., None])
        scan.start(own, None, True)
        return own.new_zeros(()), None


class _Return(torch.autograd.Function):
    """Passes on what was computed with the incoming state; backward, fetches the gradient of the state that left."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        final: Tensor,
        query: Tensor,
        rows: Tensor | None,
        total: Tensor | None,
        scale: float,
        carry: Carry,
        group: Group,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(query, rows, total)
        ctx.call, ctx.value_dim = (scale, carry, group), out.shape[-1]
        ctx.set_materialize_grads(False)
        return out.view_as(out), final.view_as(final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        query, rows, total = ctx.saved_tensors
        scale, carry, group = ctx.call
        work = accumulation_dtype(query.dtype)
        if grad_out is None:
            grad_out = query.new_zeros(*query.shape[:3], ctx.value_dim)
        reach = _reach(query, None if rows is None else running_decay(rows, 2), scale)
        own = reach.transpose(-1, -2) @ grad_out.to(work)
        if grad_final is not None:
            own = own + (grad_final if total is None else grad_final * total[..., None])
        after = carry(group, own, total, None, True)
        after = after if grad_final is None else after + grad_final
        return grad_out, after, None, None, None, None, None, None
