"""Matching tasks: the rule gives the answer, linear scores cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.bench.matching_tasks import NearestValueRetrieval, XorMatch
from regard.errors import OptionError


def parts(task: NearestValueRetrieval | XorMatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, classes, question and answers, read from the inputs."""
    inputs, targets = task.batch(256, torch.Generator().manual_seed(1))
    assert inputs.shape == (256, task.cells + 1, task.input_dim) and not inputs[:, -1, task.features :].any()
    classes = inputs[:, :-1, task.features :]
    assert (classes.sum(-1) == 1).all()
    return inputs[:, :-1, : task.features], classes.argmax(-1), inputs[:, -1, : task.features], targets


@pytest.mark.paper("neural_attention")
def test_the_nearest_key_has_the_answer() -> None:
    keys, classes, asked, targets = parts(NearestValueRetrieval(cells=5, num_classes=3))
    for row in range(256):
        best = min(range(5), key=lambda cell: abs(float(keys[row, cell, 0] - asked[row, 0])))
        assert classes[row, best] == targets[row]
    # Every linear score takes the largest or the smallest key, whatever the slope.
    ends = (keys[..., 0].argmax(-1), keys[..., 0].argmin(-1))
    right = [(classes.gather(1, end[:, None])[:, 0] == targets) for end in ends]
    assert float((right[0] | right[1]).double().mean()) < 0.8


@pytest.mark.paper("neural_attention")
def test_one_key_alone_has_the_parity() -> None:
    keys, classes, asked, targets = parts(XorMatch(cells=6, num_classes=4))
    fits = ((keys[..., 0] > 0) ^ (keys[..., 1] > 0)) == (asked[:, :1] < 0)
    assert (fits.sum(-1) == 1).all() and (classes[fits] == targets).all()
    # Over keys that fit and keys that do not, a bit's mean is the same: zero.
    for bits in (keys[fits], keys[~fits]):
        assert float(bits.mean(0).abs().max()) < 0.2


def test_sizes_are_checked() -> None:
    with pytest.raises(OptionError, match="two cells"):
        XorMatch(cells=1)
    assert NearestValueRetrieval().chance == 1 / 8
