"""The tasks that ``regard train`` knows, and how each is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from regard.bench.digits import PixelDigits
from regard.bench.recall import PairedRecall
from regard.bench.regression_tasks import DriftingRegression, InContextRegression
from regard.bench.retrieval import Passkey
from regard.bench.sequence_tasks import Copy
from regard.bench.state_tasks import GroupWords, cyclic_group, symmetric_group
from regard.bench.tasks import MultiQueryRecall, Task
from regard.bench.text_tasks import PackageText
from regard.errors import OptionError, UnknownNameError

__all__ = ["TASKS", "SizedTask", "TaskSetup", "task_names"]


class SizedTask(Task, Protocol):
    """A task at one length. ``metric``: what its score is called; ``chance``: its value for who guesses."""

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    @property
    def chance(self) -> float: ...


@dataclass(frozen=True)
class TaskSetup:
    """``build``: the task at a length. ``about``: what it asks, in a sentence or two.

    length: tokens in training, by default. tests: lengths of the tests, in lengths of training. shortest: training
    begins at this length or, where it is a longer way, at a thirty-second of the whole. positions: as of
    :class:`~regard.models.sequence.SequenceModel`; learned ones cannot be tested beyond the training length. pooled:
    one answer a sequence, so that a mechanism without a causal form can be used as well. shows_answers: later tokens
    hold what is asked for earlier. grid: the space behind the tokens. tested: tokens of a test.
    """

    build: Callable[[int], SizedTask]
    about: str
    length: int
    tests: tuple[int, ...] = (1,)
    shortest: int = 64
    positions: str = "none"
    pooled: bool = False
    shows_answers: bool = False
    grid: tuple[int, ...] | None = None
    fixed: bool = False
    lr: float = 3e-3
    tokens: int = 1024
    tested: int = 65536

    def at(self, length: int) -> SizedTask:
        """The task at a length."""
        if self.fixed and length != self.length:
            raise OptionError(f"This task's sequences have {self.length} tokens; got {length}.")
        return self.build(length)


TASKS: dict[str, TaskSetup] = {
    "passkey": TaskSetup(
        lambda length: Passkey(length, digits=16),
        "Sixteen digits stand in a row somewhere in a text of filler, and are asked for at its end.",
        length=256,
        tests=(1, 4),
        tested=131072,
    ),
    "recall": TaskSetup(
        lambda length: PairedRecall(length, pairs=16, keys=32, values=16, memory=length // 4),
        "Pairs of a key and its value stand in the text, and keys come again; key and value share a token.",
        length=128,
        tests=(1, 4),
        tested=131072,
    ),
    "mqar": TaskSetup(
        lambda length: MultiQueryRecall(length=length),
        "Pairs of a key and its value stand in the text one behind the other, and keys come again.",
        length=128,
        positions="learned",
    ),
    "regression": TaskSetup(
        InContextRegression,
        "Pairs of x and y of a linear function that is new in each sequence; each y is to be told before it is shown.",
        length=64,
        shortest=16,
        shows_answers=True,
    ),
    "drift": TaskSetup(
        DriftingRegression,
        "As regression, but the function changes from pair to pair, and the x that are shown are noisy and skewed.",
        length=64,
        shortest=16,
        shows_answers=True,
    ),
    "copy": TaskSetup(
        lambda length: Copy(length // 2, 16),
        "Random tokens, to be written again behind them.",
        length=64,
        positions="learned",
    ),
    "parity": TaskSetup(
        lambda length: GroupWords(cyclic_group(2), length),
        "Bits; at each place whether the ones up to it are even or odd.",
        length=32,
        tests=(1, 4),
        shortest=4,
    ),
    "permutations": TaskSetup(
        lambda length: GroupWords(symmetric_group(3), length),
        "Permutations of three things; at each place the composition of all up to it.",
        length=32,
        tests=(1, 4),
        shortest=4,
    ),
    "text": TaskSetup(
        PackageText,
        "Bytes of Python source; which of eight packages of the standard library they come from (other modules in "
        "the test).",
        length=1024,
        shortest=128,
        positions="learned",
        pooled=True,
        tested=262144,
    ),
    "digits": TaskSetup(
        lambda length: PixelDigits(),
        "Handwritten digits of 8 x 8 pixels, one pixel a token, row by row.",
        length=64,
        positions="learned",
        pooled=True,
        grid=(8, 8),
        fixed=True,
        tested=32768,
    ),
}
"""Tasks by name."""


def task_names(text: str) -> tuple[str, ...]:
    """Names in :data:`TASKS` from a list with commas; ``all`` are all of them."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if names == ("all",):
        return tuple(TASKS)
    for name in names:
        if name not in TASKS:
            raise UnknownNameError("task", name, TASKS, f"There are: {', '.join(TASKS)}, or all.")
    return names
