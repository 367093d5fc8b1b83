"""Weights that are themselves drawn: Dirichlet samples with a gradient to their concentrations.

A Dirichlet draw is Gamma draws over their sum. A Gamma draw of shape ``a >= 1`` is ``h(e, a) = (a - 1/3) (1 + e /
sqrt(9 a - 3))^3`` of a normal ``e`` that passed a test (Marsaglia and Tsang, 2000). For a function ``f`` of the draw

    d/da E f(h(e, a)) = E [d/da f(h(e, a))] + E [f(h(e, a)) d/da log pi(e; a)],    pi: density of the ``e`` that passed

so the gradient has a part through ``h`` and a correction by reward, which is small where few ``e`` are rejected.
Shapes are drawn as ``a + boost`` and brought down by uniform draws, ``z u^(1 / a)`` step by step: that allows any ``a``
and makes the correction smaller still.

Naesseth et al., "Reparameterization Gradients through Acceptance-Rejection Sampling Algorithms", 2016, arXiv
1610.05683, sections 3 to 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["dirichlet_kl", "draw_dirichlet"]


def draw_dirichlet(
    concentration: Tensor,
    visible: Tensor | None = None,
    samples: int = 1,
    boost: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights ``(samples, ..., positions)`` and ``log pi`` of the noise that made them, ``(samples, ...)``.

    concentration ``(..., positions)``, above 0; where not ``visible`` the weight is zero. The weights carry the part of
    the gradient through ``h``; for the rest add ``(f - baseline).detach() * log_pi`` to ``f``
    (:func:`regard.train.variational_attention.relaxed_elbo` does). boost: how far shapes are raised for the draw.
    """
    if samples < 1 or boost < 1:
        raise OptionError(f"Need samples >= 1 and boost >= 1, got {samples} and {boost}.")
    work = concentration.to(accumulation_dtype(concentration.dtype)).expand(samples, *concentration.shape)
    shape = work + boost
    noise = _accepted_noise(shape.detach(), generator)

    # Everything in logarithms: small shapes give draws below the smallest number.
    third = shape - 1 / 3
    root = 1 + noise / (9 * third).sqrt()
    log_gamma_draw = third.log() + 3 * root.log()
    log_slope = third.log() / 2 + 2 * root.log()  # dh / de
    log_pi = (shape - 1) * log_gamma_draw - log_gamma_draw.exp() - torch.lgamma(shape) + log_slope

    tiny = torch.finfo(work.dtype).tiny
    for step in range(boost):
        uniform = torch.rand(work.shape, dtype=work.dtype, device=work.device, generator=generator).clamp_min(tiny)
        log_gamma_draw = log_gamma_draw + uniform.log() / (work + step)
    if visible is not None:
        log_gamma_draw = log_gamma_draw.masked_fill(~visible, float("-inf"))
        log_pi = log_pi.masked_fill(~visible, 0.0)
    return log_gamma_draw.softmax(-1).to(concentration.dtype), log_pi.sum(-1)


def _accepted_noise(shape: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal numbers that pass Marsaglia and Tsang's test for Gamma draws of this shape, at least 1."""
    third = shape - 1 / 3
    noise, waiting = torch.zeros_like(shape), torch.ones_like(shape, dtype=torch.bool)
    while waiting.any():
        normal = torch.randn(shape.shape, dtype=shape.dtype, device=shape.device, generator=generator)
        uniform = torch.rand(shape.shape, dtype=shape.dtype, device=shape.device, generator=generator)
        cube = (1 + normal / (9 * third).sqrt()).pow(3)
        bound = normal.square() / 2 + third * (1 - cube + cube.clamp_min(torch.finfo(shape.dtype).tiny).log())
        passed = waiting & (cube > 0) & (uniform.log() < bound)
        noise, waiting = torch.where(passed, normal, noise), waiting & ~passed
    return noise


def dirichlet_kl(first: Tensor, second: Tensor, visible: Tensor | None = None) -> Tensor:
    """``KL(Dir(first) || Dir(second))`` over the last axis, counting visible positions alone."""

    def total(terms: Tensor) -> Tensor:
        return (terms if visible is None else terms.masked_fill(~visible, 0.0)).sum(-1)

    whole = total(first)
    apart = total(torch.lgamma(second) - torch.lgamma(first))
    moved = total((first - second) * (torch.digamma(first) - torch.digamma(whole)[..., None]))
    return torch.lgamma(whole) - torch.lgamma(total(second)) + apart + moved
