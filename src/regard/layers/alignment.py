"""Attention as a latent choice: a query stands at one position ``z``, drawn with its weights, and reads that one alone.

With a prior ``p(z)`` (the attention weights) and the likelihood ``p(y | z)`` of what is to be explained, each given as
logarithms with the positions on the last axis, these are the quantities that take the place of "read the mean":

    log p(y) = log sum_z p(z) p(y | z)                                       log_marginal, exact
    E_q log p(y | z) - KL(q || p)  <=  log p(y)                              elbo, with any q
    E_p log p(y | z)               <=  log p(y)                              hard_bound, the same with q = p

The second is an equality at ``q(z) = p(z) p(y | z) / p(y)`` (:func:`true_posterior`). Where going through all positions
costs too much, ``z`` is drawn: :func:`draw` with :func:`reinforce_loss` or :func:`wsram_loss`, or :func:`draw_relaxed`,
whose gradient goes through the draw. A weight of zero is ``-inf`` here; it stays zero everywhere and has no gradient.

:class:`AlignmentRead` is the same choice as a read-out of an attention map, for
:func:`regard.kernels.scored.scored_attention` and :meth:`regard.dense.frame.ScoredMechanism.read`::

    scored_attention(q, k, v, score, normalize, read=AlignmentRead("hard"))
    scored_attention(q, k, log_likelihoods, score, normalize, read=AlignmentRead("exact"))    # log p(y) of each query

On values that are log-likelihoods the plain weighted sum is the hard bound and ``"exact"`` the marginal. ``"soft"`` is
linear in the values, as ``"hard"`` is for one draw; ``"exact"`` is not, and forms ``value_dim`` numbers per pair. For
variational inference the read-out is given a posterior, whose KL from the map is the other term of the bound::

    read.posterior = log_q                        # (batch, heads, q_len, k_len); left there until the backward pass
    out = mechanism(q, k, v)                      # training: reads what the posterior draws
    kl = alignment_kl(log_q, log_weights(mechanism.weights(q, k)))

Deng et al., "Latent Alignment and Variational Attention", 2018, arXiv 1807.03756, sections 2 and 3; Xu et al., "Show,
Attend and Tell", 2015, arXiv 1502.03044 (hard attention); Ba et al., "Learning Wake-Sleep Recurrent Attention Models",
2015, arXiv 1509.06812.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels.scored import Tile
from regard.layers.gumbel import gumbel_one_hot

__all__ = [
    "AlignmentRead",
    "alignment_kl",
    "draw",
    "draw_relaxed",
    "elbo",
    "exact_nll",
    "expectation",
    "hard_bound",
    "importance_weights",
    "log_alignment",
    "log_marginal",
    "log_probability",
    "log_weights",
    "read_drawn",
    "reinforce_loss",
    "true_posterior",
    "wsram_loss",
]

_NEVER = float("-inf")


def log_alignment(scores: Tensor, visible: Tensor | None = None) -> Tensor:
    """``log softmax(scores)`` over the last axis where ``visible`` (None: everywhere), ``-inf`` elsewhere."""
    if visible is None:
        return scores.log_softmax(-1)
    seen = visible.any(-1, keepdim=True)
    # An empty row is given every position and emptied afterwards, so that no gradient is NaN.
    return scores.masked_fill(~(visible | ~seen), _NEVER).log_softmax(-1).masked_fill(~seen, _NEVER)


def log_weights(weights: Tensor) -> Tensor:
    """Logarithms of weights; ``-inf`` and no gradient where they are zero."""
    none = weights <= 0
    return weights.masked_fill(none, 1.0).log().masked_fill(none, _NEVER)


def expectation(log_weight: Tensor, values: Tensor) -> Tensor:
    """``sum_z w(z) f(z)``; a position of weight zero does not count, whatever its value."""
    weight = log_weight.exp()
    return (weight * torch.where(weight > 0, values, torch.zeros_like(values))).sum(-1)


def log_marginal(log_prior: Tensor, log_likelihood: Tensor) -> Tensor:
    """``log sum_z p(z) p(y | z)``, the evidence."""
    return (log_prior + log_likelihood).logsumexp(-1)


def exact_nll(log_prior: Tensor, log_likelihood: Tensor) -> Tensor:
    """``-log sum_z p(z) p(y | z)``, what exact marginalisation minimises."""
    return -log_marginal(log_prior, log_likelihood)


def true_posterior(log_prior: Tensor, log_likelihood: Tensor) -> Tensor:
    """``log p(z | y)``, the ``q`` at which the bound is tight."""
    return (log_prior + log_likelihood).log_softmax(-1)


def alignment_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q || p)``; infinite where ``q`` puts weight that ``p`` does not."""
    weight = log_q.exp()
    gap = torch.where(weight > 0, log_q - log_p, torch.zeros_like(log_q))
    return (weight * gap).sum(-1)


def elbo(log_q: Tensor, log_p: Tensor, log_likelihood: Tensor, kl_weight: float = 1.0) -> Tensor:
    """``E_q log p(y | z) - kl_weight KL(q || p)``, summed over all positions: at most the evidence at weight 1."""
    return expectation(log_q, log_likelihood) - kl_weight * alignment_kl(log_q, log_p)


def hard_bound(log_prior: Tensor, log_likelihood: Tensor) -> Tensor:
    """``E_p log p(y | z)``, the bound that hard attention raises: :func:`elbo` with the prior for ``q``."""
    return expectation(log_prior, log_likelihood)


def draw(log_weight: Tensor, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Positions drawn independently, ``(samples, ...)`` of int64 for log-weights ``(..., positions)``."""
    if samples < 1:
        raise OptionError(f"At least one sample is drawn, got {samples}.")
    rows = log_weight.detach().exp().flatten(0, -2) if log_weight.dim() > 1 else log_weight.detach().exp()[None]
    chosen = torch.multinomial(rows, samples, replacement=True, generator=generator)
    return chosen.t().reshape(samples, *log_weight.shape[:-1])


def log_probability(log_weight: Tensor, positions: Tensor) -> Tensor:
    """Log-weights of drawn positions, ``(samples, ...)`` as :func:`draw` gives them."""
    return log_weight.expand(len(positions), *log_weight.shape).gather(-1, positions[..., None])[..., 0]


def draw_relaxed(
    log_weight: Tensor, samples: int = 1, temperature: float = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    """Draws softened to weights, ``(samples, ..., positions)``: ``softmax((log w + Gumbel noise) / temperature)``."""
    if samples < 1:
        raise OptionError(f"At least one sample is drawn, got {samples}.")
    return gumbel_one_hot(log_weight.expand(samples, *log_weight.shape), temperature, hard=False, generator=generator)


def reinforce_loss(reward: Tensor, log_q: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """``-(reward - baseline) log q(z)`` of each draw, the gradient going to ``log_q`` alone: that of ``-E_q reward``.

    The baseline must not depend on the draw; then it changes the gradient's variance and not its mean.
    """
    gain = reward.detach() - (baseline.detach() if isinstance(baseline, Tensor) else baseline)
    return -gain * log_q


def importance_weights(log_likelihood: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """``w_k ~ p(z_k) p(y | z_k) / q(z_k)`` of draws from ``q`` on the first axis, summing to one over them."""
    return (log_p + log_likelihood - log_q).softmax(0)


def wsram_loss(log_likelihood: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """``-sum_k w_k [log p(y | z_k) + log p(z_k) + log q(z_k)]`` of draws from ``q`` on the first axis, the weights
    being constants. With many draws the gradient of likelihood and prior is that of ``-log p(y)``, and ``q`` learns to
    cover the true posterior."""
    weight = importance_weights(log_likelihood, log_p, log_q).detach()
    return -(weight * (log_likelihood + log_p + log_q)).sum(0)


def read_drawn(weights: Tensor, value: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The value of one drawn key a row, and the log-weight of the draw for :func:`reinforce_loss`.

    weights ``(..., rows, k_len)``, value ``(..., k_len, value_dim)`` -> ``(..., rows, value_dim)``, ``(..., rows)``. A
    row without weight reads zeros, with log-weight zero.
    """
    some = weights.sum(-1) > 0
    log_weight = log_weights(torch.where(some[..., None], weights, torch.ones_like(weights)))
    positions = draw(log_weight.log_softmax(-1), 1, generator)
    chosen = log_probability(log_weight, positions)[0]
    index = positions[0][..., None].expand(*positions.shape[1:], value.shape[-1])
    read = value.expand(*weights.shape[:-2], *value.shape[-2:]).gather(-2, index)
    return read * some[..., None], chosen * some


class AlignmentRead(nn.Module):
    """A read-out ``(weights, query, key, value, tile) -> (..., rows, value_dim)`` of an attention map.

    mode: ``"soft"`` the weighted sum; ``"exact"`` ``log sum_j w_j exp(v_j)``, for values that are log-likelihoods;
    ``"hard"`` the value of one drawn key, with the gradient of the relaxed draw (straight-through), and of the largest
    weight in evaluation; ``"gumbel"`` the relaxed draw itself, and the weighted sum in evaluation. temperature: of the
    relaxed draw. Draws come from torch's own generator, which tiles that are computed again set back. A row without
    weight reads zeros. For the other gradient of a hard choice, by reward, take :func:`read_drawn`.

    ``posterior``: log-weights or scores ``(batch, heads, q_len, k_len)`` that training reads by in place of the map's
    weights, where those are not zero; evaluation has none.
    """

    posterior: Tensor | None

    Mode = Literal["soft", "exact", "hard", "gumbel"]

    def __init__(self, mode: Mode = "soft", temperature: float = 1.0) -> None:
        super().__init__()
        if mode not in get_args(self.Mode):
            raise OptionError(f"mode is one of {', '.join(get_args(self.Mode))}; got {mode!r}.")
        if not temperature > 0:
            raise OptionError(f"A temperature is above 0, got {temperature}.")
        self.mode, self.temperature, self.posterior = mode, temperature, None

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, temperature={self.temperature}"

    def per_pair(self, value_dim: int) -> int:
        """Numbers that the read-out forms for each pair, which sets the size of tiles."""
        return value_dim if self.mode == "exact" else 1

    def forward(
        self,
        weights: Tensor,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        tile: Tile | None = None,
    ) -> Tensor:
        if value is None:
            raise ShapeError("A read-out needs the values: read(weights, query, key, value, tile).")
        if self.posterior is not None and self.training:
            weights = self._posterior_weights(weights, self.posterior, 0 if tile is None else tile.start)
        if self.mode == "soft" or (self.mode == "gumbel" and not self.training):
            return weights @ value
        some = weights.sum(-1, keepdim=True) > 0
        log_weight = log_weights(torch.where(some, weights, torch.ones_like(weights)))
        if self.mode == "exact":
            read = (log_weight[..., None] + value[..., None, :, :]).logsumexp(-2)
        elif self.training:
            read = gumbel_one_hot(log_weight, self.temperature, hard=self.mode == "hard") @ value
        else:
            # The first of those that are largest to rounding, so that equal keys do not take turns.
            least = log_weight.amax(-1, keepdim=True) - 64 * torch.finfo(log_weight.dtype).eps
            index = (log_weight >= least).to(torch.int8).argmax(-1, keepdim=True)
            read = torch.zeros_like(weights).scatter(-1, index, 1.0) @ value
        return torch.where(some, read, torch.zeros_like(read))

    @staticmethod
    def _posterior_weights(weights: Tensor, posterior: Tensor, start: int) -> Tensor:
        rows = posterior[..., start : start + weights.shape[-2], :]
        if rows.shape[-2:] != weights.shape[-2:]:
            raise ShapeError(
                f"The posterior has a row for each query and a number for each of {weights.shape[-1]} keys; got "
                f"{tuple(posterior.shape)}."
            )
        return log_alignment(rows.to(weights.dtype), weights > 0).exp()
