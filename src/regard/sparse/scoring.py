"""What selectors score with: block means, and where blocks stand.

The frame of this folder is score -> select -> layout -> execute: :mod:`regard.sparse.scoring` and
:mod:`regard.sparse.selection` hold the first two steps as far as papers share them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels import accumulation_dtype, expand_groups
from regard.layout import num_blocks

__all__ = ["block_has", "block_index", "grouped_scores", "per_kv_head", "pool_blocks", "split_blocks"]


def split_blocks(x: Tensor, block_size: int) -> Tensor:
    """``(..., length, dim)`` -> ``(..., num_blocks, block_size, dim)``; a short last block is filled up with zeros."""
    short = -x.shape[-2] % block_size
    return (F.pad(x, (0, 0, 0, short)) if short else x).unflatten(-2, (-1, block_size))


def pool_blocks(x: Tensor, block_size: int, keys: Tensor | None = None) -> Tensor:
    """Means over blocks of tokens, ``(batch, heads, num_blocks, dim)`` in the accumulation dtype.

    ``x`` ``(batch, heads, length, dim)``; a short last block is averaged over the tokens it has. ``keys`` ``(batch | 1,
    heads | 1, length)`` boolean: tokens that count; a block without any gives zeros.
    """
    x = x.to(accumulation_dtype(x.dtype))
    if keys is None:
        sizes = torch.full((num_blocks(x.shape[2], block_size),), block_size, dtype=x.dtype, device=x.device)
        sizes[-1] -= -x.shape[2] % block_size
        return split_blocks(x, block_size).sum(-2) / sizes[:, None]
    shown = keys[..., None]
    counts = split_blocks(shown.to(x.dtype), block_size).sum(-2)
    return split_blocks(torch.where(shown, x, 0), block_size).sum(-2) / counts.clamp_min(1)


def block_has(keys: Tensor, block_size: int) -> Tensor:
    """Whether a block has any token that counts: boolean ``(..., length)`` -> ``(..., num_blocks)``."""
    return split_blocks(keys[..., None], block_size)[..., 0].any(-1)


def block_index(q_len: int, k_len: int, block_size: int, device: torch.device | str | None = None) -> Tensor:
    """The key block in which each query stands ``(q_len,)``; negative for queries before the first key."""
    position = torch.arange(k_len - q_len, k_len, device=device)
    return position.div(block_size, rounding_mode="floor")


def per_kv_head(key: Tensor, keys: Tensor | None) -> Tensor:
    """``key`` with its heads repeated where ``keys`` ``(batch | 1, heads | 1, k_len)`` differs between query heads."""
    return key if keys is None or keys.shape[1] in (1, key.shape[1]) else expand_groups(key, keys.shape[1])


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """``q k^T`` ``(batch, num_heads, q_len, k_len)`` for key heads that divide the query's, without repeating keys."""
    batch, heads, q_len, dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, dim)
    return (folded @ key.transpose(-1, -2)).view(batch, heads, q_len, key.shape[2])
