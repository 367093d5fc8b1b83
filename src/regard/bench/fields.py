"""Smooth random fields in space and time, plus noise: what tokens of images and videos look like to attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["field_tokens", "smooth_field"]


def smooth_field(
    grid: Sequence[int], channels: int, generator: torch.Generator | None = None, waves: float = 1.5
) -> Tensor:
    """Gaussian random fields of unit variance, ``(tokens, channels)`` in the grid's order.

    waves: at so many waves across the longest axis the spectrum's amplitude has fallen by ``exp(-1/2)``.
    """
    axes = [torch.fft.fftfreq(n) * max(grid) for n in grid]
    square = torch.stack([axis**2 for axis in torch.meshgrid(*axes, indexing="ij")]).sum(0)
    over = tuple(range(1, len(grid) + 1))
    white = torch.fft.fftn(torch.randn(channels, *grid, generator=generator), dim=over)
    field = torch.fft.ifftn(white * torch.exp(-square / (2 * waves**2)), dim=over).real
    return (field / field.std()).flatten(1).T


def field_tokens(
    grid: Sequence[int],
    heads: int,
    dim: int,
    seed: int,
    noise: float = 0.0,
    same_noise: bool = False,
    size: float = 1.0,
    waves: float = 1.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(1, heads, tokens, dim)`` in the grid's order.

    Query and key of a token are the same smooth field plus noise, times ``size``; values are another field plus noise.
    same_noise: query and key carry the same noise, as projections of one token do, so that a query finds its like.
    """
    generator = torch.Generator().manual_seed(seed)
    fields = [torch.stack([smooth_field(grid, dim, generator, waves) for _ in range(heads)]) for _ in range(2)]
    rough = [noise * torch.randn(fields[0].shape, generator=generator) for _ in range(3)]
    key_noise = rough[0] if same_noise else rough[1]
    query, key, value = size * (fields[0] + rough[0]), size * (fields[0] + key_noise), fields[1] + rough[2]
    return query[None], key[None], value[None]
