"""Vectors per row and column offset that meet the query, against the formula written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.layers.position_bias import RowColumnPositions, fold_positions

SIDES, REACH = (3, 4), (4, 3)


def offsets(queries: Tensor) -> list[Tensor]:
    """From each query's (row, column) to each coordinate of keys at rows 0 to 2 and columns 0 to 3."""
    return [torch.arange(side) - queries[:, axis : axis + 1] for axis, side in enumerate(SIDES)]


def by_loop(layer: RowColumnPositions, query: Tensor, queries: Tensor) -> Tensor:
    rows, columns = layer.tables
    out = torch.zeros(*query.shape[:-1], SIDES[0] * SIDES[1], dtype=query.dtype)
    for i, (y, x) in enumerate(queries.tolist()):
        for j, (key_y, key_x) in enumerate(itertools.product(*map(range, SIDES))):
            vector = rows[key_y - y + REACH[0]] + columns[key_x - x + REACH[1]]
            out[..., i, j] = (query[..., i, :] * vector).sum(-1)
    return out


def test_logits_are_the_formula() -> None:
    layer = RowColumnPositions(REACH, 5).double()
    places = torch.tensor([[0, 0], [2, 3], [1, 1], [4, 0], [-2, 2]])
    query = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = by_loop(layer, query, places)
    torch.testing.assert_close(layer(query, offsets(places)), expected, rtol=1e-12, atol=1e-12)


def test_folded_products_are_scores_plus_logits() -> None:
    layer = RowColumnPositions(REACH, 6).double()
    places = torch.tensor([[0, 0], [2, 3], [1, 2]])
    query = torch.randn(2, 3, 6, dtype=torch.float64)
    key = torch.randn(2, 12, 6, dtype=torch.float64)
    wide_query, wide_key = fold_positions(query, key, tuple(layer.tables), offsets(places), 0.3)
    expected = 0.3 * query @ key.transpose(1, 2) + by_loop(layer, query, places)
    torch.testing.assert_close(0.3 * wide_query @ wide_key.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


def test_one_and_three_axes() -> None:
    query = torch.randn(4, 7, dtype=torch.float64)
    line = RowColumnPositions((3,), 7).double()
    steps = torch.arange(4) - torch.arange(4)[:, None]
    torch.testing.assert_close(line(query, [steps]), torch.einsum("id,ijd->ij", query, line.tables[0][steps + 3]))
    space = RowColumnPositions((0, 3, 1), 7).double()
    parts = [torch.zeros(4, 1).long(), steps, torch.tensor([[-1, 0]] * 4)]
    vectors = [table[part + far] for table, part, far in zip(space.tables, parts, (0, 3, 1), strict=True)]
    summed = vectors[0][:, :, None, None] + vectors[1][:, None, :, None] + vectors[2][:, None, None]
    expected = torch.einsum("id,iabcd->iabc", query, summed).flatten(1)
    torch.testing.assert_close(space(query, parts), expected)


def test_tables_have_every_offset_once_and_logits_of_variance_one() -> None:
    torch.manual_seed(0)
    layer = RowColumnPositions((10, 10), 64)
    assert [tuple(table.shape) for table in layer.tables] == [(21, 64), (21, 64)]
    logits = torch.randn(400, 64) @ layer.tables[0].detach().T
    assert 0.9 < float(logits.var()) < 1.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_single(dtype: torch.dtype) -> None:
    layer = RowColumnPositions(REACH, 64).to(dtype)
    places = torch.tensor([[0, 0], [2, 3]])
    query = torch.randn(2, 64).to(dtype)
    logits = layer(query, offsets(places))
    assert logits.dtype == torch.float32
    exact = layer.double()(query.double(), offsets(places))
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    folded = fold_positions(query, torch.zeros(12, 64, dtype=dtype), tuple(layer.to(dtype).tables), offsets(places), 1)
    assert folded[0].dtype == folded[1].dtype == dtype


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="reaches"):
        RowColumnPositions((-1, 2), 4)
    with pytest.raises(OptionError, match="head_dim"):
        RowColumnPositions((1,), 0)
    with pytest.raises(ShapeError, match="reach of 3"):
        RowColumnPositions((3,), 4)(torch.randn(2, 4), [torch.tensor([[0, 4], [0, 1]])])
