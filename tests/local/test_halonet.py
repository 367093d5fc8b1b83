"""Blocked local attention with halos against dense attention, unfolded windows and torch's own attention; HaloNet."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.local.halonet import HaloAttention, halo_attention, halo_gather
from regard.local.windows import window_plan, windowed_attention
from regard.models.halonet import HaloNet

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def inputs(height: int, width: int, grad: bool = False, dim: int = 4, value_dim: int = 4) -> list[Tensor]:
    return [torch.randn(2, 3, height, width, d, dtype=torch.float64, requires_grad=grad) for d in (dim, dim, value_dim)]


def tables(block: int, halo: int, grad: bool = False, dim: int = 4) -> list[Tensor]:
    shape = (2 * (block + halo) - 1, dim)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=grad) for _ in range(2)]


def places(height: int, width: int) -> Tensor:
    """Row and column of each pixel, ``(pixels, 2)``."""
    return torch.tensor(list(itertools.product(range(height), range(width))))


def block_mask(height: int, width: int, block: int, halo: int) -> Tensor:
    """Boolean (pixels, pixels): key within the query's block grown by the halo, by comparing coordinates."""
    at = places(height, width)
    first = at // block * block
    low, high = first - halo, first + block + halo
    return ((at[None] >= low[:, None]) & (at[None] < high[:, None])).all(-1)


def position_logits(query: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """``q_i . (r_row + r_col)`` for all pairs; offsets that the tables lack get any (they are masked)."""
    at = places(*query.shape[2:4])
    offset, reach = at[None] - at[:, None], len(rel_h) // 2
    vectors = rel_h[(offset[..., 0] + reach).clamp(0, 2 * reach)] + rel_w[(offset[..., 1] + reach).clamp(0, 2 * reach)]
    return torch.einsum("bhid,ijd->bhij", query.flatten(2, 3), vectors)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rel: list[Tensor] | None = None) -> Tensor:
    """Attention of all pixels under a boolean mask, written out."""
    q, k, v = (x.flatten(2, 3) for x in (query, key, value))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if rel is not None:
        logits = logits + position_logits(query, *rel)
    return (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v).unflatten(2, query.shape[2:4])


@pytest.mark.paper("halonet")
@pytest.mark.parametrize(("block", "pad"), [(7, "mask"), (8, "mask"), (7, "zero")])
def test_one_block_is_global_attention(block: int, pad: str) -> None:
    qkv, rel = inputs(7, 7), tables(block, 0)
    everything = torch.ones(49, 49, dtype=torch.bool)
    out = halo_attention(*qkv, block, 0, *rel, pad=pad)
    torch.testing.assert_close(out, dense(*qkv, everything, rel), **TIGHT)
    plain = halo_attention(*qkv, block, 0, pad=pad)
    torch_own = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in qkv)).unflatten(2, (7, 7))
    torch.testing.assert_close(plain, torch_own, **TIGHT)


@pytest.mark.paper("halonet")
@pytest.mark.parametrize("size", [(8, 12), (7, 10)])
def test_no_halo_is_window_attention(size: tuple[int, int]) -> None:
    qkv = inputs(*size)
    plan = window_plan(size, (4, 4), (0, 0), torch.device("cpu"))
    expected = windowed_attention(*(x.flatten(2, 3) for x in qkv), plan).unflatten(2, size)
    torch.testing.assert_close(halo_attention(*qkv, 4, 0), expected, **TIGHT)


@pytest.mark.paper("halonet")
@pytest.mark.parametrize("pad", ["mask", "zero"])
@pytest.mark.parametrize("position", [False, True])
def test_blocks_of_one_are_a_sliding_window(pad: str, position: bool) -> None:
    halo, side = 2, 5
    query, key, value = inputs(6, 7)
    rel = tables(1, halo) if position else None

    def unfolded(x: Tensor) -> Tensor:
        columns = F.unfold(x.flatten(0, 1).movedim(-1, 1), side, padding=halo)
        return columns.unflatten(1, (-1, side**2)).unflatten(0, (2, 3)).permute(0, 1, 4, 3, 2)

    logits = torch.einsum("bhid,bhind->bhin", query.flatten(2, 3), unfolded(key)) * 4**-0.5
    if rel is not None:
        vectors = (rel[0][:, None] + rel[1][None]).flatten(0, 1)
        logits = logits + query.flatten(2, 3) @ vectors.T
    if pad == "mask":
        logits = logits.masked_fill(unfolded(torch.ones_like(key))[..., 0] == 0, -torch.inf)
    expected = torch.einsum("bhin,bhind->bhid", logits.softmax(-1), unfolded(value)).unflatten(2, (6, 7))
    out = halo_attention(query, key, value, 1, halo, *(rel or (None, None)), pad=pad)
    torch.testing.assert_close(out, expected, **TIGHT)


@pytest.mark.paper("halonet")
@pytest.mark.parametrize(("size", "block", "halo"), [((8, 8), 4, 1), ((7, 10), 4, 2), ((9, 3), 4, 3), ((5, 6), 2, 4)])
@pytest.mark.parametrize("position", [False, True])
def test_gathered_form_is_dense_attention_with_the_block_mask(size, block, halo, position) -> None:
    qkv = inputs(*size, grad=True, value_dim=6)
    rel = tables(block, halo, grad=True) if position else None
    expected = dense(*qkv, block_mask(*size, block, halo), rel)
    out = halo_attention(*qkv, block, halo, *(rel or (None, None)))
    torch.testing.assert_close(out, expected, **TIGHT)
    leaves, seed = [*qkv, *(rel or [])], torch.randn_like(out)
    for actual, wanted in zip(
        torch.autograd.grad(out, leaves, seed), torch.autograd.grad(expected, leaves, seed), strict=True
    ):
        torch.testing.assert_close(actual, wanted, **TIGHT)


@pytest.mark.paper("halonet")
@pytest.mark.parametrize("pad", ["mask", "zero"])
def test_shifts_by_a_block_carry_over_and_shifts_by_a_pixel_do_not(pad: str) -> None:
    halo = HaloAttention(8, head_dim=4, block=4, halo=2, pad=pad).double()
    x = torch.ones(1, 8, 24, 24, dtype=torch.float64)
    x[:, :, 9:14, 10:15] = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    out, inner = halo(x), slice(8, 16)
    for shift, same in ((4, True), (-4, True), (1, False), (2, False)):
        moved = halo(x.roll((shift, shift), (2, 3))).roll((-shift, -shift), (2, 3))
        assert torch.allclose(moved[..., inner, inner], out[..., inner, inner], **TIGHT) == same


@pytest.mark.paper("halonet")
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 17)])
@pytest.mark.parametrize("pad", ["mask", "zero"])
def test_stride_keeps_every_second_query(size: tuple[int, int], pad: str) -> None:
    qkv, rel = inputs(*size), tables(4, 1)
    full = halo_attention(*qkv, 4, 1, *rel, pad=pad)
    torch.testing.assert_close(halo_attention(*qkv, 4, 1, *rel, pad=pad, stride=2), full[:, :, ::2, ::2], **TIGHT)
    assert halo_attention(*qkv, 4, 1, *rel, stride=4).shape[2:4] == tuple(-(-n // 4) for n in size)


def test_zeros_outside_take_their_share() -> None:
    qkv, rel = inputs(6, 7), tables(4, 1)
    wide = [F.pad(x, (0, 0, 4, 5, 4, 6)) for x in qkv]
    # Inside the wider map the same zeros are part of it, so nothing is outside the blocks of the old map.
    expected = halo_attention(*wide, 4, 1, *rel)[:, :, 4:10, 4:11]
    torch.testing.assert_close(halo_attention(*qkv, 4, 1, *rel, pad="zero"), expected, **TIGHT)
    assert not torch.allclose(halo_attention(*qkv, 4, 1, *rel), expected)


@pytest.mark.parametrize("space", [(7,), (4, 6), (3, 4, 5)])
def test_halo_gather_on_any_number_of_axes(space: tuple[int, ...]) -> None:
    block, halo = (2, 3, 2)[: len(space)], (1, 2, 0)[: len(space)]
    x = torch.randn(2, *space, 3)
    gathered, real = halo_gather(x, block, halo)
    counts = [-(-n // b) for n, b in zip(space, block, strict=True)]
    blocks = list(itertools.product(*map(range, counts)))
    inside = list(itertools.product(*(range(b + 2 * h) for b, h in zip(block, halo, strict=True))))
    assert gathered.shape == (2, len(blocks), len(inside), 3)
    for n, place in enumerate(blocks):
        for m, step in enumerate(inside):
            at = [p * b + s - h for p, b, s, h in zip(place, block, step, halo, strict=True)]
            on_map = all(0 <= a < length for a, length in zip(at, space, strict=True))
            assert bool(real[n, m]) == on_map
            expected = x[(slice(None), *at)] if on_map else torch.zeros(2, 3)
            assert torch.equal(gathered[:, n, m], expected)


def test_module_is_projections_around_the_function() -> None:
    halo = HaloAttention(12, num_heads=3, head_dim=4, block=4, halo=1, stride=2, v_ratio=1.5, bias=True).double()
    x = torch.randn(2, 12, 7, 8, dtype=torch.float64)

    def heads(conv: torch.nn.Conv2d) -> Tensor:
        flat = F.linear(x.movedim(1, -1), conv.weight[:, :, 0, 0], conv.bias)
        return flat.unflatten(-1, (3, -1)).movedim(3, 1)

    assert halo.positions is not None
    out = halo_attention(heads(halo.query), heads(halo.key), heads(halo.value), 4, 1, *halo.positions.tables, stride=2)
    assert halo.out_channels == 18
    torch.testing.assert_close(halo(x), out.movedim(-1, 2).flatten(1, 2), **TIGHT)
    assert HaloAttention(48).num_heads == 3
    assert not list(HaloAttention(16, position=False).buffers())


def test_bad_arguments_teach() -> None:
    with pytest.raises(OptionError, match="divides block"):
        HaloAttention(16, block=8, stride=3)
    with pytest.raises(OptionError, match="pad"):
        HaloAttention(16, pad="reflect")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="No head"):
        HaloAttention(8)
    with pytest.raises(ShapeError, match="16, height"):
        HaloAttention(16)(torch.randn(1, 8, 8, 8))
    qkv = inputs(4, 4)
    with pytest.raises(ShapeError, match="head_dim"):
        halo_attention(qkv[0], qkv[1][:, :, :3], qkv[2])
    with pytest.raises(ShapeError, match="together"):
        halo_attention(*qkv, 2, 1, tables(2, 1)[0])
    with pytest.raises(ShapeError, match=r"\(5, 4\)"):
        halo_attention(*qkv, 2, 1, *tables(2, 2))
    with pytest.raises(OptionError, match="halo of at least 0"):
        halo_gather(torch.randn(1, 4, 2), 2, -1)


@pytest.mark.parametrize(("name", "millions"), [("h0", 5.5), ("h1", 8.1)])
def test_sizes_of_the_backbone_are_the_papers(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = HaloNet.preset(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_stages_of_the_backbone_halve_the_map_and_train() -> None:
    torch.manual_seed(0)
    model = HaloNet((1, 2, 1), 0.5, 4, 1, v_ratio=1.5, widths=(16, 32, 48), final_width=40, num_classes=5)
    images = torch.randn(2, 3, 70, 64)
    assert [m.shape[1:] for m in model.maps(images)] == [(8, 18, 16), (16, 9, 8), (24, 5, 4)]
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_hybrid_convolves_in_early_stages() -> None:
    with torch.device("meta"):
        model = HaloNet.preset("h1", attention=(False, False, True, True))
    attends = [sum(isinstance(m, HaloAttention) for m in stage.modules()) for stage in model.stages]
    wide = [sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in s.modules()) for s in model.stages]
    assert (attends, wide) == ([0, 0, 10, 3], [3, 3, 0, 0])


def test_wrong_options_of_the_backbone_are_refused() -> None:
    with pytest.raises(OptionError, match="preset 'h9'"):
        HaloNet.preset("h9")
    with pytest.raises(OptionError, match="one value a stage"):
        HaloNet(attention=(True,))
