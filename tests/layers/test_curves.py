"""Space-filling curves."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ShapeError
from regard.layers.curves import hilbert_order


@pytest.mark.parametrize("grid", [(1,), (7,), (4, 4), (16, 16), (5, 9), (8, 8, 8), (3, 6, 10), (2, 2, 2, 2)])
def test_every_token_once(grid: tuple[int, ...]) -> None:
    order = hilbert_order(grid)
    assert order.sort().values.tolist() == list(range(int(torch.tensor(grid).prod())))


@pytest.mark.parametrize("grid", [(8,), (2, 2), (16, 16), (8, 8, 8), (4, 4, 4, 4)])
def test_steps_go_to_neighbours_in_a_cube(grid: tuple[int, ...]) -> None:
    places = torch.stack(torch.unravel_index(hilbert_order(grid), grid), -1)
    assert bool((places.diff(dim=0).abs().sum(-1) == 1).all())


def test_aligned_runs_fill_cubes() -> None:
    """Each aligned run of 64 tokens of a cube is a cube of side 4, also where the grid is half a cube."""
    for grid in ((16, 16, 16), (8, 16, 16)):
        places = torch.stack(torch.unravel_index(hilbert_order(grid), grid), -1).view(-1, 64, 3)
        assert bool(((places.amax(1) - places.amin(1)) == 3).all())


def test_no_grid() -> None:
    with pytest.raises(ShapeError, match="axis"):
        hilbert_order(())
