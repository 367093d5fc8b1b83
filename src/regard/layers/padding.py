"""Masks of layers that can hide tokens from all queries, but none per query."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ShapeError, UnsupportedMaskError
from regard.masks import Mask

__all__ = ["layer_keys", "per_head"]


def layer_keys(mask: Mask | None, length: int, device: torch.device, name: str) -> Tensor | None:
    """The keys ``(batch | 1, heads | 1, length)`` that a layer's mask shows; a mask per query is refused."""
    if mask is None:
        return None
    keys = mask.to(device).key_validity(length)
    if keys is None:
        raise UnsupportedMaskError(f"{name} can hide keys (KeyPadding), but not per query as {mask!r:.120} does.")
    return keys.to(device)


def per_head(real: Tensor | None) -> Tensor | None:
    """A mask of real tokens, ``(batch, length)`` or ``(batch | 1, heads | 1, length)``, as the latter."""
    if real is None or (real.dim() == 3 and real.dtype == torch.bool):
        return real
    if real.dim() != 2 or real.dtype != torch.bool:
        raise ShapeError(
            "A padding mask is boolean, True for real tokens, of shape (batch, length) or (batch, heads, length); "
            f"got {real.dtype} of shape {tuple(real.shape)}."
        )
    return real[:, None]
