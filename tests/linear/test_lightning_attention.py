from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels import LinearState
from regard.linear.lightning_attention import (
    LightningAttention,
    TnlAttention,
    decay_slopes,
    lightning_attention,
    lrpe,
    srms_norm,
)
from regard.masks import KeyPadding

SLOPES = torch.tensor([0.5, 0.03, 0.0], dtype=torch.float64)


def draw(n: int = 53, d: int = 5, dv: int = 4, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(2, 3, n, size, dtype=torch.float64, requires_grad=grad) for size in (d, d, dv))
    return query, key, value


def loop(query: Tensor, key: Tensor, value: Tensor, slope: Tensor = SLOPES) -> Tensor:
    """The definition: o_t = sum over s <= t of lam^(t - s) (q_t . k_s) v_s."""
    rows = []
    for t in range(query.shape[2]):
        age = torch.arange(t, -1, -1, dtype=query.dtype)
        fade = torch.exp(-slope[:, None].to(query.dtype) * age)
        scores = torch.einsum("bhd,bhsd->bhs", query[:, :, t], key[:, :, : t + 1]) * fade
        rows.append(torch.einsum("bhs,bhse->bhe", scores, value[:, :, : t + 1]))
    return torch.stack(rows, 2)


@pytest.mark.paper("lightning_attention")
@pytest.mark.parametrize("mode", ["tiled", "recurrent", "parallel", "cumsum"])
def test_forms_agree_with_the_definition(mode: str) -> None:
    inputs = draw()  # 53 tokens: the last tile of 16 is a partial one
    out, state = lightning_attention(*inputs, SLOPES, block=16, mode=mode)
    torch.testing.assert_close(out, loop(*inputs), rtol=0, atol=1e-12)
    age = torch.arange(52, -1, -1, dtype=torch.float64)
    fade = torch.exp(-SLOPES[:, None] * age)
    torch.testing.assert_close(state.sum, torch.einsum("hs,bhsd,bhse->bhde", fade, *inputs[1:]), rtol=0, atol=1e-12)


@pytest.mark.paper("lightning_attention")
@pytest.mark.parametrize("block", [1, 7, 16, 64, 200])
def test_block_size_and_gradients(block: int) -> None:
    inputs, others = draw(grad=True), draw(grad=True)
    with torch.no_grad():
        for a, b in zip(others, inputs, strict=True):
            a.copy_(b)
    out, _ = lightning_attention(*inputs, SLOPES, block=block)
    age = torch.arange(53)[:, None] - torch.arange(53)
    mask = torch.where(age >= 0, torch.exp(-SLOPES[:, None, None] * age.clamp_min(0)), 0.0)
    query, key, value = others
    masked = (query @ key.transpose(-1, -2) * mask) @ value
    torch.testing.assert_close(out, masked, rtol=0, atol=1e-12)
    seed = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, seed), torch.autograd.grad(masked, others, seed), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.paper("lightning_attention")
def test_limits_of_the_slope() -> None:
    query, key, value = draw()
    plain, _ = lightning_attention(query, key, value, torch.zeros(3))
    sums = torch.einsum("bhnd,bhne->bhnde", key, value).cumsum(2)
    torch.testing.assert_close(plain, torch.einsum("bhnd,bhnde->bhne", query, sums), rtol=0, atol=1e-12)
    own = (query * key).sum(-1, keepdim=True) * value
    for slope in (60.0, math.inf):
        for mode in ("tiled", "recurrent", "parallel", "cumsum"):
            out, _ = lightning_attention(query, key, value, torch.full((3,), slope), mode=mode)
            torch.testing.assert_close(out, own, rtol=0, atol=1e-12)


@pytest.mark.paper("lightning_attention")
@pytest.mark.parametrize("mode", ["tiled", "recurrent", "parallel", "cumsum"])
def test_passing_the_state_is_one_pass(mode: str) -> None:
    inputs = draw()
    whole, last = lightning_attention(*inputs, SLOPES, block=8)
    state: LinearState | None = None
    parts = []
    for q, k, v in zip(*(t.split((20, 1, 32), 2) for t in inputs), strict=True):
        out, state = lightning_attention(q, k, v, SLOPES, 8, state, mode)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)
    assert state is not None
    torch.testing.assert_close(state.sum, last.sum, rtol=0, atol=1e-12)


@pytest.mark.paper("lightning_attention")
def test_srms_norm_and_slopes() -> None:
    x = torch.randn(4, 7, dtype=torch.float64)
    normed = srms_norm(x)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-14)
    for factor in (1e-5, 3.0, 1e6):
        torch.testing.assert_close(srms_norm(factor * x), normed, rtol=1e-12, atol=0)
    assert not bool(srms_norm(torch.zeros(3)).any())
    layers = torch.stack([decay_slopes(8, layer, 12) for layer in range(12)])
    assert bool((layers[1:] < layers[:-1]).all())
    assert float(layers[-1].max()) < 1e-5
    torch.testing.assert_close(layers[0], 2.0 ** -torch.arange(1.0, 9, dtype=torch.float64) * (1 + 1e-5))


@pytest.mark.paper("lightning_attention")
def test_no_overflow_over_a_hundred_thousand_tokens() -> None:
    query, key, value = (torch.randn(1, 1, 100_000, 4) for _ in range(3))
    slope = torch.ones(1)
    out, state = lightning_attention(query, key, value, slope)
    assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(state.sum).all())
    # With slope 1 the last 60 tokens are all that float32 can tell.
    q, k, v = (t[:, :, -60:].double() for t in (query, key, value))
    torch.testing.assert_close(out[:, :, -1].double(), loop(q, k, v, slope)[:, :, -1], rtol=0, atol=1e-5)


def test_slopes_between_powers_of_two() -> None:
    """ALiBi's rule for 12 heads: the slopes of 8, then every other one of 16."""
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** (-i / 2) for i in (1, 3, 5, 7)]
    torch.testing.assert_close(decay_slopes(12) / (1 + 1e-5), torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(OptionError):
        decay_slopes(8, 3, 3)


def test_mechanism_takes_slopes_of_its_layer_and_masks_keys() -> None:
    query, key, value = draw()
    mechanism = LightningAttention(block_size=8, layer_index=1, num_layers=3)
    torch.testing.assert_close(
        mechanism(query, key, value, causal=True), loop(query, key, value, decay_slopes(3, 1, 3)), rtol=0, atol=1e-12
    )
    valid = torch.rand(2, 53) < 0.7
    out = LightningAttention(slopes=[0.5, 0.03, 0.0])(query, key, value, causal=True, mask=KeyPadding(valid))
    kept = value * valid[:, None, :, None]
    torch.testing.assert_close(out, loop(query, key, kept), rtol=0, atol=1e-12)


def test_wrong_slopes_are_refused() -> None:
    with pytest.raises(OptionError):
        LightningAttention(slopes=[-0.1])
    with pytest.raises(ShapeError):
        lightning_attention(*draw(), torch.ones(2))
    with pytest.raises(OptionError):
        lightning_attention(*draw(), SLOPES, mode="fast")


def test_lrpe_makes_products_relative() -> None:
    theta = torch.rand(3, 5, dtype=torch.float64)
    query, key, _ = draw(n=9)
    scores = lrpe(query, theta) @ lrpe(key, theta).transpose(-1, -2)
    gap = torch.arange(9)[:, None] - torch.arange(9)
    wave = torch.cos(theta[:, None, None] * gap[..., None])
    torch.testing.assert_close(scores, torch.einsum("bhic,bhjc,hijc->bhij", query, key, wave), rtol=0, atol=1e-13)
    torch.testing.assert_close(lrpe(query, theta)[:, :, 4:], lrpe(query[:, :, 4:], theta, start=4))


@pytest.mark.parametrize("official", [False, True])
def test_layer_is_the_formula(official: bool) -> None:
    layer = TnlAttention(12, 3, layer_index=1, num_layers=4, official=official).double()
    x = torch.randn(2, 21, 12, dtype=torch.float64)

    def heads(t: Tensor) -> Tensor:
        return t.view(2, 21, 3, 4).transpose(1, 2)

    value = layer.value(x)
    value = F.silu(value) if official else value
    mixed = loop(heads(F.silu(layer.query(x))), heads(F.silu(layer.key(x))), heads(value), decay_slopes(3, 1, 4))
    mixed = mixed.transpose(1, 2).reshape(2, 21, 12)
    normed = F.layer_norm(mixed, (12,)) if official else mixed / mixed.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(x), layer.out(normed * layer.gate(x)))


def test_only_the_first_layer_rotates() -> None:
    assert [TnlAttention(12, 3, index, 4).theta is not None for index in range(4)] == [True, False, False, False]
