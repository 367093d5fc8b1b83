"""Causal linear attention: time per token over length, share of a matrix product's rate, causal SDPA, memory."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Report, Row, Times, gradients, inputs, peak_growth, ratio, run_alone
from regard.bench.measure import interleaved
from regard.kernels import delta_rule, linear_attention
from regard.registry import build

HEADS, DIM, CHUNK = 8, 64, 64
Call = Callable[..., Tensor]
# The paper whose claim this is, and the other kinds of state that the kernels know.
FORMS = ("lightning_attention", "normalised sum", "decay per channel", "delta rule")


def run(report: Report, quick: bool) -> list[Row]:
    """All of it; short and without targets when quick."""
    lengths, rounds = ((1024, 4096), 3) if quick else ((4096, 32768, 262144), 5)
    rows = [row for form in FORMS for row in _spread(report, form, lengths, quick)]
    rows += _rate(report, lengths[1], rounds, quick)
    rows += _against_sdpa(report, 2048 if quick else 32768, 3, quick)
    return rows + [row for form in FORMS for row in _memory(report, form, lengths[-2:], quick)]


def _inputs(form: str, length: int, grad: bool) -> tuple[Tensor, ...]:
    """Queries, keys and values as the kernel takes them, and gates if it has some."""
    query, key, value = inputs(HEADS, length)
    tensors: tuple[Tensor, ...] = (query, key, value)
    if form == "normalised sum":
        tensors = (query.relu_(), key.relu_(), value)
    elif form == "decay per channel":
        tensors = (query, key, value, F.logsigmoid(value))
    elif form == "delta rule":
        tensors = (query, F.normalize(key, dim=-1), value, value[..., 0].sigmoid(), F.logsigmoid(value[..., 1]))
    return tuple(tensor.requires_grad_(grad) for tensor in tensors)


def _call(form: str) -> Call:
    if form == "lightning_attention":
        mechanism = build(form, {}, num_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM)
        return partial(mechanism, causal=True)
    if form == "normalised sum":
        return lambda q, k, v: linear_attention(q, k, v, causal=True, normalize=True, eps=1.0)[0]
    if form == "decay per channel":
        return lambda q, k, v, g: linear_attention(q, k, v, causal=True, log_decay=g)[0]
    return lambda q, k, v, b, g: delta_rule(q, k, v, b, log_decay=g)[0]


def _spread(report: Report, form: str, lengths: tuple[int, ...], quick: bool) -> list[Row]:
    """How far the time per token differs between lengths, in a process whose allocator keeps its memory; for the first
    form also as a process finds it, where the system clears fresh pages for every long output."""
    rows = []
    for mode in ("forward", "backward"):
        for memory in ("kept", "default") if form == FORMS[0] else ("kept",):
            report(f"{form}, {mode}: {lengths[0]} to {lengths[-1]} tokens, memory {memory}")
            printed = run_alone("benchmarks.linear", "share", form, mode, *map(str, lengths), memory=memory)
            share = json.loads(printed)
            note = f"allocator: memory {memory}; microseconds per token: " + ", ".join(
                f"{taken:.2f} at {n // 1024}k" for taken, n in zip(share, lengths, strict=True)
            )
            both = "forward + backward" if mode == "backward" else "forward"
            target = 15.0 if memory == "kept" and not quick else None
            spread = 100 * (max(share) / min(share) - 1)
            name = f"{form}, spread of time per token, {both}" + (", fresh memory" if memory == "default" else "")
            rows.append(Row(name, spread, "%", target, "<=", note))
    return rows


def shares(form: str, mode: str, lengths: list[int]) -> list[float]:
    """Microseconds per token at each length. Every round takes as many tokens at every length, from the same memory:
    short sequences find no warmer cache."""
    backward = mode == "backward"
    whole = _inputs(form, lengths[-1], grad=False)
    calls = {str(n): partial(_in_turn, _call(form), whole, n, backward) for n in lengths}
    medians = [statistics.median(times) for times in interleaved(calls, 3 if backward else 5).values()]
    return [1e6 * seconds / lengths[-1] for seconds in medians]


def _in_turn(call: Call, whole: tuple[Tensor, ...], length: int, backward: bool) -> None:
    """One call after the other on sequences of ``length`` tokens, as many as the whole memory holds."""
    # Stretches of memory, so that every sequence is contiguous, as the whole is.
    cut = (t.view(-1, 1, t.shape[1], length, *t.shape[3:]).unbind(0) for t in whole)
    for tensors in zip(*cut, strict=True):
        if backward:
            gradients(call, tuple(t.detach().requires_grad_() for t in tensors))()
        else:
            call(*tensors)


def _rate(report: Report, length: int, rounds: int, quick: bool) -> list[Row]:
    """Floating-point operations that the formula needs (the triangle of each chunk, reading and updating its state)
    per second, over those of a matrix product."""
    report(f"share of the matrix-product rate at {length} tokens")
    call, (query, key, value) = _call("lightning_attention"), inputs(HEADS, length)
    side = 2048
    square = torch.randn(side, side)
    times = interleaved({"product": lambda: square @ square, "linear": lambda: call(query, key, value)}, rounds)
    own = HEADS * length * (2 * DIM * (CHUNK + 1) + 4 * DIM * DIM)
    share = ratio(times, "product", "linear") * own / (2 * side**3)
    note = f"forward, chunks of {CHUNK}, its own operations per second over those of a {side} x {side} product"
    return [Row(f"lightning_attention, {length} tokens", share, "of the rate", None if quick else 0.4, ">=", note)]


def _against_sdpa(report: Report, length: int, rounds: int, quick: bool) -> list[Row]:
    rows = []
    for name, backward in (("forward", False), ("forward + backward", True)):
        report(f"lightning_attention against causal SDPA, {name}, {length} tokens")
        tensors = inputs(HEADS, length, grad=backward)
        times = _both(tensors, rounds, backward)
        note = f"{name}, times faster than causal SDPA"
        target = None if quick else 20.0
        rows.append(
            Row(f"lightning_attention, {length} tokens", ratio(times, "sdpa", "linear"), target=target, note=note)
        )
    return rows


def _both(tensors: tuple[Tensor, ...], rounds: int, backward: bool) -> Times:
    calls: dict[str, Call] = {
        "sdpa": partial(F.scaled_dot_product_attention, is_causal=True),
        "linear": _call("lightning_attention"),
    }
    if backward:
        return interleaved({name: gradients(call, tensors) for name, call in calls.items()}, rounds)
    return interleaved({name: partial(call, *tensors) for name, call in calls.items()}, rounds)


def _memory(report: Report, form: str, lengths: tuple[int, ...], quick: bool) -> list[Row]:
    """Bytes that each further token takes beyond inputs, outputs and gradients, over the bytes of those."""
    rows = []
    for backward in (False, True):
        report(f"memory of {form}: {', '.join(map(str, lengths))} tokens")
        mode = "backward" if backward else "forward"
        peaks = [int(run_alone("benchmarks.linear", "peak", form, mode, str(n))) for n in lengths]
        own = (sum(t.nbytes for t in _inputs(form, 64, False)) / 64 + 4 * HEADS * DIM) * (2 if backward else 1)
        extra = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
        note = "beyond inputs and outputs: " + ", ".join(
            f"{peak / 2**20:.0f} MiB at {n // 1024}k" for peak, n in zip(peaks, lengths, strict=True)
        )
        name = f"{form}, growth of memory, {'forward + backward' if backward else 'forward'}"
        target = None if quick else 5.0
        rows.append(Row(name, 100 * extra / own, "% of inputs and outputs", target, "<=", note))
    return rows


def peak(form: str, mode: str, length: int) -> int:
    """Bytes held at most beyond inputs, outputs and gradients."""
    backward = mode == "backward"
    tensors, call = _inputs(form, length, backward), _call(form)
    short = tuple(t[:, :, :1024].detach().requires_grad_(backward) for t in tensors)
    growth = 0
    # A small call first, so that what libraries set up once is not counted.
    for some in (short, tensors):
        growth = peak_growth(gradients(call, some) if backward else partial(call, *some))
    # An output, and with gradients those of every input; what comes back into the output was there before.
    return growth - tensors[0].nbytes - sum(t.nbytes for t in tensors) * backward


if __name__ == "__main__":
    question, form, mode, *lengths = sys.argv[1:]
    if question == "share":
        print(json.dumps(shares(form, mode, [int(n) for n in lengths])))
    else:
        print(peak(form, mode, int(lengths[0])))
