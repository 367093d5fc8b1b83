"""Stabilisers of logits against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from regard.errors import OptionError
from regard.layers.stabilisers import QKNorm, qk_norm, soft_cap, z_loss


def test_z_loss_is_the_square_of_the_log_partition() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.flatten(0, 1).tolist()) / 6
    assert float(z_loss(logits, 0.5)) == pytest.approx(0.5 * expected)
    assert float(z_loss(logits.log_softmax(-1))) == pytest.approx(0, abs=1e-20)
    leaf = logits.clone().requires_grad_()
    for _ in range(300):
        (grad,) = torch.autograd.grad(z_loss(leaf, 1.0), leaf)
        leaf = (leaf - 5 * grad).detach().requires_grad_()
    torch.testing.assert_close(leaf.logsumexp(-1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert z_loss(torch.full((1, 4), 300.0, dtype=torch.float16)).isfinite()


def test_soft_cap_bounds_and_keeps_small_logits() -> None:
    logits = torch.linspace(-500, 500, 1001, dtype=torch.float64)
    capped = soft_cap(logits, 50)
    assert float(capped.abs().max()) < 50.0 + 1e-12
    assert bool((capped.diff() >= 0).all())
    by_hand = torch.tensor([50 * math.tanh(v / 50) for v in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(capped, by_hand)
    torch.testing.assert_close(soft_cap(logits / 1e4, 50), logits / 1e4, rtol=1e-6, atol=0)
    with pytest.raises(OptionError, match="above 0"):
        soft_cap(logits, 0)


def test_qk_norm_bounds_logits_by_its_scale() -> None:
    query, key = 100 * torch.randn(2, 3, 9, 4, dtype=torch.float64), torch.randn(2, 3, 9, 4, dtype=torch.float64)
    cosines = torch.cosine_similarity(query[..., :, None, :], key[..., None, :, :], dim=-1)
    first, second = qk_norm(query, key)
    torch.testing.assert_close(first @ second.transpose(-1, -2), cosines)
    norm = QKNorm(length=9).double()
    first, second = norm(query, key)
    torch.testing.assert_close(first @ second.transpose(-1, -2), math.log2(72) * cosines, rtol=1e-6, atol=1e-6)
    (first @ second.transpose(-1, -2)).sum().backward()
    torch.testing.assert_close(norm.scale.grad, cosines.sum())
    assert qk_norm(query.half(), key.half())[0].dtype == torch.float16
    assert bool(qk_norm(torch.zeros(1, 4), torch.zeros(1, 4))[0].isfinite().all())
    with pytest.raises(OptionError, match="length"):
        QKNorm(1)
