"""Small models that differ in their attention alone, trained on a task for so many seconds, tested at several lengths.

What is done is kept as it comes: a checkpoint every few seconds, a result a mechanism. A run that was stopped goes on
where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from regard.bench.kept import load_kept, save_kept
from regard.bench.measure import training_clock
from regard.bench.study_tasks import TASKS, SizedTask, TaskSetup
from regard.bench.tasks import Task
from regard.bench.training import evaluate, reads_ahead
from regard.errors import OptionError, RegardError, UnknownNameError, UnsupportedPatternError
from regard.mechanism import Layer, Mechanism
from regard.models.sequence import SequenceModel
from regard.registry import describe, get

__all__ = ["Outcome", "Study", "StudyResult", "parse_seconds", "run_study", "tested_sequences"]

VERSION = 1
# Seconds between two checkpoints.
_KEPT_EVERY = 20.0
# A test has so many sequences at least.
_FEWEST = 2


@dataclass(frozen=True)
class Study:
    """``task``: a name in :data:`~regard.bench.study_tasks.TASKS`. ``length``: tokens in training, which begins with
    ``shortest`` or a thirty-second. ``test_lengths``: in tests. ``seconds``: of training a mechanism. ``options``: per
    mechanism, over what the catalogue suggests for some thousands of tokens. ``tokens``, ``tested``: of a batch in
    training, and of a test at each length."""

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
    positions: str = "none"
    shortest: int = 64
    tokens: int = 4096
    tested: int = 131072

    @classmethod
    def of(
        cls,
        task: str,
        mechanisms: tuple[str, ...],
        length: int | None = None,
        test_lengths: tuple[int, ...] | None = None,
        **settings: Any,
    ) -> Study:
        """A study with the task's own settings where none are given, and two sequences a batch at least."""
        setup = _setup(task)
        length = setup.length if length is None else length
        own: dict[str, Any] = {"lr": setup.lr, "positions": setup.positions, "shortest": setup.shortest}
        own |= {"tokens": max(setup.tokens, 2 * length), "tested": setup.tested}
        tests = tuple(times * length for times in setup.tests) if test_lengths is None else test_lengths
        return cls(task, mechanisms, length, tests, **{**own, **settings})

    @property
    def setup(self) -> TaskSetup:
        """How the task is trained."""
        return _setup(self.task)

    def at(self, length: int) -> SizedTask:
        """The task at a length."""
        return self.setup.at(length)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What all results of a folder have in common."""
        facts = asdict(self)
        return {name: facts[name] for name in facts if name not in ("mechanisms", "options", "test_lengths")}

    def kept(self, folder: Path) -> StudyResult | None:
        """What an earlier run of this study left in ``folder``. Raises OptionError for another study's results."""
        done = StudyResult.load(folder)
        # A setting that an older version did not write down had its default.
        known = {f.name: f.default for f in fields(self) if f.name in self.fingerprint and f.default is not MISSING}
        if done is not None and {**known, **done.fingerprint} != self.fingerprint:
            raise OptionError(
                f"{folder} holds another study: {done.fingerprint} against {self.fingerprint}. Give another --out, or "
                "remove it."
            )
        return done

    def sequences(self, length: int) -> int:
        """How many sequences of a length a test has."""
        return tested_sequences(length, self.tested)

    def settings(self, name: str) -> dict[str, Any]:
        """The options that ``name`` runs with."""
        return {**describe(name).compare, **self.options.get(name, {})}

    def causal(self, name: str) -> bool:
        """Whether ``name`` runs causally: wherever it can; without where the task has one answer a sequence.

        Raises UnsupportedPatternError where it can do neither.
        """
        patterns = cast(type[Layer | Mechanism], get(name)).patterns
        if "causal-self" in patterns:
            return True
        if not self.setup.pooled:
            raise UnsupportedPatternError(f"{name} has no causal form, and this task asks all along the sequence.")
        return False

    def model(self, name: str) -> SequenceModel:
        """The model with this mechanism, untrained. Without learned positions it reads any length."""
        task, setup = self.at(self.length), self.setup
        causal = self.causal(name)
        cls = cast(type[Layer | Mechanism], get(name))
        if cls.needs_grid and (setup.grid is None or len(setup.grid) not in cls.grid_axes):
            raise UnsupportedPatternError(f"{name} needs a grid that this task's sequences do not have.")
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
            causal=causal,
            positions=self.positions,
            max_length=self.length,
            pool="mean" if setup.pooled else "none",
            grid=setup.grid if cls.needs_grid else None,
        )


def _setup(task: str) -> TaskSetup:
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS, f"There are: {', '.join(TASKS)}.")
    return TASKS[task]


@dataclass
class Outcome:
    """One mechanism's result: the task's score by length of the test. ``reason``: why there is none."""

    mechanism: str
    options: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    steps: int = 0
    loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    causal: bool = True


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
        for outcome in raw["outcomes"]:
            # Their name when all tasks were scored by it.
            if "accuracy" in outcome:
                outcome["scores"] = outcome.pop("accuracy")
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


def tested_sequences(length: int, tokens: int = 131072) -> int:
    """How many sequences of a length a test of so many tokens has."""
    return max(tokens // length, _FEWEST)


def run_study(
    study: Study, out: Path | str | None = None, report: Callable[[str, float], None] = lambda line, share: None
) -> StudyResult:
    """Train and test each mechanism in turn.

    report: what is going on, and the share of this mechanism's training that is done. With ``out``, finished mechanisms
    and the training under way are kept there, and the same study goes on from them.
    """
    folder = None if out is None else Path(out)
    study.at(study.length)
    if study.positions == "learned" and max(study.test_lengths) > study.length:
        raise OptionError(
            f"The models learn a vector for each of {study.length} positions here, and cannot be tested at "
            f"{max(study.test_lengths)} tokens."
        )
    result = (None if folder is None else study.kept(folder)) or StudyResult(study.fingerprint)
    for name in study.mechanisms:
        settings = study.settings(name)
        outcome = next((o for o in result.outcomes if (o.mechanism, o.options) == (name, settings)), None)
        if outcome is None:
            result.outcomes = [o for o in result.outcomes if o.mechanism != name]
            outcome = Outcome(name, settings)
            result.outcomes.append(outcome)
        try:
            outcome.reason = ""
            _measure(study, name, outcome, folder, report)
        except RegardError as error:
            outcome.reason = str(error)
        except Exception as error:
            # One mechanism's fault is not the others'.
            outcome.reason = f"{type(error).__name__}: {error}"
        if folder is not None:
            result.save(folder)
    return result


def _measure(
    study: Study, name: str, outcome: Outcome, folder: Path | None, report: Callable[[str, float], None]
) -> None:
    missing = [length for length in study.test_lengths if str(length) not in outcome.scores]
    if not missing:
        report(f"{name}: kept from an earlier run", 1.0)
        return
    model = study.model(name)
    outcome.causal, outcome.parameters = model.causal, sum(p.numel() for p in model.parameters())
    if study.setup.shows_answers:
        task, generator = study.at(study.length), torch.Generator().manual_seed(0)
        if reads_ahead(model, *(task.batch(2, generator)[0] for _ in range(2))):
            raise UnsupportedPatternError(
                f"{name} lets later tokens change earlier outputs, and this task's hold answers."
            )
    _train(study, name, model, outcome, folder, report)
    for length in missing:
        report(f"{name}: testing at {length}", 1.0)
        task, count = study.at(length), study.sequences(length)
        size = max(min(count, study.tokens // length), 1)
        _, score = evaluate(model, task, batches=count // size, batch_size=size)
        if not math.isfinite(score):
            raise OptionError(f"The outputs at {length} tokens are not finite numbers.")
        outcome.scores[str(length)] = score


def _train(
    study: Study,
    name: str,
    model: SequenceModel,
    outcome: Outcome,
    folder: Path | None,
    report: Callable[[str, float], None],
) -> None:
    """Until the seconds are spent: AdamW, warm-up over a twentieth of them, cosine decay to a tenth. Lengths double
    up to the whole, each for an equal time: what to look for is learned where it is cheap."""
    lengths = [study.length >> halvings for halvings in range(5, -1, -1) if study.length >> halvings >= study.shortest]
    lengths = lengths or [study.length]
    tasks = [study.at(length) for length in lengths]
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
    last, saved = training_clock(), spent
    while spent < study.seconds:
        share = spent / study.seconds
        rate = min(20 * share + 1e-3, 0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        for part in optimizer.param_groups:
            part["lr"] = study.lr * rate
        stage = int(share * len(tasks))
        loss = _step(model, tasks[stage], optimizer, max(study.tokens // lengths[stage], 1), generator)
        step += 1
        if not math.isfinite(loss):
            raise OptionError(f"Training diverged: the loss of step {step} is {loss}.")
        now = training_clock()
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
