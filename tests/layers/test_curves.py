"""Space-filling curves."""

from __future__ import annotations

import itertools

import pytest
import torch

from regard.errors import ShapeError
from regard.layers.curves import gilbert3d, hilbert_order


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


@pytest.mark.paper("blade")
def test_gilbert_visits_every_cell_once_and_back() -> None:
    for width, height, depth in [*itertools.product(range(1, 8), repeat=3), (45, 30, 13), (100, 1, 3)]:
        order, inverse = gilbert3d(width, height, depth)
        cells = torch.arange(width * height * depth)
        assert torch.equal(order.sort().values, cells)
        assert torch.equal(inverse[order], cells) and torch.equal(order[inverse], cells)


def _steps(width: int, height: int, depth: int) -> torch.Tensor:
    places = torch.stack(torch.unravel_index(gilbert3d(width, height, depth)[0], (depth, height, width)), -1)
    return places.diff(dim=0).abs()


@pytest.mark.paper("blade")
def test_gilbert_steps_go_to_neighbours() -> None:
    """Of even sizes (and of 1); odd ones have a few longer steps."""
    for sizes in [*itertools.product((1, 2, 4, 6, 10), repeat=3), (52, 30, 20), (16, 2, 40)]:
        assert bool((_steps(*sizes).sum(-1) == 1).all()), sizes
    for sizes in [*itertools.product((1, 3, 4, 5, 7), repeat=3), (45, 30, 13)]:
        steps = _steps(*sizes).sum(-1)
        assert bool((steps <= 4).all())
        assert int((steps > 1).sum()) <= 0.2 * len(steps)


@pytest.mark.paper("blade")
def test_gilbert_runs_are_compact() -> None:
    """Runs of 64 of 20 x 12 x 8 tokens span far smaller boxes than in row-major order."""
    order = gilbert3d(20, 12, 8)[0]
    for cells, bound in ((order, 4.0), (torch.arange(len(order)), 5.0)):
        places = torch.stack(torch.unravel_index(cells, (8, 12, 20)), -1).view(-1, 64, 3).double()
        spread = (places - places.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
        assert bool((spread < bound).all()) == (bound == 4.0)


def test_gilbert_refuses_empty_grids() -> None:
    with pytest.raises(ShapeError, match="1 cell"):
        gilbert3d(3, 0, 2)
