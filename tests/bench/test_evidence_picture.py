"""Pictures of evidence: small, complete, and with names that do not cover one another."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from regard.bench.evidence_picture import draw_plots, save_picture
from regard.reproduce import Plot

X = [float(2**k) for k in range(8)]
LINES = {f"method {k}": [(x, x ** (1 + k / 100)) for x in X] for k in range(4)}
MANY = {f"method {k}": [(x, math.sin(x) + k) for x in X] for k in range(7)}
NAMES = {"small": 0.0, "large": 1.0}
BARS = Plot("Bars", "model", "share", {"a": [(0, 0.5), (1, 0.25)], "b": [(0, 1), (1, 2)]}, kind="bar", ticks=NAMES)


def test_every_kind_is_drawn_and_the_file_stays_small(tmp_path: Path) -> None:
    plots = [
        Plot("Curves", "length", "seconds", LINES, log_x=True, log_y=True, dashed=("method 3",)),
        Plot("Many", "length", "error", MANY, references={"chance": 2.5}),
        BARS,
        Plot("Points", "length", "error", LINES, kind="points"),
    ]
    file = tmp_path / "all.png"
    save_picture(plots, file, "A title")
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size <= 60_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.png"]


def test_names_stand_apart_where_curves_end_together() -> None:
    figure = draw_plots([Plot("Curves", "length", "seconds", LINES, log_x=True, log_y=True)])
    labels = {text.get_text(): text.xy[1] for text in figure.axes[0].texts}  # type: ignore[attr-defined]
    assert set(labels) == set(LINES)
    heights = sorted(labels.values())
    assert all(b - a >= 0.07 for a, b in pairwise(heights)) and heights[-1] <= 1, "apart, and below the title"
    assert list(labels) == list(LINES), "the order of the names is that of the curves' ends"


def test_names_stand_where_their_curves_end() -> None:
    falling = {name: [(x, 10.0 ** (-3 * k - x / 99)) for x in X] for k, name in enumerate(("upper", "lower"))}
    panel = draw_plots([Plot("Falling", "length", "error", falling, log_x=True, log_y=True)]).axes[0]
    panel.figure.draw_without_rendering()  # type: ignore[union-attr]
    to_panel = panel.transData + panel.transAxes.inverted()
    for text in panel.texts:
        end = to_panel.transform(falling[text.get_text()][-1])[1]
        assert text.xy[1] == pytest.approx(end, abs=0.01)  # type: ignore[attr-defined]


def test_many_curves_and_bars_get_a_legend() -> None:
    figure = draw_plots([Plot("Many", "length", "error", MANY), BARS])
    many, bars = figure.axes
    for panel, names in ((many, set(MANY)), (bars, {"a", "b"})):
        legend = panel.get_legend()
        assert legend is not None and {text.get_text() for text in legend.get_texts()} == names
    assert [text.get_text() for text in bars.get_xticklabels()] == ["small", "large"]


def test_theory_is_a_broken_line_and_levels_are_named() -> None:
    figure = draw_plots([Plot("C", "x", "y", LINES, dashed=("method 1",), references={"chance": 3.0})])
    panel = figure.axes[0]
    styles = [line.get_linestyle() for line in panel.get_lines()]
    assert styles[1] == "--" and styles[0] == "-"
    assert "chance" in [text.get_text() for text in panel.texts]


def test_measured_places_are_written_out() -> None:
    figure = draw_plots([Plot("C", "x", "y", {"a": [(512, 1), (8192, 2)]}, log_x=True)])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["512", "8192"]
