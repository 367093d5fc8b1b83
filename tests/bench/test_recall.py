"""The one-hop recall task: its answers can be read off its inputs by the rule that it states."""

from __future__ import annotations

import pytest
import torch

from regard.bench.recall import PairedRecall, recall_accuracy
from regard.errors import OptionError


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_lookup_answers_everything(split: str) -> None:
    task = PairedRecall(length=64, pairs=5, keys=9, values=7, memory=16)
    inputs, targets = task.batch(6, torch.Generator().manual_seed(0), split)
    assert inputs.shape == (6, 64, 17) and int((targets >= 0).sum()) == 30
    keys, values, asked = inputs.split([9, 7, 1], -1)
    assert not bool(asked[:, :16].any()) and not bool(values[:, 16:].any())
    if split == "test":
        assert not bool(asked[:, :32].any())
    matches = keys @ keys[:, :16].mT  # one where query token and memory token share their key
    outputs = matches @ values[:, :16]
    right, count = task.score(outputs, targets)
    assert (right, count) == (30.0, 30)
    assert float(task.loss(100 * outputs, targets)) < 1e-6


def test_same_generator_same_batch() -> None:
    task = PairedRecall(length=64, pairs=5, keys=9, values=7, memory=16, noise=0.1)
    first, second = (task.batch(3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_sizes_must_fit() -> None:
    with pytest.raises(OptionError):
        PairedRecall(length=64, pairs=20, keys=16)


def test_rivals_are_trained_from_one_seed() -> None:
    task, told = PairedRecall(32, pairs=2, keys=4, values=4, memory=8), []
    rivals = {"a": ("full", {}), "b": ("full", {}), "c": ("sliding_window", {"window": 2, "sinks": 0})}
    found = recall_accuracy(task, rivals, told.append, steps=2, batches=1)
    assert list(found) == ["a", "b", "c"] and len(told) == 3
    assert found["a"] == found["b"] and all(0 <= accuracy <= 1 for accuracy in found.values())
