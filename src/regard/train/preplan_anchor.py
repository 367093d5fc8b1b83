"""Reinforcement learning with credit by token: GRPO whose advantages are weighed by a rhythm of attention.

"Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization", 2025,
arXiv 2510.13554, equations 5, 6 and 12; the weights ``gamma`` are those of :mod:`regard.inspect.preplan_anchor`.

``J = mean of min(r_t A_t, clip(r_t, 1 - c, 1 + c) A_t)`` with ``r_t`` the ratio of a token's probability now to when it
was drawn and ``A_t = gamma_t A`` where ``A >= 0``, else ``A``; the paper's second version weighs both signs. All is of
tokens, ``(batch, length)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = ["group_advantage", "grpo_loss", "reweight_advantage"]


def group_advantage(reward: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage of rewards ``(..., group)``: less the mean of the group, over its standard deviation (equation
    6; plus ``eps``, so that a group of equal rewards has none)."""
    reward = reward if reward.is_floating_point() else reward.float()
    spread = reward.std(-1, correction=0, keepdim=True)
    return (reward - reward.mean(-1, keepdim=True)) / (spread + eps)


def reweight_advantage(advantage: Tensor, gamma: Tensor, *, both_signs: bool = False) -> Tensor:
    """``gamma A`` where ``A >= 0`` and ``A`` elsewhere, ``(batch, length)``. advantage: ``(batch,)``, one of each
    response, or ``(batch, length)``. both_signs: ``gamma A`` everywhere. No gradient flows into gamma."""
    per_token = _per_token(advantage, gamma)
    weighed = per_token * gamma.detach()
    return weighed if both_signs else torch.where(per_token >= 0, weighed, per_token)


def grpo_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, clip: float = 0.2, response_mask: Tensor | None = None
) -> Tensor:
    """The clipped surrogate, to be minimised (equation 5), without the divergence term, which the paper leaves out.

    logp, logp_old ``(batch, length)``: log-probabilities (nats) of the tokens now and when they were drawn. advantage:
    ``(batch,)`` or ``(batch, length)``. The mean is over a response's tokens, then over responses.
    """
    if logp.shape != logp_old.shape:
        raise ShapeError(f"logp and logp_old go together, got {tuple(logp.shape)} and {tuple(logp_old.shape)}.")
    if not 0 < clip < 1:
        raise OptionError(f"clip is how far the ratio may move, between 0 and 1; got {clip}.")
    mask = torch.ones_like(logp, dtype=torch.bool) if response_mask is None else response_mask.bool()
    if mask.shape != logp.shape:
        raise ShapeError(f"response_mask is (batch, length) = {tuple(logp.shape)}, got {tuple(mask.shape)}.")
    given = _per_token(advantage, logp).detach()
    # What stands outside the responses may be anything, infinities too.
    ratio = (logp - logp_old.detach()).masked_fill(~mask, 0.0).exp()
    gain = torch.minimum(ratio * given, ratio.clamp(1 - clip, 1 + clip) * given)
    return -(gain.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)).mean()


def _per_token(advantage: Tensor, like: Tensor) -> Tensor:
    if advantage.dim() == 1 and like.dim() == 2 and len(advantage) == len(like):
        return advantage[:, None].expand_as(like)
    if advantage.shape != like.shape:
        raise ShapeError(
            f"advantage is (batch,) or (batch, length) = {tuple(like.shape)}; got {tuple(advantage.shape)}."
        )
    return advantage
