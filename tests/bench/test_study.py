"""Long retrieval and the study that trains on it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from regard.bench import study as module
from regard.bench.retrieval import Passkey
from regard.bench.study import Study, StudyResult, parse_seconds, run_study
from regard.bench.study_page import page
from regard.bench.study_tasks import TASKS, task_names
from regard.cli import main
from regard.dense.full import FullAttention
from regard.errors import FileFormatError, OptionError, UnknownNameError
from regard.linear.lightning_attention import LightningAttention
from regard.mechanism import Request


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
    for name in ("passkey", "recall", "mqar"):
        for length in (128, 2048, 65536):
            inputs, targets = TASKS[name].at(length).batch(1, torch.Generator().manual_seed(0))
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
    assert outcome.steps > 0 and set(outcome.scores) == {"128", "256"} and outcome.parameters > 1000
    assert lines[0].startswith("full: step 1,") and lines[-1] == "full: testing at 256"

    def never(*arguments: object) -> float:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_step", never)
        again = run_study(small(), tmp_path)
        assert again.outcomes == result.outcomes
        longer = run_study(small(test_lengths=(128, 256, 512)), tmp_path).outcomes[0]
        assert set(longer.scores) == {"128", "256", "512"} and longer.scores["128"] == outcome.scores["128"]
    with pytest.raises(OptionError, match="another study"):
        run_study(small(length=256), tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"version": 0}))
    with pytest.raises(FileFormatError, match="another --out"):
        run_study(small(), tmp_path)


def test_training_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step for step what an uninterrupted run does: weights, optimiser and data go on where they were."""
    clock = iter(range(10_000))
    monkeypatch.setattr(module, "training_clock", lambda: float(next(clock)))
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
    assert (rest.steps, rest.loss, rest.scores) == (whole.steps, whole.loss, whole.scores)
    assert whole.steps == 8


def test_results_of_before_there_were_other_scores_are_read(tmp_path: Path) -> None:
    fingerprint = {"task": "passkey", "length": 128, "seconds": 0.3, "lr": 0.003, "embed_dim": 16, "num_heads": 2}
    outcome = {"mechanism": "full", "options": {}, "parameters": 9, "steps": 1, "loss": 2.0, "reason": ""}
    kept = {"fingerprint": {**fingerprint, "depth": 2, "seed": 0}, "version": 1}
    kept["outcomes"] = [{**outcome, "accuracy": {"128": 0.5, "256": 0.25}}]
    (tmp_path / "study.json").write_text(json.dumps(kept))
    result = run_study(small(), tmp_path)
    assert result.outcomes[0].scores == {"128": 0.5, "256": 0.25} and result.outcomes[0].steps == 1
    text = page([result])
    assert text.startswith("# Finding things far back") and "| full | 1 | 2.000 | 0.500 | 0.250 |" in text


def test_a_task_settles_what_the_study_leaves_open() -> None:
    study = Study.of("drift", ("full",), seconds=2.0, seed=3)
    setup = TASKS["drift"]
    assert (study.length, study.test_lengths, study.lr) == (setup.length, (setup.length,), setup.lr)
    assert (study.positions, study.shortest, study.seed, study.seconds) == ("none", setup.shortest, 3, 2.0)
    assert Study.of("passkey", ("full",), 512).test_lengths == (512, 2048)
    assert Study.of("passkey", ("full",), 512, (1024,)).test_lengths == (1024,)
    assert (study.tokens, Study.of("passkey", ("full",), 2048).tokens) == (setup.tokens, 4096)
    assert task_names("all") == tuple(TASKS) and task_names("mqar, copy,mqar") == ("mqar", "copy")
    with pytest.raises(UnknownNameError, match="permutations"):
        task_names("copy,permutation")
    with pytest.raises(OptionError, match="64 tokens"):
        Study.of("digits", ("full",), 32).at(32)
    with pytest.raises(OptionError, match="vector for each of 64 positions"):
        run_study(Study.of("copy", ("full",), 64, (64, 128)))


def quick(task: str, *mechanisms: str, **settings: Any) -> StudyResult:
    small = {"seconds": 0.05, "embed_dim": 16, "num_heads": 2, "tokens": 256, "tested": 512}
    return run_study(Study.of(task, mechanisms, **{**small, **settings}))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_trained_on(task: str) -> None:
    length = None if task == "digits" else 128 if task == "text" else 64
    outcome = quick(task, "full", length=length).outcomes[0]
    assert outcome.scores and not outcome.reason and outcome.causal
    assert all(math.isfinite(score) and score >= 0 for score in outcome.scores.values())


def test_mechanisms_and_layers_are_causal_where_they_can() -> None:
    """Without a causal form they are used where a sequence has one answer, and said to be; else the reason is."""
    names = ("full", "lightning_attention", "tnl_attention", "hcam", "efficient_attention", "set_attention_block")
    kinds = {outcome.mechanism: outcome for outcome in quick("digits", *names, "inline_attention_layer").outcomes}
    assert all(outcome.scores for outcome in kinds.values()), [outcome.reason for outcome in kinds.values()]
    without = {"efficient_attention", "set_attention_block", "inline_attention_layer"}
    assert {name for name, outcome in kinds.items() if not outcome.causal} == without
    along = {outcome.mechanism: outcome for outcome in quick("parity", *names).outcomes}
    assert {name for name, outcome in along.items() if not outcome.scores} == {"efficient_attention", names[-1]}
    assert "no causal form" in along["efficient_attention"].reason
    text = quick("text", "inline_attention_layer", length=128).outcomes[0]
    assert "needs a grid" in text.reason and not text.scores


def test_answers_that_are_read_before_they_are_asked_for_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick("regression", "full").outcomes[0].scores
    forward = FullAttention.attend

    def peeking(self: FullAttention, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return forward(self, query, key, value, replace(request, causal=False))

    monkeypatch.setattr(FullAttention, "attend", peeking)
    outcome = quick("regression", "full").outcomes[0]
    assert "lets later tokens change earlier outputs" in outcome.reason and not outcome.scores


def test_one_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> Tensor:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(LightningAttention, "attend", broken)
        first, second = quick("recall", "lightning_attention", "full").outcomes
        assert first.reason == "RuntimeError: no such kernel" and second.scores and not second.reason
    monkeypatch.setattr(module, "_step", lambda *arguments: math.nan)
    assert "diverged: the loss of step 1 is nan" in quick("recall", "full").outcomes[0].reason


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    result = run_study(small(mechanisms=("vmoba", "full")), tmp_path)
    assert result.outcomes[0].reason and not result.outcomes[0].scores and result.outcomes[1].scores
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
