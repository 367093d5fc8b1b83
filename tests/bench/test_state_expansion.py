"""The sweep over state expansions, and the data of its task."""

from __future__ import annotations

import pytest
import torch

from regard.bench.state_expansion import state_expansion_sweep
from regard.bench.tasks import IGNORED, MultiQueryRecall
from regard.errors import OptionError


@pytest.mark.paper("dsf")
def test_sweep_gives_a_point_per_expansion() -> None:
    task = MultiQueryRecall(vocab_size=9, pairs=2, length=8)
    lines: list[str] = []
    points = state_expansion_sweep(
        "ssd",
        [2, 4],
        task=task,
        options={"expansion": 1},
        embed_dim=8,
        depth=2,
        steps=3,
        batch_size=4,
        seeds=(0, 1),
        report=lines.append,
    )
    assert [point.expansion for point in points] == [2, 4] and len(lines) == 4
    assert [point.state_size for point in points] == [2 * 2 * 8, 2 * 4 * 8]
    assert all(len(point.accuracy) == len(point.loss) == 2 and 0 <= point.mean <= 1 for point in points)
    assert points[0].parameters < points[1].parameters
    again = state_expansion_sweep(
        "ssd", [4], task=task, options={"expansion": 1}, embed_dim=8, steps=3, batch_size=4, seeds=(0, 1)
    )
    assert again[0].loss == points[1].loss, "the same seeds give the same models"
    wide = state_expansion_sweep("qlstm", [2], option="expansion", task=task, embed_dim=8, steps=1, batch_size=2)
    assert wide[0].state_size == 2 * 2 * 8
    with pytest.raises(OptionError, match="state_dim"):
        state_expansion_sweep("qlstm", [2])
    with pytest.raises(OptionError):
        state_expansion_sweep("ssd", [])


@pytest.mark.paper("dsf")
def test_recall_that_asks_soon() -> None:
    """Power-law gaps, as Zoology draws them: each key is still asked for once, and most of them early."""
    task = MultiQueryRecall(vocab_size=33, pairs=5, length=60, power=0.01)
    inputs, targets = task.batch(400, torch.Generator().manual_seed(0))
    asked = targets != IGNORED
    assert bool((asked.sum(1) == 5).all()) and not bool(asked[:, :10].any())
    table = dict(zip(inputs[0, :10:2].tolist(), inputs[0, 1:10:2].tolist(), strict=True))
    assert {table[k]: 1 for k in inputs[0][asked[0]].tolist()}.keys() == set(targets[0][asked[0]].tolist())
    share = asked.float().mean(0)[10:]
    assert float(share[0]) > 0.6 and float(share[0]) > float(share[4]) > float(share[30:].mean())
    with pytest.raises(OptionError, match="power"):
        MultiQueryRecall(power=0.0)
