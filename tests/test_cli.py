"""The command, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from regard.cli import main


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def test_list_names_what_there_is() -> None:
    result = call("list", "--json")
    keys = [entry["key"] for entry in json.loads(result.output)]
    assert {"full", "sliding_window", "moba", "cbam"} <= set(keys)
    only = json.loads(call("list", "--json", "--home", "feature").output)
    assert {entry["home"] for entry in only} == {"feature"}
    table = call("list", "--markdown").output.splitlines()
    assert len(table) == len(keys) + 2


def test_list_of_nothing_says_so() -> None:
    result = call("list", "--home", "nowhere")
    assert result.exit_code == 1 and "regard list" in result.output


def test_show_tells_all_of_one() -> None:
    output = call("show", "sliding_window").output
    for part in ("Formula", "window = 256", "causal-cross", "GFLOP at 4096 tokens", "Implied attention", "\u2588"):
        assert part in output


def test_show_of_a_misspelt_name_offers_the_nearest() -> None:
    result = call("show", "sliding_windw")
    assert result.exit_code == 1
    assert "sliding_window" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_draw_writes_a_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / f"map.{suffix}"
    result = call("draw", "full", "--length", "16", "--out", str(target))
    assert result.exit_code == 0 and target.stat().st_size > 1000
    start = target.read_bytes()[:8]
    assert start == b"\x89PNG\r\n\x1a\n" if suffix == "png" else start.startswith(b"<?xml")


def test_draw_refuses_other_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = call("draw", "full", "--length", "16", "--out", str(tmp_path / "map.txt"))
    assert result.exit_code == 1 and ".png" in result.output


@pytest.mark.parametrize(("key", "grid", "query"), [("gna", "30", "7"), ("gna", "8x9", "5,7"), ("cswin", "6x6", None)])
def test_draw_shows_what_one_query_sees(tmp_path: Path, key: str, grid: str, query: str | None) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "made" / "view.png"
    chosen = () if query is None else ("--query", query)
    result = call("draw", key, "--grid", grid, *chosen, "--out", str(target))
    assert result.exit_code == 0 and target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("swin", "--grid", "16"), "2 axes"),
        (("gna", "--grid", "16by16"), "16x64x64"),
        (("gna", "--grid", "8x8", "--query", "3"), "2 axes"),
        (("gna", "--grid", "8x8", "--query", "3,8"), "7,7"),
        (("swin", "--grid", "8x8", "--causal"), "causal-self"),
        (("gna", "--query", "3,3"), "--grid"),
    ],
)
def test_draw_of_an_impossible_view_says_why(arguments: tuple[str, ...], words: str) -> None:
    pytest.importorskip("matplotlib")
    result = call("draw", *arguments, "--out", "never.png")
    assert result.exit_code == 1 and words in result.output and not Path("never.png").exists()


def test_options_are_read_as_values() -> None:
    pytest.importorskip("matplotlib")
    result = call("draw", "sliding_window", "--option", "widow=3", "--out", "never.png")
    assert result.exit_code == 1 and "window" in result.output
    result = call("draw", "sliding_window", "--option", "window", "--out", "never.png")
    assert result.exit_code == 1 and "NAME=VALUE" in result.output


VIDEO = ("simulate", "--grid", "30x48x80", "--window", "18x24x24")


def test_simulate_prints_the_bounds_of_each_tiling() -> None:
    lines = call(*VIDEO, "--stride", "16x8x8", "--tile", "4x8x8:2x8x8").output.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["grid"], ["flat"]) and "static" in line]
    assert rows[0] == ["grid", "static", "11.11x", "11.11x", "11.11x", "yes", "81.0", "81", "900"]
    assert rows[1][:3] == ["flat", "static", "11.11x"] and rows[1][5] == "no"
    assert all(len(line) <= 80 for line in lines)


def test_simulate_searches_stride_and_tile(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "tiles.png"
    result = call(
        "simulate",
        "--grid",
        "24x32",
        "--window",
        "8",
        "--search",
        "--tile-volume",
        "16:32",
        "--top",
        "3",
        "--out",
        str(target),
    )
    assert "8x8" in result.output and "12.00x" in result.output and "sharing" in result.output
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--grid", "64by64", "--window", "8"), "16x64x64"),
        (("--grid", "64x64", "--window", "8x8x8"), "3 numbers and the grid 2 axes"),
        (("--grid", "64x64", "--window", "8x65"), "65 > 64"),
        (("--grid", "64x64", "--window", "8", "--stride", "9"), "stride 9"),
        (("--grid", "64x64", "--window", "8", "--tile", "4:4:4"), "QUERIES:KEYS"),
        (("--grid", "64x64", "--window", "8", "--causal", "2"), "0 to 1"),
        (("--grid", "64x64", "--window", "8", "--search", "--tile-volume", "100"), "powers of two"),
        (("--grid", "64x64", "--window", "8", "--out", "tiles.txt"), ".png"),
        (("--grid", "64x64", "--window", "8", "--report", "page.md"), "--measure"),
        (
            (
                "--grid",
                "64x64",
            ),
            "--window",
        ),
        (("--measure", "--grid", "64x64"), "of its own"),
        (("--measure", "--out", "times.txt"), ".png"),
    ],
)
def test_simulate_of_the_impossible_says_why(arguments: tuple[str, ...], words: str) -> None:
    result = call("simulate", *arguments)
    assert result.exit_code == 1 and words in " ".join(result.output.split())


def test_simulate_measures_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from regard.bench import tile_timing

    few = [tile_timing.Setting.of((64,), window, 1, (8,)) for window in (4, 16, 64)]
    monkeypatch.setattr(tile_timing, "SETTINGS", few)
    results, picture, page = tmp_path / "runs.json", tmp_path / "pictures" / "times.png", tmp_path / "page.md"
    result = call("simulate", "--measure", "--results", str(results), "--out", str(picture), "--report", str(page))
    assert result.exit_code == 0 and "Spearman rank correlation" in result.output
    assert len(json.loads(results.read_text())["rows"]) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(pictures/times.png)" in page.read_text() and "Spearman" in page.read_text()


def test_compare_wants_a_mechanism_with_each_option() -> None:
    pytest.importorskip("transformers")
    result = call("compare", "--option", "top_k=4")
    assert result.exit_code == 1 and "moba.top_k=4" in result.output


def test_reproduce_of_what_is_no_paper_says_so() -> None:
    result = call("reproduce", "full")
    assert result.exit_code == 1 and "no reproduction" in result.output


def test_env_names_versions() -> None:
    output = call("env").output
    assert "torch" in output and "python" in output
    assert any(state in output for state in ("ready (", "not built (", "off (", "failed ("))
