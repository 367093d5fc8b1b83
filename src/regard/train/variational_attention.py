"""Training with latent alignments: what is minimised in each mode, exact evidence, and a trainer.

With the prior ``p``, the posterior network's ``q``, and ``l_z = log p(y | z)`` at one target step:

    soft      -log p(y | the mean read)
    exact     -log sum_z p(z) exp(l_z)
    enum      -sum_z q(z) l_z + KL(q || p)
    sample    -l_z - (l_z - B) log q(z) + KL(q || p),  z ~ q;  B: log-likelihood of the soft state at this step
    gumbel    -log p(y | a relaxed draw of q) + KL(q || p)
    wsram     -sum_k w_k [l_k + log p(z_k) + log q(z_k)],  z_k ~ q,  w_k ~ p(z_k) exp(l_k) / q(z_k), both constants

In ``sample`` the factor ``l_z - B`` is a constant too. ``B`` knows the input and not the draw, so it takes variance
away, adds no bias and costs one more state. Without a posterior network ``enum`` and ``sample`` are hard attention:
``q`` is ``p``, the KL is zero. In evaluation ``q`` is not there, for it needs the target: :func:`exact_evidence`
marginalises, over all positions or the best few.

Deng et al., "Latent Alignment and Variational Attention", 2018, arXiv 1807.03756, section 3 (algorithms 1 and 2); rates
of the released scripts: Adam at 3e-4, norms of gradients at most 5, from epoch 2 on the rate halved after an epoch that
did not improve held-out perplexity. The released code leaves the baseline's own cross-entropy out unless asked
(``train_baseline``), as is the default here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.layers.alignment import (
    alignment_kl,
    elbo,
    exact_nll,
    hard_bound,
    log_marginal,
    log_probability,
    reinforce_loss,
    wsram_loss,
)
from regard.layers.dirichlet import dirichlet_kl
from regard.models.latent_translation import AlignmentModel, Pairs
from regard.models.variational_attention import Aligned, Mode, RelaxedAligned

__all__ = [
    "AlignmentHistory",
    "Bounds",
    "alignment_loss",
    "bounds",
    "exact_evidence",
    "fit_alignment",
    "model_loss",
    "relaxed_elbo",
]


class PairTask(Protocol):
    """What :func:`fit_alignment` needs."""

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> Pairs:
        """So many pairs; ``split`` is ``"train"`` or ``"test"``."""
        ...


def alignment_loss(
    aligned: Aligned,
    log_likelihood: Tensor,
    mode: Mode,
    baseline: Tensor | None = None,
    kl_weight: float = 1.0,
    train_baseline: float = 0.0,
) -> Tensor:
    """What is minimised at each target step, ``(batch, T)``.

    log_likelihood ``(K, batch, T)`` of ``aligned.states``. baseline ``(batch, T)``: log-likelihood of
    ``aligned.soft_state``, for mode sample; None for no baseline. train_baseline: weight of its cross-entropy.
    """
    prior, log_q = aligned.log_prior, aligned.log_q
    if mode == "soft":
        return -log_likelihood[0]
    if mode == "exact":
        return exact_nll(prior, log_likelihood.movedim(0, -1))
    if mode == "enum":
        return -elbo(log_q, prior, log_likelihood.movedim(0, -1), kl_weight)
    if mode == "gumbel":
        return -log_likelihood.mean(0) + _kl(aligned, kl_weight)
    if aligned.positions is None:
        raise OptionError(f"Mode {mode!r} needs drawn positions; this call of the attention was in another mode.")
    of_q = log_probability(log_q, aligned.positions)
    if mode == "wsram":
        if aligned.log_posterior is None:
            raise OptionError("Mode 'wsram' teaches a posterior network; give the model one (infer=True).")
        return wsram_loss(log_likelihood, log_probability(prior, aligned.positions), of_q)
    by_reward = reinforce_loss(log_likelihood, of_q, 0.0 if baseline is None else baseline)
    loss = (by_reward - log_likelihood).mean(0) + _kl(aligned, kl_weight)
    return loss if baseline is None or not train_baseline else loss - train_baseline * baseline


def _kl(aligned: Aligned, weight: float) -> Tensor:
    if aligned.log_posterior is None:
        return aligned.log_prior.new_zeros(aligned.log_prior.shape[:-1])
    return weight * alignment_kl(aligned.log_posterior, aligned.log_prior)


def relaxed_elbo(
    aligned: RelaxedAligned, log_likelihood: Tensor, baseline: Tensor | float = 0.0, kl_weight: float = 1.0
) -> Tensor:
    """``E_q log p(y | weights) - kl_weight KL(q || p)`` of :class:`~regard.models.variational_attention.
    DirichletAttention` at each step, ``(batch, T)``, its gradient with the correction for rejected noise.

    log_likelihood ``(K, batch, T)`` of ``aligned.states``. baseline: of the correction alone, it must not depend on the
    draw. Without a posterior this is the bound that draws from the prior give.
    """
    gain = log_likelihood.detach() - (baseline.detach() if isinstance(baseline, Tensor) else baseline)
    correction = gain * (aligned.log_pi - aligned.log_pi.detach())  # zero, with a gradient
    value = (log_likelihood + correction).mean(0)
    if aligned.posterior is None:
        return value
    return value - kl_weight * dirichlet_kl(aligned.posterior, aligned.prior, aligned.visible)


def model_loss(
    model: AlignmentModel,
    pairs: Pairs,
    generator: torch.Generator | None = None,
    baseline: bool = True,
    kl_weight: float = 1.0,
    train_baseline: float = 0.0,
) -> Tensor:
    """The mean of :func:`alignment_loss` over real targets, in the model's mode."""
    aligned = model(pairs, generator)
    likelihood = model.log_likelihood(aligned.states, pairs.targets)
    soft = None
    if model.mode == "sample" and baseline:
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_baseline > 0):
            soft = model.log_likelihood(aligned.soft_state, pairs.targets)
    each = alignment_loss(aligned, likelihood, model.mode, soft, kl_weight, train_baseline)
    return each[pairs.counted].mean()


@torch.no_grad()
def exact_evidence(model: AlignmentModel, pairs: Pairs, top_k: int | None = None) -> Tensor:
    """``log p(y_t | x, y_<t)`` of each target in nats, ``(batch, T)``, zero where ignored: the sum over all positions
    or the ``top_k`` of largest prior; of a soft model its own likelihood, which has no sum. Dropout is as the model is
    set."""
    states, log_weight = model.marginal_states(pairs, top_k)
    found = log_marginal(log_weight.movedim(0, -1), model.log_likelihood(states, pairs.targets).movedim(0, -1))
    return found.masked_fill(~pairs.counted, 0.0)


@dataclass(frozen=True)
class Bounds:
    """Means over real targets, in nats: ``evidence >= variational`` and ``evidence >= hard``. variational is None for a
    model without a posterior network."""

    evidence: float
    variational: float | None
    hard: float


@torch.no_grad()
def bounds(model: AlignmentModel, pairs: Pairs) -> Bounds:
    """The exact log marginal likelihood and both of its lower bounds, each summed over all positions."""
    kept, model.attention.mode = model.attention.mode, "enum"
    try:
        aligned = model(pairs)
        likelihood = model.log_likelihood(aligned.states, pairs.targets).movedim(0, -1)
    finally:
        model.attention.mode = kept
    prior, posterior = aligned.log_prior, aligned.log_posterior

    def mean(each: Tensor) -> float:
        return float(each[pairs.counted].mean())

    variational = None if posterior is None else mean(elbo(posterior, prior, likelihood))
    return Bounds(mean(log_marginal(prior, likelihood)), variational, mean(hard_bound(prior, likelihood)))


@dataclass
class AlignmentHistory:
    """At each look: the step, held-out nats per target (:func:`exact_evidence`, negated), and the rate."""

    steps: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> list[float]:
        """``exp`` of the nats."""
        return [math.exp(value) for value in self.nats]


def fit_alignment(
    model: AlignmentModel,
    task: PairTask,
    *,
    steps: int,
    epoch: int,
    batch_size: int = 32,
    lr: float = 3e-4,
    halve_from: int | None = 2,
    max_norm: float = 5.0,
    baseline: bool = True,
    kl_weight: float = 1.0,
    train_baseline: float = 0.0,
    held_out: int = 512,
    seed: int = 0,
    look: Callable[[int, Pairs], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> AlignmentHistory:
    """Train with Adam, looking at ``held_out`` pairs of the test split after every ``epoch`` steps.

    halve_from: from this epoch on the rate is halved after each that did not improve; None: never. look: called with
    the step and the held-out pairs, the model in evaluation mode.
    """
    if steps < 1 or epoch < 1:
        raise OptionError(f"Need steps >= 1 and epoch >= 1, got {steps} and {epoch}.")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator, history, best = torch.Generator().manual_seed(seed), AlignmentHistory(), math.inf
    test = task.batch(held_out, torch.Generator().manual_seed(10_000 + seed), "test")
    model.train()
    for step in range(1, steps + 1):
        pairs = task.batch(batch_size, generator)
        loss = model_loss(model, pairs, generator, baseline, kl_weight, train_baseline)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if step % epoch and step != steps:
            continue
        model.eval()
        nats = -float(exact_evidence(model, test)[test.counted].mean())
        if look is not None:
            look(step, test)
        model.train()
        history.steps.append(step)
        history.nats.append(nats)
        history.rates.append(optimizer.param_groups[0]["lr"])
        if halve_from is not None and nats >= best and step // epoch >= halve_from:
            optimizer.param_groups[0]["lr"] /= 2
        best = min(best, nats)
        if report is not None:
            report(f"step {step}/{steps}  held out {nats:.4f} nats")
    model.eval()
    return history
