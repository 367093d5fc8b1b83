"""The block-sparse executor against the ideal at 16k tokens."""

from __future__ import annotations

from benchmarks.block_sparse import DENSITY, TARGETS, compare
from benchmarks.rows import Report, Row


def run(report: Report, quick: bool) -> list[Row]:
    """Rows for all blocks and both kinds of layout."""
    heads, length, rounds = (2, 4096, 2) if quick else (8, 16384, 3)
    return compare(report, heads, heads, length, (32, 64, 128), DENSITY, rounds, TARGETS, competitors=False)
