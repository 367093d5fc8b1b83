"""The block-sparse executor against the ideal in harder settings: small blocks, grouped heads, low density."""

from __future__ import annotations

from benchmarks.block_sparse import DENSITY, compare
from benchmarks.rows import Report, Row


def run(report: Report, quick: bool) -> list[Row]:
    """Rows for blocks of 32, half as many key heads, and a density of 0.03."""
    heads, length, rounds = (2, 2048, 2) if quick else (8, 8192, 3)
    rows = compare(report, heads, heads, length, (32,), DENSITY, rounds, None)
    rows += compare(report, heads, heads // 2, length, (64,), DENSITY, rounds, None)
    rows += compare(report, heads, heads, length, (64,), 0.03, rounds, None)
    return rows
