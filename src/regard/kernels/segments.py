"""A recurrence over a long sequence, segment after segment: memory beyond inputs and outputs is that of one segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Stretch", "in_segments", "segment_length"]

_Tensors = tuple[Tensor | None, ...]
Stretch = Callable[[_Tensors, _Tensors, Tensor | None], tuple[Tensor, Tensor]]
"""``(rows, whole, state) -> (out, state)``: what happens to one stretch of the sequence. ``rows`` are its parts of the
tensors that have a length, ``whole`` those that have none."""

# Elements of one segment: a few megabytes of everything together, within the last-level cache.
_SEGMENT = 1 << 19


def segment_length(per_token: int, chunk_size: int, device: torch.device) -> int:
    """Tokens that are processed at once: whole chunks, on a CPU few enough to stay in its cache."""
    limit = _SEGMENT if device.type == "cpu" else 16 * _SEGMENT
    return max(limit // max(per_token, 1) // chunk_size, 1) * chunk_size


def in_segments(
    stretch: Stretch,
    rows: Sequence[Tensor | None],
    whole: Sequence[Tensor | None] = (),
    initial: Tensor | None = None,
    *,
    step: int,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """``stretch`` over segments of ``step`` tokens with the state carried on; length is dimension ``dim`` of ``rows``
    and of the output.

    Only the states between segments are kept for the backward pass, which runs each segment again.
    """
    length = next(row.shape[dim] for row in rows if row is not None)
    if length <= step:
        return stretch(tuple(rows), tuple(whole), initial)
    out, state = _Segments.apply(stretch, step, dim, len(rows), initial, *rows, *whole)
    return out, state


def _cut(tensors: Sequence[Tensor | None], dim: int, start: int, size: int) -> list[Tensor | None]:
    return [None if t is None else t.narrow(dim, start, size) for t in tensors]


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stretch: Stretch, step: int, dim: int, count: int, initial: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, whole = tensors[:count], tensors[count:]
        length = next(row.shape[dim] for row in rows if row is not None)
        ctx.pieces = [(start, min(step, length - start)) for start in range(0, length, step)]
        states: list[Tensor | None] = []
        state, out = initial, None
        for start, size in ctx.pieces:
            states.append(state)
            here, state = stretch(tuple(_cut(rows, dim, start, size)), whole, state)
            if out is None:
                out = here.new_empty(*here.shape[:dim], length, *here.shape[dim + 1 :])
            out.narrow(dim, start, size).copy_(here)
        ctx.save_for_backward(*tensors, *states)
        ctx.stretch, ctx.dim, ctx.count, ctx.total = stretch, dim, count, len(tensors)
        assert out is not None and state is not None
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        tensors, states = ctx.saved_tensors[: ctx.total], ctx.saved_tensors[ctx.total :]
        wanted = ctx.needs_input_grad[5:]
        grads = [
            torch.zeros_like(t) if t is not None and needed else None for t, needed in zip(tensors, wanted, strict=True)
        ]
        for (start, size), state in zip(reversed(ctx.pieces), reversed(states), strict=True):
            parts = (*_cut(tensors[: ctx.count], ctx.dim, start, size), *tensors[ctx.count :])
            places = (*_cut(grads[: ctx.count], ctx.dim, start, size), *grads[ctx.count :])
            with torch.enable_grad():
                parts = tuple(
                    None if part is None else part.detach().requires_grad_(place is not None)
                    for part, place in zip(parts, places, strict=True)
                )
                before = None if state is None else state.detach().requires_grad_(True)
                out, after = ctx.stretch(parts[: ctx.count], parts[ctx.count :], before)
            leaves = [part for part in (*parts, before) if part is not None and part.requires_grad]
            seeds = (grad_out.narrow(ctx.dim, start, size), grad_state)
            found = iter(torch.autograd.grad((out, after), leaves, seeds, allow_unused=True))
            for place in places:
                if place is not None and (grad := next(found)) is not None:
                    place += grad
            if before is not None:
                grad_state = next(found)
        grad_initial = grad_state if states[0] is not None and ctx.needs_input_grad[4] else None
        return None, None, None, None, grad_initial, *grads
