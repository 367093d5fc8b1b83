"""Attention as a mixture of Gaussians: responsibilities of memory units for queries, and EM updates of the units.

Unit ``j`` holds a mean of queries ``k_j`` and a mean of values ``v_j``; a query's weights are the responsibilities

    w_ij = softmax_j(log pi_ij - alpha_j / 2 |q_i - k_j|^2 - beta_j / 2 |u_i - v_j|^2)

(the last term only where initial values ``u`` are given). Keys move towards the queries they answer for, values towards
annotated ones. Everything goes tile by tile of queries (:mod:`regard.kernels.scored`), the sums of the updates too, so
memory is linear in length; positions and priors for every pair are as large as they are handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.kernels import accumulation_dtype, expand_groups
from regard.kernels.dense import masked_softmax
from regard.kernels.scored import Score, Tile, handed_out, scored_attention, scored_transport
from regard.layers.scorers import DistanceScore, DotScore
from regard.masks import Mask

__all__ = ["GaussianMixture", "PairPositions", "mixture_log_likelihood"]


class PairPositions(NamedTuple):
    """Relative position vectors ``(q_len, k_len, dim)`` that meet queries and keys and are added to values."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


_NOWHERE = PairPositions()


@dataclass(frozen=True)
class GaussianMixture:
    """What the responsibilities depend on besides queries and keys.

    alpha, beta: precisions, numbers or tensors ``(batch | 1, heads | 1, k_len)``. prior: ``pi``, broadcastable to
    ``(batch, heads, q_len, k_len)``, in any scale (None: uniform). magnitude_prior: ``pi_ij ~ exp(alpha_j / 2
    |k_j|^2)``, and ``exp(beta_j / 2 |v_j|^2)`` with initial values, which leaves dot products. rule: who sees whom.
    ``value_init (batch, heads, q_len, value_dim)``.
    """

    alpha: float | Tensor
    beta: float | Tensor = 0.0
    prior: Tensor | None = None
    magnitude_prior: bool = False
    value_init: Tensor | None = None
    positions: PairPositions = _NOWHERE
    rule: Mask | None = None

    def logits(self, query: Tensor, key: Tensor, value: Tensor | None, tile: Tile) -> Tensor:
        """Unnormalised log responsibilities ``(batch, heads, rows, k_len)`` of a tile of queries."""
        rows = slice(tile.start, tile.start + tile.rows)
        scores = self._match(query, key, self.alpha)
        if self.positions.query is not None:
            near = self.positions.query[rows].to(query)
            scores = scores + torch.einsum("bhid,ijd->bhij", query, near) - _half_square(query)[..., None]
            scores = scores if self.magnitude_prior else scores - _half_square(near)
        if self.positions.key is not None:
            near = self.positions.key[rows].to(query)
            scores = scores + torch.einsum("bhjd,ijd->bhij", key, near)
            if not self.magnitude_prior:
                scores = scores - _half_square(key)[..., None, :] - _half_square(near)
        scores = scores * _per_key(self.alpha, query)
        if self.value_init is not None and value is not None:
            start = self.value_init[:, :, rows].to(query)
            scores = scores + self._match(start, value, self.beta) * _per_key(self.beta, query)
        if self.prior is not None:
            prior = self.prior.to(query)
            prior = prior[..., rows, :] if prior.dim() > 1 and prior.shape[-2] > 1 else prior
            # A unit of prior zero is left out altogether, whatever its distance.
            scores = scores + torch.where(prior > 0, prior, 1).log().masked_fill(prior <= 0, float("-inf"))
        return scores

    def weights(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """Responsibilities: softmax over the units that are seen and that the prior admits."""
        if self.prior is None:
            return masked_softmax(scores, visible)
        admitted = scores > float("-inf")
        return masked_softmax(scores.masked_fill(~admitted, 0), admitted if visible is None else visible & admitted)

    def read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``sum_j w_ij (v_j + r_ij)``, ``(batch, heads, q_len, value_dim)``."""

        def offset(weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
            out = weights @ value
            if self.positions.value is None:
                return out
            near = self.positions.value[tile.start : tile.start + tile.rows].to(out)
            return out + torch.einsum("bhij,ijd->bhid", weights, near)

        return scored_attention(query, key, value, self.scorer(value), self.weights, rule=self.rule, read=offset)

    def adapt_keys(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        prior_precision: float | Tensor | None = None,
        part: Tensor | None = None,
    ) -> Tensor:
        """Keys after one step of EM, ``k_j <- (c k_j + alpha_j sum_i w_ij q_i) / (c + alpha_j sum_i w_ij)``.

        prior_precision: ``c``, a number or a tensor like alpha (None: 0, a weighted mean). part: the queries that
        count, ``(batch | 1, heads | 1, q_len)`` boolean. A key that answers for none stays.
        """
        work = query.to(accumulation_dtype(query.dtype))
        count = work.new_ones(*query.shape[:3], 1) if part is None else _flags(part, work)
        mass = torch.cat((work * count, count), -1)
        received = scored_transport(query, key, mass, self.scorer(value), self.weights, rule=self.rule)
        return _moved(key, received[..., :-1], received[..., -1:], self.alpha, prior_precision)

    def propagate_values(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        value_fixed: Tensor,
        fixed_mask: Tensor,
        *,
        prior_precision: float | Tensor | None = None,
    ) -> Tensor:
        """Values after one step towards the known ones of the annotated places F, ``v_j <- (c v_j + beta_j sum_{i in F}
        w_ij (v*_i - r_ij)) / (c + beta_j sum_{i in F} w_ij)``.

        fixed_mask ``(batch | 1, heads | 1, q_len)`` boolean: F. A unit that answers for none of them stays.
        """
        work = query.to(accumulation_dtype(query.dtype))
        count = _flags(fixed_mask, work)
        # Whatever stands at places that are not annotated must not reach the sums, NaN included.
        known = torch.where(count > 0, value_fixed.to(work), 0)

        def give(weights: Tensor, mass: Tensor, tile: Tile) -> Tensor:
            received = handed_out(weights, mass, tile)
            if self.positions.value is None:
                return received
            near = self.positions.value[tile.start : tile.start + tile.rows].to(mass)
            offsets = torch.einsum("bhij,ijd->bhjd", weights * mass[..., -1:], near)
            return torch.cat((received[..., :-1] - offsets, received[..., -1:]), -1)

        mass = torch.cat((known, count), -1)
        received = scored_transport(query, key, mass, self.scorer(value), self.weights, rule=self.rule, give=give)
        return _moved(value, received[..., :-1], received[..., -1:], self.beta, prior_precision)

    def scorer(self, value: Tensor | None) -> Score:
        """:meth:`logits` for these values, ``(batch, num_heads, k_len, value_dim)``."""
        return lambda query, key, tile: self.logits(query, key, None if value is None else value.to(query), tile)

    def _match(self, left: Tensor, right: Tensor, precision: float | Tensor) -> Tensor:
        """``-|left - right|^2 / 2``, and with the magnitude prior ``+ |right|^2 / 2``. Under one precision for all
        keys that is the product alone, as a row's softmax does not see ``|left|^2``."""
        if self.magnitude_prior and not isinstance(precision, Tensor):
            products: Tensor = DotScore(left.shape[-1], scale=1.0)(left, right)
            return products
        squares: Tensor = DistanceScore(left.shape[-1], scale=2.0)(left, right)
        return squares + _half_square(right)[..., None, :] if self.magnitude_prior else squares


def mixture_log_likelihood(
    query: Tensor, key: Tensor, alpha: float | None = None, prior: Tensor | None = None
) -> Tensor:
    """``sum_i log sum_j pi_ij N(q_i; k_j, 1 / alpha)`` in nats, ``(batch, heads)``: how well keys explain queries.

    prior: ``pi``, normalised over keys, broadcastable to ``(batch, heads, q_len, k_len)`` (None: uniform).
    """
    dim, k_len = query.shape[-1], key.shape[-2]
    precision = torch.as_tensor(dim**-0.5 if alpha is None else alpha, dtype=query.dtype)
    logits = -precision / 2 * torch.cdist(query, expand_groups(key, query.shape[1])).square()
    share = torch.full((1, 1, 1, k_len), 1 / k_len).to(query) if prior is None else prior
    density = (logits + share.log()).logsumexp(-1) + dim / 2 * (precision / (2 * torch.pi)).log()
    return density.sum(-1)


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1) / 2


def _per_key(precision: float | Tensor, like: Tensor) -> float | Tensor:
    return precision[..., None, :].to(like) if isinstance(precision, Tensor) else precision


def _flags(mask: Tensor, like: Tensor) -> Tensor:
    """``(batch, heads, q_len, 1)`` of ones and zeros."""
    return mask[..., None].to(like).expand(*like.shape[:3], 1)


def _moved(
    mean: Tensor, total: Tensor, count: Tensor, precision: float | Tensor, prior_precision: float | Tensor | None
) -> Tensor:
    """``(c mean + precision total) / (c + precision count)``, written as a step from the old mean: exact where nothing
    was received or ``c`` is infinite."""
    work = mean.to(total)
    step, tiny = total - count * work, torch.finfo(total.dtype).tiny
    if prior_precision is None:
        return (work + step / count.clamp_min(tiny)).to(mean.dtype)
    sharp, strong = (p[..., None].to(total) if isinstance(p, Tensor) else p for p in (precision, prior_precision))
    if not isinstance(strong, Tensor) and strong < 0:
        raise OptionError(f"A prior's precision is at least 0, got {strong}.")
    return (work + sharp * step / (strong + sharp * count).clamp_min(tiny)).to(mean.dtype)
