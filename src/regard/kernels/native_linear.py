"""Causal linear attention in C++ on a CPU (``native_linear.cpp``, ``native_channel.cpp``), with its gradient."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels import native
from regard.kernels.shapes import fold_groups

__all__ = ["causal", "obstacle"]

# Chunks between two states that are kept for the backward pass.
_KEEP = 32
_Options = tuple[int, float, bool, float]
_INTEGERS = (
    *("batch", "heads", "kv_heads", "length", "dim", "value_dim", "normalize"),
    *("decay", "chunk", "keep", "threads"),
)


class _Problem(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in _INTEGERS), ("scale", ctypes.c_float), ("eps", ctypes.c_float)]


def obstacle(query: Tensor, value: Tensor, log_decay: Tensor | None, chunk: int, *, asked: bool) -> str | None:
    """Why a call should not run here, or None; ``asked``: it was asked for by name, so that size does not count."""
    if query.device.type != "cpu" or query.dtype == torch.float64:
        return f"it computes in float32 on a CPU, not in {query.dtype} on {query.device}"
    batch, heads, length, dim = query.shape
    work = 2.0 * batch * heads * length * (chunk * (dim + value.shape[-1]) / 2 + 2 * dim * value.shape[-1])
    if asked:
        return None if length and native.available(build=True) else native.status().detail
    return None if native.large_enough(work) else "it would not be worth it"


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    *,
    chunk: int,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output and last state of float32 tensors, shapes as in :func:`regard.kernels.linear_attention`."""
    out, last = _Causal.apply(query, key, value, log_decay, initial, (chunk, scale, normalize, eps))
    return out, last


def _problem(
    query: Tensor, value: Tensor, log_decay: Tensor | None, options: tuple[int, float, bool, float]
) -> _Problem:
    chunk, scale, normalize, eps = options
    (batch, heads, length, dim), (_, kv_heads, _, value_dim) = query.shape, value.shape
    kind = 0 if log_decay is None else 1 if log_decay.dim() == 1 else 2
    sizes = (batch, heads, kv_heads, length, dim, value_dim, int(normalize))
    return _Problem(*sizes, kind, chunk, _KEEP, torch.get_num_threads(), scale, eps)


def _per_channel(log_decay: Tensor | None) -> bool:
    return log_decay is not None and log_decay.dim() == 4


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        initial: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        library = native.require()
        inputs = [None if t is None else t.float().contiguous() for t in (query, key, value, log_decay, initial)]
        query, key, value = (t for t in inputs[:3] if t is not None)
        (batch, heads, length, dim), (chunk, _, normalize, _) = query.shape, options
        width, panel = value.shape[-1] + int(normalize), library.regard_panel()
        out, last = query.new_empty(batch, heads, length, value.shape[-1]), query.new_empty(batch, heads, dim, width)
        states = totals = None
        if any(ctx.needs_input_grad):
            kept = -(length // -(chunk * _KEEP))
            states = query.new_empty(batch, heads, kept, dim, -(width // -panel) * panel)
        if normalize:
            totals = query.new_empty(batch, heads, length)
        problem = _problem(query, value, log_decay, options)
        run = library.regard_channel_forward if _per_channel(log_decay) else library.regard_linear_forward
        run(ctypes.byref(problem), *map(_at, (*inputs, out, last, states, totals)))
        ctx.save_for_backward(*inputs, states, totals)
        ctx.options = options
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_decay, initial, states, totals = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (query.new_empty(*query.shape[:3], t.shape[-1]) for t in (key, value))
        per_head = log_decay is not None and log_decay.dim() == 1
        channels = _per_channel(log_decay)
        grad_decay = query.new_zeros(query.shape if channels else query.shape[: 2 if per_head else 3])
        grad_initial = torch.empty_like(grad_last, memory_format=torch.contiguous_format)
        sources = (query, key, value, log_decay, states, totals, grad_out.contiguous(), grad_last.contiguous())
        places = (grad_query, grad_key, grad_value, grad_decay, grad_initial)
        problem = _problem(query, value, log_decay, ctx.options)
        library = native.require()
        run = library.regard_channel_backward if channels else library.regard_linear_backward
        run(ctypes.byref(problem), *map(_at, (*sources, *places)))
        decay_grad = None if log_decay is None else (grad_decay.sum(0) if per_head else grad_decay)
        return (
            grad_query,
            fold_groups(grad_key, key.shape[1]),
            fold_groups(grad_value, value.shape[1]),
            decay_grad,
            None if initial is None else grad_initial,
            None,
        )
