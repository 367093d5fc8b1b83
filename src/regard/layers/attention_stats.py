"""Numbers that describe an attention map or a feature matrix: how local, how flat, of what rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["effective_rank", "local_mass", "neighbourhood", "numerical_rank", "row_entropy"]


def neighbourhood(grid: Sequence[int], radius: int = 1, device: torch.device | None = None) -> Tensor:
    """Boolean ``(N, N)``: True where two tokens of a grid are at most ``radius`` apart along every axis."""
    if radius < 0 or not grid or min(grid) < 1:
        raise OptionError(f"Need a radius of at least 0 and a grid of positive sides, got {radius} and {tuple(grid)}.")
    place = torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid)).view(-1, len(grid))
    return (place[:, None] - place[None]).abs().amax(-1) <= radius


def local_mass(attn: Tensor, grid: Sequence[int], radius: int = 1) -> Tensor:
    """Share of each row's weight that lies within ``radius`` of the query: ``(..., N, N)`` -> ``(..., N)``.

    Weights count by their size, so that maps with negative weights can be compared; a row of zeros has share 0.
    """
    near = neighbourhood(grid, radius, attn.device)
    if attn.shape[-2:] != near.shape:
        raise ShapeError(f"A map of {len(near)} x {len(near)} tokens belongs to grid {tuple(grid)}; got {attn.shape}.")
    size = attn.to(accumulation_dtype(attn.dtype)).abs()
    whole = size.sum(-1)
    return size.masked_fill(~near, 0).sum(-1) / torch.where(whole > 0, whole, 1)


def row_entropy(attn: Tensor) -> Tensor:
    """Entropy in nats of each row of non-negative weights, scaled to sum 1: ``(..., N)`` -> ``(...)``; at most
    ``log N``, for a flat row."""
    if bool((attn < 0).any()):
        raise OptionError("Entropy is defined for non-negative weights; this map has negative ones.")
    return _entropy(attn.to(accumulation_dtype(attn.dtype)))


def effective_rank(matrix: Tensor) -> Tensor:
    """``exp`` of the entropy of the normalised singular values: ``(..., m, n)`` -> ``(...)``."""
    return _entropy(torch.linalg.svdvals(matrix.to(accumulation_dtype(matrix.dtype)))).exp()


def numerical_rank(matrix: Tensor, tol: float = 1e-6) -> Tensor:
    """Singular values above ``tol`` times the largest: ``(..., m, n)`` -> integers ``(...)``."""
    values = torch.linalg.svdvals(matrix.to(accumulation_dtype(matrix.dtype)))
    return (values > tol * values[..., :1]).sum(-1)


def _entropy(parts: Tensor) -> Tensor:
    whole = parts.sum(-1, keepdim=True)
    share = parts / torch.where(whole > 0, whole, 1)
    return -torch.special.xlogy(share, share).sum(-1)
