"""Generalized neighborhood attention against its formulas, written out as loops, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import merge_attentions, use_backend
from regard.layers.tiles import balanced_tile, token_permute, token_unpermute
from regard.local.gna import (
    GeneralizedNeighborhoodAttention,
    GNASimulator,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    neighborhood_mask,
    window_bounds,
)
from regard.masks import KeyPadding

TIGHT = {"rtol": 1e-10, "atol": 1e-11}

SETTINGS = [
    ((20,), 5, 1, 1, False),
    ((21,), 6, 4, 1, True),
    ((23,), 5, 2, 3, True),
    ((7, 9), (3, 4), (1, 2), 1, False),
    ((10, 11), 3, 2, (2, 3), (False, True)),
    ((5, 6, 7), (3, 4, 2), (3, 1, 2), 1, (True, False, False)),
]


def written_out(length: int, window: int, stride: int, dilation: int, causal: bool) -> list[set[int]]:
    """The keys of each query on one axis, from the paper's formulas with Python integers."""
    seen = []
    for i in range(length):
        own = [j for j in range(length) if j % dilation == i % dilation]
        place, size = own.index(i), len(own)
        first = (place // stride) * stride
        if causal:
            leader = min(first + stride - 1, size - 1)
            chosen = range(max(leader - window + 1, 0), place + 1)
        else:
            leader = min(first + stride // 2, size - 1)
            start = max(leader - window // 2, 0)
            if leader + window // 2 + window % 2 - 1 >= size:
                start = size - window
            chosen = range(start, start + window)
        seen.append({own[p] for p in chosen})
    return seen


def spread(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * axes


def reference_mask(grid, window, stride, dilation, causal) -> Tensor:
    options = [spread(value, len(grid)) for value in (window, stride, dilation, causal)]
    axes = [written_out(*setting) for setting in zip(grid, *options, strict=True)]
    tokens = list(itertools.product(*(range(n) for n in grid)))
    return torch.tensor(
        [[all(y in axes[a][x] for a, (x, y) in enumerate(zip(i, j, strict=True))) for j in tokens] for i in tokens]
    )


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ value


def inputs(*space: int, heads: int = 2, dim: int = 8, batch: int = 2, grad: bool = False) -> list[Tensor]:
    return [torch.randn(batch, heads, *space, dim, dtype=torch.float64, requires_grad=grad) for _ in range(3)]


@pytest.mark.paper("gna")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_mask_is_the_formula(setting) -> None:
    grid, window, stride, dilation, causal = setting
    assert torch.equal(neighborhood_mask(grid, window, stride, dilation, causal), reference_mask(*setting))


@pytest.mark.paper("gna")
@pytest.mark.parametrize("window", [2, 3, 4, 6])
def test_stride_equal_to_window_is_blocked_attention(window: int) -> None:
    blocks = torch.arange(12) // window
    assert torch.equal(neighborhood_mask((12,), window, window), blocks[:, None] == blocks)
    rows, columns = (torch.arange(144) // 12) // window, (torch.arange(144) % 12) // window
    same = (rows[:, None] == rows) & (columns[:, None] == columns)
    assert torch.equal(neighborhood_mask((12, 12), window, window), same)
    q, k, v = inputs(12, 12)
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    torch.testing.assert_close(na2d(q, k, v, window, stride=window).flatten(2, 3), dense(*flat, same), **TIGHT)


@pytest.mark.paper("gna")
@pytest.mark.parametrize("length", [7, 8])
def test_window_equal_to_length_is_global(length: int) -> None:
    q, k, v = inputs(length, length)
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*flat).unflatten(2, (length, length))
    for stride in range(1, length + 1):
        assert neighborhood_mask((length,), length, stride).all()
        torch.testing.assert_close(na2d(q, k, v, length, stride=stride), expected, **TIGHT)


@pytest.mark.paper("gna")
def test_every_row_has_the_whole_window_and_itself() -> None:
    for window in range(1, 12):
        for stride in range(1, window + 1):
            seen = neighborhood_mask((11,), window, stride)
            assert (seen.sum(-1) == window).all()
            assert seen.diagonal().all()
    seen = neighborhood_mask((6, 7), (3, 4), (2, 3))
    assert (seen.sum(-1) == 12).all()
    assert seen.diagonal().all()


@pytest.mark.paper("gna")
@pytest.mark.parametrize("stride", [1, 2])
def test_dilation_is_the_undilated_form_on_residue_grids(stride: int) -> None:
    q, k, v = inputs(11, 13)
    out = na2d(q, k, v, 3, stride=stride, dilation=(2, 3))
    for row, column in itertools.product(range(2), range(3)):
        part = (..., slice(row, None, 2), slice(column, None, 3), slice(None))
        alone = na2d(q[part], k[part], v[part], 3, stride=stride)
        torch.testing.assert_close(out[part], alone, **TIGHT)


@pytest.mark.paper("gna")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("tile", [None, 2, 3])
def test_tiled_execution_equals_dense_masked(setting, tile) -> None:
    grid, window, stride, dilation, causal = setting
    tensors = inputs(math.prod(grid), grad=True)
    expected = dense(*tensors, reference_mask(*setting))
    mechanism = GeneralizedNeighborhoodAttention(window, stride, dilation, causal, tile=tile)
    out = mechanism(*tensors, grid=grid)
    torch.testing.assert_close(out, expected, **TIGHT)
    probe = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, tensors, probe), torch.autograd.grad(expected, tensors, probe), strict=True
    ):
        torch.testing.assert_close(found, wanted, **TIGHT)


@pytest.mark.paper("gna")
@pytest.mark.parametrize(
    ("space", "tile", "dilation"),
    [((9,), (4,), (1,)), ((6, 8), (3, 4), (1, 1)), ((7, 10), (2, 3), (2, 1)), ((5, 6, 7), (2, 3, 2), (1, 2, 3))],
)
def test_token_permute_round_trips(space, tile, dilation) -> None:
    x = torch.randn(2, 3, *space, 4)
    tiles = token_permute(x, tile, dilation)
    assert tiles.shape[0] == 2 * math.prod(dilation)
    assert tiles.shape[2] % math.prod(tile) == 0
    assert torch.equal(token_unpermute(tiles, space, tile, dilation), x)


def test_token_permute_puts_each_tile_together() -> None:
    x = torch.arange(4 * 6, dtype=torch.float64).view(1, 1, 4, 6, 1)
    tiles = token_permute(x, (2, 3)).view(4, 6)
    assert tiles[0].tolist() == [0, 1, 2, 6, 7, 8]
    assert tiles[3].tolist() == [15, 16, 17, 21, 22, 23]
    classes = token_permute(x, (2, 3), (2, 1))
    assert classes.shape == (2, 1, 12, 1)
    assert classes[1, 0, :3, 0].tolist() == [6, 7, 8]


@pytest.mark.paper("gna")
def test_simulator_gives_the_bounds_of_the_two_dimensional_case() -> None:
    setting = {"shape": (256, 256), "window": 80, "q_tile": 16, "kv_tile": (16, 8)}
    strided, plain = GNASimulator(stride=16, **setting), GNASimulator(stride=1, **setting)
    assert strided.flop_bound == plain.flop_bound == pytest.approx(10.24)
    assert strided.tile_bound == pytest.approx(10.24)
    assert strided.is_perfectly_block_sparse
    assert plain.tile_bound == pytest.approx(6.10, abs=5e-3)
    assert plain.mean_tile_bound == pytest.approx(7.06, abs=5e-3)
    assert not plain.is_perfectly_block_sparse


@pytest.mark.paper("gna")
def test_simulator_gives_the_bounds_of_the_three_dimensional_case() -> None:
    setting = {"shape": (30, 48, 80), "window": (18, 24, 24), "q_tile": (4, 8, 8), "kv_tile": (2, 8, 8)}
    strided = GNASimulator(stride=(16, 8, 8), **setting)
    assert strided.flop_bound == pytest.approx(11.11, abs=5e-3)
    assert strided.tile_bound == pytest.approx(strided.flop_bound)
    plain = GNASimulator(stride=1, **setting)
    assert plain.tile_bound == pytest.approx(3.27, abs=5e-3)
    assert plain.mean_tile_bound == pytest.approx(5.24, abs=5e-3)


@pytest.mark.parametrize("tiling", ["multi", "flat"])
@pytest.mark.parametrize("causal", [False, True])
def test_simulator_counts_the_tiles_of_the_mask(tiling, causal) -> None:
    shape, tile = (6, 10), (2, 5)
    simulator = GNASimulator(shape, 5, 2, (causal, False), tile, tile, tiling=tiling)
    seen = reference_mask(shape, 5, 2, 1, (causal, False))
    index = torch.arange(60)
    tiles = index // 10 if tiling == "flat" else (index // 10 // 2) * 2 + index % 10 // 5
    visited = [len({int(t) for t in tiles[seen[tiles == q].any(0)]}) for q in range(6)]
    assert simulator.visited().flatten().tolist() == visited
    assert simulator.flop_bound == pytest.approx(60 * 60 / int(seen.sum()))


def test_dynamic_key_tiles_never_touch_more() -> None:
    static = GNASimulator((40, 40), 12, 3, False, 5, 8)
    dynamic = GNASimulator((40, 40), 12, 3, False, 5, 8, kv_start="dynamic")
    assert (dynamic.visited() <= static.visited()).all()
    assert dynamic.mean_visited < static.mean_visited


def test_flat_tiling_wastes_more() -> None:
    multi = GNASimulator((32, 32), 8, 8, False, 8, 8)
    flat = GNASimulator((32, 32), 8, 8, False, 8, 8, tiling="flat")
    assert multi.is_perfectly_block_sparse
    assert not flat.is_perfectly_block_sparse
    assert flat.mean_visited > 3 * multi.mean_visited


@pytest.mark.parametrize("causal", [False, True])
def test_window_bounds_are_rows_of_the_mask(causal: bool) -> None:
    rows = written_out(13, 6, 4, 1, causal)
    for i, row in enumerate(rows):
        start, stop = window_bounds(i, 13, 6, 4, causal)
        assert set(range(start, stop)) == row


@pytest.mark.paper("gna")
def test_extra_tokens_join_one_softmax() -> None:
    q, k, v = inputs(6, 7)
    extra_key, extra_value = (torch.randn(2, 2, 3, 8, dtype=torch.float64) for _ in range(2))
    seen = F.pad(reference_mask((6, 7), 3, 1, 1, False), (0, 3), value=True)
    keys, values = (torch.cat((x.flatten(2, 3), e), 2) for x, e in ((k, extra_key), (v, extra_value)))
    expected = dense(q.flatten(2, 3), keys, values, seen)
    out, lse = neighborhood_attention(q, k, v, 3, extra_key=extra_key, extra_value=extra_value, return_lse=True)
    torch.testing.assert_close(out.flatten(2, 3), expected, **TIGHT)
    scores = (q.flatten(2, 3) @ keys.transpose(-1, -2) / 8**0.5).masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(lse.flatten(2, 3), scores.logsumexp(-1), **TIGHT)
    mechanism = GeneralizedNeighborhoodAttention(3, extra_tokens=3)
    torch.testing.assert_close(mechanism(q.flatten(2, 3), keys, values, grid=(6, 7)), expected, **TIGHT)
    hidden = torch.rand(2, 45) > 0.3
    masked = mechanism(q.flatten(2, 3), keys, values, grid=(6, 7), mask=KeyPadding(hidden))
    torch.testing.assert_close(
        masked, dense(q.flatten(2, 3), keys, values, seen & hidden[:, None, None]).nan_to_num(0), **TIGHT
    )


def test_gradient_through_extra_tokens() -> None:
    q, k, v = inputs(3, 4, batch=1, dim=3, grad=True)
    extra = [torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def run(*tensors: Tensor) -> Tensor:
        return neighborhood_attention(*tensors[:3], 2, extra_key=tensors[3], extra_value=tensors[4])

    assert torch.autograd.gradcheck(run, (q, k, v, *extra))


def test_merging_two_halves_of_the_keys_is_the_whole() -> None:
    q, k, v = inputs(12)
    scores = q @ k.transpose(-1, -2)
    halves = [slice(0, 5), slice(5, None)]
    outs = [scores[..., h].softmax(-1) @ v[:, :, h] for h in halves]
    merged, lse = merge_attentions(outs, [scores[..., h].logsumexp(-1) for h in halves])
    torch.testing.assert_close(merged, scores.softmax(-1) @ v, **TIGHT)
    torch.testing.assert_close(lse, scores.logsumexp(-1), **TIGHT)


def test_causal_on_a_sequence_makes_its_axis_causal() -> None:
    q, k, v = inputs(30)
    out = GeneralizedNeighborhoodAttention(7)(q, k, v, causal=True)
    distance = torch.arange(30)[:, None] - torch.arange(30)
    torch.testing.assert_close(out, dense(q, k, v, (distance >= 0) & (distance < 7)), **TIGHT)


def test_causal_on_a_grid_hides_later_tokens_in_row_major_order() -> None:
    q, k, v = inputs(30)
    seen = reference_mask((5, 6), 3, 1, 1, (True, False)).tril()
    out = GeneralizedNeighborhoodAttention(3)(q, k, v, causal=True, grid=(5, 6))
    torch.testing.assert_close(out, dense(q, k, v, seen), **TIGHT)


def test_a_window_larger_than_an_axis_is_that_axis() -> None:
    q, k, v = inputs(3 * 20)
    out = GeneralizedNeighborhoodAttention(7, dilation=2)(q, k, v, grid=(3, 20))
    torch.testing.assert_close(out, dense(q, k, v, reference_mask((3, 20), (3, 7), 1, (1, 2), False)), **TIGHT)


def test_padded_keys_are_hidden() -> None:
    q, k, v = inputs(30)
    real = torch.rand(2, 30) > 0.4
    out = GeneralizedNeighborhoodAttention(5)(q, k, v, grid=(5, 6), mask=KeyPadding(real))
    seen = reference_mask((5, 6), 5, 1, 1, False) & real[:, None, None]
    torch.testing.assert_close(out, dense(q, k, v, seen).nan_to_num(0), **TIGHT)


def test_reference_backend_agrees() -> None:
    q, k, v = inputs(9, 10)
    with use_backend("reference"):
        expected = na2d(q, k, v, 5)
    torch.testing.assert_close(na2d(q, k, v, 5), expected, **TIGHT)


def test_a_plan_made_in_inference_mode_can_be_trained_with() -> None:
    q, k, v = inputs(11, 12, grad=True)
    with torch.inference_mode():
        na2d(q.detach(), k.detach(), v.detach(), 5)
    na2d(q, k, v, 5).sum().backward()
    assert q.grad is not None


def test_aliases_name_their_axes() -> None:
    for axes, alias in ((1, na1d), (2, na2d), (3, na3d)):
        tensors = inputs(*(4,) * axes)
        torch.testing.assert_close(alias(*tensors, 3), neighborhood_attention(*tensors, 3))
        with pytest.raises(ShapeError):
            alias(*inputs(*(4,) * (axes % 3 + 1)), 3)


def test_computed_pairs_are_those_of_visited_tiles() -> None:
    q, k, _ = inputs(16 * 16, dim=4, batch=1)
    mechanism = GeneralizedNeighborhoodAttention(8, 8, tile=8)
    assert mechanism.pairs(q, k, grid=(16, 16)) == pytest.approx(1 / 4)
    uneven = GeneralizedNeighborhoodAttention(1, tile=8).pairs(q[:, :, :90], k[:, :, :90], grid=(9, 10))
    assert uneven == pytest.approx((64**2 + 16**2 + 8**2 + 2**2) / 90**2)


def test_tiles_are_balanced() -> None:
    assert balanced_tile((96, 96)) == (8, 8)
    assert balanced_tile((16, 16, 16)) == (4, 4, 4)
    assert balanced_tile((2, 4096)) == (2, 32)
    assert balanced_tile((3, 5)) == (3, 5)


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="stride"):
        GeneralizedNeighborhoodAttention(3, 4)
    with pytest.raises(OptionError, match="window"):
        GeneralizedNeighborhoodAttention(0)
    with pytest.raises(OptionError, match="axes"):
        GeneralizedNeighborhoodAttention((3, 3))(*inputs(12))
    with pytest.raises(OptionError, match="length"):
        neighborhood_attention(*inputs(6, 6), 7)
    with pytest.raises(UnsupportedPatternError):
        GeneralizedNeighborhoodAttention(3)(inputs(6)[0], *inputs(7)[1:])
    with pytest.raises(ShapeError, match="extra_tokens"):
        GeneralizedNeighborhoodAttention(3, extra_tokens=2)(inputs(6)[0], *inputs(7)[1:])
    with pytest.raises(ShapeError, match="together"):
        neighborhood_attention(*inputs(6), 3, extra_key=inputs(2)[0])
    with pytest.raises(OptionError, match="tiling"):
        GNASimulator((8, 8), 4, tiling="round")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("border", ["mask", "zero"])
def test_windows_that_stick_out(border: str, dilation: int, stride: int) -> None:
    """Outside the map a key is not there, or a zero that takes its share of the softmax."""
    height, width, window = 6, 7, 3
    query, key, value = (torch.randn(2, 2, height * width, 4, dtype=torch.float64) for _ in range(3))
    out = GeneralizedNeighborhoodAttention(window, stride, dilation, border=border)(
        query, key, value, grid=(height, width)
    )
    for i in range(height * width):
        near, missing = [], 0
        leaders = []
        for place, length in ((i // width, height), (i % width, width)):
            inner, residue = place // dilation, place % dilation
            last = (length - 1 - residue) // dilation
            leaders.append((min(inner // stride * stride + stride // 2, last), residue, length))
        for down in range(-1, 2):
            for right in range(-1, 2):
                y, x = (
                    (lead + step) * dilation + residue
                    for (lead, residue, _), step in zip(leaders, (down, right), strict=True)
                )
                if 0 <= y < height and 0 <= x < width:
                    near.append(y * width + x)
                else:
                    missing += 1
        logits = torch.einsum("bhd,bhnd->bhn", query[:, :, i], key[:, :, near]) / 2
        if border == "zero":
            logits = torch.cat((logits, torch.zeros(2, 2, missing, dtype=torch.float64)), -1)
        weights = logits.softmax(-1)[..., : len(near)]
        expected = torch.einsum("bhn,bhnd->bhd", weights, value[:, :, near])
        torch.testing.assert_close(out[:, :, i], expected, rtol=1e-9, atol=1e-10)
