"""What choosing the blocks costs, as a share of the whole call."""

from __future__ import annotations

from benchmarks.rows import Report, Row, inputs, ratio
from regard.bench.measure import interleaved
from regard.errors import UnknownNameError
from regard.mechanism import SparseMechanism
from regard.registry import build

MECHANISMS = ("moba", "spargeattn")


def run(report: Report, quick: bool) -> list[Row]:
    """The selectors' share at 16k tokens."""
    heads, length, rounds = (2, 2048, 2) if quick else (8, 16384, 3)
    tensors = inputs(heads, length)
    rows = []
    for name in MECHANISMS:
        title = f"selection of {name}, {length} tokens"
        try:
            mechanism = build(name, {}, num_heads=heads, num_kv_heads=heads, head_dim=64)
        except UnknownNameError:
            rows.append(Row(title, None, note=f"{name} is not registered"))
            continue
        if not isinstance(mechanism, SparseMechanism):
            rows.append(Row(title, None, note=f"{name} is not a SparseMechanism"))
            continue
        report(f"{title}, {rounds} rounds")
        request = mechanism.request(*tensors, causal=True)
        times = interleaved(
            {
                "select": lambda m=mechanism, r=request: m.select(*tensors[:2], r),
                "whole": lambda m=mechanism: m(*tensors, causal=True),
            },
            rounds,
        )
        share = 100 * ratio(times, "select", "whole")
        note = f"computes {mechanism.select(*tensors[:2], request).density():.1%} of the pairs"
        rows.append(Row(title, share, "% of the whole", None if quick else 15.0, "<=", note))
    return rows
