"""Dirichlet draws: moments and divergence against their formulas, gradients against those of known expectations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError
from regard.layers.dirichlet import dirichlet_kl, draw_dirichlet

pytestmark = pytest.mark.paper("variational_attention")
CONCENTRATION = torch.tensor([0.3, 2.0, 5.0, 0.05], dtype=torch.float64)


def test_moments() -> None:
    weights, log_pi = draw_dirichlet(CONCENTRATION, samples=50_000)
    assert weights.shape == (50_000, 4) and log_pi.shape == (50_000,)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50_000, dtype=torch.float64))
    known = torch.distributions.Dirichlet(CONCENTRATION)
    torch.testing.assert_close(weights.mean(0), known.mean, atol=0.005, rtol=0)
    torch.testing.assert_close(weights.var(0), known.variance, atol=0.002, rtol=0)


@pytest.mark.parametrize("boost", [1, 5])
def test_the_gradient_is_that_of_the_expectation(boost: int) -> None:
    """``E z_i^2 = a_i (a_i + 1) / (A (A + 1))``."""
    factor = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    exact = CONCENTRATION.clone().requires_grad_()
    total = exact.sum()
    (factor * exact * (exact + 1)).sum().div(total * (total + 1)).backward()

    def estimate(corrected: bool) -> Tensor:
        leaf = CONCENTRATION.clone().requires_grad_()
        weights, log_pi = draw_dirichlet(leaf, samples=150_000, boost=boost)
        value = (factor * weights.square()).sum(-1)
        loss = value + (value - value.mean()).detach() * log_pi if corrected else value
        loss.mean().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert exact.grad is not None
    torch.testing.assert_close(estimate(True), exact.grad, atol=0.015, rtol=0.02)
    pathwise = CONCENTRATION.clone().requires_grad_()
    drawn = torch.distributions.Dirichlet(pathwise).rsample(torch.Size([150_000]))
    (factor * drawn.square()).sum(-1).mean().backward()
    assert pathwise.grad is not None
    torch.testing.assert_close(estimate(True), pathwise.grad, atol=0.02, rtol=0.02)


def test_divergence_and_padding() -> None:
    first, second = torch.rand(3, 4, dtype=torch.float64) + 0.1, 4 * torch.rand(3, 4, dtype=torch.float64) + 0.1
    known = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(first), torch.distributions.Dirichlet(second)
    )
    torch.testing.assert_close(dirichlet_kl(first, second), known)
    visible = torch.tensor([True, True, False, True])
    kept = dirichlet_kl(first[:, visible], second[:, visible])
    torch.testing.assert_close(dirichlet_kl(first, second, visible), kept)
    first.requires_grad_()
    weights, log_pi = draw_dirichlet(first, visible, samples=5)
    assert bool((weights[..., 2] == 0).all())
    (grad,) = torch.autograd.grad((weights.square().sum(-1) + log_pi).sum(), first)
    assert bool((grad[:, 2] == 0).all()) and bool(grad.isfinite().all())


def test_tiny_shapes_and_options() -> None:
    weights, _ = draw_dirichlet(torch.full((100, 3), 1e-3))
    assert bool(weights.isfinite().all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 100))
    with pytest.raises(OptionError, match="boost"):
        draw_dirichlet(CONCENTRATION, boost=0)
