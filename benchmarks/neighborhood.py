"""2-D neighbourhood attention (gna) against dense SDPA, and NATTEN where it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from benchmarks.rows import Report, Row, Times, inputs, ratio
from regard.bench.measure import interleaved
from regard.errors import UnknownNameError
from regard.registry import create

WINDOW = 13
NOTE = "forward, times faster than dense SDPA"


def run(report: Report, quick: bool) -> list[Row]:
    """Speed-up over dense SDPA on the same tokens."""
    heads, side, small, rounds = (2, 48, 32, 2) if quick else (8, 96, 64, 7)
    try:
        mechanism = create("gna", window=WINDOW)
    except UnknownNameError:
        return [Row("gna", None, note="gna is not registered")]
    times = _times(report, mechanism, heads, side, rounds, None)
    rows = [Row(_name("gna", side), ratio(times, "dense", "gna"), target=None if quick else 6.0, note=NOTE)]
    try:
        from natten.functional import na2d
    except ImportError:
        return [*rows, Row("NATTEN", None, note="natten is not installed")]
    # Its CPU path holds all scores of the map at once, hence a smaller map and few rounds.
    times = _times(report, mechanism, heads, small, 2, na2d)
    return [*rows, *(Row(_name(name, small), ratio(times, "dense", name), note=NOTE) for name in ("gna", "NATTEN"))]


def _name(what: str, side: int) -> str:
    return f"{what}, {side} x {side}, window {WINDOW}"


def _times(
    report: Report, mechanism: nn.Module, heads: int, side: int, rounds: int, natten: Callable[..., Any] | None
) -> Times:
    query, key, value = inputs(heads, side * side)
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(query, key, value),
        "gna": lambda: mechanism(query, key, value, grid=(side, side)),
    }
    if natten is not None:
        maps = [t.transpose(1, 2).unflatten(1, (side, side)).contiguous() for t in (query, key, value)]
        calls["NATTEN"] = lambda: natten(*maps, kernel_size=WINDOW)
    report(f"{', '.join(calls)}: {side} x {side}, {rounds} rounds")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return interleaved(calls, rounds)
