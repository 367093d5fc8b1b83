"""Causal lightning attention: time per token over length, and against causal SDPA."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Report, Row, inputs, ratio
from regard.bench.measure import interleaved
from regard.errors import UnknownNameError
from regard.kernels import linear_attention
from regard.registry import build

HEADS = 8


def run(report: Report, quick: bool) -> list[Row]:
    """Flatness from 4k to 64k tokens (shorter when quick), and speed-up over causal SDPA at 16k."""
    lengths, middle, rounds = ((1024, 2048, 4096), 2048, 3) if quick else ((4096, 8192, 16384, 32768, 65536), 16384, 5)
    call, name = _lightning()
    # Every round takes as many tokens at every length, from the same memory: short sequences find no warmer cache.
    whole = inputs(HEADS, lengths[-1])
    calls: dict[str, Callable[[], object]] = {str(n): partial(_in_turn, call, whole, n) for n in lengths}
    report(f"{name}: {lengths[0]} to {lengths[-1]} tokens, {rounds} rounds")
    times = interleaved(calls, rounds)
    medians = [statistics.median(times[str(n)]) for n in lengths]
    spread = max(medians) / min(medians) - 1
    query, key, value = inputs(HEADS, middle)
    report(f"{name}: against causal SDPA at {middle} tokens")
    times = interleaved(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
            "linear": lambda: call(query, key, value),
        },
        rounds,
    )
    tokens = f"{lengths[0] // 1024}k to {lengths[-1] // 1024}k tokens"
    return [
        Row(f"{name}, spread of time per token, {tokens}", 100 * spread, "%", None if quick else 15.0, "<="),
        Row(
            f"{name}, {middle} tokens",
            ratio(times, "sdpa", "linear"),
            target=None if quick else 8.0,
            note="forward, times faster than causal SDPA",
        ),
    ]


def _in_turn(
    call: Callable[[Tensor, Tensor, Tensor], object], whole: tuple[Tensor, Tensor, Tensor], length: int
) -> None:
    """One call after the other on sequences of ``length`` tokens, as many as the whole memory holds."""
    heads, total, dim = whole[0].shape[1:]
    for sequence in zip(*(t.view(total // length, 1, heads, length, dim) for t in whole), strict=True):
        call(*sequence)


def _lightning() -> tuple[Callable[[Tensor, Tensor, Tensor], object], str]:
    try:
        mechanism = build("lightning_attention", {}, num_heads=HEADS, num_kv_heads=HEADS, head_dim=64)
    except UnknownNameError:
        decay = -torch.linspace(0.01, 1, HEADS)
        return partial(linear_attention, causal=True, log_decay=decay), "linear attention with decay"
    return partial(mechanism, causal=True), "lightning_attention"
