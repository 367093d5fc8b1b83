"""What all executors do to shapes: grouped-query heads, score scale, broadcasting of masks over heads."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "expand_groups", "fold_groups", "score_scale"]


def score_scale(query: Tensor, scale: float | None) -> float:
    """``scale``, or the usual ``1 / sqrt(head_dim)``."""
    return query.shape[-1] ** -0.5 if scale is None else scale


def expand_groups(tensor: Tensor, num_heads: int) -> Tensor:
    """Repeat key/value heads ``(batch, kv_heads, ...)`` for the query heads that share them (grouped queries)."""
    groups = num_heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def fold_groups(tensor: Tensor, kv_heads: int) -> Tensor:
    """Sum ``(batch, num_heads, ...)`` over the query heads of each key/value head: the adjoint of expanding."""
    batch, heads = tensor.shape[:2]
    if heads == kv_heads:
        return tensor
    return tensor.view(batch, kv_heads, heads // kv_heads, *tensor.shape[2:]).sum(2)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision accumulates in float32; float32 and float64 in themselves."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
