"""What all executors do to shapes: grouped-query heads, score scale, broadcasting of masks over heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "accumulation_dtype",
    "cut_blocks",
    "expand_groups",
    "fold_groups",
    "score_scale",
    "take_blocks",
    "take_tokens",
]


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


def cut_blocks(tensor: Tensor, block: int, dtype: torch.dtype, spare: int = 0) -> Tensor:
    """``(batch, heads, length, dim)`` -> ``(all blocks + spare, block, dim)``, zeros after the ends."""
    short = -tensor.shape[2] % block
    padded = F.pad(tensor, (0, 0, 0, short)) if short else tensor
    flat = padded.to(dtype).reshape(-1, block, tensor.shape[-1])
    return F.pad(flat, (0, 0, 0, 0, 0, spare)) if spare else flat


def take_blocks(blocks: Tensor, index: Tensor) -> Tensor:
    """Rows of blocks: ``(rows, slots)`` of ``(all blocks, block, dim)`` -> ``(rows, slots * block, dim)``."""
    return blocks.index_select(0, index.flatten()).view(len(index), -1, blocks.shape[-1])


def take_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens of grouped heads: ``index (batch, num_heads, slots)`` into ``(batch, kv_heads, length, dim)`` ->
    ``(batch, num_heads, slots, dim)``. Neither are heads repeated first nor is more read than is taken."""
    rows = index.reshape(index.shape[0], tensor.shape[1], -1, 1)
    taken = tensor.gather(2, rows.expand(-1, -1, -1, tensor.shape[3]))
    return taken.view(*index.shape, tensor.shape[3])
