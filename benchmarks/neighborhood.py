"""2-D neighbourhood attention (gna) against dense SDPA and NATTEN, where it is installed; its memory over windows."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Report, Row, Times, gradients, inputs, peak_growth, ratio, run_alone
from regard.bench.measure import interleaved
from regard.registry import create

WINDOW = 13
NOTE = "times faster than dense SDPA"


def run(report: Report, quick: bool) -> list[Row]:
    """Speed-up over dense SDPA on the same tokens, with and without a learned bias; peak memory of three windows."""
    heads, side, small, rounds = (2, 48, 32, 2) if quick else (8, 96, 64, 7)
    plain = create("gna", window=WINDOW)
    biased = create("fna", window=WINDOW, position_bias=True, num_heads=heads)
    query, key, value = inputs(heads, side * side)
    ideal = f"{NOTE}; only visible pairs: {side**2 / WINDOW**2:.0f}"
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(query, key, value),
        "gna": lambda: plain(query, key, value, grid=(side, side)),
        "biased": lambda: biased(query, key, value, grid=(side, side)),
    }
    with torch.no_grad():
        times = _timed(report, "forward", calls, rounds)
    rows = [
        Row(_name("gna", side), ratio(times, "dense", "gna"), target=None if quick else 10.0, note=f"forward, {ideal}"),
        Row(_name("fna with a bias", side), ratio(times, "dense", "biased"), note=f"forward, {NOTE}"),
    ]
    leaves = inputs(heads, side * side, grad=True)
    both = {
        "dense": gradients(F.scaled_dot_product_attention, leaves),
        "gna": gradients(partial(plain, grid=(side, side)), leaves),
        "biased": gradients(partial(biased, grid=(side, side)), leaves),
    }
    times = _timed(report, "forward + backward", both, max(rounds // 2, 2))
    note = f"forward + backward, {NOTE}"
    rows += [
        Row(_name("gna", side), ratio(times, "dense", "gna"), target=None if quick else 5.0, note=note),
        Row(_name("fna with a bias", side), ratio(times, "dense", "biased"), note=note),
    ]
    return [*rows, *_natten(report, heads, small), *_memory(report, side)]


def _name(what: str, side: int) -> str:
    return f"{what}, {side} x {side}, window {WINDOW}"


def _timed(report: Report, what: str, calls: dict[str, Callable[[], object]], rounds: int) -> Times:
    report(f"{what}: {', '.join(calls)}, {rounds} rounds")
    return interleaved(calls, rounds)


def _natten(report: Report, heads: int, side: int) -> list[Row]:
    try:
        from natten.functional import na2d
    except ImportError:
        return [Row("NATTEN", None, note="natten is not installed")]
    mechanism = create("gna", window=WINDOW)
    query, key, value = inputs(heads, side * side)
    maps = [t.transpose(1, 2).unflatten(1, (side, side)).contiguous() for t in (query, key, value)]
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.scaled_dot_product_attention(query, key, value),
        "gna": lambda: mechanism(query, key, value, grid=(side, side)),
        "NATTEN": lambda: na2d(*maps, kernel_size=WINDOW),
    }
    # Its CPU path holds all scores of the map at once, hence a smaller map and few rounds; it has no backward pass.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        times = _timed(report, "forward", calls, 2)
    return [
        *(Row(_name(name, side), ratio(times, "dense", name), note=f"forward, {NOTE}") for name in ("gna", "NATTEN")),
        Row(f"gna over NATTEN, {side} x {side}", ratio(times, "NATTEN", "gna"), note="forward, times faster"),
    ]


def _memory(report: Report, side: int) -> list[Row]:
    windows = (7, 13, 25)
    report(f"memory of windows {', '.join(map(str, windows))}")
    peaks = [int(run_alone("benchmarks.neighborhood", str(side), str(window))) for window in windows]
    note = "peak beyond the inputs, forward, 8 heads: " + ", ".join(
        f"{peak / 2**20:.1f} MiB at window {window}" for peak, window in zip(peaks, windows, strict=True)
    )
    return [Row("memory of gna, widest window over narrowest", peaks[-1] / peaks[0], target=1.1, sense="<=", note=note)]


def _peak(side: int, window: int) -> int:
    tensors = inputs(8, side * side)
    mechanism = create("gna", window=window)

    def step() -> Tensor:
        with torch.no_grad():
            out: Tensor = mechanism(*tensors, grid=(side, side))
            return out

    step()  # what depends on sizes alone is made once and kept
    return peak_growth(step)


if __name__ == "__main__":
    print(_peak(int(sys.argv[1]), int(sys.argv[2])))
