"""Full attention is softmax attention: against torch's own module and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regard
from regard.dense.full import FullAttention
from regard.kernels import use_backend
from regard.masks import Causal, KeyPadding


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_what_torchs_multihead_attention_computes(backend: str) -> None:
    """The same projections around it give the output of ``nn.MultiheadAttention``, padding mask and all."""
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    expected, _ = theirs(x, x, x, key_padding_mask=padding, attn_mask=~Causal().dense(9, 9)[0, 0])
    projected = nn.functional.linear(x, theirs.in_proj_weight, theirs.in_proj_bias).chunk(3, -1)
    query, key, value = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in projected)
    with use_backend(backend):
        out = FullAttention()(query, key, value, causal=True, mask=KeyPadding(~padding))
    torch.testing.assert_close(theirs.out_proj(out.transpose(1, 2).flatten(2)), expected)


def test_limits_of_the_scale() -> None:
    """Scale zero gives the mean of the values, a very large scale the value of the best key."""
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    full = FullAttention()
    mean = value.mean(2, keepdim=True).expand_as(value)
    torch.testing.assert_close(full(query, key, value, scale=0.0), mean)
    best = (query @ key.transpose(-1, -2)).argmax(-1, keepdim=True).expand(-1, -1, -1, 8)
    torch.testing.assert_close(full(query, key, value, scale=1e6), value.gather(2, best))


def test_weights_are_the_softmax() -> None:
    query, key = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    expected = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(FullAttention().weights(query, key), expected)


def test_weights_of_many_keys_come_in_slices() -> None:
    """More keys than one slice of identity values holds."""
    query, key = torch.randn(1, 1, 3, 8, dtype=torch.float64), torch.randn(1, 1, 1100, 8, dtype=torch.float64)
    weights = FullAttention().weights(query, key)
    assert weights.shape == (1, 1, 3, 1100)
    torch.testing.assert_close(weights, (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1))


def test_permuting_keys_changes_nothing() -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    order = torch.randperm(7)
    full = FullAttention()
    torch.testing.assert_close(full(query, key[:, :, order], value[:, :, order]), full(query, key, value))


def test_bias_of_minus_infinity_hides() -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~Causal().dense(6, 6)[0, 0], float("-inf"))
    full = FullAttention()
    torch.testing.assert_close(full(query, key, value, mask=bias), full(query, key, value, causal=True))


def test_share_of_pairs() -> None:
    query, key = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    full = FullAttention()
    assert full.pairs(query, key) == 1.0
    assert full.pairs(query, key, causal=True) == pytest.approx(21 / 36)
    assert full.pairs(query[:, :, :2], key, causal=True) == pytest.approx(11 / 12)


def test_by_name() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    assert torch.equal(regard.attention(query, key, value), FullAttention()(query, key, value))
