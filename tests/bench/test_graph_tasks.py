"""The majority task against votes counted by hand."""

from __future__ import annotations

import pytest
import torch

from regard.bench.graph_tasks import MajorityColour
from regard.errors import OptionError
from regard.inspect.ego_tree import EgoTree


def test_majority_task_asks_what_it_says() -> None:
    task = MajorityColour(nodes=40, links=8, prompts=64)
    told: list[EgoTree] = []
    task.told = told.extend
    inputs, targets = task.batch(16, torch.Generator().manual_seed(0))
    assert inputs.shape == (16, task.length) and len(told) == 16
    for row, target, tree in zip(inputs, targets, told, strict=True):
        assert torch.equal(row[task.length - len(tree.tokens) :], tree.tokens)
        votes = [task.colours[int(node)] for node in tree.nodes[tree.hop == 2]]
        assert int(target[-1]) == int(sum(votes) * 2 > len(votes)) and sum(votes) * 2 != len(votes)
    test_centres = {tree.centre for tree in task.trees["test"]}
    assert not test_centres & {tree.centre for tree in task.trees["train"]}
    with pytest.raises(OptionError, match="too few"):
        MajorityColour(nodes=10)
