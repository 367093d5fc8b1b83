"""The frontier's measures against dense matrices, and its bookkeeping."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import regard
from regard.bench import frontier as module
from regard.bench.frontier import BASELINES, Frontier, Plan, Point, Setting, frontier, settings_of
from regard.bench.frontier_picture import draw_frontier
from regard.cli import main
from regard.cli.compare import frontier_table
from regard.errors import FileFormatError, OptionError
from regard.local.sliding_window import SlidingWindowAttention
from regard.masks import Causal
from regard.sparse.metrics import attention_overlap, mass_recall

CONTEXT = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "layer_index": 0, "num_layers": 1}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens, and few settings."""
    monkeypatch.setattr(module, "GRID", (2, 16, 16))
    monkeypatch.setattr(module, "BASELINES", (BASELINES[3], BASELINES[5]))


def run(folder: Path, **settings: object) -> Frontier:
    return frontier(out=folder, mechanisms=("spargeattn",), lengths=(), **settings)  # type: ignore[arg-type]


def test_overlap_is_the_mass_on_the_chosen_keys() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 90, 8, generator=g, dtype=torch.float64)
    window = SlidingWindowAttention(window=17, sinks=3)
    weights = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~Causal().dense(90, 90), float("-inf")).softmax(-1)
    place = torch.arange(90)
    seen = Causal().dense(90, 90) & ((place[:, None] - place < 17) | (place < 3))
    expected = (weights * seen).sum(-1).mean(-1)
    torch.testing.assert_close(attention_overlap(window, query, key, causal=True), expected)
    layout = window.select(query, key, window.request(query, key, key, causal=True))
    torch.testing.assert_close(mass_recall(query, key, layout, causal=True), expected)
    estimate = torch.stack([attention_overlap(window, query, key, causal=True, columns=45, seed=s) for s in range(20)])
    torch.testing.assert_close(estimate.mean(0), expected, atol=0.02, rtol=0)
    some = torch.stack([attention_overlap(window, query, key, causal=True, rows=30, seed=s) for s in range(30)])
    torch.testing.assert_close(some.mean(0), expected, atol=0.03, rtol=0)
    everything = SlidingWindowAttention(window=90)
    ones = torch.ones(1, 2, dtype=torch.float64)
    torch.testing.assert_close(attention_overlap(everything, query, key, causal=True, columns=20), ones)


def test_overlap_of_what_stands_elsewhere_is_small() -> None:
    """Mass in common, not mass: uniform weights against one-hot ones share one key's part."""

    class Uniform(type(regard.create("full"))):  # type: ignore[misc]
        def attend(self, query, key, value, request):  # type: ignore[no-untyped-def]
            return value.mean(2, keepdim=True).expand(-1, -1, query.shape[2], -1)

    query = key = 100 * torch.eye(10).view(1, 1, 10, 10)
    torch.testing.assert_close(attention_overlap(Uniform(), query, key), torch.full((1, 1), 0.1))


def test_the_oracle_keeps_the_heaviest_blocks() -> None:
    g = torch.Generator().manual_seed(1)
    query, key = 2 * torch.randn(2, 1, 2, 256, 8, generator=g)
    oracle = Setting("oracle blocks", "oracle", {"ratio": 0.5, "block_size": 32}).build(CONTEXT)
    chosen = oracle.select(query, key, oracle.request(query, key, key)).visit  # type: ignore[operator]
    mass = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1).unflatten(3, (8, 32)).unflatten(2, (8, 32)).sum((3, 5))
    best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.topk(4, -1).indices, True)
    assert torch.equal(chosen, best | torch.eye(8, dtype=torch.bool))


@pytest.mark.usefixtures("small")
def test_points_are_written_as_they_come_and_kept(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.workloads == ["fields", "noise"]
    names = [point.name for point in result.points if point.workload == "fields"]
    assert names == ["oracle blocks", "window", *["spargeattn"] * 5]
    for point in result.points:
        assert point.density is not None and 0 < point.density <= 1
        assert point.recall is not None and 0 < point.recall <= 1 and point.error is not None
    dense = [p for p in result.points if p.workload == "noise" and p.name == "spargeattn"]
    assert dense[-1].recall > dense[0].recall and dense[-1].error < dense[0].error  # type: ignore[operator]
    raw = json.loads((tmp_path / "frontier.json").read_text())
    raw["points"][2]["recall"] = 0.123
    del raw["points"][-1]
    (tmp_path / "frontier.json").write_text(json.dumps(raw))
    again = run(tmp_path)
    assert again.points[2].recall == 0.123, "what is there is not measured again"
    assert len(again.points) == len(result.points) and again.points[-1] == result.points[-1]
    with pytest.raises(OptionError, match="another model, text or amount"):
        run(tmp_path, tokens=7)
    (tmp_path / "frontier.json").write_text("{")
    with pytest.raises(FileFormatError, match="another --out"):
        run(tmp_path)


@pytest.mark.usefixtures("small")
def test_text_is_read_by_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(mechanisms=("prism",), lengths=(256,), tokens=512)
    monkeypatch.setattr(module, "TENSORS", ())
    result = frontier(plan, out=tmp_path)
    losses = {(p.name, p.options.get("p_high")): p for p in result.points}
    full = result.full["text 256"]
    dense = losses["prism", 0.95]
    assert dense.bits_per_byte == pytest.approx(full, rel=0.02) and dense.density > 0.85  # type: ignore[operator]
    assert losses["window", None].bits_per_byte > full  # type: ignore[operator]
    assert all(p.error is None and 0 < p.recall <= 1 for p in result.points)  # type: ignore[operator]


def test_what_does_not_fit_the_workload_says_so(tmp_path: Path) -> None:
    point = Point("text 64", "vmoba", "mechanism", {})
    module._on_text(None, torch.zeros(1, 2), Setting("vmoba", "mechanism", {}, "vmoba"), point)  # type: ignore[arg-type]
    assert point.density is None and "causal" in point.reason
    with pytest.raises(OptionError, match="no settings to sweep"):
        settings_of("full")


def test_longer_windows_than_the_model_was_made_for() -> None:
    from regard.bench.subjects import load_subject

    plain, squeezed = (module.stretched(load_subject("nano"), 4096, flag) for flag in (False, True))
    assert plain.max_length == squeezed.max_length == 4096
    own, other = (s.model.model.rotary_emb.inv_freq for s in (plain, squeezed))
    torch.testing.assert_close(other, own / 2)


def test_a_figure_and_a_table_of_the_curves(tmp_path: Path) -> None:
    result = Frontier({})
    for name, group in (("oracle blocks", "oracle"), ("window", "static"), ("spargeattn", "mechanism")):
        for density in (0.1, 0.4):
            for workload in ("fields", "text 2048"):
                point = Point(workload, name, group, {"d": density}, density, density**0.5)  # type: ignore[arg-type]
                text = workload != "fields"
                point = dataclasses.replace(point, **{"bits_per_byte" if text else "error": 1.2 - density})
                result.points.append(point)
    result.full["text 2048"] = 0.7
    assert result.at("fields", "window", "error", 0.2) == pytest.approx(0.95)
    assert result.at("fields", "window", "error", 0.5) is None
    figure = draw_frontier(result)
    assert len([axes for axes in figure.axes if axes.lines]) == 4
    table = frontier_table(result, "text 2048")
    assert table.row_count == 3 and "0.700" in str(table.title)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRID", (2, 16, 16))
    monkeypatch.setattr(module, "BASELINES", BASELINES[:2])
    arguments = ["frontier", "--lengths", "", "--mechanisms", "spargeattn", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "spargeattn" in result.output and (tmp_path / "frontier.png").stat().st_size > 10_000
    wrong = CliRunner().invoke(main, ["frontier", "--lengths", "many"])
    assert wrong.exit_code != 0 and "2048,8192" in wrong.output
