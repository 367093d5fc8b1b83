"""The check that people run on their own machines: green where all is right, loud where something is not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from regard.parallel import check
from regard.parallel.group import simulate


def test_simulated_ranks_pass() -> None:
    done = CliRunner().invoke(check.main, ["--simulate", "4", "--length", "50", "--head-dim", "8", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    assert "equal to one process" in done.output
    assert [done.output.count(name) for name in ("ring ", "ulysses ", "mesh ")] == [3, 1, 3]


def test_a_wrong_result_and_a_wrong_count_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = check.Problem(length=24, head_dim=8, repeats=1)
    exact = check.context_parallel_attention
    monkeypatch.setattr(check, "context_parallel_attention", lambda *a, **k: exact(*a, **k) * 1.001)
    assert not check._report(simulate(2, check.examine, problem).results[0], problem, 2)
    monkeypatch.undo()
    formula = check.traffic
    monkeypatch.setattr(check, "traffic", lambda *a, **k: formula(*a, **{**k, "batch": 3}))
    assert not check._report(simulate(2, check.examine, problem).results[0], problem, 2)
    monkeypatch.undo()
    assert check._report(simulate(2, check.examine, problem).results[0], problem, 2)


def test_without_torchrun_it_says_how() -> None:
    done = CliRunner().invoke(check.main, [], env={"RANK": None})
    assert done.exit_code == 2 and "torchrun --nproc-per-node" in done.output


def torchrun(*command: str) -> str:
    """Two processes of this machine, started as people do."""
    options = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_under_torchrun() -> None:
    output = torchrun("-m", "regard.parallel.check", "--length", "40", "--head-dim", "8", "--repeats", "1")
    assert output.count("equal to one process") == 1


def test_the_training_step_of_the_docs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
    script = tmp_path / "train.py"
    script.write_text(re.findall(r"```python\n(# train.py.*?)```", page, re.DOTALL)[0], encoding="utf-8")
    assert "the loss and the gradients of one process" in torchrun(str(script))
