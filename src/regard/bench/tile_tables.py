"""The simulator's tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from regard.bench.simulate import Bounds, Found, front, sides

if TYPE_CHECKING:
    from regard.bench.tile_timing import Timed

__all__ = ["bounds_table", "search_tables", "timed_table"]


def bounds_table(found: Sequence[Bounds], title: str) -> Table:
    """What ways to cut a grid into tiles allow, a row each."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("tiling", "key tiles"):
        table.add_column(column, no_wrap=True)
    for column in ("FLOP", "worst", "mean", "perfect", "visited", "at most", "of"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            "grid" if one.tiling == "multi" else "flat",
            one.kv_start,
            f"{one.flop:.2f}x",
            f"{one.worst:.2f}x",
            f"{one.mean:.2f}x",
            "yes" if one.perfect else "no",
            f"{one.mean_visited:.1f}",
            str(one.max_visited),
            str(one.total),
        )
    return table


def search_tables(found: Sequence[Found], top: int, title: str) -> list[Table]:
    """The best settings of a search, and what sharing windows buys."""
    tables = []
    for rows, name in ((found[:top], f"best of {len(found)}: {title}"), (front(found), "what sharing a window buys")):
        table = Table(title=name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ("stride", "sharing", "query tile", "key tile", "mean", "worst", "perfect"):
            table.add_column(column, justify="right", no_wrap=True)
        for one in rows:
            table.add_row(
                sides(one.stride),
                str(one.sharing),
                sides(one.q_tile),
                sides(one.kv_tile),
                f"{one.bound:.2f}x",
                f"{one.worst:.2f}x",
                "yes" if one.perfect else "no",
            )
        tables.append(table)
    return tables


def timed_table(rows: Sequence[Timed]) -> Table:
    """Predicted and measured cost as shares of dense attention's."""
    table = Table(
        title="forward of gna beside dense attention on the same tiles", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("grid", "window", "stride", "tile", "tiles visited", "of dense", "time of dense"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(sides(numbers) for numbers in (row.grid, row.window, row.stride, row.tile)),
            f"{row.visited:.1f} of {row.total}",
            f"{100 * row.share:.1f} %",
            f"{100 * row.ratio:.1f} %",
        )
    return table
