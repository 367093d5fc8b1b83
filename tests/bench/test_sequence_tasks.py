"""Each task against a plain solver that reads the inputs alone, row by row."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from regard.bench.sequence_tasks import TASKS, Bigram, SequenceAnswer, sequence_task
from regard.bench.tasks import IGNORED
from regard.errors import OptionError

NOTHING = IGNORED
Row = list[int]


def last(row: Row, answer: int) -> Row:
    return [NOTHING] * (len(row) - 1) + [answer]


def compress(row: Row) -> Row:
    return [t for i, t in enumerate(row) if i == 0 or t != row[i - 1]]


def stack(row: Row) -> Row:
    held: Row = []
    answers = []
    for token in row:
        if token == 31:
            answers.append(held.pop())
        else:
            held.append(token)
            answers.append(NOTHING)
    return answers


def follow(row: Row) -> int:
    pairs = dict(zip(row[:-2:2], row[1:-2:2], strict=True))
    at = row[-1]
    while at in pairs:
        at = pairs[at]
    return at


def majority(row: Row) -> int:
    counts = Counter(row)
    return min(token for token in counts if counts[token] == max(counts.values()))


# What is to be written behind the input (or in place) ...
WRITTEN: dict[str, Callable[[Row], Row]] = {
    "copy": list,
    "long_copy": list,
    "sort": sorted,
    "reverse": lambda row: row[::-1],
    "selective_copy": lambda row: [b for a, b in itertools.pairwise(row) if a == 31],
    "noisy_copy": lambda row: [t for t in row if t != 31],
    "compression": compress,
    "histogram": lambda row: [row.count(c) for c in range(5)],
}
# ... and the targets of the others.
ASKED: dict[str, Callable[[Row], Row]] = {
    "retrieval": lambda row: last(row, next(t for t in row if 47 <= t < 63)),
    "kv_recall": lambda row: last(row, row[row[:-2:2].index(row[-1]) * 2 + 1]),
    "multihop": lambda row: last(row, follow(row)),
    "first_token": lambda row: last(row, row[0]),
    "distant_match": lambda row: [row[0] if i == 64 else NOTHING for i in range(128)],
    "stack": stack,
    "induction": lambda row: last(row, row[row.index(row[-1]) + 1]),
    "pattern": lambda row: [NOTHING] * 3 + [row[i - 3] for i in range(3, 32)],
    "counting": lambda row: last(row, row.count(0)),
    "parity": lambda row: last(row, row.count(1) % 2),
    "addition": lambda row: last(row, row.count(1)),
    "modular": lambda row: last(row, sum(row) % 7),
    "bigram": lambda row: [int(Bigram().table[t]) for t in row],
    "majority": lambda row: last(row, majority(row)),
}


@pytest.mark.paper("slay")
def test_there_are_twenty_two() -> None:
    assert len(TASKS) == 22 and set(TASKS) == set(WRITTEN) | set(ASKED)


@pytest.mark.paper("slay")
@pytest.mark.parametrize("name", list(TASKS))
def test_targets_are_what_a_solver_finds(name: str) -> None:
    for in_place in (False, True) if name in WRITTEN else (False,):
        task = sequence_task(name, **({"in_place": True} if in_place else {}))
        inputs, targets = task.batch(32, torch.Generator().manual_seed(1))
        assert inputs.shape == targets.shape and inputs.dtype == targets.dtype == torch.int64
        assert int(inputs.min()) >= 0 and int(inputs.max()) < task.vocab_size
        counted = targets != IGNORED
        assert bool(counted.any()) and int(targets[counted].min()) >= 0
        assert int(targets.max()) < task.num_classes
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            if name in ASKED:
                assert target == ASKED[name](row)
                continue
            assert isinstance(task, SequenceAnswer)
            shown = row[: task.length]
            answer = WRITTEN[name](shown)
            answer = answer + [NOTHING] * (task.length - len(answer))
            assert target == (answer if in_place else [NOTHING] * task.length + answer)
            assert in_place or row[task.length :] == [task.blank] * task.length


@pytest.mark.paper("slay")
@pytest.mark.parametrize("name", list(TASKS))
def test_answers_vary_and_seeds_decide(name: str) -> None:
    """No constant scores well, the same seed gives the same batch, and loss and score reward the right answer."""
    task = sequence_task(name)
    inputs, targets = task.batch(128, torch.Generator().manual_seed(2))
    again = task.batch(128, torch.Generator().manual_seed(2))
    assert torch.equal(inputs, again[0]) and torch.equal(targets, again[1])
    counted = targets != IGNORED
    share = targets[counted].bincount().max() / counted.sum()
    assert float(share) < {"parity": 0.65, "histogram": 0.3, "majority": 0.4}.get(name, 0.35)
    right = 20.0 * torch.nn.functional.one_hot(targets.clamp_min(0), task.num_classes)
    hits, total = task.score(right, targets)
    assert hits == total == int(counted.sum()) and float(task.loss(right, targets)) < 1e-3


@pytest.mark.paper("slay")
def test_recall_and_hops_are_well_posed() -> None:
    """Keys of one sequence differ, and the chain asked for is no different from the others."""
    inputs, _ = sequence_task("kv_recall", pairs=8).batch(64, torch.Generator().manual_seed(0))
    assert inputs.shape == (64, 18)
    assert all(len(set(row[:16:2])) == 8 for row in inputs.tolist())
    inputs, _ = sequence_task("multihop").batch(64, torch.Generator().manual_seed(0))
    starts = [row[:-2:2].index(row[-1]) for row in inputs.tolist()]
    assert all(len(set(row[:-2:2])) == 10 for row in inputs.tolist()) and len(set(starts)) > 5


def test_teaching_errors() -> None:
    with pytest.raises(OptionError, match="kv_recall"):
        sequence_task("recall")
    for name, options in (
        ("kv_recall", {"pairs": 64}),
        ("multihop", {"chains": 30}),
        ("retrieval", {"needles": 63}),
        ("histogram", {"colours": 1}),
        ("pattern", {"period": 40}),
        ("induction", {"length": 2}),
    ):
        with pytest.raises(OptionError):
            sequence_task(name, **options)
