"""Tokens that plan a phrase, anchors that later ones return to, and credit for both.

"Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization", 2025,
arXiv 2510.13554, sections 4 and 5, equations 13 to 18, on WAAD and FAI of :mod:`regard.inspect.rhythm`.

- Preplan tokens are the 40 percent of a response with the largest ``delta_t = |WAAD_t - WAAD_{t+1}|``, anchors the 40
  percent with the largest FAI. An anchor ``t`` is dominated if ``WAAD_t <= tau_waad`` and the largest ``delta`` of the
  ``k`` tokens before is at least ``tau_delta``; the token of that largest ``delta`` introduces it.
- Credit: ``gamma = 1 + (amp - 1) w`` with ``w = [preplan]``, ``w = [anchor]``, or coupled ``w = [anchor, not dominated]
  + (1 - alpha) [dominated] + alpha [introduces one]``; :mod:`regard.train.preplan_anchor` applies it.

The paper gives no thresholds; medians of the response stand for them. Its neighbourhood is of one to three tokens.
Shapes: what is said of tokens ``(batch, length)``; ``response_mask`` ``(batch, length)`` bool, True on the response
(default: everywhere).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.inspect.rhythm import response_tokens

__all__ = [
    "RhythmCoupling",
    "RhythmLift",
    "anchor_tokens",
    "preplan_tokens",
    "rhythm_coupling",
    "rhythm_lift",
    "token_credit",
]


def preplan_tokens(waad: Tensor, q: float = 0.4, response_mask: Tensor | None = None) -> Tensor:
    """``(batch, length)`` bool: the share ``q`` of each response where WAAD changes most to the next token
    (equation 13). The last token has no next one; a token without change is never chosen."""
    mask = response_tokens(waad, response_mask)
    return _top(_change(waad, mask).clamp_min(0), q, mask)


def anchor_tokens(fai: Tensor, q: float = 0.4, response_mask: Tensor | None = None) -> Tensor:
    """``(batch, length)`` bool: the share ``q`` of each response with the largest FAI (equation 15). A token of FAI 0,
    as those without a window have, is never chosen."""
    return _top(fai, q, response_tokens(fai, response_mask))


@dataclass(frozen=True, eq=False)
class RhythmCoupling:
    """All ``(batch, length)``: ``anchors``, the ``dominated`` among them, ``introductory`` tokens of these (bool), and
    ``introduced_by`` (int64): the place of a dominated anchor's introductory token, -1 at other tokens."""

    anchors: Tensor
    dominated: Tensor
    introductory: Tensor
    introduced_by: Tensor


@torch.no_grad()
def rhythm_coupling(
    waad: Tensor,
    fai: Tensor,
    *,
    q: float = 0.4,
    k: int = 3,
    response_mask: Tensor | None = None,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> RhythmCoupling:
    """Anchors that the few tokens before them make likely, and which token that is (equation 17).

    k: how many tokens before. tau_waad, tau_delta: thresholds, by default the medians of each response. Of equal
    changes the nearest introduces.
    """
    mask = response_tokens(waad, response_mask)
    response_tokens(fai, mask)
    if k < 1:
        raise OptionError(f"k counts tokens before an anchor, so it is at least 1; got {k}.")
    change, length = _change(waad, mask), waad.shape[-1]
    low = _median(waad, mask) if tau_waad is None else torch.full_like(waad[:, :1], tau_waad)
    high = _median(change, change >= 0) if tau_delta is None else torch.full_like(waad[:, :1], tau_delta)
    before = nn.functional.pad(change, (k, 0), value=-1.0).unfold(-1, k, 1)[:, :length].flip(-1)
    largest, back = before.max(-1)
    anchors = anchor_tokens(fai, q, mask)
    # A change of -1 stands for a token that has none.
    dominated = anchors & (waad <= low) & (largest >= high) & (largest >= 0)
    introduced_by = torch.where(dominated, torch.arange(length, device=waad.device) - 1 - back, -1)
    introductory = torch.zeros_like(dominated)
    rows, at = dominated.nonzero(as_tuple=True)
    introductory[rows, introduced_by[rows, at]] = True
    return RhythmCoupling(anchors, dominated, introductory, introduced_by)


@torch.no_grad()
def token_credit(
    waad: Tensor,
    fai: Tensor,
    mode: Literal["local", "global", "coupled"] = "coupled",
    *,
    amp: float = 1.5,
    alpha: float = 0.5,
    q: float = 0.4,
    k: int = 3,
    response_mask: Tensor | None = None,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> Tensor:
    """``gamma`` ``(batch, length)``, without gradients: what a token's advantage is multiplied by (equations 14, 16 and
    18). amp: of a chosen token. alpha: the share of a dominated anchor's extra that goes to its introductory token; the
    shares of a token that is an anchor and introduces another add up."""
    if mode not in ("local", "global", "coupled"):
        raise OptionError(f"mode is 'local', 'global' or 'coupled', got {mode!r}.")
    if amp < 0 or not 0 <= alpha <= 1:
        raise OptionError(f"amp is at least 0 and alpha between 0 and 1; got {amp} and {alpha}.")
    if mode == "local":
        share = preplan_tokens(waad, q, response_mask).to(waad.dtype)
    elif mode == "global":
        share = anchor_tokens(fai, q, response_mask).to(fai.dtype)
    else:
        found = rhythm_coupling(
            waad, fai, q=q, k=k, response_mask=response_mask, tau_waad=tau_waad, tau_delta=tau_delta
        )
        own = found.anchors.to(waad.dtype) - alpha * found.dominated.to(waad.dtype)
        share = own + alpha * found.introductory.to(waad.dtype)
    return 1 + (amp - 1) * share


@dataclass(frozen=True)
class RhythmLift:
    """Table 2 of the paper. ``entropy_at_peaks`` and ``entropy`` (nats): mean entropy of the model's guess where WAAD
    peaks, and of all response tokens. ``follows``: share of FAI's peaks at or right after one of WAAD;
    ``follows_by_chance``: the same, were FAI's peaks anywhere in the response. NaN where there are no peaks."""

    entropy_at_peaks: float
    entropy: float
    follows: float
    follows_by_chance: float


@torch.no_grad()
def rhythm_lift(waad: Tensor, fai: Tensor, entropy: Tensor, response_mask: Tensor | None = None) -> RhythmLift:
    """How the signals go together, all ``(batch, length)``; ``entropy`` of the guess of each token, made at the one
    before. A peak is a token above both neighbours, all three of the response."""
    mask = response_tokens(waad, response_mask)
    response_tokens(fai, mask)
    response_tokens(entropy, mask)
    tall, far = _peaks(waad, mask), _peaks(fai, mask)
    near = tall | nn.functional.pad(tall, (1, 0))[:, :-1]
    # Peaks may fall wherever there is a window; chance is judged within each response.
    room = mask & (fai > 0)
    chance = (near & room).sum(-1) / room.sum(-1).clamp_min(1)
    return RhythmLift(
        float(entropy[tall].mean()),
        float(entropy[mask].mean()),
        float(near[far].double().mean()),
        float((chance * far.sum(-1)).sum() / far.sum()),
    )


def _change(waad: Tensor, mask: Tensor) -> Tensor:
    """``|WAAD_t - WAAD_{t+1}|`` where both are of the response, -1 elsewhere."""
    step = nn.functional.pad(waad.diff(dim=-1).abs(), (0, 1))
    return torch.where(mask & nn.functional.pad(mask[:, 1:], (0, 1)), step, -1.0)


def _top(score: Tensor, q: float, mask: Tensor) -> Tensor:
    if not 0 < q <= 1:
        raise OptionError(f"q is the share of tokens to choose, above 0 and at most 1; got {q}.")
    order = score.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return mask & (score > 0) & (rank < (q * mask.sum(-1, keepdim=True)).round())


def _median(score: Tensor, mask: Tensor) -> Tensor:
    return score.masked_fill(~mask, torch.nan).nanmedian(-1, keepdim=True).values


def _peaks(score: Tensor, mask: Tensor) -> Tensor:
    beside = nn.functional.pad(score.masked_fill(~mask, torch.inf), (1, 1), value=torch.inf)
    return mask & (score > beside[:, :-2]) & (score > beside[:, 2:])
