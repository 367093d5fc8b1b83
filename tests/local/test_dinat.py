"""Dilated neighborhood attention against residue sub-grids, brute force and torch's own attention."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.local.dinat import DilatedNeighborhoodAttention, dilation_schedule, receptive_field
from regard.models.dinat import NAT, DiNAT

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def layer(channels: int = 8, num_heads: int = 2, **options) -> DilatedNeighborhoodAttention:
    dinat = DilatedNeighborhoodAttention(channels, num_heads, **options).double()
    if dinat.position_bias is not None:
        torch.nn.init.normal_(dinat.position_bias.table)
    return dinat


def tokens(height: int, width: int, channels: int = 8) -> Tensor:
    return torch.randn(2, height * width, channels, dtype=torch.float64)


def neighbours(index: int, length: int, window: int, dilation: int) -> list[int]:
    """The nearest ``window`` of the tokens congruent to ``index``, by trying all runs of them."""
    kind = list(range(index % dilation, length, dilation))
    runs = [kind[first : first + window] for first in range(len(kind) - window + 1)]
    return min((run for run in runs if index in run), key=lambda run: abs(run[0] + run[-1] - 2 * index))


@pytest.mark.paper("dinat")
@pytest.mark.parametrize(("grid", "window", "dilation"), [((9, 8), 3, 2), ((11, 13), 3, 3), ((10, 10), 5, 2)])
@pytest.mark.parametrize("position_bias", [False, True])
def test_dilation_is_attention_on_each_residue_sub_grid(grid, window, dilation, position_bias) -> None:
    dinat, x = layer(window=window, dilation=dilation, position_bias=position_bias), tokens(*grid)
    out = dinat(x, grid=grid).unflatten(1, grid)
    dinat.set_dilation(1)
    expected, image = torch.empty_like(out), x.unflatten(1, grid)
    for row, column in itertools.product(range(dilation), repeat=2):
        part = image[:, row::dilation, column::dilation]
        inner = part.shape[1:3]
        expected[:, row::dilation, column::dilation] = dinat(part.flatten(1, 2), grid=inner).unflatten(1, inner)
    torch.testing.assert_close(out, expected, **TIGHT)


@pytest.mark.paper("dinat")
@pytest.mark.parametrize(("grid", "window", "dilation"), [((8, 9), 3, 1), ((8, 9), 3, 2), ((6, 10), 5, (1, 2))])
def test_every_query_attends_to_its_nearest_tokens_and_as_many(grid, window, dilation) -> None:
    # Queries of zero weigh all that they see alike; values that are the identity show what that is.
    count = grid[0] * grid[1]
    dinat = layer(count, 1, window=window, dilation=dilation, position_bias=False, qkv_bias=False)
    with torch.no_grad():
        dinat.qkv.weight.zero_()
        dinat.qkv.weight[2 * count :] = torch.eye(count)
        dinat.proj.weight.copy_(torch.eye(count))
        dinat.proj.bias.zero_()
    seen = dinat(torch.eye(count, dtype=torch.float64)[None], grid=grid)[0] * window**2
    rates = (dilation, dilation) if isinstance(dilation, int) else dilation
    expected = torch.zeros(count, count, dtype=torch.float64)
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        rows, columns = (neighbours(p, n, window, d) for p, n, d in zip((row, column), grid, rates, strict=True))
        for key_row, key_column in itertools.product(rows, columns):
            expected[row * grid[1] + column, key_row * grid[1] + key_column] = 1
    assert (expected.sum(-1) == window**2).all()
    torch.testing.assert_close(seen, expected, **TIGHT)


@pytest.mark.paper("dinat")
def test_receptive_fields() -> None:
    schedules = [(1,), (1, 3), (1, 3, 9), (1, 3, 9, 27)]
    assert [receptive_field(s, 3, 81) for s in schedules] == [3, 9, 27, 81]
    assert receptive_field((1, 1, 1, 1), 3, 81) == 9
    assert receptive_field([1] * 5, 7, 101) == 5 * 6 + 1
    assert receptive_field((), 3, 10) == 1


@pytest.mark.paper("dinat")
def test_dilation_costs_no_parameters() -> None:
    counts = set()
    for mode in ("alternate", "gradual", "local", "global"):
        with torch.device("meta"):
            model = DiNAT.preset("mini", mode=mode)
        counts.add(sum(p.numel() for p in model.parameters()))
    assert len(counts) == 1
    local, dilated = layer(window=3), layer(window=3, dilation=2)
    dilated.load_state_dict(local.state_dict())
    local.set_dilation(2)
    x = tokens(8, 8)
    assert torch.equal(local(x, grid=(8, 8)), dilated(x, grid=(8, 8)))


@pytest.mark.paper("dinat")
def test_a_window_as_large_as_the_map_is_global_attention_with_relative_bias() -> None:
    dinat, x = layer(16, 4, window=7), tokens(7, 7, 16)
    assert dinat.position_bias is not None
    table = dinat.position_bias.table.T.view(4, 13, 13)
    bias = torch.empty(4, 49, 49, dtype=torch.float64)
    for i, j in itertools.product(range(49), repeat=2):
        bias[:, i, j] = table[:, j // 7 - i // 7 + 6, j % 7 - i % 7 + 6]
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in dinat.qkv(x).chunk(3, -1))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    torch.testing.assert_close(dinat(x, grid=(7, 7)), dinat.proj(expected), **TIGHT)


@pytest.mark.paper("dinat")
def test_a_neighbourhood_larger_than_the_map_is_refused() -> None:
    for options in ({"window": 3, "dilation": 3}, {"window": 9}):
        with pytest.raises(OptionError, match="must not exceed the length 8"):
            layer(fit=False, **options)(tokens(8, 9), grid=(8, 9))
    layer(fit=False, window=4, dilation=2)(tokens(8, 9), grid=(8, 9))
    with pytest.raises(OptionError, match="must not exceed"):
        receptive_field((1, 4), 3, 11)


def test_small_maps_give_way_dilation_first() -> None:
    dinat, x = layer(window=3, dilation=4), tokens(7, 2)
    assert dinat.rule((7, 2)).window == (3, 2)
    assert dinat.rule((7, 2)).dilation == (2, 1)
    fitted = layer(window=(3, 2), dilation=(2, 1), fit=False)
    # The smaller table is the middle of the larger one.
    assert dinat.position_bias is not None and fitted.position_bias is not None
    with torch.no_grad():
        middle = dinat.position_bias.table.view(5, 5, 2)[:, 1:4].reshape(-1, 2)
        fitted.position_bias.table.copy_(middle)
    fitted.qkv.load_state_dict(dinat.qkv.state_dict())
    fitted.proj.load_state_dict(dinat.proj.state_dict())
    torch.testing.assert_close(dinat(x, grid=(7, 2)), fitted(x, grid=(7, 2)), **TIGHT)


def test_schedules() -> None:
    assert dilation_schedule(56, 7, 3) == [1, 8, 1]
    assert dilation_schedule(28, 7, 4) == [1, 4, 1, 4]
    assert dilation_schedule(56, 7, 4, "gradual") == [1, 3, 6, 8]
    assert dilation_schedule(56, 7, 2, "global") == [8, 8]
    assert dilation_schedule(56, 7, 2, "local") == [1, 1]
    assert dilation_schedule(5, 7, 2) == [1, 1]


@pytest.mark.parametrize(
    ("name", "millions"), [("mini", 20.0), ("tiny", 27.9), ("small", 50.7), ("base", 89.8), ("large", 200.9)]
)
def test_sizes_and_dilations_are_the_papers(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = DiNAT.preset(name)
        plain = NAT.preset(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.dilations[:2] == [[1, 8, 1], [1, 4, 1, 4]]
    assert model.dilations[2][:4] == [1, 2, 1, 2]
    assert model.dilations[3] == [1] * 5
    assert {rate for stage in plain.dilations for rate in stage} == {1}
    with torch.device("meta"):
        larger = DiNAT.preset(name, resolution=384)
    assert [max(stage) for stage in larger.dilations] == [13, 6, 3, 1]


def test_backbone_trains_and_takes_other_dilations() -> None:
    torch.manual_seed(0)
    model = DiNAT(16, (2, 1), (1, 2), window=3, resolution=48, num_classes=5, layer_scale=0.1)
    assert model.dilations == [[1, 4], [1]]
    images = torch.randn(2, 3, 50, 37)
    assert [m.shape[1:] for m in model.maps(images)] == [(16, 13, 10), (32, 7, 5)]
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    before = model(images)
    model.set_dilations([[1, 1], [2]])
    assert model.dilations == [[1, 1], [2]]
    assert not torch.allclose(model(images), before)


def test_bad_arguments_teach() -> None:
    with pytest.raises(OptionError, match="multiple of num_heads"):
        DilatedNeighborhoodAttention(10, 4)
    with pytest.raises(OptionError, match="at least one token"):
        DilatedNeighborhoodAttention(8, 2, window=0)
    with pytest.raises(OptionError, match="at least 1 on every axis"):
        DilatedNeighborhoodAttention(8, 2, dilation=(1, 0))
    with pytest.raises(ShapeError, match="grid"):
        layer()(tokens(3, 4))
    with pytest.raises(OptionError, match="mode"):
        dilation_schedule(8, 3, 2, "random")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no negative depth"):
        dilation_schedule(0, 3, 2)
    with pytest.raises(OptionError, match="not on an axis"):
        receptive_field((1,), 3, 9, 9)
    with pytest.raises(OptionError, match="as many dilations"):
        DiNAT(16, (2, 1), (1, 2), num_classes=2).set_dilations([[1], [1]])
    with pytest.raises(OptionError, match="one number of heads"):
        DiNAT(16, (2, 1), (1,))
