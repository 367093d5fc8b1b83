"""Long-short attention against torch's own attention, its windows, its cache, and its argument about rank."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.errors import OptionError, ShapeError, UnknownNameError, UnsupportedPatternError
from regard.local.ls_attention import LongShortAttention
from regard.masks import Boolean, KeyPadding
from regard.reproduce.ls_attention import least_logit

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def layer(channels: int = 16, num_heads: int = 4, **options) -> LongShortAttention:
    return LongShortAttention(channels, num_heads, **options).double()


def tokens(length: int, channels: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, channels, dtype=torch.float64)


def torch_twin(layer: LongShortAttention) -> nn.MultiheadAttention:
    """torch's own module with the same weights, local heads first."""
    twin = nn.MultiheadAttention(layer.embed_dim, layer.num_heads, batch_first=True, dtype=torch.float64)
    thirds = [[], []]
    for group in layer.groups.values():
        for kept, whole in zip(thirds, (group.qkv.weight, group.qkv.bias), strict=True):
            kept.append(whole.chunk(3))
    with torch.no_grad():
        for target, parts in zip((twin.in_proj_weight, twin.in_proj_bias), thirds, strict=True):
            target.copy_(torch.cat([torch.cat(part) for part in zip(*parts, strict=True)]))
        twin.out_proj.load_state_dict(layer.out.state_dict())
    return twin


def torch_output(layer: LongShortAttention, x: Tensor) -> Tensor:
    """Each head under its mask, by torch."""
    length = x.shape[1]
    gap = torch.arange(length)[:, None] - torch.arange(length)
    seen = (gap >= 0).repeat(layer.num_heads, 1, 1)
    seen[: layer.local_heads] &= gap <= layer.window
    hidden = ~seen.repeat(len(x), 1, 1)
    return torch_twin(layer)(x, x, x, attn_mask=hidden, need_weights=False)[0]


@pytest.mark.paper("ls_attention")
@pytest.mark.parametrize("window", [22, 100])
@pytest.mark.parametrize("executor", ["windowed", "masked"])
def test_a_window_over_everything_is_causal_multi_head_attention(window: int, executor: str) -> None:
    long_short, x = layer(window=window, executor=executor), tokens(23)
    causal = nn.Transformer.generate_square_subsequent_mask(23, dtype=torch.float64)
    expected = torch_twin(long_short)(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(long_short(x), expected, **TIGHT)


@pytest.mark.paper("ls_attention")
@pytest.mark.parametrize("local_heads", [0, 1, 3, 4])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_both_executors_are_attention_under_a_mask_per_head(local_heads: int, window: int) -> None:
    windowed = layer(local_heads=local_heads, window=window)
    masked = layer(local_heads=local_heads, window=window, executor="masked")
    masked.load_state_dict(windowed.state_dict())
    x = tokens(83)
    expected = torch_output(windowed, x)
    torch.testing.assert_close(windowed(x), expected, **TIGHT)
    torch.testing.assert_close(masked(x), expected, **TIGHT)


@pytest.mark.paper("ls_attention")
@pytest.mark.parametrize("executor", ["windowed", "masked"])
def test_a_token_beyond_the_window_changes_no_local_head(executor: str) -> None:
    long_short, x = layer(window=4, executor=executor), tokens(30)
    with torch.no_grad():
        long_short.out.weight.copy_(torch.eye(16))  # channels are then head outputs, local ones first
    changed = x.clone()
    changed[:, 10] += 1
    moved = (long_short(changed) - long_short(x)).abs().amax(0) > 0
    near = torch.zeros(30, dtype=torch.bool)
    near[10:15] = True
    assert torch.equal(moved[:, :8], near[:, None].expand(-1, 8))
    assert torch.equal(moved[:, 8:], (torch.arange(30) >= 10)[:, None].expand(-1, 8))


@pytest.mark.paper("ls_attention")
@pytest.mark.parametrize("local_heads", [0, 2, 4])
def test_as_many_parameters_as_multi_head_attention(local_heads: int) -> None:
    count = sum(p.numel() for p in layer(local_heads=local_heads).parameters())
    assert count == sum(p.numel() for p in nn.MultiheadAttention(16, 4).parameters())
    assert layer(local_heads=local_heads)(tokens(5)).shape == (2, 5, 16)


def test_narrow_heads_give_their_parameters_to_the_mlp() -> None:
    wide, narrow = LongShortAttention(64, 4, bias=False), LongShortAttention(64, 4, head_dim=12, bias=False)
    saved = sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in narrow.parameters())
    assert saved == 2 * 64 * narrow.spare_width, "an MLP has 2 D parameters a hidden unit"
    assert wide.spare_width == 0
    assert narrow(torch.randn(1, 9, 64)).shape == (1, 9, 64)


@pytest.mark.paper("ls_attention")
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("local_heads", [0, 2, 4])
def test_decoding_is_the_whole_pass(window: int, local_heads: int) -> None:
    long_short, x = layer(window=window, local_heads=local_heads), tokens(40)
    expected, state, outs, start = long_short(x), long_short.init_state(2, like=x), [], 0
    for size in (17, 1, 1, 9, 1, 11):
        out, state = long_short.step(x[:, start : start + size], state)
        outs.append(out)
        start += size
        if "local" in state:
            # With the token to come they are window + 1.
            assert state["local"].read().key.shape == (2, local_heads, min(start, window), 4)
        if "global" in state:
            assert state["global"].read().key.shape[2] == start
    torch.testing.assert_close(torch.cat(outs, 1), expected, **TIGHT)


@pytest.mark.paper("ls_attention")
def test_a_band_of_low_rank_takes_logits_that_grow_with_the_length_unless_it_is_cut() -> None:
    """Rank 4: all of the past against a window of 3 tokens and the own."""
    past = [least_logit(length, 4) for length in (8, 16, 32, 64)]
    near = [least_logit(length, 4, window=3) for length in (8, 16, 32, 64)]
    assert all(a < b for a, b in itertools.pairwise(past))
    assert past[-1] > 3 * past[0]
    assert max(near) <= 1.2 * min(near) and max(near) < past[0]


def test_presets_are_those_of_the_released_code() -> None:
    half, newest = (LongShortAttention.preset(name, 96, 12) for name in ("half", "newest"))
    assert (half.local_heads, half.window) == (6, 20)
    assert (newest.local_heads, newest.window) == (11, 100)
    assert LongShortAttention.preset("newest", 32, 4).local_heads == 3
    assert LongShortAttention.preset("half", 32, 4, window=30).window == 30
    with pytest.raises(UnknownNameError, match="half"):
        LongShortAttention.preset("haf", 32, 4)


@pytest.mark.parametrize("executor", ["windowed", "masked"])
def test_padding_is_not_seen(executor: str) -> None:
    long_short, x = layer(window=4, executor=executor), tokens(20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :6] = False
    out = long_short(x, mask=KeyPadding(valid))
    torch.testing.assert_close(out[0], long_short(x)[0], **TIGHT)
    torch.testing.assert_close(out[1, 6:], long_short(x[1:, 6:])[0], **TIGHT)
    torch.testing.assert_close(long_short(x, mask=valid[:, None, None]), out, **TIGHT)


def test_a_model_of_it_is_watched_and_retrofitted_like_others() -> None:
    model = nn.Sequential(layer(window=4))
    x = tokens(20)
    expected = model(x)
    with regard.capture(model, "all") as trace:
        assert torch.equal(model(x), expected)
    near, far = trace
    assert near.weights is not None and far.weights is not None
    assert not bool(near.weights.tril(-5).any()) and bool(far.weights.tril(-5).any())
    scores = (near.queries @ near.keys.transpose(-1, -2) / 2).masked_fill(near.weights == 0, float("-inf"))
    torch.testing.assert_close(F.softmax(scores, -1), near.weights)
    with regard.retrofit(model, "sliding_window", layers="re:global", window=5, sinks=0):
        alike = layer(window=4, local_heads=4)
        parts = zip(*(group.qkv.weight.chunk(3) for group in model[0].groups.values()), strict=True)
        with torch.no_grad():
            alike.groups["local"].qkv.weight.copy_(torch.cat([torch.cat(part) for part in parts]))
            parts = zip(*(group.qkv.bias.chunk(3) for group in model[0].groups.values()), strict=True)
            alike.groups["local"].qkv.bias.copy_(torch.cat([torch.cat(part) for part in parts]))
            alike.out.load_state_dict(model[0].out.state_dict())
        torch.testing.assert_close(model(x), alike(x), **TIGHT)


def test_mistakes_teach() -> None:
    for wrong in ({"local_heads": 5}, {"local_heads": -1}, {"window": -1}):
        with pytest.raises(OptionError, match="local_heads <= num_heads"):
            LongShortAttention(16, 4, **wrong)
    with pytest.raises(OptionError, match="executor"):
        LongShortAttention(16, 4, executor="banded")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="head_dim"):
        LongShortAttention(18, 4)
    with pytest.raises(UnsupportedPatternError, match="causal"):
        layer()(tokens(5), causal=False)
    with pytest.raises(ShapeError, match="one mask for all heads"):
        layer()(tokens(5), mask=Boolean(torch.ones(4, 5, 5, dtype=torch.bool)))
    with pytest.raises(ShapeError, match="batch, length, 16"):
        layer()(tokens(5, 8))
