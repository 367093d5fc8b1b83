"""Lanes that need the same blocks go together, and come back where they were."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.kernels.lanes import Lanes, by_lanes, needed
from regard.layout import BlockLayout
from regard.masks import Everything


def test_lanes_run_in_groups_and_return_in_order() -> None:
    visit = torch.zeros(3, 4, 2, 3, dtype=torch.bool)
    visit[..., 0], visit[1, :, 1], visit[:, 1::2, 0, 2] = True, True, True
    layout = BlockLayout(visit, visit, Everything(), 8, 12, 4, 4)
    numbers, shared = torch.arange(12).view(3, 4, 1, 1), torch.zeros(1, 1, 5)
    groups: list[tuple[list[int], list[int]]] = []

    def run(lanes: Lanes) -> list[Tensor]:
        groups.append((lanes.batches, lanes.heads))
        assert lanes.of(shared) is shared
        part = lanes.of(numbers)
        assert torch.equal(part, 4 * lanes.index[0] + lanes.index[1])
        return [part, -part]

    found = by_lanes(layout, 3, 4, visit.device, run)
    assert torch.equal(found[0], numbers) and torch.equal(found[1], -numbers)
    assert groups == [([0, 2], [0, 2]), ([0, 2], [1, 3]), ([1], [0, 2]), ([1], [1, 3])]


def test_runs_are_neighbouring_blocks_of_one_kind() -> None:
    visit = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)[None, None]
    full = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)[None, None]
    layout, lanes = BlockLayout(visit, full, Everything(), 4, 10, 2, 2), Lanes([0], [0], visit.device)
    single = [(0, 1, True), (1, 2, True), (2, 3, False), (4, 5, False)]
    assert needed(layout, lanes) == [single, []]
    assert needed(layout, lanes, 8) == [[(0, 2, True), (2, 3, False), (4, 5, False)], []]
