"""How selectors choose: top-k and top-p over scores, what is forced and what is forbidden, and masks made definite.

Scores carry both: ``+inf`` is always chosen, ``-inf`` never.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regard.masks import Boolean, Causal, Mask
from regard.mechanism import Request

__all__ = ["settle_mask", "top_k_mask", "top_p_mask"]


def settle_mask(request: Request, q_len: int, k_len: int) -> tuple[Mask | None, Tensor | None]:
    """What a selector must know of the mask: the rule (causality included), and the keys that any query may see.

    Keys ``(batch | 1, heads | 1, k_len)`` boolean, or None for all. A mask that speaks of more than keys is evaluated
    once, so that what is selected depends on what it hides and not on how it is written.
    """
    mask, keys = request.mask, request.keys
    if mask is not None and keys is None:
        mask = Boolean(mask.dense(q_len, k_len))
        keys = mask.tensor.any(-2)
    if request.causal:
        return (Causal() if mask is None else mask & Causal()), keys
    return mask, keys


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """True for the ``top_k`` largest of each row (fewer where fewer are above ``-inf``)."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if top_k >= scores.shape[-1]:
        return scores > float("-inf")
    best = scores.topk(top_k, dim=-1)
    return chosen.scatter_(-1, best.indices, best.values > float("-inf"))


def top_p_mask(
    shares: Tensor,
    top_p: float | Tensor,
    crossing: Literal["include", "exclude"] = "include",
    minimum: int = 1,
) -> Tensor:
    """True for the largest entries of each row whose running sum stays at or below ``top_p``.

    ``shares`` are non-negative, rows sum to 1 (or to 0: nothing is chosen). ``crossing``: whether the entry that carries
    the sum past ``top_p`` is taken too. At least ``minimum`` non-zero entries are taken. ``top_p`` may be a tensor that
    broadcasts to ``shares``; a row with ``top_p >= 1`` takes all that is not zero, whatever rounding makes of the sum.
    """
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    running = ordered.cumsum(-1)
    if crossing == "include":
        running = running - ordered
        kept = running < top_p
    else:
        kept = running <= top_p
    kept[..., :minimum] = True
    kept = (kept | torch.as_tensor(top_p, device=shares.device).ge(1)) & (ordered > 0)
    return torch.zeros_like(kept).scatter_(-1, order, kept)
