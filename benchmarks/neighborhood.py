"""2-D neighbourhood attention (gna) against dense SDPA, and NATTEN where it is installed."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F

from benchmarks.rows import Report, Row, inputs, ratio
from regard.bench.measure import interleaved
from regard.errors import UnknownNameError
from regard.registry import create

WINDOW = 13


def run(report: Report, quick: bool) -> list[Row]:
    """Speed-up over dense SDPA on the same tokens."""
    heads, side, rounds = (2, 48, 2) if quick else (8, 96, 7)
    name = f"gna, {side} x {side}, window {WINDOW}"
    try:
        mechanism = create("gna", window=WINDOW)
    except UnknownNameError:
        return [Row(name, None, note="gna is not registered")]
    query, key, value = inputs(heads, side * side)
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(query, key, value),
        "gna": lambda: mechanism(query, key, value, grid=(side, side)),
    }
    note = "forward, times faster than dense SDPA"
    rows = []
    try:
        from natten.functional import na2d
    except ImportError:
        rows.append(Row(f"NATTEN, {side} x {side}, window {WINDOW}", None, note="natten is not installed"))
    else:
        maps = [t.transpose(1, 2).unflatten(1, (side, side)).contiguous() for t in (query, key, value)]
        calls["natten"] = lambda: na2d(*maps, kernel_size=WINDOW)
    report(f"gna: {side} x {side}, {rounds} rounds")
    times = interleaved(calls, rounds)
    if "natten" in times:
        rows.append(Row(f"NATTEN, {side} x {side}, window {WINDOW}", ratio(times, "dense", "natten"), note=note))
    return [Row(name, ratio(times, "dense", "gna"), target=None if quick else 6.0, note=note), *rows]
