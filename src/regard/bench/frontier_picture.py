"""The curves of :mod:`regard.bench.frontier`: one row a workload, quality against density."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.bench.figures import COLOURS, MARKS, new_figure
from regard.bench.frontier import Frontier, Group, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_frontier"]

# Where the colours run out.
_DASHES = ("-", "--", ":")
_STATIC = ("#555555", "#888888", "#B0B0B0")
_MEASURES = (("bits_per_byte", "bits per byte"), ("error", "error of the output"), ("recall", "recalled mass"))


def draw_frontier(result: Frontier) -> Figure:
    """Left what it does to the result (bits per byte of text, error on tensors; lower is better), right the recalled
    mass (higher is better), each against the share of pairs computed."""
    workloads = result.workloads
    figure = new_figure((11.5, 3.6 * max(len(workloads), 1)))
    panels = figure.subplots(max(len(workloads), 1), 2, squeeze=False, sharex=True)
    styles = _styles(result)
    for row, workload in zip(panels, workloads, strict=False):
        points = [p for p in result.points if p.workload == workload and p.density is not None]
        first = "bits_per_byte" if any(p.bits_per_byte is not None for p in points) else "error"
        for panel, measure in zip(row, (first, "recall"), strict=True):
            _curves(panel, points, measure, styles)
            panel.set_title(_title(workload), loc="left", fontsize=10)
            panel.set_ylabel(dict(_MEASURES)[measure])
            if measure == "bits_per_byte":
                panel.axhline(result.full[workload], color="black", lw=0.8, ls=(0, (1, 2)))
                place = (0.011, result.full[workload])
                panel.annotate("full attention", place, (0, 3), textcoords="offset points", fontsize=8)
                _fit(panel, points, result.full[workload])
            if measure == "recall":
                # What a choice without any knowledge keeps.
                blind = [10 ** (-2 + step / 50) for step in range(101)]
                panel.plot(blind, blind, color="black", lw=0.8, ls=(0, (1, 2)))
                panel.set_ylim(0, 1.02)
    for panel in panels[-1]:
        panel.set_xscale("log")
        panel.set_xlabel("share of the pairs of full attention that is computed")
        panel.set_xticks([0.01, 0.03, 0.1, 0.3, 1], ["1 %", "3 %", "10 %", "30 %", "100 %"])
        panel.set_xlim(0.01, 1.05)
    panels[-1][1].annotate("dotted: a blind choice", (0.98, 0.04), xycoords="axes fraction", ha="right", fontsize=8)
    handles, labels = panels[0][1].get_legend_handles_labels()
    for row in panels[1:]:
        for handle, label in zip(*row[1].get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _title(workload: str) -> str:
    return {
        "fields": "smooth fields in space and time, 2048 tokens",
        "noise": "white noise, 2048 tokens",
    }.get(workload, f"held-out {workload.replace('text ', 'text, windows of ')} tokens")


def _styles(result: Frontier) -> dict[str, tuple[str, str, str]]:
    """Colour, dash and mark by name."""
    names: dict[Group, list[str]] = {"oracle": [], "static": [], "mechanism": []}
    for point in result.points:
        if point.name not in names[point.group]:
            names[point.group].append(point.name)
    found = {name: ("black", "-", "") for name in names["oracle"]}
    found |= {name: (_STATIC[at % 3], "-", "x+|"[at % 3]) for at, name in enumerate(names["static"])}
    for at, name in enumerate(names["mechanism"]):
        colour, dash = COLOURS[at % len(COLOURS)], _DASHES[at // len(COLOURS) % len(_DASHES)]
        found[name] = (colour, dash, MARKS[at % len(MARKS)])
    return found


def _curves(panel: Axes, points: list[Point], measure: str, styles: dict[str, tuple[str, str, str]]) -> None:
    for name, (colour, dash, mark) in styles.items():
        own = [(p.density, getattr(p, measure)) for p in points if p.name == name and getattr(p, measure) is not None]
        if own:
            own.sort()
            wide = 2.0 if colour == "black" else 1.3
            panel.plot(*zip(*own, strict=True), color=colour, ls=dash, marker=mark, ms=4, lw=wide, label=name)
    panel.grid(alpha=0.25)


def _fit(panel: Axes, points: list[Point], full: float) -> None:
    """Leave what is far off (tiny windows) outside, so that the differences that matter are seen."""
    losses = sorted(p.bits_per_byte for p in points if p.bits_per_byte is not None)
    if losses:
        best, most = min(losses[0], full), losses[min(int(0.9 * len(losses)), len(losses) - 1)]
        room = max(most - best, 0.01)
        panel.set_ylim(best - 0.06 * room, most + 0.1 * room)
