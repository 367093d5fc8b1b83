"""Twins: windows and summaries against torch's own operations, what reaches what, and the published counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError, UnsupportedMaskError
from regard.local.twins import (
    GlobalSubsampledAttention,
    LocallyGroupedSelfAttention,
    PositionalEncodingGenerator,
    SpatiallySeparableAttention,
    optimal_window,
    sssa_cost,
)
from regard.masks import Boolean, Causal, KeyPadding
from regard.models.twins import TwinsPCPVT, TwinsSVT

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
CHANNELS, HEADS = 16, 4


def tokens(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, height * width, CHANNELS, dtype=torch.float64)


def local(window=4) -> LocallyGroupedSelfAttention:
    return LocallyGroupedSelfAttention(CHANNELS, HEADS, window).double()


def summarised(sr_ratio: int) -> GlobalSubsampledAttention:
    layer = GlobalSubsampledAttention(CHANNELS, HEADS, sr_ratio).double()
    if layer.summary is not None:
        torch.nn.init.normal_(layer.summary.norm.weight)
        torch.nn.init.normal_(layer.summary.norm.bias)
    return layer


def torch_own(qkv_weight: Tensor, qkv_bias: Tensor, proj: torch.nn.Linear) -> torch.nn.MultiheadAttention:
    own = torch.nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        own.in_proj_weight.copy_(qkv_weight)
        own.in_proj_bias.copy_(qkv_bias)
        own.out_proj.load_state_dict(proj.state_dict())
    return own


def own_of(layer: LocallyGroupedSelfAttention | GlobalSubsampledAttention) -> torch.nn.MultiheadAttention:
    """The same weights in torch's own layer."""
    if isinstance(layer, LocallyGroupedSelfAttention):
        return torch_own(layer.qkv.weight, layer.qkv.bias, layer.proj)
    pairs = (layer.query, layer.key_value)
    return torch_own(torch.cat([p.weight for p in pairs]), torch.cat([p.bias for p in pairs]), layer.proj)


@pytest.mark.paper("twins")
@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
@pytest.mark.parametrize("layer", [local(7), local((6, 9)), summarised(1)], ids=["lsa", "lsa-oblong", "gsa"])
def test_one_window_or_cells_of_one_are_global_attention(layer, size) -> None:
    x = tokens(*size)
    torch.testing.assert_close(layer(x, grid=size), own_of(layer)(x, x, x)[0], **TIGHT)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (3, 10)])
@pytest.mark.parametrize("window", [4, (2, 5)])
def test_windows_equal_attention_under_their_mask(size, window) -> None:
    layer, x = local(window), tokens(*size)
    k1, k2 = (window, window) if isinstance(window, int) else window
    place = (torch.arange(size[0])[:, None] // k1 * 100 + torch.arange(size[1]) // k2).flatten()
    expected, _ = own_of(layer)(x, x, x, attn_mask=place[:, None] != place)
    torch.testing.assert_close(layer(x, grid=size), expected, **TIGHT)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (3, 2)])
@pytest.mark.parametrize("sr_ratio", [2, 4])
def test_summaries_are_convolved_normed_and_projected(size, sr_ratio) -> None:
    """Cell by cell: the kernel on the cell's tokens, whatever is missing left out of the sum."""
    layer, x = summarised(sr_ratio), tokens(*size)
    kernel, maps, cells = layer.summary.conv.weight, x.unflatten(1, size), []
    for top in range(0, size[0], sr_ratio):
        for left in range(0, size[1], sr_ratio):
            piece = maps[:, top : top + sr_ratio, left : left + sr_ratio]
            part = kernel[..., : piece.shape[1], : piece.shape[2]]
            cells.append(torch.einsum("bhwc,ochw->bo", piece, part) + layer.summary.conv.bias)
    cells = torch.stack(cells, 1)
    centred = cells - cells.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    source = normed * layer.summary.norm.weight + layer.summary.norm.bias
    torch.testing.assert_close(layer(x, grid=size), own_of(layer)(x, source, source)[0], **TIGHT)


@pytest.mark.paper("twins")
@pytest.mark.parametrize("size", [(8, 12), (7, 10)])
def test_windows_alone_keep_a_change_and_summaries_spread_it(size) -> None:
    first, second, x = local(4), summarised(4), tokens(*size, batch=1)
    changed = x.clone()
    changed[:, 1 * size[1] + 2] += 1

    def moved(one: Tensor, other: Tensor) -> Tensor:
        return ((one - other).abs().sum(-1) > 0).view(size)

    one, other = first(x, grid=size), first(changed, grid=size)
    window = torch.zeros(size, dtype=torch.bool)
    window[:4, :4] = True
    assert torch.equal(moved(one, other), window)
    assert moved(second(x + one, grid=size), second(changed + other, grid=size)).all()


@pytest.mark.paper("twins")
def test_windows_of_seven_and_eight_tie_on_56_and_beat_all_others() -> None:
    costs = {k: sssa_cost(56, 56, 64, k, k) for k in range(1, 57)}
    assert costs[7] == costs[8]
    assert all(costs[k] > costs[7] for k in costs if k not in (7, 8))
    assert optimal_window(56, 56) == 7
    assert 7 < (56 * 56) ** 0.25 < 8
    for height, width in ((1, 1), (14, 14), (28, 56), (112, 96)):
        every = {k: sssa_cost(height, width, 1, k, k) for k in range(1, max(height, width) + 1)}
        assert optimal_window(height, width) == min(every, key=every.get)


def test_cost_counts_the_pairs_of_both_halves() -> None:
    height, width, k = 12, 8, 4
    within = sum(k * k for _ in range(height * width))
    across = height * width * (height // k) * (width // k)
    assert sssa_cost(height, width, 32, k, k) == 32 * (within + across)


@pytest.mark.paper("twins")
def test_position_comes_from_the_generator_alone() -> None:
    layer, x, order = summarised(1), tokens(4, 6), torch.randperm(24)
    torch.testing.assert_close(layer(x[:, order], grid=(4, 6)), layer(x, grid=(4, 6))[:, order], **TIGHT)
    generator = PositionalEncodingGenerator(CHANNELS).double()
    out, other = (layer(generator(t, grid=(4, 6)), grid=(4, 6)) for t in (x, x[:, order]))
    assert (other - out[:, order]).abs().max() > 1e-3


def test_generator_adds_a_depthwise_convolution() -> None:
    generator, x = PositionalEncodingGenerator(CHANNELS).double(), tokens(3, 5)
    kernel, maps = generator.conv.conv.weight[:, 0], F.pad(x.unflatten(1, (3, 5)), (0, 0, 1, 1, 1, 1))
    expected = x.unflatten(1, (3, 5)) + generator.conv.conv.bias
    for row in range(3):
        for column in range(3):
            expected = expected + maps[:, row : row + 3, column : column + 5] * kernel[:, row, column]
    torch.testing.assert_close(generator(x, grid=(3, 5)), expected.flatten(1, 2), **TIGHT)


@pytest.mark.paper("twins")
@pytest.mark.parametrize(
    ("model", "widths"),
    [
        (TwinsSVT(dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), depths=(2, 2, 2, 2), num_classes=5), (16, 32, 48, 64)),
        (TwinsPCPVT(dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1, 2, 1, 1), num_classes=5), (8, 16, 24, 32)),
    ],
    ids=["svt", "pcpvt"],
)
def test_one_set_of_weights_takes_all_sizes(model, widths) -> None:
    for height, width in ((224, 224), (256, 256), (70, 100)):
        sides = [(-(-height // step), -(-width // step)) for step in (4, 8, 16, 32)]
        images = torch.randn(1, 3, height, width)
        with torch.no_grad():
            assert [m.shape[1:] for m in model.maps(images)] == [
                (channels, *side) for channels, side in zip(widths, sides, strict=True)
            ]
            assert model(images).shape == (1, 5)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.paper("twins")
@pytest.mark.parametrize(
    ("cls", "size", "millions"),
    [
        (TwinsSVT, "small", 24.06),
        (TwinsSVT, "base", 56.0),
        (TwinsSVT, "large", 99.2),
        (TwinsPCPVT, "small", 24.1),
        (TwinsPCPVT, "base", 43.8),
        (TwinsPCPVT, "large", 60.9),
    ],
)
def test_published_numbers_of_parameters(cls, size, millions) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in cls.preset(size).parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.01)


def test_stages_alternate_and_carry_one_generator() -> None:
    with torch.device("meta"):
        stages = TwinsSVT().stages
    for blocks, ratio in zip(stages, (8, 4, 2, 1), strict=True):
        assert isinstance(blocks[1], PositionalEncodingGenerator)
        attentions = [block.attention for block in (blocks[0], *blocks[2:])]
        assert [a.kind for a in attentions] == ["local", "global"] * (len(attentions) // 2)
        assert attentions[1].attention.sr_ratio == ratio


def test_initial_convolutions_keep_the_scale() -> None:
    torch.manual_seed(0)
    model = TwinsSVT(
        dims=(64, 128), num_heads=(2, 4), depths=(2, 2), windows=(7, 7), sr_ratios=(8, 4), mlp_ratios=(4, 4)
    )
    generator = model.stages[0][1].conv.conv
    assert float(generator.weight.detach().std()) == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    summary = model.stages[0][2].attention.attention.summary.conv
    assert float(summary.weight.detach().std()) == pytest.approx((2 / (64 * 64)) ** 0.5, rel=0.05)
    assert not generator.bias.any()


def test_the_registered_layer_alternates() -> None:
    built = [regard.build("twins", {"window": 4}, embed_dim=32, num_heads=4, layer_index=i) for i in range(3)]
    assert [layer.kind for layer in built] == ["local", "global", "local"]
    assert built[1].attention.sr_ratio == 4
    x = torch.randn(1, 15, 32)
    assert torch.equal(built[0](x, grid=(3, 5)), built[0].attention(x, grid=(3, 5)))


@pytest.mark.parametrize("layer", [local(4), summarised(2), summarised(1)], ids=["lsa", "gsa", "gsa-1"])
def test_padding_reaches_nothing(layer) -> None:
    """An image padded to a larger one by a margin that is hidden gives the same numbers as alone."""
    size, padded = (6, 8), (9, 12)
    x = tokens(*size)
    wide = 3 * torch.randn(2, *padded, CHANNELS, dtype=torch.float64)
    wide[:, :6, :8] = x.unflatten(1, size)
    valid = torch.zeros(2, *padded, dtype=torch.bool)
    valid[:, :6, :8] = True
    out = layer(wide.flatten(1, 2), grid=padded, mask=KeyPadding(valid.flatten(1)))
    torch.testing.assert_close(out.unflatten(1, padded)[:, :6, :8].flatten(1, 2), layer(x, grid=size), **TIGHT)


def test_summaries_of_padding_alone_are_hidden() -> None:
    """Not merely zeros: without the mask a summary of zeros is a key like any other."""
    layer, x = summarised(2), tokens(4, 4)
    x.unflatten(1, (4, 4))[:, 2:] = 0
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, 2:] = False
    hidden = layer(x, grid=(4, 4), mask=KeyPadding(valid.flatten(1)))
    assert not torch.allclose(hidden, layer(x, grid=(4, 4)))
    torch.testing.assert_close(hidden[:, :8], layer(x[:, :8], grid=(2, 4)), **TIGHT)


def test_windows_take_any_mask_and_summaries_only_padding() -> None:
    x = tokens(4, 4)
    layer = local(4)
    expected, _ = own_of(layer)(x, x, x, attn_mask=~Causal().dense(16, 16)[0, 0])
    torch.testing.assert_close(layer(x, grid=(4, 4), mask=Causal()), expected, **TIGHT)
    with pytest.raises(UnsupportedMaskError, match="KeyPadding"):
        summarised(2)(x, grid=(4, 4), mask=Causal())
    with pytest.raises(UnsupportedMaskError, match="heads"):
        summarised(2)(x, grid=(4, 4), mask=Boolean(torch.ones(1, HEADS, 1, 16, dtype=torch.bool)))


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="num_heads"):
        LocallyGroupedSelfAttention(10, 4)
    with pytest.raises(OptionError, match="sides"):
        LocallyGroupedSelfAttention(16, 4, window=0)
    with pytest.raises(OptionError, match="sr_ratio"):
        GlobalSubsampledAttention(16, 4, sr_ratio=0)
    with pytest.raises(OptionError, match="kind"):
        SpatiallySeparableAttention(16, 4, kind="both")
    with pytest.raises(ShapeError, match="grid"):
        local()(tokens(3, 4))
    with pytest.raises(OptionError, match="stage"):
        TwinsSVT(depths=(1, 1))
    with pytest.raises(OptionError, match="preset"):
        TwinsPCPVT.preset("tiny")
