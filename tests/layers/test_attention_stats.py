from __future__ import annotations

import math

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.layers.attention_stats import effective_rank, local_mass, neighbourhood, numerical_rank, row_entropy


@pytest.mark.parametrize(("grid", "radius"), [((4, 5), 1), ((3, 3), 0), ((7,), 2), ((2, 3, 4), 1)])
def test_neighbourhood_is_a_box_around_each_token(grid: tuple[int, ...], radius: int) -> None:
    near = neighbourhood(grid, radius)
    places = [torch.unravel_index(torch.tensor(i), grid) for i in range(math.prod(grid))]
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            assert bool(near[i, j]) == all(abs(int(x - y)) <= radius for x, y in zip(a, b, strict=True))


def test_local_mass_of_known_maps() -> None:
    flat = torch.full((12, 12), 1 / 12, dtype=torch.float64)
    torch.testing.assert_close(local_mass(flat, (3, 4)), neighbourhood((3, 4)).double().sum(-1) / 12)
    torch.testing.assert_close(local_mass(torch.eye(12), (3, 4)), torch.ones(12))
    assert not bool(local_mass(torch.zeros(12, 12), (3, 4)).any())


def test_entropy_lies_between_one_key_and_all() -> None:
    torch.testing.assert_close(row_entropy(torch.full((9,), 3.0)), torch.tensor(math.log(9)))
    assert float(row_entropy(torch.eye(5)).abs().max()) == 0


def test_ranks_of_matrices_with_known_singular_values() -> None:
    left, _ = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(9, 8, dtype=torch.float64))
    equal = left[:, :5] @ right[:, :5].T
    torch.testing.assert_close(effective_rank(equal), torch.tensor(5.0, dtype=torch.float64))
    assert int(numerical_rank(equal)) == 5
    uneven = left[:, :2] @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ right[:, :2].T
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert abs(float(effective_rank(uneven)) - expected) < 1e-9
    assert [int(n) for n in numerical_rank(torch.stack((equal, uneven)), 0.5)] == [5, 1]


def test_bad_input_teaches() -> None:
    with pytest.raises(ShapeError, match="grid"):
        local_mass(torch.eye(12), (3, 3))
    with pytest.raises(OptionError, match="negative"):
        row_entropy(-torch.eye(3))
    with pytest.raises(OptionError, match="radius"):
        neighbourhood((3, 3), -1)
