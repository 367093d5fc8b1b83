"""Where the needle stands, and what the answer is when it is missing."""

from __future__ import annotations

import pytest
import torch

from regard.bench.keyed_needle import KeyedNeedle
from regard.errors import OptionError


@pytest.mark.paper("tensorlens")
def test_the_key_asked_for_stands_before_its_value() -> None:
    task = KeyedNeedle(length=20, pairs=3, keys=5, values=7)
    prompts, place = task.draw(200, torch.Generator().manual_seed(0))
    rows = torch.arange(200)
    asked = prompts[:, -1]
    assert bool(((prompts == asked[:, None]).sum(-1) == 2).all())
    assert torch.equal(prompts[rows, place - 1], asked)
    assert bool((prompts[rows, place] < task.values).all())
    assert torch.equal((prompts >= task.values).sum(-1), torch.full((200,), 4))
    tests, targets = task.batch(200, torch.Generator().manual_seed(0), "test")
    assert torch.equal(tests, prompts)
    assert torch.equal(targets[:, -1], prompts[rows, place])
    assert bool((targets[:, :-1] < 0).all())


@pytest.mark.paper("tensorlens")
def test_without_key_or_value_the_answer_is_blank() -> None:
    task = KeyedNeedle(length=20, pairs=3, keys=5, values=7, missing=0.3)
    whole, place = task.draw(2000, torch.Generator().manual_seed(0))
    prompts, targets = task.batch(2000, torch.Generator().manual_seed(0))
    rows = torch.arange(2000)
    lost = (prompts[rows, place] == task.blank) | (prompts[rows, place - 1] == task.blank)
    assert torch.equal(targets[:, -1] == task.blank, lost)
    assert float(lost.float().mean()) == pytest.approx(1 - 0.7**2, abs=0.04)
    assert torch.equal(targets[~lost, -1], whole[rows, place][~lost])
    assert bool((prompts[:, -1] == whole[:, -1]).all())
    changed = prompts != whole
    assert bool((prompts[changed] == task.blank).all())
    with pytest.raises(OptionError, match="do not fit"):
        KeyedNeedle(length=6, pairs=4)
