"""Learning curves of :mod:`regard.bench.language_comparison`: a panel for each kind of attention."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from regard.bench.figures import COLOURS, new_figure
from regard.bench.language_comparison import BASELINE, LanguageResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_languages"]

_COLUMNS = 5
# Mark, its size and colour. The larger is seen around the other where the two are one.
_READINGS = {"parameters": ("o", 7, COLOURS[0]), "flops": ("D", 3.5, COLOURS[1])}


def draw_languages(result: LanguageResult) -> Figure:
    """The baseline's learning curves, then a panel for each variant: how many bits per byte of training text it is
    above the baseline at the same step (thin: each seed, bold: their mean), and marks for the two held-out readings.

    Text comes new to every step, so that the training text's bits are those of a prediction. What lies beyond the
    common scale is told in its panel.
    """
    labels = [label for label in result.labels() if any(run.curve for run in result.runs if run.label == label)]
    rows = -(-max(len(labels), 1) // _COLUMNS)
    limit, longest = (
        _limit(result),
        max((max(run.flops_steps, result.settings["steps"]) for run in result.runs), default=1),
    )
    figure = new_figure((2.6 * _COLUMNS, 2.0 * rows + 0.5))
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for panel in panels[max(len(labels), 1) :]:
        panel.set_axis_off()
    for panel, label in zip(panels, labels, strict=False):
        panel.set_title(label, loc="left", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.set_xlim(0, 1.05 * longest)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        if label == BASELINE:
            _baseline(panel, result)
        else:
            _against(panel, result, label, limit)
    for panel in panels[max(len(labels) - _COLUMNS, 0) : len(labels)]:
        panel.set_xlabel("step", fontsize=8)
    others = [panel for panel, label in zip(panels, labels, strict=False) if label != BASELINE]
    for at in range(0, len(labels), _COLUMNS):
        panels[at].set_ylabel("bits per byte" if at == 0 else f"bits above {BASELINE}", fontsize=8)
    handles = {}
    for panel in others:
        handles.update(dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True)))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _middles(result: LanguageResult) -> list[float]:
    """Middles of the stretches that the points of a curve are means of."""
    points, steps = result.settings["points"], result.settings["steps"]
    return [(point + 0.5) * steps / points for point in range(points)]


def _baseline(panel: Axes, result: LanguageResult) -> None:
    for run in result.runs:
        if run.label == BASELINE and run.curve:
            panel.plot(_middles(result), run.curve, color="black", lw=0.9)


def _against(panel: Axes, result: LanguageResult, label: str, limit: float) -> None:
    panel.axhline(0, color="black", lw=0.8)
    panel.set_ylim(-limit, limit)
    colour, curves = _READINGS["parameters"][2], []
    for run in result.runs:
        base = result.find(BASELINE, run.seed)
        if run.label == label and run.curve and base is not None and base.curve:
            curves.append([mine - its for mine, its in zip(run.curve, base.curve, strict=True)])
            panel.plot(_middles(result), curves[-1], color=colour, lw=0.5, alpha=0.6)
    if curves:
        mean = [statistics.fmean(column) for column in zip(*curves, strict=True)]
        panel.plot(_middles(result), mean, color=colour, lw=1.6, label="training text, same step")
    beyond = []
    for which, (mark, size, colour) in _READINGS.items():
        found = result.differences(label, which)
        if not found:
            continue
        steps = next(run.flops_steps for run in result.runs if run.label == label and run.bits)
        place, name = (result.settings["steps"], "parameters") if which == "parameters" else (steps, "FLOPs")
        value, spread = statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0
        if abs(value) > limit:
            beyond.append(f"{value:+.2f}")
        text = f"held-out text, equal {name}"
        panel.errorbar(place, value, spread, fmt=mark, color=colour, ms=size, lw=1, capsize=2, label=text)
    if beyond:
        panel.annotate(f"held out: {', '.join(beyond)}", (0.97, 0.05), xycoords="axes fraction", ha="right", fontsize=7)


def _limit(result: LanguageResult) -> float:
    """The same for all panels; what few variants lose beyond it would hide what the others do."""
    others = [label for label in result.labels() if label != BASELINE]
    sizes = [abs(result.mean_difference(label, which)) for label in others for which in _READINGS]
    known = sorted(size for size in sizes if not math.isnan(size))
    return max(3 * known[len(known) // 2], 0.03) if known else 0.1
