"""The comparison: its numbers against their definitions, resuming, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from regard.bench.compare import Comparison, Plan, applicable, compare, default_mechanisms
from regard.bench.subjects import Subject, read_text, token_windows
from regard.errors import FileFormatError, OptionError, UnknownNameError

SMALL = {"length": 64, "windows": 2, "decode_tokens": 4, "passage": 32}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(200)), encoding="utf-8")
    return str(path)


def run(subject: Subject, text: str, *names: str, **settings: object) -> Comparison:
    return compare(Plan("tiny", text, names, **{**SMALL, **settings}), subject=subject)  # type: ignore[arg-type]


def test_full_attention_changes_nothing(subject: Subject, text: str) -> None:
    result = run(subject, text, "full")
    (row,) = result.rows
    assert row.group == "exact"
    assert row.change == pytest.approx(0, abs=1e-5)
    assert row.kl == pytest.approx(0, abs=1e-5)
    assert row.pairs == pytest.approx(1)
    assert row.prefill_ratio is not None and row.prefill_ratio > 0
    assert row.decode_ratio is not None and row.memory_ratio is not None
    assert len(row.maps) == 2


def test_bits_per_byte_is_the_loss_in_bits_over_the_bytes_predicted(subject: Subject, text: str) -> None:
    result = run(subject, text, "full")
    windows = token_windows(subject, read_text(text), 64, 2)
    with torch.no_grad():
        logits = subject.model(input_ids=windows).logits[:, :-1]
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    # One token is one byte here, so bits per byte are bits per token.
    assert result.reference["bits_per_byte"] == pytest.approx(float(nats) / math.log(2), rel=1e-5)
    assert result.reference["bytes"] == windows[:, 1:].numel()


def test_a_window_reports_the_pairs_it_computes(subject: Subject, text: str) -> None:
    options = {"sliding_window": {"window": 8, "sinks": 0, "block_size": 1}}
    (row,) = run(subject, text, "sliding_window", options=options).rows
    seen = sum(min(i + 1, 8) for i in range(64))
    assert row.group == "training-free"
    assert row.pairs == pytest.approx(seen / (64 * 65 / 2), rel=1e-6)
    assert row.kl is not None and row.kl > 0


def test_the_model_is_left_as_it_was(subject: Subject, text: str) -> None:
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    implementation = subject.model.config._attn_implementation
    run(subject, text, "sliding_window")
    assert subject.model.config._attn_implementation == implementation
    after = subject.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_stand_in_a_causal_model_is_listed_with_its_reason(subject: Subject, text: str) -> None:
    result = run(subject, text, "full", "cbam")
    assert [row.group for row in result.rows] == ["exact", "not applicable"]
    assert "feature" in result.rows[1].reason
    assert applicable("full") == ""


def test_a_rerun_goes_on_where_the_last_one_stopped(subject: Subject, text: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("sliding_window"):
            raise KeyboardInterrupt

    plan = Plan("tiny", text, ("full", "sliding_window"), **SMALL)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        compare(plan, out=tmp_path / "out", subject=subject, report=stop)
    kept = Comparison.load(tmp_path / "out")
    assert kept is not None and [row.mechanism for row in kept.rows] == ["full"]

    lines: list[str] = []
    result = compare(plan, out=tmp_path / "out", subject=subject, report=lines.append)
    assert "full: kept from an earlier run" in lines
    assert [row.mechanism for row in result.rows] == ["full", "sliding_window"]
    assert result.rows[0].prefill_ratio == kept.rows[0].prefill_ratio


def test_other_options_are_measured_anew(subject: Subject, text: str, tmp_path: Path) -> None:
    def once(window: int) -> Comparison:
        plan = Plan("tiny", text, ("sliding_window",), options={"sliding_window": {"window": window}}, **SMALL)  # type: ignore[arg-type]
        return compare(plan, out=tmp_path, subject=subject)

    assert once(4).rows[0].options["window"] == 4
    assert once(9).rows[0].options["window"] == 9


def test_results_of_another_comparison_are_not_overwritten(subject: Subject, text: str, tmp_path: Path) -> None:
    compare(Plan("tiny", text, ("full",), **SMALL), out=tmp_path, subject=subject)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="another model, text or length"):
        compare(Plan("tiny", text, ("full",), **{**SMALL, "length": 32}), out=tmp_path, subject=subject)  # type: ignore[arg-type]


def test_a_broken_results_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"version": 99}), encoding="utf-8")
    with pytest.raises(FileFormatError, match="version 99"):
        Comparison.load(tmp_path)


def test_fine_tuning_trains_what_needs_training_and_only_the_twin(subject: Subject, text: str) -> None:
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    options = {"moba": {"block_size": 8, "top_k": 2}}
    (untrained,) = run(subject, text, "moba", options=options).rows
    (trained,) = run(subject, text, "moba", options=options, train=6).rows
    assert (untrained.group, trained.group) == ("untrained", "trained")
    assert trained.bits_per_byte is not None and untrained.bits_per_byte is not None
    assert trained.bits_per_byte < untrained.bits_per_byte
    assert all(torch.equal(before[name], tensor) for name, tensor in subject.model.state_dict().items())


def test_defaults_begin_with_full_and_what_needs_no_training() -> None:
    names = default_mechanisms()
    assert names[0] == "full"
    assert names.index("sliding_window") < names.index("moba") < names.index("swin")
    assert "cbam" not in names
    free = default_mechanisms(training_free=True)
    assert "sliding_window" in free and not {"moba", "swin"} & set(free)


def test_errors_teach(subject: Subject, text: str) -> None:
    with pytest.raises(UnknownNameError, match="sliding_window"):
        run(subject, text, "sliding_windw")
    with pytest.raises(OptionError, match="not compared"):
        run(subject, text, "full", options={"moba": {"top_k": 2}})
    with pytest.raises(OptionError, match="at most 256 tokens"):
        run(subject, text, "full", length=512)
    with pytest.raises(OptionError, match="too few for one window"):
        token_windows(subject, ["short"], 64, 1)
    with pytest.raises(FileFormatError, match="no file or folder"):
        read_text("/no/such/place")


def test_binary_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(FileFormatError, match="not UTF-8"):
        read_text(path)
