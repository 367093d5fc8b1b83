"""Language models at equal parameters and equal FLOPs."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from regard.bench import language_comparison as module
from regard.bench.equal_cost import count_parameters, forward_flops, matched
from regard.bench.language_comparison import (
    LanguageResult,
    LanguageRun,
    LanguageSettings,
    Variant,
    held_out_bits,
    module_bytes,
    run_languages,
    variants_of,
)
from regard.bench.language_page import language_page, language_rows
from regard.bench.language_picture import draw_languages
from regard.cli import main
from regard.cost import AttentionShape, dense_cost, linear_layer_flops
from regard.errors import OptionError
from regard.models.decoder import Decoder
from regard.models.nano.corpus import Module
from regard.nn import MultiHeadAttention
from regard.registry import catalogue

FULL, MLP = Variant("full", "full"), Variant("mlp", "deconstructed_attention", {"kind": "mlp"})


def small(**settings: Any) -> LanguageSettings:
    sizes = {"steps": 6, "batch": 2, "length": 16, "embed_dim": 16, "depth": 2, "num_heads": 4, "hidden": 24}
    return LanguageSettings(**{**sizes, "tested": 4, "points": 3, "warmup": 2, **settings})


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40))
    modules = [Module(f"a/m{i}.py", text[i:]) for i in range(4)]
    monkeypatch.setattr(module, "read_corpus", lambda split: modules[:3] if split == "train" else modules[3:])
    module_bytes.cache_clear()


@pytest.mark.parametrize("name", ["gda", "moh", "better_attention_efficient", "neural_attention"])
def test_parameters_are_brought_to_the_baseline(name: str) -> None:
    settings = LanguageSettings()
    wanted = count_parameters(settings.model(FULL, settings.hidden))
    variant = variants_of([name])[-1]
    model, hidden = matched(lambda width: settings.model(variant, width), wanted, settings.hidden)
    assert abs(count_parameters(model) - wanted) <= 0.01 * wanted and hidden > 0
    one = 3 * settings.embed_dim * settings.depth
    assert abs(count_parameters(model) - wanted) <= one / 2, "the nearest width there is"


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(OptionError, match="compare larger models"):
        matched(lambda width: nn.Linear(1000, width), 500, 4)


def test_flops_of_the_baseline_by_hand() -> None:
    settings = small()
    dim, length, batch, hidden = settings.embed_dim, settings.length, settings.batch, settings.hidden
    tokens = batch * length
    projections = 4 * linear_layer_flops(tokens, dim, dim)
    scores_and_values = 2 * 2 * batch * length * length * dim
    mlp = 3 * linear_layer_flops(tokens, dim, hidden)
    wanted = settings.depth * (projections + scores_and_values + mlp) + linear_layer_flops(tokens, dim, 256)
    inputs = torch.zeros(batch, length, dtype=torch.long)
    assert forward_flops(settings.model(FULL, hidden), inputs) == wanted
    # No pairs of tokens at all: three matrices of four thirds of the width in place of the four.
    without = wanted - settings.depth * (projections + scores_and_values)
    without += settings.depth * 3 * linear_layer_flops(tokens, dim, round(4 * dim / 3))
    assert forward_flops(settings.model(MLP, hidden), inputs) == without


def test_what_the_counter_cannot_see_is_taken_from_the_cost() -> None:
    settings = small()
    inputs = torch.zeros(2, 16, dtype=torch.long)
    plain = forward_flops(settings.model(FULL, 24), inputs)
    model = settings.model(Variant("lla", "lla"), 24)
    shape, host = AttentionShape(16, 16, 4, 4, 2, causal=True), model.blocks[0].attention
    assert isinstance(host, MultiHeadAttention)
    more = host.mechanism.cost(shape).flops - dense_cost(shape).flops
    assert more > 0 and forward_flops(model, inputs) >= plain + 2 * more


def test_held_out_bits_count_bytes_alone() -> None:
    settings = small()
    model = settings.model(FULL, 24)
    with torch.no_grad():
        model.head.weight.zero_()
    assert held_out_bits(model, settings) == pytest.approx(8), "256 values alike"
    assert model.training


def test_both_readings_of_one_run() -> None:
    told: list[float] = []
    result = run_languages(small(), (FULL, MLP), 2, report=lambda line, done: told.append(done))
    assert [(run.label, run.seed) for run in result.runs] == [("full", 0), ("mlp", 0), ("full", 1), ("mlp", 1)]
    full, mlp = result.runs[:2]
    assert full.flops_steps == 6 and full.bits["parameters"] == full.bits["flops"]
    assert mlp.flops_steps == round(6 * full.flops / mlp.flops) > 6, "cheaper, so more steps"
    assert set(mlp.bits) == {"parameters", "flops"} and mlp.bits["parameters"] != mlp.bits["flops"]
    assert all(len(run.curve) == 3 and not run.reason and run.seconds for run in result.runs)
    assert abs(mlp.parameters - full.parameters) <= 0.01 * full.parameters
    assert full.bits != result.runs[2].bits and told == sorted(told) and told[-1] == 4
    again = run_languages(small(), (FULL,), 1).runs[0]
    assert again.bits == full.bits and again.curve == full.curve


def test_a_stopped_comparison_goes_on_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_languages(small(), (FULL, MLP), 1)

    def stop(line: str, done: float) -> None:
        if line.startswith("mlp, seed 0: step 4/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_KEPT_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_languages(small(), (FULL, MLP), 1, tmp_path, stop)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["mlp-0.pt"]
    lines: list[str] = []
    result = run_languages(small(), (FULL, MLP), 1, tmp_path, lambda line, done: lines.append(line))
    assert lines[0].startswith("mlp, seed 0: step 4/"), "what was kept before the fourth step's report is gone on from"
    for run, wanted in zip(result.runs, whole.runs, strict=True):
        assert (run.bits, run.curve, run.flops_steps) == (wanted.bits, wanted.curve, wanted.flops_steps)
    assert not list(tmp_path.glob("*.pt"))
    assert LanguageResult.load(tmp_path) == result
    with pytest.raises(OptionError, match="another comparison"):
        run_languages(small(steps=7), (FULL,), 1, tmp_path)


def test_one_failure_does_not_lose_the_others(tmp_path: Path) -> None:
    variants = (
        FULL,
        Variant("broken", "gda", {"no_such": 1}),
        Variant("typo", "gda", {"num_noise_heads": "two"}),
        MLP,
    )
    result = run_languages(small(), variants, 1, tmp_path)
    reasons = [run.reason for run in result.runs]
    assert not reasons[0] and not reasons[3] and "no_such" in reasons[1] and "TypeError" in reasons[2]
    text = language_page(result, "regard language", "pictures/x.png")
    assert "- broken: " in text and "## What has no figure" in text
    # A run without figures is tried again.
    mended = (FULL, Variant("broken", "gda"), Variant("learned", "better_attention_efficient"), MLP)
    assert not any(run.reason for run in run_languages(small(), mended, 1, tmp_path).runs)


def test_what_reads_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, x, **call: forward(self, x, **call).flip(1))
    assert "later tokens" in run_languages(small(), (FULL,), 1).runs[0].reason


def test_variants() -> None:
    labels = [variant.label for variant in variants_of(["full", "gda", "dense_attention"], length=32)]
    assert labels[:2] == ["full", "gda"] and "dense_attention: entmax" in labels
    _, control, sized = variants_of(["better_attention"], length=32)
    assert sized.options == {"max_len": 32}
    assert control.label == "full: learned positions" and small().model(control, 24).positions is not None
    own = variants_of(["dense_attention"], {"dense_attention": {"normalizer": "tanh"}})
    assert own == (FULL, Variant("dense_attention", "dense_attention", {"normalizer": "tanh"}))
    every = [e.key for e in catalogue(home="dense") if e.kind in ("mechanism", "layer")]
    settings = small(num_heads=4)
    for variant in variants_of(every, length=16):
        assert settings.model(variant, 24)(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 256), variant.label


def made() -> LanguageResult:
    runs = []
    for seed, (full, gda) in enumerate(((2.5, 2.4), (2.7, 2.62))):
        for label, bits in (("full", full), ("gda", gda)):
            found = {"parameters": bits, "flops": bits + 0.02 * (label == "gda")}
            curve = [5.0, 4.0, bits]
            runs.append(LanguageRun(label, label, {}, seed, 24, 1000, 2 * 10**9, 6, found, curve, 0.25))
    sized: dict[str, Any] = {"max_len": 16}
    runs += [
        LanguageRun("moh", "moh", {}, 0, reason="It broke."),
        LanguageRun(
            "better_attention", "better_attention", sized, 0, 24, 1000, 10, 5, {"parameters": 3, "flops": 3}, [5, 4, 3]
        ),
        LanguageRun("better_attention", "better_attention", sized, 1, reason="It diverged."),
    ]
    return LanguageResult(asdict(small()), runs)


def test_the_table_has_paired_differences() -> None:
    result = made()
    head, rows = language_rows(result)
    assert [row[0] for row in rows] == ["full", "gda", "better_attention † (1 of 2 seeds)", "moh"]
    spread = statistics.stdev([-0.1, -0.08])
    cells = dict(zip(range(len(head)), rows[1], strict=True))
    assert cells[4] == "2.510 ± 0.156" and cells[5] == f"-0.090 ± {spread:.3f}" and cells[8].startswith("-0.070")
    assert rows[0][5] == "" and rows[3][1:] == [""] * (len(head) - 1) and rows[1][2:4] == ["2.00", "0.250"]
    text = language_page(result, "regard language --mechanisms dense", "pictures/dense.png")
    assert "over 2 seeds" in text and "- better_attention: max_len=16" in text and "- moh: It broke." in text
    assert "not tuned for any other" in " ".join(text.split())
    assert all(len(line) <= 120 for line in text.splitlines() if line[:1] not in "|-W!")


def test_the_picture_has_a_panel_for_each() -> None:
    figure = draw_languages(made())
    titles = [panel.get_title(loc="left") for panel in figure.axes if panel.axison]
    assert titles == ["full", "gda", "better_attention"]
    lines = figure.axes[1].get_lines()
    assert [round(y, 3) for y in lines[1].get_ydata()] == [0, 0, -0.1]  # type: ignore[union-attr]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LanguageSettings", lambda steps: small(steps=steps))
    arguments = [
        "language",
        "--mechanisms",
        "full,gda",
        "--seeds",
        "1",
        "--steps",
        "20",
        "--out",
        str(tmp_path / "runs"),
    ]
    arguments += ["--report", str(tmp_path / "docs" / "dense.md"), "--option", "gda.num_noise_heads=2"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "docs" / "dense.md").read_text()
    assert "--option gda.num_noise_heads=2" in text and "pictures/dense.png" in text
    assert (tmp_path / "docs" / "pictures" / "dense.png").is_file()
    kept = json.loads((tmp_path / "runs" / "language.json").read_text())
    assert [run["label"] for run in kept["runs"]] == ["full", "gda"] and kept["runs"][1]["options"]
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0 and (tmp_path / "docs" / "dense.md").read_text() == text
