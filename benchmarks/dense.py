"""What ``regard.attention(..., "full")`` costs beyond calling SDPA."""

from __future__ import annotations

import torch.nn.functional as F

import regard
from benchmarks.rows import Report, Row, inputs, ratio
from regard.bench.measure import interleaved

LENGTH = 1024


def run(report: Report, quick: bool) -> list[Row]:
    """Time of full attention by name over the time of SDPA."""
    query, key, value = inputs(8, LENGTH)
    rounds = 20 if quick else 200
    report(f"full: {LENGTH} tokens, {rounds} rounds")
    rows = []
    for causal in (False, True):
        times = interleaved(
            {
                "sdpa": lambda causal=causal: F.scaled_dot_product_attention(query, key, value, is_causal=causal),
                "full": lambda causal=causal: regard.attention(query, key, value, "full", causal=causal),
            },
            rounds,
            warmup=3,
        )
        name = f"full by name, {LENGTH} tokens" + (", causal" if causal else "")
        rows.append(Row(name, ratio(times, "full", "sdpa"), "of SDPA's time", None if causal else 1.03, "<="))
    return rows
