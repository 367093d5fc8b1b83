"""The picture of what a reproduction found: its plots as panels of one small PNG file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.bench.figures import COLOURS, MARKS, new_figure
from regard.reproduce.finding import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_plots", "save_picture"]

_COLUMNS = 3
# Up to so many curves are named where they end; more need a legend.
_NAMED_AT_END = 4
# Least distance between two names, as a share of the panel's height.
_APART = 0.075
_QUIET = "#555555"


def draw_plots(plots: Sequence[Plot], title: str = "") -> Figure:
    """One panel a plot, up to three in a row (four make a square). Raises MissingExtraError without matplotlib."""
    columns = 2 if len(plots) == 4 else min(len(plots), _COLUMNS)
    rows = -(-len(plots) // columns)
    figure = new_figure((4.6 * columns, 3.3 * rows + (0.35 if title else 0)))
    figure.set_facecolor("white")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, plot in zip(panels, plots, strict=False):
        _panel(panel, plot)
    for panel in panels[len(plots) :]:
        panel.set_axis_off()
    if title:
        figure.suptitle(textwrap.fill(title, 58 * columns), fontsize=10)
    return figure


def save_picture(plots: Sequence[Plot], file: Path, title: str = "") -> None:
    """Write :func:`draw_plots` as a PNG of at most 128 colours: a third of the bytes, and lines lose nothing by it."""
    figure = draw_plots(plots, title)
    from PIL import Image  # matplotlib brings it

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    partial = file.with_suffix(".png.partial")
    image.save(partial, "PNG", optimize=True)
    partial.replace(file)


def _panel(panel: Axes, plot: Plot) -> None:
    if plot.log_x:
        panel.set_xscale("log")
    if plot.log_y:
        panel.set_yscale("log")
    if plot.kind == "bar":
        _bars(panel, plot)
    else:
        _curves(panel, plot)
    panel.set_title(plot.title, loc="left", fontsize=9)
    panel.set_xlabel(plot.x, fontsize=8)
    panel.set_ylabel(plot.y, fontsize=8)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.25, axis="y" if plot.kind == "bar" else "both")
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    if plot.ticks:
        panel.set_xticks(list(plot.ticks.values()), list(plot.ticks), fontsize=7)
        panel.minorticks_off()
    elif plot.log_x:
        _plain_ticks(panel, plot)
    for name, level in plot.references.items():
        panel.axhline(level, color=_QUIET, lw=1, ls=(0, (1, 2)))
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        box = {"facecolor": "white", "alpha": 0.75, "pad": 0.5, "edgecolor": "none"}
        panel.annotate(name, (0.015, level), (0, 3), color=_QUIET, fontsize=7, bbox=box, zorder=5, **place)
    if len(plot.series) > 1:
        _name(panel, plot)


def _styles(plot: Plot) -> dict[str, dict[str, Any]]:
    """Colour and mark of each series; a broken line has no marks."""
    found: dict[str, dict[str, Any]] = {}
    for at, name in enumerate(plot.series):
        broken = name in plot.dashed
        dash = "--" if broken else "" if plot.kind == "points" else "-"
        mark = "" if broken else MARKS[at % len(MARKS)]
        found[name] = {"color": COLOURS[at % len(COLOURS)], "ls": dash, "marker": mark}
    return found


def _curves(panel: Axes, plot: Plot) -> None:
    for name, style in _styles(plot).items():
        # Many points need no marks: the line says it.
        many = len(plot.series[name]) > 40 and style["ls"] != ""
        panel.plot(*zip(*plot.series[name], strict=True), **style | ({"marker": ""} if many else {}), ms=3.5, lw=1.5)


def _bars(panel: Axes, plot: Plot) -> None:
    places = sorted({x for points in plot.series.values() for x, _ in points})
    step = min((b - a for a, b in pairwise(places)), default=1.0)
    width = 0.8 * step / len(plot.series)
    for at, (points, style) in enumerate(zip(plot.series.values(), _styles(plot).values(), strict=True)):
        shift = (at - (len(plot.series) - 1) / 2) * width
        bars = panel.bar([x + shift for x, _ in points], [y for _, y in points], width, color=style["color"])
        if len(places) * len(plot.series) <= 12:
            panel.bar_label(bars, fmt="%.3g", fontsize=6.5, padding=1)


def _plain_ticks(panel: Axes, plot: Plot) -> None:
    """The places that were measured, written out, where they are few: 2048 rather than 2 x 10^3."""
    places = sorted({x for name, points in plot.series.items() if name not in plot.dashed for x, _ in points})
    if 1 < len(places) <= 9 and all(float(x).is_integer() for x in places):
        panel.set_xticks(places, [f"{x:g}" for x in places])
        panel.minorticks_off()


def _name(panel: Axes, plot: Plot) -> None:
    """Names in the colour of their curve at its end, or a legend where curves are many or are bars."""
    if plot.kind != "line" or len(plot.series) > _NAMED_AT_END:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        styles = _styles(plot)
        handles: list[Any] = [
            Patch(color=style["color"]) if plot.kind == "bar" else Line2D([], [], **style) for style in styles.values()
        ]
        where: dict[str, Any] = {
            "loc": "upper center",
            "bbox_to_anchor": (0.5, -0.2),
            "ncols": 2 if len(styles) > 3 else len(styles),
        }
        panel.legend(handles, list(styles), fontsize=7, frameon=False, **where)
        return
    for low_high, fix in ((panel.get_xlim(), panel.set_xlim), (panel.get_ylim(), panel.set_ylim)):
        fix(low_high)  # until they are asked for, limits are those of an empty panel
    to_panel = panel.transData + panel.transAxes.inverted()
    ends = {name: to_panel.transform(max(points))[1] for name, points in plot.series.items()}
    for name, height in _spread(ends).items():
        colour = _darker(_styles(plot)[name]["color"])
        panel.annotate(name, (1.02, height), xycoords="axes fraction", color=colour, fontsize=7.5, va="center")


def _spread(ends: dict[str, float]) -> dict[str, float]:
    """Heights of the names, in the order of the curves' ends: far enough apart, and none above the panel."""
    order = sorted(ends, key=lambda name: ends[name])
    heights = [ends[name] for name in order]
    for at in range(1, len(heights)):
        heights[at] = max(heights[at], heights[at - 1] + _APART)
    limit = 1.0
    for at in reversed(range(len(heights))):
        heights[at] = min(heights[at], limit)
        limit = heights[at] - _APART
    return dict(zip(order, heights, strict=True))


def _darker(colour: str) -> str:
    """For text: small letters need more contrast than lines."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(colour)
    return str(to_hex((0.72 * red, 0.72 * green, 0.72 * blue)))
