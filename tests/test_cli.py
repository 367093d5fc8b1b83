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


def test_options_are_read_as_values() -> None:
    pytest.importorskip("matplotlib")
    result = call("draw", "sliding_window", "--option", "widow=3", "--out", "never.png")
    assert result.exit_code == 1 and "window" in result.output
    result = call("draw", "sliding_window", "--option", "window", "--out", "never.png")
    assert result.exit_code == 1 and "NAME=VALUE" in result.output


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
