"""Long retrieval and the study that trains on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from regard.bench import study as module
from regard.bench.retrieval import Passkey
from regard.bench.study import TASKS, Study, parse_seconds, run_study
from regard.cli import main
from regard.errors import FileFormatError, OptionError, UnknownNameError


@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_the_key_stands_in_the_text_and_is_asked_for_at_its_end(depth: float | None) -> None:
    task = Passkey(200, digits=3, fillers=20, depth=depth)
    inputs, targets = task.batch(50, torch.Generator().manual_seed(0))
    assert int(inputs.max()) < task.vocab_size
    starts = set()
    for text, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert text[-3:] == [50, 51, 52] and all(target == -100 for target in wanted[:-3])
        places = [at for at, token in enumerate(text) if 20 <= token < 50]
        assert places == list(range(places[0], places[0] + 3))
        assert [(text[at] - 20) // 10 for at in places] == [0, 1, 2], "a token tells its place"
        assert [(text[at] - 20) % 10 for at in places] == wanted[-3:]
        starts.add(places[0])
    assert starts == {round(depth * 194)} if depth is not None else len(starts) > 30
    perfect = torch.nn.functional.one_hot(targets.clamp_min(0), 10).float()
    assert task.score(perfect, targets) == (150.0, 150)


def test_tasks_at_any_length() -> None:
    for name in TASKS:
        for length in (128, 2048, 65536):
            inputs, targets = TASKS[name](length).batch(1, torch.Generator().manual_seed(0))
            assert inputs.shape[:2] == targets.shape == (1, length) and int((targets >= 0).sum()) >= 16
    with pytest.raises(OptionError, match="at least 15 tokens"):
        Passkey(14)
    with pytest.raises(OptionError, match="share of the text"):
        Passkey(depth=2)


def small(**settings: object) -> Study:
    known = {"task": "passkey", "mechanisms": ("full",), "length": 128, "test_lengths": (128, 256), "seconds": 0.3}
    return Study(**{**known, "embed_dim": 16, "num_heads": 2, **settings})  # type: ignore[arg-type]


def test_a_study_is_kept_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    result = run_study(small(), tmp_path, lambda line, share: lines.append(line))
    outcome = result.outcomes[0]
    assert outcome.steps > 0 and set(outcome.accuracy) == {"128", "256"} and outcome.parameters > 1000
    assert lines[0].startswith("full: step 1,") and lines[-1] == "full: testing at 256"

    def never(*arguments: object) -> float:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_step", never)
        again = run_study(small(), tmp_path)
        assert again.outcomes == result.outcomes
        longer = run_study(small(test_lengths=(128, 256, 512)), tmp_path).outcomes[0]
        assert set(longer.accuracy) == {"128", "256", "512"} and longer.accuracy["128"] == outcome.accuracy["128"]
    with pytest.raises(OptionError, match="another study"):
        run_study(small(length=256), tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"version": 0}))
    with pytest.raises(FileFormatError, match="another --out"):
        run_study(small(), tmp_path)


def test_training_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step for step what an uninterrupted run does: weights, optimiser and data go on where they were."""
    clock = iter(range(10_000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(module, "_KEPT_EVERY", 0.5)
    whole = run_study(small(seconds=8.0), tmp_path / "whole").outcomes[0]
    steps = 0

    def stop(line: str, share: float) -> None:
        nonlocal steps
        steps += "step" in line
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(small(seconds=8.0), tmp_path / "cut", stop)
    rest = run_study(small(seconds=8.0), tmp_path / "cut").outcomes[0]
    assert (rest.steps, rest.loss, rest.accuracy) == (whole.steps, whole.loss, whole.accuracy)
    assert whole.steps == 8


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    result = run_study(small(mechanisms=("vmoba", "full")), tmp_path)
    assert result.outcomes[0].reason and not result.outcomes[0].accuracy and result.outcomes[1].accuracy
    with pytest.raises(UnknownNameError, match="passkey"):
        run_study(small(task="pass"))
    for text, seconds in (("90", 90), ("90s", 90), ("3m", 180), ("1h", 3600)):
        assert parse_seconds(text) == seconds
    for wrong in ("soon", "0s", "-1m"):
        with pytest.raises(OptionError):
            parse_seconds(wrong)


def test_the_command(tmp_path: Path) -> None:
    arguments = ["train", "--task", "passkey", "--mechanisms", "full,sliding_window", "--length", "128"]
    arguments += ["--test-lengths", "128", "--budget", "0.2s", "--out", str(tmp_path)]
    arguments += ["--option", "sliding_window.window=8"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "sliding_window" in result.output and (tmp_path / "study.json").is_file()
    kept = json.loads((tmp_path / "study.json").read_text())
    assert kept["outcomes"][1]["options"]["window"] == 8
