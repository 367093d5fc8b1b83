"""Small models that differ in their attention alone, trained on a task for so many seconds, tested at several lengths.

What is done is kept as it comes: a checkpoint every few seconds, a result a mechanism. A run that was stopped goes on
where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from regard.bench.kept import load_kept, save_kept
from regard.bench.recall import PairedRecall
from regard.bench.retrieval import Passkey
from regard.bench.tasks import MultiQueryRecall, Task
from regard.bench.training import evaluate
from regard.errors import OptionError, RegardError, UnknownNameError
from regard.models.sequence import SequenceModel
from regard.registry import describe

__all__ = ["TASKS", "Outcome", "Study", "StudyResult", "parse_seconds", "run_study", "tested_sequences"]

VERSION = 1
# Seconds between two checkpoints.
_KEPT_EVERY = 20.0
# Tokens of a batch in training, and of a test at each length, which has so many sequences at least.
_BATCH, _TESTED, _FEWEST = 4096, 131072, 2
_SHORTEST = 64


class SizedTask(Task, Protocol):
    """A task that knows the length of its sequences."""

    length: int


TASKS: dict[str, Callable[[int], SizedTask]] = {
    "passkey": lambda length: Passkey(length, digits=16),
    "recall": lambda length: PairedRecall(length, pairs=16, keys=32, values=16, memory=length // 4),
    "mqar": lambda length: MultiQueryRecall(length=length),
}
"""Tasks by name, for a length: a passkey in filler; pairs of key and value, asked for in any order, one hop
(``recall``) or two (``mqar``)."""


@dataclass(frozen=True)
class Study:
    """``task``: a name in :data:`TASKS`. ``length``: tokens in training, which begins with a thirty-second.
    ``test_lengths``: in tests. ``seconds``: of training a mechanism. ``options``: per mechanism, over what the
    catalogue suggests for some thousands of tokens."""

    task: str
    mechanisms: tuple[str, ...]
    length: int = 2048
    test_lengths: tuple[int, ...] = (2048, 8192)
    seconds: float = 60.0
    lr: float = 3e-3
    embed_dim: int = 64
    num_heads: int = 4
    depth: int = 2
    seed: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def at(self, length: int) -> SizedTask:
        """The task at a length."""
        if self.task not in TASKS:
            raise UnknownNameError("task", self.task, TASKS, f"There are: {', '.join(TASKS)}.")
        return TASKS[self.task](length)

    def settings(self, name: str) -> dict[str, Any]:
        """The options that ``name`` runs with."""
        return {**describe(name).compare, **self.options.get(name, {})}

    def model(self, name: str) -> SequenceModel:
        """The model with this mechanism, untrained; no positions, so that any length can be read."""
        task = self.at(self.length)
        torch.manual_seed(self.seed)
        words = getattr(task, "vocab_size", None)
        return SequenceModel(
            task.num_classes,
            vocab_size=words,
            input_dim=None if words else task.input_dim,  # type: ignore[attr-defined]
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mechanism=name,
            options=self.settings(name),
            positions="none",
        )


@dataclass
class Outcome:
    """One mechanism's result: share of right answers by length of the test. ``reason``: why there is none."""

    mechanism: str
    options: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    steps: int = 0
    loss: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass
class StudyResult:
    """All outcomes, kept as ``study.json``."""

    fingerprint: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write ``study.json``, whole or not at all."""
        save_kept(folder / "study.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> StudyResult | None:
        """What an earlier run left in ``folder``; None if there is nothing."""
        return load_kept(folder / "study.json", VERSION, cls._read, "a study")

    @classmethod
    def _read(cls, raw: dict[str, Any]) -> StudyResult:
        return cls(raw["fingerprint"], [Outcome(**outcome) for outcome in raw["outcomes"]])


def parse_seconds(text: str) -> float:
    """``90``, ``90s``, ``3m`` or ``1h`` in seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    unit = units.get(text[-1:], 0.0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError as error:
        raise OptionError(f"{text!r} is no time: write e.g. 90s, 3m or 1h.") from error
    if not seconds > 0:
        raise OptionError(f"A time is more than nothing; got {text!r}.")
    return seconds


def tested_sequences(length: int) -> int:
    """How many sequences of a length a test has."""
    return max(_TESTED // length, _FEWEST)


def run_study(
    study: Study, out: Path | str | None = None, report: Callable[[str, float], None] = lambda line, share: None
) -> StudyResult:
    """Train and test each mechanism in turn.

    report: what is going on, and the share of this mechanism's training that is done. With ``out``, finished mechanisms
    and the training under way are kept there, and the same study goes on from them.
    """
    folder = None if out is None else Path(out)
    fingerprint = asdict(study)
    for varying in ("mechanisms", "options", "test_lengths"):
        del fingerprint[varying]
    done = None if folder is None else StudyResult.load(folder)
    if done is not None and done.fingerprint != fingerprint:
        raise OptionError(
            f"{folder} holds another study: {done.fingerprint} against {fingerprint}. Give another --out, or remove it."
        )
    result = done or StudyResult(fingerprint)
    study.at(study.length)
    for name in study.mechanisms:
        outcome = next((o for o in result.outcomes if (o.mechanism, o.options) == (name, study.settings(name))), None)
        if outcome is None:
            result.outcomes = [o for o in result.outcomes if o.mechanism != name]
            outcome = Outcome(name, study.settings(name))
            result.outcomes.append(outcome)
        try:
            _measure(study, name, outcome, folder, report)
        except RegardError as error:
            outcome.reason = str(error)
        if folder is not None:
            result.save(folder)
    return result


def _measure(
    study: Study, name: str, outcome: Outcome, folder: Path | None, report: Callable[[str, float], None]
) -> None:
    missing = [length for length in study.test_lengths if str(length) not in outcome.accuracy]
    if not missing:
        report(f"{name}: kept from an earlier run", 1.0)
        return
    model = study.model(name)
    outcome.parameters = sum(p.numel() for p in model.parameters())
    _train(study, name, model, outcome, folder, report)
    for length in missing:
        report(f"{name}: testing at {length}", 1.0)
        task, count = study.at(length), tested_sequences(length)
        size = max(min(count, _BATCH // length), 1)
        _, outcome.accuracy[str(length)] = evaluate(model, task, batches=count // size, batch_size=size)


def _train(
    study: Study,
    name: str,
    model: SequenceModel,
    outcome: Outcome,
    folder: Path | None,
    report: Callable[[str, float], None],
) -> None:
    """Until the seconds are spent: AdamW, warm-up over a twentieth of them, cosine decay to a tenth. Lengths double
    from a thirty-second to the whole, each for an equal time: what to look for is learned where it is cheap."""
    lengths = [study.length >> halvings for halvings in range(5, -1, -1) if study.length >> halvings >= _SHORTEST]
    tasks = [study.at(length) for length in lengths or [study.length]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.lr, weight_decay=0.01, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(study.seed)
    file = None if folder is None else folder / f"{name}.pt"
    spent, step, loss = 0.0, 0, math.nan
    if file is not None and file.is_file():
        kept = torch.load(file, weights_only=True)
        if kept["options"] == outcome.options:
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            generator.set_state(kept["generator"])
            spent, step, loss = kept["spent"], kept["step"], kept["loss"]

    def keep() -> None:
        if file is None or folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"generator": generator.get_state(), "options": outcome.options}
        state |= {"spent": spent, "step": step, "loss": loss}
        torch.save(state, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)

    model.train()
    last, saved = time.perf_counter(), spent
    while spent < study.seconds:
        share = spent / study.seconds
        rate = min(20 * share + 1e-3, 0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        for part in optimizer.param_groups:
            part["lr"] = study.lr * rate
        task = tasks[int(share * len(tasks))]
        loss = _step(model, task, optimizer, max(_BATCH // task.length, 1), generator)
        step += 1
        now = time.perf_counter()
        spent, last = spent + now - last, now
        report(f"{name}: step {step}, loss {loss:.3f}", min(spent / study.seconds, 1.0))
        if spent - saved > _KEPT_EVERY:
            keep()
            saved = spent
    keep()
    outcome.steps, outcome.loss = step, loss


def _step(
    model: SequenceModel, task: Task, optimizer: torch.optim.Optimizer, size: int, generator: torch.Generator
) -> float:
    inputs, targets = task.batch(size, generator)
    loss: Tensor = task.loss(model(inputs), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())
