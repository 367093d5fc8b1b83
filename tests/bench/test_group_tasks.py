"""Tasks for groups: what their demonstrations cover, and how coverage and latency are counted."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.bench.group_tasks import (
    EnumerateItems,
    GroupTask,
    all_pairs_shortest_path_toy,
    enumerate_items,
    latency_curve,
)
from regard.errors import OptionError

TASKS = {"enumerate": enumerate_items(16, 8), "paths": all_pairs_shortest_path_toy(4)}


@pytest.mark.paper("group_think")
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("same_step", [True, False])
def test_demonstrations_cover_everything_and_sooner_with_more_thinkers(name: str, same_step: bool) -> None:
    task, steps = TASKS[name], {}
    for thinkers in (1, 2, 4):
        generator = torch.Generator().manual_seed(0)
        prompts, tokens, chances = task.demonstrations(64, generator, thinkers, same_step=same_step)
        share, again = task.coverage(prompts, tokens[:, :, 1:])
        assert (share[:, -1] == 1).all() and (share.diff(dim=1) >= 0).all()
        steps[thinkers] = float(((share < 1).sum(1) + 1).double().mean())
        if thinkers == 1:
            assert tokens.shape[2] == 1 + task.steps and (again == 0).all()
        # What is shown had a chance, and chances are chances.
        there = tokens >= 0
        assert (chances.gather(-1, tokens.clamp_min(0)[..., None])[..., 0][there] > 0).all()
        assert torch.allclose(chances.sum(-1)[there], torch.ones(()))
    assert steps[4] < 0.5 * steps[1] and steps[2] < 0.75 * steps[1]


def test_coverage_of_a_trace_written_by_hand() -> None:
    task = enumerate_items(6, 3)
    prompts = task.for_group(torch.tensor([[4, 1, 2, task.separator]]), 2)
    # One thinker says 1, then 2, then ends; the other 5 (not asked), 1 again, 4.
    tokens = torch.tensor([[[1, 2, task.end], [5, 1, 4]]])
    share, again = task.coverage(prompts, tokens)
    assert torch.allclose(share, torch.tensor([[1 / 3, 2 / 3, 1.0]])) and again.tolist() == [[0, 1, 1]]


def test_distances_are_the_shortest_of_all_ways() -> None:
    task = all_pairs_shortest_path_toy(5, 9)
    prompts = task.prompts(6, torch.Generator().manual_seed(0), 1)
    pairs = list(itertools.combinations(range(5), 2))
    for prompt, found in zip(prompts, task.distances(prompts), strict=True):
        weight = dict(zip(pairs, (prompt[1:-1] - task.things + 1).tolist(), strict=True))
        for pair, distance in zip(pairs, found.tolist(), strict=True):
            between = [n for n in range(5) if n not in pair]
            ways = [(pair[0], *mid, pair[1]) for k in range(4) for mid in itertools.permutations(between, k)]
            lengths = [sum(weight[min(a, b), max(a, b)] for a, b in itertools.pairwise(way)) for way in ways]
            assert distance == min(lengths)


def test_a_wrong_distance_covers_nothing() -> None:
    task = all_pairs_shortest_path_toy(3, 4)
    weights = torch.tensor([[1, 4, 1]]) - 1 + task.things  # the way over the middle node is 2
    prompts = task.for_group(torch.cat((weights, torch.tensor([[task.separator]])), 1), 1)
    right, wrong = (torch.tensor([[[1, d - 1 + task.things]]]) for d in (2, 4))
    assert float(task.coverage(prompts, right)[0][0, -1]) == pytest.approx(1 / 3)
    assert float(task.coverage(prompts, wrong)[0][0, -1]) == 0


class Oracle:
    """Stands for a model: reads through mask and positions what it may see, and says something that is left."""

    def __init__(self, task: GroupTask, slot: int, length: int) -> None:
        self.task, self.slot, self.length = task, slot, length
        self.config, self.dtype = SimpleNamespace(), torch.float64
        self.ids = torch.empty(0, 0, dtype=torch.int64)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        return self(input_ids, attention_mask, position_ids)

    def __call__(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        batch, new = input_ids.shape
        if attention_mask is None:
            self.ids = input_ids
            return SimpleNamespace(logits=torch.zeros(batch, new, self.task.vocab_size))
        self.ids = torch.cat((self.ids, input_ids), 1)
        logits = torch.full((batch, new, self.task.vocab_size), -9.0)
        for b, q in itertools.product(range(batch), range(new)):
            seen = {int(t) for t in self.ids[b, self.length :][attention_mask[b, 0, q, self.length :] == 0]}
            left = [t for t in self.ids[b, 1 : self.length - 1].tolist() if t not in seen]
            thinkers = (1, 2, 4)[int(self.ids[b, 0]) - self.task.separator - 1]
            thinker = int(position_ids[b, q] - self.length) // self.slot
            mine = [t for t in left if t % thinkers == thinker] or left or [self.task.end]
            logits[b, q, mine[0]] = 9.0
        return SimpleNamespace(logits=logits)


@pytest.mark.paper("group_think")
def test_latency_of_thinkers_that_see_one_another() -> None:
    task: EnumerateItems = enumerate_items(16, 8)
    problems = task.prompts(20, torch.Generator().manual_seed(0), 1)

    def curve(thinkers: int, **how: Any) -> Any:
        return latency_curve(task, thinkers, Oracle(task, 1 + task.steps, problems.shape[1]), problems=problems, **how)

    one, group, blind, alone = curve(1), curve(4), curve(4, visibility="self"), curve(4, independent=True)
    assert (one.steps_to_full == 8).all() and one.repeated == 0 and one.coverage.shape == (task.steps,)
    assert torch.allclose(one.coverage[:8], torch.arange(1, 9) / 8)
    assert group.steps_to_full.mean() < 0.6 * 8
    assert group.repeated < blind.repeated and (group.steps_to_full <= blind.steps_to_full).all()
    assert torch.allclose(alone.coverage, one.coverage), "four copies of one deterministic chain"
    assert alone.repeated == pytest.approx(0.75)
    assert (curve(4, steps=1).steps_to_full == float("inf")).all()


def test_wrong_input_is_explained() -> None:
    with pytest.raises(OptionError, match="groups of"):
        enumerate_items().headers(3)
    with pytest.raises(OptionError, match="cannot be drawn"):
        enumerate_items(4, 5)
    with pytest.raises(OptionError, match="two nodes"):
        all_pairs_shortest_path_toy(1)
