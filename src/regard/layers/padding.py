"""Masks of layers that can hide tokens from all queries, but none per query."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import UnsupportedMaskError
from regard.masks import Mask

__all__ = ["layer_keys"]


def layer_keys(mask: Mask | None, length: int, device: torch.device, name: str) -> Tensor | None:
    """The keys ``(batch | 1, heads | 1, length)`` that a layer's mask shows; a mask per query is refused."""
    if mask is None:
        return None
    keys = mask.to(device).key_validity(length)
    if keys is None:
        raise UnsupportedMaskError(f"{name} can hide keys (KeyPadding), but not per query as {mask!r:.120} does.")
    return keys.to(device)
