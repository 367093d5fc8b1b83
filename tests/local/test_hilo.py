"""HiLo attention against torch's own attention, its dependencies and its counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import OptionError, ShapeError
from regard.local.hilo import HiLoAttention
from regard.models.litv2 import LITv2

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def layer(channels: int = 16, num_heads: int = 4, **options) -> HiLoAttention:
    return HiLoAttention(channels, num_heads, **options).double()


def tokens(height: int, width: int, channels: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, height * width, channels, dtype=torch.float64)


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.paper("hilo")
def test_window_of_one_is_multi_head_attention() -> None:
    hilo = layer(window=1, alpha=0.5)
    torch_own = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        torch_own.in_proj_weight.copy_(torch.cat((hilo.lo_query.weight, hilo.lo_key_value.weight)))
        torch_own.in_proj_bias.copy_(torch.cat((hilo.lo_query.bias, hilo.lo_key_value.bias)))
        torch_own.out_proj.load_state_dict(hilo.lo_proj.state_dict())
    x = tokens(5, 7)
    torch.testing.assert_close(hilo(x, grid=(5, 7)), torch_own(x, x, x)[0], **TIGHT)


@pytest.mark.paper("hilo")
@pytest.mark.parametrize("window", [2, 3])
def test_alpha_zero_stays_inside_windows(window: int) -> None:
    hilo, x = layer(alpha=0, window=window), tokens(6, 6, batch=1)
    changed = x.clone()
    changed[:, 8] += 1  # row 1, column 2
    moved = (hilo(changed, grid=(6, 6)) - hilo(x, grid=(6, 6))).abs().sum(-1).view(6, 6) > 0
    row, column = 1 // window * window, 2 // window * window
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[row : row + window, column : column + window] = True
    assert torch.equal(moved, inside)


@pytest.mark.paper("hilo")
def test_alpha_one_sees_only_window_means() -> None:
    hilo, x = layer(alpha=1, window=2), tokens(4, 6)
    order = torch.arange(24)
    order[[0, 1, 6, 7]] = torch.tensor([7, 0, 1, 6])  # the pixels of the first window
    torch.testing.assert_close(hilo(x[:, order], grid=(4, 6)), hilo(x, grid=(4, 6))[:, order], **TIGHT)


@pytest.mark.paper("hilo")
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_number_of_weights(alpha: float) -> None:
    channels, heads = 64, 8
    hilo = HiLoAttention(channels, heads, alpha=alpha)
    low = int(alpha * heads) * channels // heads
    high = channels - low
    weights = sum(p.numel() for p in hilo.parameters() if p.dim() == 2)
    assert weights == 3 * channels * high + high**2 + 3 * channels * low + low**2
    if alpha == 0.5:
        assert weights == 3.5 * channels**2


@pytest.mark.paper("hilo")
def test_channels_depend_on_their_own_branch_alone() -> None:
    hilo, x = layer(alpha=0.5), tokens(4, 6)
    before = hilo(x, grid=(4, 6))
    for name, own in (("hi", slice(0, 8)), ("lo", slice(8, 16))):
        other = slice(8, 16) if name == "hi" else slice(0, 8)
        state = {k: v.clone() for k, v in hilo.state_dict().items()}
        with torch.no_grad():
            for key, parameter in hilo.named_parameters():
                if key.startswith(name):
                    parameter.add_(torch.randn_like(parameter))
        after = hilo(x, grid=(4, 6))
        assert torch.equal(after[..., other], before[..., other])
        assert (after[..., own] != before[..., own]).all()
        hilo.load_state_dict(state)


@pytest.mark.paper("hilo")
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("official", [False, True])
def test_flops_equal_a_count_of_products(size, alpha, official) -> None:
    hilo = HiLoAttention(16, 4, alpha=alpha, official=official)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hilo(torch.randn(1, size[0] * size[1], 16), grid=size)
    assert counter.get_total_flops() == 2 * hilo.flops(*size)


def test_flops_are_the_papers_at_an_equal_split() -> None:
    tokens_, channels, s = 14 * 14, 64, 2
    high = 7 / 4 * tokens_ * channels**2 + s**2 * tokens_ * channels
    low = (3 / 4 + 1 / s**2) * tokens_ * channels**2 + tokens_**2 * channels / s**2
    assert HiLoAttention(channels, 8, window=s, alpha=0.5).flops(14, 14) == high + low


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.parametrize("window", [2, 3])
def test_branches_against_dense_attention(size, window) -> None:
    hilo, x = layer(alpha=0.5, window=window), tokens(*size)
    place = torch.arange(size[0])[:, None] // window * 100 + torch.arange(size[1]) // window
    same = place.flatten()[:, None] == place.flatten()
    q, k, v = (heads_of(t, 2) for t in hilo.hi_qkv(x).chunk(3, -1))
    high = F.scaled_dot_product_attention(q, k, v, attn_mask=same).transpose(1, 2).flatten(2)
    pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, size), window, ceil_mode=True, count_include_pad=False)
    k, v = (heads_of(t, 2) for t in hilo.lo_key_value(pooled.flatten(2).transpose(1, 2)).chunk(2, -1))
    low = F.scaled_dot_product_attention(heads_of(hilo.lo_query(x), 2), k, v).transpose(1, 2).flatten(2)
    expected = torch.cat((hilo.hi_proj(high), hilo.lo_proj(low)), -1)
    torch.testing.assert_close(hilo(x, grid=size), expected, **TIGHT)


def test_official_filling_takes_part() -> None:
    hilo, official = layer(alpha=0.5), layer(alpha=0.5, official=True)
    official.load_state_dict(hilo.state_dict())
    x = tokens(5, 7)
    filled = F.pad(x.unflatten(1, (5, 7)), (0, 0, 0, 1, 0, 1)).flatten(1, 2)
    expected = hilo(filled, grid=(6, 8)).unflatten(1, (6, 8))[:, :5, :7].flatten(1, 2)
    torch.testing.assert_close(official(x, grid=(5, 7)), expected, **TIGHT)
    assert not torch.allclose(hilo(x, grid=(5, 7)), expected)


def test_frequency_profile_is_the_spectrum_of_each_branch() -> None:
    hilo, x = layer(alpha=0.5), tokens(6, 8)
    profile = hilo.frequency_profile(x, grid=(6, 8))
    maps = hilo.hifi(x, (6, 8)).transpose(1, 2).unflatten(2, (6, 8))
    middle = maps.sum((2, 3)).abs().mean().log()
    torch.testing.assert_close(profile["hi"][3, 4], middle)
    assert profile["lo"].shape == (6, 8)
    assert set(layer(alpha=1.0).frequency_profile(x, grid=(6, 8))) == {"lo"}


def test_backbone_takes_position_from_its_convolutions() -> None:
    model = LITv2(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=5)
    images = torch.randn(2, 3, 70, 64)
    assert [m.shape[1:] for m in model.maps(images)] == [(16, 17, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)]
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.device("meta"):
        small = sum(p.numel() for p in LITv2.preset("small").parameters())
    assert 26e6 < small < 30e6


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="num_heads"):
        HiLoAttention(10, 4)
    with pytest.raises(ShapeError, match="grid"):
        HiLoAttention(16, 4)(torch.randn(1, 12, 16))
    with pytest.raises(OptionError, match="preset"):
        LITv2.preset("tiny")
