from __future__ import annotations

import math

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.layers.pooling import pool_tokens


@pytest.mark.parametrize(("grid", "size"), [((10,), (4,)), ((5, 7), (2, 3)), ((3, 4, 5), (2, 2, 4)), ((2, 2), (3, 3))])
def test_bins_are_the_documented_ones(grid: tuple[int, ...], size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, math.prod(grid), 4, dtype=torch.float64)
    space = x.view(2, 3, *grid, 4)
    pooled = pool_tokens(x, grid, size).view(2, 3, *size, 4)
    for place in torch.cartesian_prod(*(torch.arange(s) for s in size)).view(-1, len(size)).tolist():
        bins = [
            slice(i * length // s, -(-(i + 1) * length // s)) for i, length, s in zip(place, grid, size, strict=True)
        ]
        members = space[(slice(None), slice(None), *bins)].flatten(2, -2)
        torch.testing.assert_close(pooled[(slice(None), slice(None), *place)], members.mean(2))


def test_grids_that_do_not_fit_are_refused() -> None:
    x = torch.randn(1, 1, 12, 2)
    with pytest.raises(ShapeError):
        pool_tokens(x, (3, 5), (2, 2))
    with pytest.raises(OptionError):
        pool_tokens(x, (3, 4), (2,))
