"""Pictures of the simulator: the tiles of keys that a tile of queries visits, and predicted beside measured cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from regard.bench.figures import MARK, UNSEEN, new_figure, sequential
from regard.bench.simulate import VisitedTiles, sides

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.bench.tile_timing import Timed

__all__ = ["draw_timed", "draw_visited"]

_MOST_PANELS = 15
_SERIES = (("1-D", "o", "#0072B2"), ("2-D", "s", "#D55E00"), ("3-D", "^", "#009E73"))


def draw_visited(found: VisitedTiles, title: str) -> Figure:
    """The grid's tiles of keys, those visited coloured by their share of visible pairs, the tile of queries outlined.

    One axis is a strip, two an image, three an image for each row of tiles along the first axis.
    """
    axes = len(found.grid)
    layers = list(range(len(found.spans[0]))) if axes == 3 else [0]
    left_out = 0
    if len(layers) > _MOST_PANELS:
        shown = [i for i in layers if bool((found.share[i] > 0).any())]
        shown = [i for i in layers if shown[0] - 1 <= i <= shown[-1] + 1]
        layers, left_out = shown, len(layers) - len(shown)
    height, width = (1, found.grid[0]) if axes == 1 else (found.grid[-2], found.grid[-1])
    columns = min(len(layers), 5)
    rows = -(-len(layers) // columns)
    across = (9.0, 6.5, 2.3)[axes - 1]
    down = 1.0 if axes == 1 else min(max(across * height / width, 0.8), 9.0)
    figure = new_figure((across * columns + 1.0, (down + 0.25) * rows + 1.3))
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(layers) :]:
        panel.set_axis_off()
    colours = sequential()
    for panel, layer in zip(panels.flat, layers, strict=False):
        _tiles(panel, found, layer, colours)
        if axes == 3:
            first, stop = found.spans[0][layer]
            panel.set_title(f"frame {first}" if stop == first + 1 else f"frames {first} to {stop - 1}", fontsize=8)
    for place, panel in enumerate(panels.flat[: len(layers)]):
        left, lowest = place % columns == 0, place + columns >= len(layers)
        panel.tick_params(labelsize=7, labelleft=left, labelbottom=lowest)
        if left and axes > 1:
            panel.set_ylabel("row", fontsize=8)
        if lowest:
            panel.set_xlabel("position" if axes == 1 else "column", fontsize=8)
    _legend(figure, panels, colours)
    more = f"; {left_out} layers of tiles without a visit are left out" if left_out else ""
    figure.suptitle(f"{title}\n{found.visited} of {found.total} tiles of keys visited{more}", fontsize=10)
    return figure


def _tiles(panel: Axes, found: VisitedTiles, layer: int, colours: Any) -> None:
    """One panel: the last two axes (or one) at a layer of tiles along the first of three."""
    from matplotlib.patches import Rectangle

    axes = len(found.grid)
    share = found.share[layer] if axes == 3 else found.share[None] if axes == 1 else found.share
    across = found.spans[-1]
    down = ((0, 1),) if axes == 1 else found.spans[-2]
    thin = 0.8 if max(len(across), len(down)) <= 40 else 0.3
    for (top, bottom), line in zip(down, share.tolist(), strict=True):
        for (left, right), part in zip(across, line, strict=True):
            colour = colours(part) if part > 0 else UNSEEN
            box = Rectangle(
                (left, top), right - left, bottom - top, facecolor=colour, edgecolor="white", linewidth=thin
            )
            panel.add_patch(box)
    width, height = found.grid[-1], 1 if axes == 1 else found.grid[-2]
    panel.set_xlim(0, width)
    panel.set_ylim(height, 0)
    if axes > 1:
        panel.set_aspect("equal")
    else:
        panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_visible(False)
    frames = found.spans[0][layer]
    if axes < 3 or (frames[0] < found.query[0][1] and found.query[0][0] < frames[1]):
        (left, right), (top, bottom) = found.query[-1], (0, 1) if axes == 1 else found.query[-2]
        for colour, line in (("white", 3.6), (MARK, 2.0)):
            panel.add_patch(
                Rectangle(
                    (left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=line, clip_on=False
                )
            )


def _legend(figure: Figure, panels: Any, colours: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=panels, shrink=0.9, pad=0.02, aspect=30)
    bar.set_label("visible pairs" if len(panels) == 1 else "visible pairs of a visited tile", fontsize=8)
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0 %", "50 %", "100 %"], fontsize=7)
    handles = [
        Patch(facecolor="white", edgecolor=MARK, linewidth=2, label="tile of queries"),
        Patch(facecolor=UNSEEN, label="not visited"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def draw_timed(rows: Sequence[Timed], correlation: float) -> Figure:
    """Measured time against the share of tiles visited, both to dense attention on the same tiles."""
    figure = new_figure((5.4, 5.2))
    panel = figure.add_subplot()
    lowest = 0.7 * min(min(row.share, row.ratio) for row in rows)
    highest = 1.4 * max(max(row.share, row.ratio) for row in rows)
    panel.plot([lowest, highest], [lowest, highest], color="#888888", linewidth=1, linestyle="--", zorder=1)
    panel.annotate(
        "time as predicted",
        (1.6 * lowest, 1.6 * lowest),
        ha="left",
        va="bottom",
        fontsize=8,
        color="#555555",
        rotation=45,
        rotation_mode="anchor",
        xytext=(-3, 3),
        textcoords="offset points",
    )
    for axes, (label, marker, colour) in enumerate(_SERIES, 1):
        own = [row for row in rows if len(row.grid) == axes]
        if own:
            shares, ratios = [row.share for row in own], [row.ratio for row in own]
            name = f"{label}: {sides(own[0].grid)} tokens, {len(own)} settings"
            panel.scatter(
                shares,
                ratios,
                s=34,
                marker=marker,
                color=colour,
                edgecolor="white",
                linewidth=0.5,
                label=name,
                zorder=2,
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(lowest, highest)
    panel.set_ylim(lowest, highest)
    panel.set_aspect("equal")
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if lowest <= t <= highest]
    labels = [f"{100 * t:g} %" for t in ticks]
    panel.set_xticks(ticks, labels=labels, fontsize=8)
    panel.set_yticks(ticks, labels=labels, fontsize=8)
    panel.minorticks_off()
    panel.grid(color="#E6E6E6", linewidth=0.6, zorder=0)
    panel.set_axisbelow(True)
    panel.set_xlabel("predicted: mean tiles visited, of all", fontsize=9)
    panel.set_ylabel("measured: time, of dense attention's", fontsize=9)
    panel.set_title(f"Spearman rank correlation {correlation:.3f} over {len(rows)} settings", fontsize=10)
    panel.legend(loc="lower right", fontsize=8, frameon=False)
    return figure
