"""Many studies as one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from regard.bench import study as module
from regard.bench.batch_page import batch_page, batch_rows
from regard.bench.study import Outcome, Study, StudyResult
from regard.bench.study_batch import kept_results, mechanism_names, run_batch
from regard.cli import main
from regard.errors import OptionError, UnknownNameError
from regard.registry import catalogue


def studies(tasks: tuple[str, ...], seeds: int = 1, **settings: object) -> list[Study]:
    small = {"seconds": 0.05, "embed_dim": 16, "num_heads": 2, "tokens": 256, "tested": 512, **settings}
    names = ("full", "lightning_attention")
    return [Study.of(task, names, seed=seed, **small) for task in tasks for seed in range(seeds)]  # type: ignore[arg-type]


def test_a_home_is_all_of_its_mechanisms_and_layers() -> None:
    names = mechanism_names("linear")
    assert names[0] == "full" and len(set(names)) == len(names)
    assert {"lightning_attention", "tnl_attention", "hcam"} < set(names) and "rala_2d" not in names
    assert set(names[1:]) == {e.key for e in catalogue(home="linear") if e.kind in ("mechanism", "layer")}
    assert mechanism_names("moba, linear,full")[:2] == ("moba", "full")
    with pytest.raises(UnknownNameError, match="linaer"):
        mechanism_names("full,linaer")


def test_runs_are_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = studies(("recall", "drift"), seeds=2)
    told: list[str] = []
    shares: list[float] = []

    def stop(study: Study, outcome: Outcome) -> None:
        told.append(f"{study.task} {study.seed} {outcome.mechanism}")
        if len(told) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(plan, tmp_path, finished=stop)
    assert told[:3] == ["recall 0 full", "recall 0 lightning_attention", "recall 1 full"]
    kept = kept_results(plan, tmp_path)
    assert [len(result.outcomes) for result in kept] == [2, 2, 1]
    trained: list[str] = []
    train = module._train

    def watched(study: Study, name: str, *rest: Any) -> None:
        trained.append(f"{study.task} {study.seed} {name}")
        train(study, name, *rest)

    monkeypatch.setattr(module, "_train", watched)
    results = run_batch(plan, tmp_path, lambda line, done: shares.append(done))
    assert trained == ["drift 0 lightning_attention", "drift 1 full", "drift 1 lightning_attention"]
    assert shares == sorted(shares) and shares[-1] == 8
    assert [result.outcomes for result in results] == [result.outcomes for result in kept_results(plan, tmp_path)]
    with pytest.raises(OptionError, match="another study"):
        run_batch(studies(("copy", "drift"), seconds=0.1), tmp_path)
    assert not (tmp_path / "copy").exists(), "nothing is run before all is looked at"


def result(task: str, seed: int, scores: dict[str, dict[str, float]], **fields: object) -> StudyResult:
    study = Study.of(task, tuple(scores), seed=seed, seconds=30.0)
    outcomes = [Outcome(name, scores=found, parameters=1000, steps=7) for name, found in scores.items()]
    for outcome in outcomes:
        if not outcome.scores:
            outcome.reason = "no causal form"
    return StudyResult(study.fingerprint, outcomes)


def test_the_table_has_means_and_spreads_and_the_best_of_each_column() -> None:
    found = [
        result("recall", 0, {"full": {"128": 0.9, "512": 0.5}, "hcam": {"128": 0.7, "512": 0.6}, "rala": {}}),
        result("recall", 1, {"full": {"128": 1.0, "512": 0.5}, "hcam": {"128": 0.7, "512": 0.7}, "rala": {}}),
        result("drift", 0, {"full": {"64": 0.4}, "hcam": {"64": 0.3}}),
        result("digits", 0, {"rala": {"64": 0.8}}),
    ]
    found[3].outcomes[0].causal = False
    head, rows = batch_rows(found, "**")
    assert head == ["mechanism", "recall 128", "recall 512", "drift 64 (error)", "digits 64"]
    assert rows[0] == ["chance", "0.062", "0.062", "1.000", "0.100"]
    assert rows[1] == ["full", "**0.950** ± 0.071", "0.500 ± 0.000", "0.400", ""]
    assert rows[2] == ["hcam", "0.700 ± 0.000", "**0.650** ± 0.071", "**0.300**", ""]
    assert rows[3] == ["rala", "", "", "", "**0.800** *"]
    text = batch_page(found, "regard train --task recall,drift,digits")
    assert "`regard train --task recall,drift,digits`" in text and "30 s" in text and "over 2 seeds" in text
    assert "- rala (recall): no causal form" in text and "| full | 7 | 7 |  |" in text
    assert "Kalman filter" in text and all(len(line) <= 120 for line in text.splitlines() if line[:1] != "|")


def test_the_command_with_many_tasks(tmp_path: Path) -> None:
    arguments = ["train", "--task", "parity,drift", "--mechanisms", "full,agent_attention", "--budget", "0.1s"]
    arguments += ["--out", str(tmp_path / "runs"), "--report", str(tmp_path / "docs" / "table.md")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "drift, seed 0, full: " in done.output and "agent_attention has no causal form" in done.output
    text = (tmp_path / "docs" / "table.md").read_text()
    assert "| mechanism | parity 32 | parity 128 | drift 64 (error) |" in text and f"--out {tmp_path / 'runs'}" in text
    kept = json.loads((tmp_path / "runs" / "drift" / "seed0" / "study.json").read_text())
    assert [outcome["mechanism"] for outcome in kept["outcomes"]] == ["full", "agent_attention"]
    shutil.rmtree(tmp_path / "docs")
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0 and (tmp_path / "docs" / "table.md").read_text() == text
    wrong = CliRunner().invoke(main, [*arguments, "--length", "64"])
    assert wrong.exit_code and "with a single --task" in wrong.output
    seeds = ["--task", "drift", "--mechanisms", "full", "--budget", "0.1s", "--seeds", "2"]
    seeded = CliRunner().invoke(main, ["train", *seeds])
    assert seeded.exit_code == 0 and "±" in seeded.output, seeded.output
