"""Timings stand beside predictions: they are kept, gone on with, and ranked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regard.bench import tile_timing
from regard.bench.tile_page import page
from regard.bench.tile_timing import SETTINGS, Setting, Timed, correlations, measure, spearman
from regard.errors import FileFormatError, OptionError
from regard.local.gna import GNASimulator

SMALL = (
    Setting.of((64,), 8, 1, (8,)),
    Setting.of((8, 8), 4, 2, (4, 4)),
    Setting.of((4, 4, 4), (2, 4, 4), 1, (2, 2, 2)),
)


def test_settings_differ_and_their_tiles_are_equal_work() -> None:
    assert len(SETTINGS) >= 30 and len(set(SETTINGS)) == len(SETTINGS)
    for axes in (1, 2, 3):
        assert sum(len(setting.grid) == axes for setting in SETTINGS) >= 10
    assert {int(torch.tensor(setting.tile).prod()) for setting in SETTINGS} == {64}
    assert all(n % side == 0 for s in SETTINGS for n, side in zip(s.grid, s.tile, strict=True))
    for setting in SETTINGS:  # every one is a neighbourhood
        assert GNASimulator(setting.grid, setting.window, setting.stride).rule.grid == setting.grid


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "made" / "simulate.json"
    first = measure(results, SMALL[:2], rounds=1)
    assert [row.setting for row in first] == list(SMALL[:2])
    assert all(row.ratio > 0 and 0 < row.share <= 1 for row in first)
    assert first[1].visited == GNASimulator((8, 8), 4, 2, False, 4, 4).mean_visited
    measured: list[Setting] = []

    def pretend(setting: Setting, rounds: int) -> Timed:
        measured.append(setting)
        if setting == SMALL[2]:
            raise KeyboardInterrupt
        raise AssertionError("it is in the file")

    monkeypatch.setattr(tile_timing, "_time", pretend)
    with pytest.raises(KeyboardInterrupt):
        measure(results, SMALL, rounds=1)
    assert measured == [SMALL[2]]
    assert measure(results, SMALL[:2], rounds=1) == first
    assert not list(results.parent.glob("*.partial"))


def test_files_of_another_kind_or_machine_are_refused(tmp_path: Path) -> None:
    results = tmp_path / "simulate.json"
    measure(results, SMALL[:1], rounds=1)
    with pytest.raises(OptionError, match="rounds was 1 and is 2"):
        measure(results, SMALL[:1], rounds=2)
    raw = json.loads(results.read_text())
    results.write_text(json.dumps({**raw, "version": 99}))
    with pytest.raises(FileFormatError, match="version 99"):
        measure(results, SMALL[:1], rounds=1)
    results.write_text("[]")
    with pytest.raises(FileFormatError, match="Remove it"):
        measure(results, SMALL[:1], rounds=1)


def test_rank_correlation_with_ties() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    stats = pytest.importorskip("scipy.stats")
    left, right = torch.randint(0, 9, (2, 40)).double().tolist()
    assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
    with pytest.raises(OptionError, match="equally long"):
        spearman([1, 2], [1])


def rows() -> list[Timed]:
    return [
        Timed(s.grid, s.window, s.stride, s.tile, float(place + 1), 96, (place + 2) / 96)
        for place, s in enumerate(SETTINGS)
    ]


def test_correlations_of_all_and_of_each_number_of_axes() -> None:
    assert correlations(rows()) == pytest.approx({"all": 1.0, "1-D": 1.0, "2-D": 1.0, "3-D": 1.0})
    assert set(correlations(rows()[:5])) == {"all", "1-D"}


def test_the_page_holds_what_was_found() -> None:
    text = page(rows(), "pictures/simulate.png", "regard simulate --measure")
    for part in ("| 30x48x80 | 18x24x24 | 16x8x8 | 4x8x8 : 2x8x8 | 11.11 | 11.11 | 11.11 |", "**1.000**", "1024"):
        assert part in text
    assert "(pictures/simulate.png)" in text and text.count("\n| 64x96 |") == 15
    assert "![" not in page(rows(), None, "regard simulate --measure")


def test_the_scatter_shows_every_setting() -> None:
    pytest.importorskip("matplotlib")
    from regard.bench.tile_pictures import draw_timed

    (panel,) = draw_timed(rows(), 0.987).axes
    assert sum(len(series.get_offsets()) for series in panel.collections) == len(SETTINGS)
    assert "0.987" in panel.get_title() and len(panel.get_legend().get_texts()) == 3
