"""Words of groups."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from regard.bench.sequence_tasks import Parity
from regard.bench.state_tasks import GroupWords, cyclic_group, symmetric_group
from regard.errors import OptionError


@pytest.mark.parametrize(
    ("table", "order"),
    [(cyclic_group(2), 2), (cyclic_group(7), 7), (symmetric_group(3), 6), (symmetric_group(5), 120)],
)
def test_the_tables_are_groups(table: torch.Tensor, order: int) -> None:
    """Closed, with the neutral element first, associative, with inverses."""
    assert table.shape == (order, order) and int(table.min()) == 0 and int(table.max()) == order - 1
    every = torch.arange(order)
    assert torch.equal(table[0], every) and torch.equal(table[:, 0], every)
    assert torch.equal(table.sort(0).values, every[:, None].expand(-1, order))
    a, b, c = torch.randint(order, (3, 500), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert bool((table == table.T).all()) == (order in (2, 7)), "permutations do not commute"


def test_permutations_are_composed_one_after_the_other() -> None:
    """Against permutations applied to a row of things."""
    table, names = symmetric_group(4), list(permutations(range(4)))
    task = GroupWords(table, 12)
    words, products = task.batch(20, torch.Generator().manual_seed(1))
    for word, wanted in zip(words.tolist(), products.tolist(), strict=True):
        where = list(range(4))
        for letter, product in zip(word, wanted, strict=True):
            where = [names[letter][at] for at in where]
            assert tuple(where) == names[product]


def test_of_two_elements_it_is_the_parity() -> None:
    task = GroupWords(cyclic_group(2), 32)
    words, products = task.batch(50, torch.Generator().manual_seed(0))
    assert torch.equal(products, words.cumsum(1) % 2) and task.chance == 0.5
    ones, last = Parity(32).batch(50, torch.Generator().manual_seed(0))
    assert torch.equal(words, ones) and torch.equal(products[:, -1], last[:, -1])


def test_what_is_no_group_is_refused() -> None:
    for wrong in (
        lambda: cyclic_group(1),
        lambda: symmetric_group(6),
        lambda: GroupWords(torch.zeros(2, 3)),
        lambda: GroupWords(cyclic_group(2), 0),
    ):
        with pytest.raises(OptionError):
            wrong()
