"""What a reproduction keeps: its figures, and its plots as data and as a picture beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from regard import catalogue
from regard.bench import figures
from regard.cli import main
from regard.errors import MissingExtraError, OptionError
from regard.reproduce import Finding, Plot, moba, reproduce


def curve(**settings: object) -> Plot:
    points = [(512.0, 0.123456789), (131072.0, 1 / 3)]
    return Plot("Title", "tokens", "seconds", {"one": points, "theory": points}, **settings)  # type: ignore[arg-type]


def test_a_plot_is_kept_as_short_plain_data_and_comes_back() -> None:
    assert curve().content() == {
        "title": "Title",
        "x": "tokens",
        "y": "seconds",
        "series": {name: [[512, 0.1235], [131072, 0.3333]] for name in ("one", "theory")},
    }
    rich = curve(kind="bar", log_x=True, references={"chance": 0.25}, dashed=("theory",), ticks={"first": 512})
    kept = json.loads(json.dumps(rich.content()))
    assert Plot(**kept).content() == kept
    assert kept["kind"] == "bar" and kept["log_x"] and "log_y" not in kept


@pytest.mark.parametrize(
    ("points", "settings", "words"),
    [
        ([], {}, "at least one point"),
        ([(1.0, math.nan)], {}, "leave such points out"),
        ([(0.0, 1.0)], {"log_x": True}, "logarithmic"),
        ([(1.0, -1.0)], {"log_y": True}, "logarithmic"),
        ([(1.0, 1.0)], {"kind": "pie"}, "line, points, bar"),
        ([(1.0, 1.0)], {"dashed": ("b",)}, "no series"),
    ],
)
def test_a_plot_that_cannot_be_drawn_says_why(
    points: list[tuple[float, float]], settings: dict[str, object], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        Plot("T", "x", "y", {"a": points}, **settings)  # type: ignore[arg-type]


def found(monkeypatch: pytest.MonkeyPatch, *plots: Plot) -> None:
    finding = Finding({"share": 0.5}, True, "A note.", list(plots))
    monkeypatch.setattr(moba, "run", lambda report: finding)


def test_the_picture_lies_beside_the_figures_and_goes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    said: list[str] = []
    found(monkeypatch, curve(), curve(log_y=True))
    result = reproduce("moba", said.append, tmp_path)
    text = (tmp_path / "moba.json").read_text(encoding="utf-8")
    assert json.loads(text) == result and [Plot(**kept) for kept in result["plots"]]
    assert len(text.splitlines()) < 40, "a plot takes one line"
    picture = tmp_path / "moba.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and said == [f"drew {picture}"]
    found(monkeypatch)
    assert "plots" not in reproduce("moba", said.append, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["moba.json"], "no picture of figures that are gone"


def test_without_matplotlib_the_figures_are_kept_and_the_way_to_the_picture_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(size: tuple[float, float]) -> None:
        raise MissingExtraError("Drawing", "plot")

    monkeypatch.setattr("regard.bench.evidence_picture.new_figure", missing)
    assert figures.new_figure is not missing
    said: list[str] = []
    found(monkeypatch, curve())
    assert len(reproduce("moba", said.append, tmp_path)["plots"]) == 1
    assert "regard[plot]" in said[0] and not (tmp_path / "moba.png").exists()


def test_show_names_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    found(monkeypatch, curve())
    reproduce("moba", lambda line: None, tmp_path)
    monkeypatch.setattr(catalogue, "evidence_folder", lambda: tmp_path)
    shown = CliRunner().invoke(main, ["show", "moba"], catch_exceptions=False).output
    assert str(tmp_path / "moba.png") in shown.replace("\n", "")
