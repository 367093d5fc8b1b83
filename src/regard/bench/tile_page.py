"""The documentation's page of the simulator: the paper's cases, a search, and what was measured, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from regard.bench.markdown import paragraph, table
from regard.bench.simulate import Sides, bounds, front, search, sides
from regard.bench.tile_timing import HEAD_DIM, HEADS, ROUNDS, Timed, conditions_of, correlations

__all__ = ["page"]

# Grid, window, strides, tiles of queries and of keys: the cases of arXiv 2504.16922.
_CASES: tuple[tuple[Sides, Sides, tuple[Sides, ...], Sides, Sides], ...] = (
    ((256, 256), (80, 80), ((1, 1), (16, 16)), (16, 16), (16, 8)),
    ((30, 48, 80), (18, 24, 24), ((1, 1, 1), (16, 8, 8)), (4, 8, 8), (2, 8, 8)),
)


def page(rows: Sequence[Timed], picture: str | None, command: str, rounds: int = ROUNDS) -> str:
    """The page that ``command`` writes; ``picture`` is the scatter's path as seen from it."""
    lines = ["# Simulated tiles, and the time they take", ""]
    lines += paragraph(f"Written by `{command}`; no figure is typed by hand.")
    lines += [*_simulated(), "## What a stride buys", "", *_searched(), "## Predicted and measured", ""]
    return "\n".join([*lines, *_measured(rows, picture, rounds)])


def _simulated() -> list[str]:
    rows = [
        (
            *(sides(numbers) for numbers in (grid, window, stride)),
            f"{sides(q_tile)} : {sides(kv_tile)}",
            *(f"{bound:.2f}" for bound in (one.flop, one.worst, one.mean, flat.mean)),
            "yes" if one.perfect else "no",
        )
        for grid, window, strides, q_tile, kv_tile in _CASES
        for stride in strides
        for one, _, flat, _ in [bounds(grid, window, stride, q_tile, kv_tile)]
    ]
    text = paragraph(
        "`regard simulate` counts which tiles of keys each tile of queries of a neighbourhood has to visit. All pairs "
        "over the visible ones are the *FLOP bound* of a speedup over dense attention; all tiles over the visited ones "
        "are the *tile-aware bound*, for the tile of queries that visits most (*worst*) and on average (*mean*). Where "
        "visited tiles hold visible pairs alone, all agree: the setting is *perfectly* block-sparse. *Flat* tiles are "
        "runs of as many tokens of the row-major sequence."
    )
    head = ("grid", "window", "stride", "tiles of queries : keys", "FLOP", "worst", "mean", "mean, flat", "perfect")
    return text + table(head, rows)


def _searched() -> list[str]:
    grid, window, _, q_tile, kv_tile = _CASES[-1]
    volumes = math.prod(q_tile), math.prod(kv_tile)
    found = search(grid, window, *volumes)
    rows = [
        (str(f.sharing), sides(f.stride), f"{sides(f.q_tile)} : {sides(f.kv_tile)}", f"{f.bound:.2f}", f"{f.worst:.2f}")
        for f in front(found)
    ]
    asked = f"--grid {sides(grid)} --window {sides(window)} --search --tile-volume {volumes[0]}:{volumes[1]}"
    text = paragraph(
        f"`regard simulate {asked}` goes through {len(found)} settings that matter. The best for each number of "
        "queries that share a window, where more sharing allows more:"
    )
    return text + table(("queries a window", "stride", "tiles of queries : keys", "mean bound", "worst"), rows)


def _measured(rows: Sequence[Timed], picture: str | None, rounds: int) -> list[str]:
    conditions, figures = conditions_of(rounds), correlations(rows)
    natively = "with" if conditions["native"] else "without"
    parts = ", ".join(f"{value:.3f} for {name}" for name, value in figures.items() if name != "all")
    text = paragraph(
        f"Forward of `gna`, {HEADS} heads of {HEAD_DIM}, float32, {len(rows)} settings, each in turn with dense "
        f"attention on the same tiles by the same executor, medians of {rounds} rounds; one thread, torch "
        f"{conditions['torch']} on {conditions['machine']}, {natively} native kernels. Predicted and measured are "
        "shares of dense attention's tiles and of its time."
    )
    text += paragraph(
        f"Spearman rank correlation of mean visited tiles and measured time: **{figures['all']:.3f}** over all "
        f"settings ({parts})."
    )
    if picture is not None:
        text += [f"![Predicted share of tiles and measured share of time]({picture})", ""]
    timed = [
        (
            *(sides(numbers) for numbers in (row.grid, row.window, row.stride, row.tile)),
            f"{row.visited:.1f} of {row.total}",
            f"{100 * row.share:.1f} %",
            f"{100 * row.ratio:.1f} %",
        )
        for row in rows
    ]
    return text + table(("grid", "window", "stride", "tile", "tiles visited", "predicted", "measured"), timed)
