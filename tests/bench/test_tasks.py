"""The tasks ask what they say they ask, and the same of everyone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from regard.bench.tasks import (
    IGNORED,
    ClutteredDigits,
    Digits,
    DistractorRetrieval,
    MultiQueryRecall,
    ShortRangeTask,
    StdlibText,
    stdlib_text,
)
from regard.errors import OptionError

MAKERS: dict[str, Any] = {
    "recall": lambda: MultiQueryRecall(32, 4, 24),
    "text": lambda: StdlibText(16, 300_000),
    "digits": lambda: pytest.importorskip("sklearn") and Digits(),
    "clutter": lambda: ClutteredDigits(train=20, test=10),
    "distractors": lambda: DistractorRetrieval(16),
    "short range": lambda: ShortRangeTask(8, 2, 24),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_batches_are_the_same_for_the_same_seed(name: str, split: str) -> None:
    first, second = MAKERS[name](), MAKERS[name]()
    inputs, targets = first.batch(6, seeded(), split)
    again = second.batch(6, seeded(), split)
    assert torch.equal(inputs, again[0]) and torch.equal(targets, again[1])
    assert len(inputs) == len(targets) == 6
    assert not torch.equal(inputs, first.batch(6, seeded(1), split)[0])
    counted = targets[targets != IGNORED]
    assert targets.dtype == torch.int64 and int(counted.min()) >= 0 and int(counted.max()) < first.num_classes


@pytest.mark.parametrize("name", MAKERS)
def test_loss_and_score_of_a_perfect_and_of_an_ignorant_answer(name: str) -> None:
    task = MAKERS[name]()
    _, targets = task.batch(6, seeded())
    counted = int((targets != IGNORED).sum())
    perfect = 50 * F.one_hot(targets.clamp_min(0), task.num_classes).float()
    assert float(task.loss(perfect, targets)) < 1e-6
    assert task.score(perfect, targets) == (counted, counted)
    uniform = torch.zeros_like(perfect)
    assert float(task.loss(uniform, targets)) == pytest.approx(torch.tensor(task.num_classes).log().item(), rel=1e-5)
    wrong = -perfect
    assert task.score(wrong, targets) == (0, counted)


def test_recall_asks_for_the_value_of_each_key_once() -> None:
    task = MultiQueryRecall(vocab_size=33, pairs=5, length=40)
    inputs, targets = task.batch(8, seeded())
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        table = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(table) == 5 and max(table) <= 16 < min(table.values())
        asked = [i for i, answer in enumerate(answers) if answer != IGNORED]
        assert min(asked) >= 10 and sorted(row[i] for i in asked) == sorted(table)
        assert all(answers[i] == table[row[i]] for i in asked)
        assert all(token == 0 for i, token in enumerate(row[10:], 10) if i not in asked)
    with pytest.raises(OptionError, match="length >= 48"):
        MultiQueryRecall(pairs=16, length=40)
    with pytest.raises(OptionError):
        MultiQueryRecall(vocab_size=16, pairs=16)


def test_text_is_the_standard_library_and_its_splits_share_no_module() -> None:
    train, test = stdlib_text(300_000)
    own = Path(torch.__file__).parents[1]
    assert b"import" in train and b"import" in test and str(own).encode() not in train
    heads = {piece[:200] for piece in test.split(b"\n\n\n") if len(piece) > 400}
    assert heads and not any(head in train for head in heads)
    task = StdlibText(32, 300_000)
    for split, text in (("train", train), ("test", test)):
        inputs, targets = task.batch(4, seeded(), split)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for row, answer in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert bytes([*row, answer[-1]]) in text
    with pytest.raises(OptionError, match="raise the limit"):
        StdlibText(16, 10)


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    task = Digits()
    (x, y), (held, answers) = task.all("train"), task.all("test")
    assert len(x) + len(held) == 1797 and x.shape[1:] == (64, 1)
    raw = datasets.load_digits().data
    mine = torch.cat((x, held))[..., 0].mul(8).add(8)
    assert sorted(map(tuple, mine.int().tolist())) == sorted(map(tuple, raw.astype(int).tolist()))
    assert set(answers.tolist()) == set(y.tolist()) == set(range(10))


def test_cluttered_digits_lie_in_their_boxes() -> None:
    clean = ClutteredDigits(pieces=0, noise=0.0)
    images, digits, boxes = clean.draw(60, seeded())
    assert images.shape == (60, 1, 32, 32) and 0 <= float(images.min()) < float(images.max()) == 1
    place = torch.arange(32) + 0.5
    for image, box in zip(images[:, 0], boxes, strict=True):
        left, top, right, bottom = box.tolist()
        assert 0 <= left < right <= 32 and 0 <= top < bottom <= 32
        # Ink reaches at most the pen's 1.6 pixels beyond, and comes close to every side.
        rows, columns = (place[image.amax(axis) > 0] for axis in (1, 0))
        assert top - 1.6 <= float(rows.min()) <= top + 0.6 and bottom - 0.6 <= float(rows.max()) <= bottom + 1.6
        assert left - 1.6 <= float(columns.min()) <= left + 0.6
        assert right - 0.6 <= float(columns.max()) <= right + 1.6
    assert len(set(digits.tolist())) == 10
    # Each digit looks most like the mean of its own kind.
    centred = []
    for image, box in zip(images[:, 0], boxes, strict=True):
        left, top, right, bottom = (round(v) for v in box.tolist())
        centred.append(F.interpolate(image[None, None, top:bottom, left:right], (12, 8), mode="bilinear").flatten())
    stack = torch.stack(centred)
    means = torch.stack([stack[digits == d].mean(0) for d in range(10)])
    assert float((torch.cdist(stack, means).argmin(-1) == digits).float().mean()) > 0.8


def test_clutter_is_added_and_splits_are_fixed() -> None:
    task = ClutteredDigits(train=40, test=20)
    train, test = task.all("train"), task.all("test")
    assert len(train[0]) == 40 and len(test[0]) == 20
    assert not any(torch.equal(a, b) for a in train[0] for b in test[0])
    assert float(train[0].mean()) > 1.5 * float(ClutteredDigits(pieces=0, noise=0.0, train=40).all("train")[0].mean())
    images, digits = task.batch(5, seeded())
    for image, digit in zip(images, digits, strict=True):
        match = [i for i, known in enumerate(train[0]) if torch.equal(image, known)]
        assert match and int(train[1][match[0]]) == int(digit)
    with pytest.raises(OptionError, match="canvas"):
        ClutteredDigits(size=16)


def test_distractors_hide_one_key() -> None:
    task = DistractorRetrieval(length=20, key_dim=8, num_classes=4, noise=0.1)
    inputs, targets, relevant = task.draw(50, seeded())
    assert inputs.shape == (50, 20, task.input_dim)
    keys, asked = inputs[:, :-1, :8], inputs[:, -1:, :8]
    assert torch.equal((keys - asked).norm(dim=-1).argmin(-1), relevant)
    rows = torch.arange(50)
    assert torch.equal(inputs[rows, relevant, 8:].argmax(-1), targets)
    assert bool((inputs[:, :-1, 8:].sum(-1) == 1).all()) and not bool(inputs[:, -1, 8:].any())
    with pytest.raises(OptionError, match="length >= 2"):
        DistractorRetrieval(1)


@pytest.mark.paper("ls_attention")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_short_range_tokens_depend_on_the_last_few_alone(order: int) -> None:
    """Counted over many sequences, the next token follows the table of its context, and no older token adds to it."""
    task = ShortRangeTask(3, order, 200)
    inputs, targets = task.batch(400, seeded())
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    sequence = torch.cat((inputs, targets[:, -1:]), 1)
    older, *context, following = (sequence[:, s : s + 201 - order - 1] for s in range(order + 2))
    row = sum(token * 3**place for place, token in enumerate(context))
    assert bool((task.table.sum(-1) - 1).abs().max() < 1e-6)
    for first in range(3):
        counts = torch.zeros(3**order, 3)
        at = older == first
        counts.index_put_((row[at], following[at]), torch.ones(int(at.sum())), accumulate=True)
        total = counts.sum(-1, keepdim=True)
        error = (counts / total.clamp_min(1) - task.table).abs()
        assert bool((error < 4 * (0.25 / total.clamp_min(1)).sqrt() + 1e-6)[total[:, 0] > 0].all())


def test_short_range_least_loss_is_that_of_the_table() -> None:
    task = ShortRangeTask(4, 3, 2000)
    inputs, targets = task.batch(20, seeded())
    row = inputs[:, :-2] + 4 * inputs[:, 1:-1] + 16 * inputs[:, 2:]
    own = -task.table.log()[row, targets[:, 2:]].mean()
    assert float(own) == pytest.approx(task.least_loss(inputs), rel=0.02)
    assert ShortRangeTask(4, sharpness=0.0).least_loss(inputs) == pytest.approx(torch.tensor(4.0).log().item())
    with pytest.raises(OptionError, match="order"):
        ShortRangeTask(order=4)
