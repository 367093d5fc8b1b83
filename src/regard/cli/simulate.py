"""``regard simulate``: what tiles make of a neighbourhood's sparsity."""

from __future__ import annotations

import math
from pathlib import Path

import click

from regard.cli.arguments import picture_file, read_causal_axes, read_position, save_figure
from regard.cli.group import console, main
from regard.errors import OptionError

__all__ = ["simulate_command"]


@main.command("simulate")
@click.option("--grid", metavar="NxM", help="Tokens per axis: 4096, 64x64 or 30x48x80.")
@click.option("--window", metavar="NxM", help="Keys per axis that a query sees; one number for all axes.")
@click.option("--stride", default="1", show_default=True, metavar="NxM", help="Queries per axis that share a window.")
@click.option("--tile", metavar="Q[:K]", help="Tiles of queries and of keys, e.g. 4x8x8:2x8x8 [default: as gna's own].")
@click.option("--causal", metavar="AXES", help="Causal axes, counted from 0, e.g. 0 or 0,1.")
@click.option("--dynamic", is_flag=True, help="Search and draw with tiles of keys that begin with the window.")
@click.option("--search", "searching", is_flag=True, help="Search stride and tile for this window.")
@click.option("--tile-volume", metavar="Q[:K]", help="Tokens of a tile in the search [default: those of --tile].")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Settings to show of a search.")
@click.option("--query", metavar="N,M", help="Position whose tile --out shows [default: the middle].")
@click.option("--measure", "measuring", is_flag=True, help="Time many settings beside what is predicted for them.")
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("runs/simulate.json"),
    show_default=True,
    help="Where --measure keeps its timings; what is there is not measured again.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Picture: visited tiles, or of --measure.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Page of what --measure found (.md).")
def simulate_command(
    grid: str | None,
    window: str | None,
    stride: str,
    tile: str | None,
    causal: str | None,
    dynamic: bool,
    searching: bool,
    tile_volume: str | None,
    top: int,
    query: str | None,
    measuring: bool,
    results: Path,
    out: Path | None,
    report: Path | None,
) -> None:
    """Count what tiles make of a neighbourhood's sparsity: bounds, the best stride and tile, the tiles visited."""
    from functools import partial

    from rich.progress import track

    from regard.bench.simulate import bounds, parse_sides, parse_tile, search, sides, visited_tiles
    from regard.bench.tile_tables import bounds_table, search_tables
    from regard.layers.tiles import balanced_tile

    if out is not None:
        picture_file(out)
    if measuring:
        if grid or window or searching:
            raise OptionError("--measure times settings of its own: give it no --grid, --window or --search.")
        _measure_tiles(results, out, report)
        return
    if grid is None or window is None:
        raise OptionError(
            "A simulation needs --grid and --window, e.g. --grid 64x64 --window 13; or ask for --measure."
        )
    if report is not None:
        raise OptionError("--report writes what --measure found: give both.")
    space = parse_sides(grid, "The grid")
    axes = len(space)
    wide, step = parse_sides(window, "The window", axes), parse_sides(stride, "The stride", axes)
    q_tile, kv_tile = (balanced_tile(space),) * 2 if tile is None else parse_tile(tile, axes)
    flags = read_causal_axes(causal, axes)
    title = f"grid {sides(space)}, window {sides(wide)}"
    if searching:
        volumes = [math.prod(t) for t in (q_tile, kv_tile)]
        if tile_volume is not None:
            parts = [parse_sides(part, "The tile volume", 1)[0] for part in tile_volume.split(":")]
            volumes = [parts[0], parts[-1]]
        progress = partial(track, description="strides and tiles", console=console, transient=True)
        found = search(
            space,
            wide,
            *volumes,
            causal=flags,
            kv_start="dynamic" if dynamic else "static",
            progress=progress,
        )
        for shown in search_tables(found, top, f"{title}, tiles of {volumes[0]} queries and {volumes[1]} keys"):
            console.print(shown)
        step, q_tile, kv_tile = found[0].stride, found[0].q_tile, found[0].kv_tile
    else:
        what = f"{title}, stride {sides(step)}, tiles of {sides(q_tile)} queries and {sides(kv_tile)} keys"
        console.print(bounds_table(bounds(space, wide, step, q_tile, kv_tile, flags), what))
    if out is not None:
        from regard.bench.tile_pictures import draw_visited

        visited = visited_tiles(
            space,
            wide,
            step,
            q_tile,
            kv_tile,
            query=None if query is None else read_position(query, space),
            causal=flags,
            kv_start="dynamic" if dynamic else "static",
        )
        tiles = f"tiles of {sides(q_tile)} queries and {sides(kv_tile)} keys"
        save_figure(draw_visited(visited, f"{title}, stride {sides(step)}, {tiles}"), out)


def _measure_tiles(results: Path, out: Path | None, report: Path | None) -> None:
    """``regard simulate --measure``: timings, their table, the rank correlation, picture and page."""
    import os
    from functools import partial

    from rich.progress import track

    from regard.bench.tile_page import page
    from regard.bench.tile_tables import timed_table
    from regard.bench.tile_timing import correlations, measure

    rows = measure(results, progress=partial(track, description="timing", console=console, transient=True))
    console.print(timed_table(rows))
    figures = correlations(rows)
    told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    console.print(f"Spearman rank correlation of mean visited tiles and measured time: {told}", highlight=False)
    console.print(f"timings in {results}")
    if out is not None:
        from regard.bench.tile_pictures import draw_timed

        save_figure(draw_timed(rows, figures["all"]), out)
    if report is not None:
        picture = None if out is None else Path(os.path.relpath(out, report.parent)).as_posix()
        arguments = [f"--out {out.as_posix()}"] if out is not None else []
        command = " ".join(["regard simulate --measure", *arguments, f"--report {report.as_posix()}"])
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(page(rows, picture, command), encoding="utf-8")
        console.print(f"wrote {report}")
