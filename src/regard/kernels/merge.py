"""Merging attentions over disjoint sets of keys by their log-sum-exp, exact in value and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import ShapeError

__all__ = ["merge_attentions"]


def merge_attentions(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention from parts: ``sum_i exp(lse_i - lse) out_i`` with ``lse = logsumexp_i lse_i``.

    outs: each ``(..., q_len, value_dim)``; lses: each ``(..., q_len)``, ``-inf`` where a part sees nothing. Returns the
    merged output and log-sum-exp; a row that no part sees gives zeros and ``-inf``.
    """
    if not outs or len(outs) != len(lses):
        raise ShapeError(f"Merging needs as many log-sum-exps as outputs, at least one; got {len(outs)}, {len(lses)}.")
    stacked = torch.stack(list(lses))
    top = stacked.detach().amax(0)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    shares = (stacked - top).exp()
    total = shares.sum(0)
    seen = total > 0
    weights = shares / torch.where(seen, total, torch.ones_like(total))
    merged = (weights[..., None] * torch.stack([out.to(stacked.dtype) for out in outs])).sum(0)
    safe = torch.where(seen, total, torch.ones_like(total)).log() + top
    return merged.to(outs[0].dtype), torch.where(seen, safe, torch.full_like(safe, float("-inf")))
