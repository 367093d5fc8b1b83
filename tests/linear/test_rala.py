from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError
from regard.layers.attention_stats import effective_rank, numerical_rank
from regard.linear.rala import (
    RALA,
    GatedSoftmax2d,
    grid_rotary,
    rank_augmented_linear_attention,
    rank_report,
    rotate_pairs,
    token_weights,
)

D = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def draw(n: int = 12, m: int | None = None, d: int = 8, dv: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    m = n if m is None else m
    query, key, value = (torch.randn(2, 3, *shape, dtype=D) for shape in ((n, d), (m, d), (m, dv)))
    return query, key, value


def heads_of(out: Tensor, heads: int = 3) -> Tensor:
    return out.unflatten(-1, (heads, -1)).transpose(1, 2)


def weights_by_hand(query: Tensor, key: Tensor) -> Tensor:
    q, k = F.elu(query) + 1, F.elu(key) + 1
    logits = torch.einsum("bhd,bhjd->bhj", q.mean(2), k) / math.sqrt(query.shape[-1])
    return key.shape[2] * logits.softmax(-1)


@pytest.mark.paper("rala")
def test_without_augmentations_it_is_kernel_attention() -> None:
    query, key, value = draw(12, 17, dv=5)
    scores = (F.elu(query) + 1) @ (F.elu(key) + 1).mT
    expected = scores / scores.sum(-1, keepdim=True) @ value
    found = rank_augmented_linear_attention(query, key, value, augment_kv=False, eps=0)
    torch.testing.assert_close(heads_of(found), expected, **TIGHT)
    ones = torch.ones(2, 12, 15, dtype=D)
    torch.testing.assert_close(
        rank_augmented_linear_attention(query, key, value, ones, augment_kv=False, eps=0), found, **TIGHT
    )


@pytest.mark.paper("rala")
def test_token_weights_sum_to_the_number_of_keys() -> None:
    query, key, _ = draw(12, 17)
    found = token_weights(query, key)
    torch.testing.assert_close(found, weights_by_hand(query, key), **TIGHT)
    torch.testing.assert_close(found.sum(-1), torch.full((2, 3), 17.0, dtype=D), **TIGHT)
    # One vector added to all features of positive keys shifts all logits alike.
    positive = key.abs()
    shift = torch.rand(2, 3, 1, 8, dtype=D)
    torch.testing.assert_close(token_weights(query, positive + shift), token_weights(query, positive), **TIGHT)


@pytest.mark.paper("rala")
@pytest.mark.parametrize("augment_kv", [True, False])
def test_linear_form_equals_the_map_written_out(augment_kv: bool) -> None:
    query, key, value = draw(12, 17, dv=5)
    a = weights_by_hand(query, key) if augment_kv else torch.ones(2, 3, 17, dtype=D)
    scores = (F.elu(query) + 1) @ (F.elu(key) + 1).mT * a[:, :, None]
    rows = scores / (scores.sum(-1, keepdim=True) + 17 * 1e-6)
    gate, local = torch.randn(2, 12, 15, dtype=D), torch.randn(2, 12, 15, dtype=D)
    found = rank_augmented_linear_attention(query, key, value, gate, augment_kv=augment_kv, local=local)
    expected = (rows @ value + heads_of(local)) * heads_of(gate)
    torch.testing.assert_close(heads_of(found), expected, **TIGHT)
    mechanism = regard.create("rala", augment_kv=augment_kv)
    torch.testing.assert_close(mechanism.weights(query, key), rows, **TIGHT)


@pytest.mark.paper("rala")
def test_rotary_turns_the_products_and_leaves_the_divisor_alone() -> None:
    query, key, value = draw(12)
    rope = grid_rotary((3, 4), 8, dtype=D)
    q, k, a = F.elu(query) + 1, F.elu(key) + 1, weights_by_hand(query, key)
    turned = rotate_pairs(q, rope) @ rotate_pairs(k, rope).mT * a[:, :, None]
    plain = q @ k.mT * a[:, :, None]
    expected = turned / plain.sum(-1, keepdim=True) @ value
    found = rank_augmented_linear_attention(query, key, value, rope=rope, eps=0)
    torch.testing.assert_close(heads_of(found), expected, **TIGHT)
    mechanism = regard.create("rala", rotary=True, eps=0.0)
    torch.testing.assert_close(mechanism(query, key, value, grid=(3, 4)), expected, **TIGHT)


@pytest.mark.paper("rala")
def test_positions_turn_pairs_by_row_and_column() -> None:
    """Channel pairs as complex numbers, turned by angle times coordinate; products depend on offsets alone."""
    cos, sin = grid_rotary((5, 6), 16, dtype=D)
    x = torch.randn(30, 16, dtype=D)
    pairs = torch.view_as_complex(x.unflatten(-1, (8, 2)).contiguous())
    rates = [10000 ** -(i / 3) for i in range(4)]
    for token in (0, 7, 29):
        row, column = divmod(token, 6)
        angles = torch.tensor([row * r for r in rates] + [column * r for r in rates], dtype=D)
        expected = torch.view_as_real(pairs[token] * torch.polar(torch.ones_like(angles), angles)).flatten()
        torch.testing.assert_close(rotate_pairs(x, (cos, sin))[token], expected, **TIGHT)
    q, k = torch.randn(16, dtype=D), torch.randn(16, dtype=D)
    products = rotate_pairs(q.expand(30, -1), (cos, sin)) @ rotate_pairs(k.expand(30, -1), (cos, sin)).T
    torch.testing.assert_close(products[0, 7], products[8, 15], **TIGHT)
    torch.testing.assert_close(products[9, 1], products[28, 20], **TIGHT)


@pytest.mark.paper("rala")
def test_order_of_tokens_does_not_matter_without_positions() -> None:
    query, key, value = draw(12)
    gate, order = torch.randn(2, 12, 24, dtype=D), torch.randperm(12)
    out = rank_augmented_linear_attention(query, key, value, gate)
    moved = rank_augmented_linear_attention(query[:, :, order], key[:, :, order], value[:, :, order], gate[:, order])
    torch.testing.assert_close(moved, out[:, order], **TIGHT)
    rope = grid_rotary((3, 4), 8, dtype=D)
    turned = rank_augmented_linear_attention(query, key, value, gate, rope)
    again = rank_augmented_linear_attention(
        query[:, :, order], key[:, :, order], value[:, :, order], gate[:, order], rope
    )
    assert not torch.allclose(again, turned[:, order])


@pytest.mark.paper("rala")
def test_the_gate_lifts_the_rank() -> None:
    query, key, value = (torch.randn(1, 1, 196, 32, dtype=D) for _ in range(3))
    gate = torch.randn(1, 196, 32, dtype=D)
    plain = effective_rank(rank_augmented_linear_attention(query, key, value, augment_kv=False)[0])
    gated = effective_rank(rank_augmented_linear_attention(query, key, value, gate, augment_kv=False)[0])
    softmax = effective_rank(F.scaled_dot_product_attention(query, key, value)[0, 0])
    assert plain < 6 < 18 < gated < softmax + 3
    narrow = rank_augmented_linear_attention(query, key, value[..., :2])[0]
    assert int(numerical_rank(narrow)) == 2
    tall = torch.randn(1, 196, 2, dtype=D) @ torch.randn(1, 2, 32, dtype=D)
    low = torch.randn(1, 1, 196, 3, dtype=D) @ torch.randn(1, 1, 3, 32, dtype=D)
    product = rank_augmented_linear_attention(query, key, low, tall)[0]
    assert int(numerical_rank(product, 1e-9)) == 6, "rank(y) rank(o)"


@pytest.mark.paper("rala")
def test_module_by_hand() -> None:
    """Queries, keys, values and gate from one 1 x 1 convolution, in this order; LePE on the values, all gated."""
    module, x = RALA(16, 2).double(), torch.randn(2, 16, 3, 4, dtype=D)
    q, k, v, o = (
        torch.einsum("oc,bchw->bohw", module.qkvo.weight[:, :, 0, 0], x)
        .add(module.qkvo.bias[:, None, None])
        .chunk(4, 1)
    )
    lepe = F.conv2d(v, module.lepe.conv.weight, module.lepe.conv.bias, padding=2, groups=16)

    def heads(t: Tensor) -> Tensor:
        return t.reshape(2, 2, 8, 12).mT

    rope = grid_rotary((3, 4), 8, dtype=D)
    read = rank_augmented_linear_attention(heads(q), heads(k), heads(v), rope=rope)
    maps = (read.mT.reshape(2, 16, 3, 4) + lepe) * o
    torch.testing.assert_close(module(x), module.proj(maps), **TIGHT)
    soft = GatedSoftmax2d(16, 2).double()
    soft.load_state_dict(module.state_dict())
    attended = F.scaled_dot_product_attention(*(rotate_pairs(heads(t), rope) for t in (q, k)), heads(v))
    maps = (attended.mT.reshape(2, 16, 3, 4) + lepe) * o
    torch.testing.assert_close(soft(x), soft.proj(maps), **TIGHT)


@pytest.mark.paper("rala")
def test_rank_report_sees_what_the_module_computes() -> None:
    module, x = RALA(32, 1).double(), torch.randn(2, 32, 7, 7, dtype=D)
    report = rank_report(module, x)
    assert report.read <= report.numerical[1] <= 32
    torch.nn.init.zeros_(module.lepe.conv.weight)
    torch.nn.init.zeros_(module.lepe.conv.bias)
    with torch.no_grad():
        module.qkvo.weight[96:] = 0
        module.qkvo.bias[96:] = 1
    flat = rank_report(module, x)
    assert abs(flat.output - flat.read) < 1e-6, "a gate of ones changes nothing"
    assert flat.output < report.output


def test_padding_is_as_if_it_were_not_there() -> None:
    query, key, value = draw(12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[:, 7:] = False
    short = [t[:, :, :7] for t in (query, key, value)]
    for augment_kv in (True, False):
        found = rank_augmented_linear_attention(
            query, key, value, augment_kv=augment_kv, key_padding_mask=valid, query_padding_mask=valid
        )
        expected = rank_augmented_linear_attention(*short, augment_kv=augment_kv)
        torch.testing.assert_close(found[:, :7], expected, **TIGHT)
    weights = token_weights(query, key, key_padding_mask=valid, query_padding_mask=valid)
    torch.testing.assert_close(weights[..., :7], token_weights(*short[:2]), **TIGHT)
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 3), 7.0, dtype=D), **TIGHT)


def test_bad_input_teaches() -> None:
    query, key, value = draw()
    with pytest.raises(OptionError, match="elu1"):
        regard.create("rala", kernel="softplus")
    with pytest.raises(ShapeError, match="grid"):
        regard.create("rala", rotary=True)(query, key, value)
    with pytest.raises(OptionError, match="4"):
        grid_rotary((3, 4), 6)
    with pytest.raises(ShapeError, match="rope"):
        rank_augmented_linear_attention(query, key, value, rope=grid_rotary((3, 3), 8))
    with pytest.raises(OptionError, match="num_heads"):
        RALA(12, 2)
    with pytest.raises(ShapeError, match="Expected"):
        RALA(16, 2)(torch.randn(1, 8, 3, 3))
