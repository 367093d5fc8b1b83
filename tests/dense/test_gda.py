"""Grouped differential attention against the Differential Transformer's own formula and plain attention."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.dense.gda import (
    DifferentialAttention,
    GroupedDifferentialAttention,
    attention_noise_ratio,
    grow_signal_heads,
    lambda_init,
)
from regard.errors import OptionError, ShapeError
from regard.masks import KeyPadding
from regard.registry import build

WIDTH, DIM, LENGTH = 32, 4, 9


def tokens(seed: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(heads: int = 8, noise: int | None = 2, **options: object) -> GroupedDifferentialAttention:
    torch.manual_seed(0)
    made = GroupedDifferentialAttention(WIDTH, heads, noise, head_dim=DIM, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 2)
        for vector in (made.lambda_q1, made.lambda_k1, made.lambda_q2, made.lambda_k2):
            vector.normal_(std=0.4)
    return made


def rotate(x: Tensor) -> Tensor:
    """Rotary positions of ``(batch, length, heads, dim)`` as products of complex numbers."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(x.shape[1])[:, None] * rates)[:, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def the_lambda(made: GroupedDifferentialAttention, layer_number: int = 1) -> float:
    q1, k1, q2, k2 = (v.tolist() for v in (made.lambda_q1, made.lambda_k1, made.lambda_q2, made.lambda_k2))
    first, second = (math.fsum(a * b for a, b in zip(u, v, strict=True)) for u, v in ((q1, k1), (q2, k2)))
    return math.exp(first) - math.exp(second) + 0.8 - 0.6 * math.exp(-0.3 * (layer_number - 1))


def differential_transformer(made: GroupedDifferentialAttention, x: Tensor, causal: bool, layer_number: int) -> Tensor:
    """Ye et al. 2024 as published: query and key heads in pairs, two softmax maps, their weighted difference."""
    batch, length, _ = x.shape
    heads, lam = made.num_heads // 2, the_lambda(made, layer_number)
    query, key = (rotate(m(x).view(batch, length, 2 * heads, DIM)) for m in (made.query, made.key))
    value = made.value(x).view(batch, length, heads, 2 * DIM)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else torch.zeros(1, 1, dtype=torch.bool)
    outputs = []
    for h in range(heads):
        maps = []
        for which in (2 * h, 2 * h + 1):
            scores = torch.einsum("bqd,bkd->bqk", query[:, :, which], key[:, :, which]) / math.sqrt(DIM)
            maps.append(scores.masked_fill(hidden, -math.inf).softmax(-1))
        out = (maps[0] - lam * maps[1]) @ value[:, :, h]
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * made.norm.weight
        outputs.append(out * (0.2 + 0.6 * (1 - math.exp(-0.3 * (layer_number - 1))) - 1) * -1)
    return torch.cat(outputs, -1) @ made.out.weight.T


def grouped(made: GroupedDifferentialAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Difference maps and values for every signal head, head by head in loops."""
    batch, length, _ = x.shape
    query = rotate(made.query(x).view(batch, length, made.num_heads, DIM))
    key = rotate(made.key(x).view(batch, length, 2 * made.groups, DIM))
    value = made.value(x).view(batch, length, made.groups, -1)
    size, lam, maps, values = made.ratio + 1, the_lambda(made), [], []
    for g in range(made.num_noise_heads):
        shared = g * made.groups // made.num_noise_heads
        noise = (query[:, :, g * size + size - 1] @ key[:, :, 2 * shared + 1].transpose(1, 2) / 2).softmax(-1)
        for r in range(made.ratio):
            signal = (query[:, :, g * size + r] @ key[:, :, 2 * shared].transpose(1, 2) / 2).softmax(-1)
            maps.append(signal - lam * noise)
            values.append(value[:, :, shared])
    return torch.stack(maps, 1), torch.stack(values, 1)


@pytest.mark.paper("gda")
@pytest.mark.parametrize("causal", [False, True])
def test_one_signal_head_a_group_is_the_differential_transformer(causal: bool) -> None:
    made, x = layer(6, 3, layer_index=2), tokens()
    torch.testing.assert_close(made(x, causal=causal), differential_transformer(made, x, causal, 3))
    named = DifferentialAttention(WIDTH, 3, head_dim=DIM, layer_index=2).double()
    assert isinstance(named, GroupedDifferentialAttention)
    named.load_state_dict(made.state_dict())
    torch.testing.assert_close(named(x, causal=causal), differential_transformer(made, x, causal, 3))
    assert DifferentialAttention(WIDTH, 4).head_dim == 4


@pytest.mark.paper("gda")
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_rows_sum_to_one_less_lambda(groups: int) -> None:
    made = layer(12, 4, num_kv_heads=groups)
    for causal in (False, True):
        maps = made.maps(tokens(), causal=causal)
        assert maps.shape == (2, 8, LENGTH, LENGTH)
        torch.testing.assert_close(maps.sum(-1), torch.full_like(maps[..., 0], 1 - the_lambda(made)))
    sharp = GroupedDifferentialAttention(WIDTH, 12, 4, head_dim=DIM, lambda_std=0).double().maps(20 * tokens())
    assert float(sharp.detach().min()) < 0


@pytest.mark.paper("gda")
@pytest.mark.parametrize("groups", [2, 1])
def test_lambda_zero_is_grouped_query_attention_and_the_norm(groups: int) -> None:
    made, x = layer(8, 2, num_kv_heads=groups, rotary=False), tokens()
    with torch.no_grad():  # exp(0) - exp(log 1.2) + 0.2 = 0
        for vector in (made.lambda_q1, made.lambda_q2, made.lambda_k1, made.lambda_k2):
            vector.zero_()
        made.lambda_q2[0], made.lambda_k2[0] = 1, math.log(1.2)
    assert abs(float(made.lam.detach())) < 1e-12
    query = made.query(x).view(2, LENGTH, 2, 4, DIM)[:, :, :, :3].flatten(2, 3).transpose(1, 2)
    key = made.key(x).view(2, LENGTH, groups, 2, DIM)[:, :, :, 0].transpose(1, 2)
    value = made.value(x).view(2, LENGTH, groups, 2 * DIM).transpose(1, 2)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    normed = F.rms_norm(plain, (2 * DIM,), made.norm.weight, 1e-5) * 0.8
    torch.testing.assert_close(made(x, causal=True), made.out(normed.transpose(1, 2).flatten(2)))


@pytest.mark.paper("gda")
@pytest.mark.parametrize(("heads", "noise", "groups"), [(8, 2, 2), (8, 2, 1), (10, 2, 2), (6, 3, 3), (12, 4, 2)])
def test_two_passes_equal_the_materialised_map(heads: int, noise: int, groups: int) -> None:
    made, x = layer(heads, noise, num_kv_heads=groups, value_dim=6), tokens()
    maps, values = grouped(made, x)
    torch.testing.assert_close(made.maps(x), maps)
    normed = F.rms_norm(maps @ values, (6,), made.norm.weight, 1e-5) * (1 - 0.2)
    torch.testing.assert_close(made(x), made.out(normed.transpose(1, 2).flatten(2)))


@pytest.mark.paper("gda")
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("groups", [2, 1])
def test_growing_keeps_the_function(groups: int, factor: int) -> None:
    made, x = layer(8, 2, num_kv_heads=groups, layer_index=1), tokens()
    grown = grow_signal_heads(made.eval(), factor)
    torch.testing.assert_close(grown(x, causal=True), made(x, causal=True), rtol=0, atol=1e-10)
    assert (grown.num_noise_heads, grown.ratio, grown.training) == (2, 3 * factor, False)
    for name in ("key.weight", "value.weight", "norm.weight", "lambda_q1", "lambda_k2"):
        assert torch.equal(grown.state_dict()[name], made.state_dict()[name])
    added = sum(p.numel() for p in grown.parameters()) - sum(p.numel() for p in made.parameters())
    assert added == (factor - 1) * 6 * (DIM + 2 * DIM) * WIDTH  # queries and output columns of signal heads alone
    noise = [m.query.weight.view(2, -1, DIM, WIDTH)[:, -1] for m in (made, grown)]
    assert torch.equal(noise[0], noise[1])


def test_growing_with_jitter_breaks_the_symmetry() -> None:
    made = layer()
    grown = grow_signal_heads(made, 2, jitter=0.01)
    rows = grown.query.weight.view(2, 7, DIM, WIDTH)
    assert not torch.equal(rows[:, 0], rows[:, 1])
    torch.testing.assert_close(grown(tokens()), made(tokens()), rtol=0.1, atol=0.02)


@pytest.mark.paper("gda")
def test_lambda_starts_at_its_schedule() -> None:
    for index in range(4):
        made = GroupedDifferentialAttention(WIDTH, 8, 2, layer_index=index, lambda_std=0)
        assert float(made.lam) == pytest.approx(0.8 - 0.6 * math.exp(-0.3 * index))
    assert lambda_init(1) == pytest.approx(0.2)
    assert lambda_init(100) == pytest.approx(0.8)
    # The public Motif port counts its first layer as 0.
    assert GroupedDifferentialAttention(WIDTH, 8, layer_index=-1).lambda_init == pytest.approx(-0.00991528)
    assert float(layer().lam) == pytest.approx(the_lambda(layer()))


@pytest.mark.paper("gda")
def test_causal() -> None:
    made, x, changed = layer(), tokens(), tokens()
    changed[:, 5:] = 3 * tokens(7)[:, 5:]
    before, after = made(x, causal=True), made(changed, causal=True)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
    assert float((after[:, 5:] - before[:, 5:]).abs().max()) > 1e-2
    assert not bool(made.maps(x, causal=True).triu(1).any())


@pytest.mark.paper("gda")
def test_the_share_of_noise_projections() -> None:
    """The noise part of the query projection shrinks from a half to 1 / (G + 1)."""
    for heads, noise in ((8, 4), (8, 2), (10, 2)):
        made = GroupedDifferentialAttention(WIDTH, heads, noise, head_dim=DIM)
        parts = made.query.weight.view(noise, made.ratio + 1, DIM, WIDTH)
        assert parts[:, -1].numel() / parts.numel() == 1 / (heads // noise)
    motif = GroupedDifferentialAttention(64, 40, 8, num_kv_heads=16, head_dim=2, value_dim=4)
    assert (motif.ratio, motif.key.out_features, motif.value.out_features) == (4, 16 * 2, 8 * 4)


def test_masks_and_rows_with_nothing_to_see() -> None:
    made, x = layer(), tokens()
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 6:] = False
    short = made(x[1:, :6])
    torch.testing.assert_close(made(x, mask=KeyPadding(valid))[1:, :6], short)
    nothing = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    x.requires_grad_()
    out = made(x, mask=nothing)
    assert not bool(out.any())
    out.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_half_precision_keeps_the_difference() -> None:
    made = layer()
    coarse = copy.deepcopy(made).bfloat16()
    assert coarse.lam.dtype == torch.float32
    fine = copy.deepcopy(coarse).double()
    x = tokens().bfloat16()
    torch.testing.assert_close(coarse(x).double(), fine(x.double()), rtol=0.05, atol=0.05)


def test_noise_ratio() -> None:
    weights = torch.tensor([[0.5, -0.25, 0.25], [0.0, 0.0, 0.0]])
    ratio = attention_noise_ratio(weights, torch.tensor([True, False, False]))
    torch.testing.assert_close(ratio, torch.tensor([0.5, 0.0]))


def test_hosts_and_errors() -> None:
    made = build("gda", {}, embed_dim=WIDTH, num_heads=16, num_kv_heads=6, layer_index=3, num_layers=4)
    assert (made.num_noise_heads, made.groups, made.layer_index) == (4, 2, 3)
    assert GroupedDifferentialAttention(WIDTH, 4).num_noise_heads == 1
    assert GroupedDifferentialAttention(15, 5).ratio == 4
    for options in (
        {"num_noise_heads": 3},
        {"num_noise_heads": 8},
        {"num_noise_heads": 0},
        {"num_noise_heads": 4, "num_kv_heads": 3},
    ):
        with pytest.raises(OptionError):
            GroupedDifferentialAttention(WIDTH, 8, **options)
    with pytest.raises(OptionError, match="give head_dim"):
        GroupedDifferentialAttention(WIDTH, 6)
    with pytest.raises(OptionError, match="factor"):
        grow_signal_heads(layer(), 0)
    with pytest.raises(ShapeError):
        layer()(torch.randn(2, 3, 5, dtype=torch.float64))
