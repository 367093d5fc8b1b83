"""The block-sparse executor against the ideal in harder settings at 16k tokens: grouped heads, low density."""

from __future__ import annotations

from benchmarks.block_sparse import DENSITY, TARGETS, compare
from benchmarks.rows import Report, Row


def run(report: Report, quick: bool) -> list[Row]:
    """Rows for a quarter as many key heads, and for a density of 0.03."""
    heads, length, rounds = (4, 2048, 2) if quick else (8, 16384, 3)
    rows = compare(report, heads, heads // 4, length, (32, 64, 128), DENSITY, rounds, TARGETS, competitors=False)
    return rows + compare(report, heads, heads, length, (32, 64, 128), 0.03, rounds, TARGETS, competitors=False)
