from __future__ import annotations

import math

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.layers.feature_maps import (
    poly_features,
    poly_pullback,
    poly_width,
    positive_random_features,
    taylor_exp,
    unit_vectors,
)


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("p", [0, 1, 2, 3, 4])
def test_poly_features_are_the_series(p: int, symmetric: bool) -> None:
    x, y = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = poly_features(x, p, symmetric), poly_features(y, p, symmetric)
    series = sum((x @ y.T) ** power / math.factorial(power) for power in range(p + 1))
    torch.testing.assert_close(left @ right.T, series, rtol=0, atol=1e-12)
    torch.testing.assert_close(taylor_exp(x @ y.T, p), series, rtol=0, atol=1e-12)
    assert left.shape[-1] == (poly_width(5, p) if symmetric else sum(5**power for power in range(p + 1)))


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("p", [0, 1, 2])
def test_pullback_is_autograd(p: int) -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    features = poly_features(x, p)
    seed = torch.randn_like(features)
    wanted = torch.autograd.grad(features, x, seed)[0] if p else torch.zeros_like(x)
    torch.testing.assert_close(poly_pullback(x.detach(), seed, p), wanted, rtol=0, atol=1e-12)
    with pytest.raises(OptionError):
        poly_pullback(x, seed, 3)


@pytest.mark.paper("slay")
def test_positive_random_features_have_the_mean_exp() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64) / 2
    omega = torch.randn(6, 200_000, generator=generator, dtype=torch.float64)
    products = positive_random_features(x, omega) * positive_random_features(y, omega) * omega.shape[1]
    error = (products.mean(-1) - (x * y).sum(-1).exp()).abs()
    assert bool((products > 0).all())
    assert bool((error <= 3.5 * products.std(-1) / omega.shape[1] ** 0.5).all())
    with pytest.raises(ShapeError):
        positive_random_features(x, omega[:4])


def test_unit_vectors_at_all_sizes() -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    for size in (1e-30, 1.0, 1e30):
        out = unit_vectors(size * x)
        wanted = torch.tensor([1.0, 1, 0, 1, 1])
        torch.testing.assert_close(out.norm(dim=-1), wanted, rtol=0, atol=1e-6)
    double = x.double().requires_grad_()
    keep = torch.tensor([0, 1, 3, 4])
    assert torch.autograd.gradcheck(lambda t: unit_vectors(t[keep]), double)
