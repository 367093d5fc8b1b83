"""The patterns that attention maps take, as a plane: a convolutional autoencoder of maps and an atlas of its codes.

Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", 2023, arXiv 2303.13731;
:mod:`regard.inspect.vit_head_analytics` holds the rest of it. Maps ``(layers, batch, heads, N, N)`` of any model; an
encoder of three strided convolutions, a bottleneck of (by default) two codes, and its mirror as decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.clustering import cluster_means, kmeans

__all__ = ["PatternDecoder", "PatternEmbedding", "PatternEncoder", "attention_pattern_embedding", "sample_grid"]


class PatternEncoder(nn.Module):
    """Maps ``(count, size, size)`` to codes ``(count, dim)``: three strided convolutions and a linear layer.

    Codes have mean 0 and variance 1 over a batch, so that they fill a box of known size."""

    def __init__(self, dim: int = 2, size: int = 64, width: int = 8) -> None:
        super().__init__()
        if dim < 1 or size < 8 or size % 8:
            raise OptionError(f"Codes need at least 1 dimension and maps a side that 8 divides; got {dim} and {size}.")
        wide = (1, width, 2 * width, 4 * width)
        steps = [nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()) for a, b in pairwise(wide)]
        self.layers = nn.Sequential(*steps, nn.Flatten(), nn.Linear(4 * width * (size // 8) ** 2, dim))
        self.layers.append(nn.BatchNorm1d(dim, affine=False))

    def forward(self, maps: Tensor) -> Tensor:
        return cast(Tensor, self.layers(maps[:, None]))


class PatternDecoder(nn.Module):
    """The encoder's mirror: codes ``(count, dim)`` to maps ``(count, size, size)`` between 0 and 1.

    ``low``, ``high`` ``(dim,)``: the box of codes that maps took, set when it is fitted.
    """

    low: Tensor
    high: Tensor

    def __init__(self, dim: int = 2, size: int = 64, width: int = 8) -> None:
        super().__init__()
        side = size // 8
        self.layers = nn.Sequential(
            nn.Linear(dim, 4 * width * side**2),
            nn.Unflatten(1, (4 * width, side, side)),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
            nn.Sigmoid(),
        )
        self.register_buffer("low", -torch.ones(dim))
        self.register_buffer("high", torch.ones(dim))

    def forward(self, codes: Tensor) -> Tensor:
        return cast(Tensor, self.layers(codes))[:, 0]


@dataclass(frozen=True, eq=False)
class PatternEmbedding:
    """``codes`` ``(layers, batch, heads, dim)`` of all maps, ``assignment`` ``(layers, batch, heads)`` to clusters of
    codes, and ``prototypes`` ``(clusters, size, size)``, what the decoder makes of the clusters' means. ``error``: mean
    squared error of the maps rebuilt from their codes, ``spread``: their variance around the mean map (what no code at
    all would leave)."""

    codes: Tensor
    assignment: Tensor
    prototypes: Tensor
    encoder: PatternEncoder
    decoder: PatternDecoder
    error: float
    spread: float

    def head_clusters(self) -> Tensor:
        """The cluster that most images give each head, ``(layers, heads)``; of several the lowest."""
        return F.one_hot(self.assignment, len(self.prototypes)).sum(1).argmax(-1)


def attention_pattern_embedding(
    attn: Tensor,
    dim: int = 2,
    *,
    size: int = 64,
    clusters: int = 6,
    steps: int = 600,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> PatternEmbedding:
    """Learn the patterns that maps ``(layers, batch, heads, N, N)`` take.

    Each row of a map is divided by its largest weight, the map is resized to ``size`` x ``size``, and an autoencoder
    with ``dim`` codes is fitted to all of them (Adam, mean squared error, ``steps`` of ``batch_size``); k-means puts
    the codes into ``clusters``. Same seed, same result; the global generator stays as it was.
    """
    if attn.dim() != 5 or attn.shape[3] != attn.shape[4]:
        raise ShapeError(f"Maps are (layers, batch, heads, N, N); got {tuple(attn.shape)}.")
    if attn.numel() == 0 or not bool(attn.isfinite().all()):
        raise OptionError(f"There are no maps, or some weights are not finite, in {tuple(attn.shape)}.")
    maps = _pictures(attn.detach(), size)
    if not 1 <= clusters <= len(maps):
        raise OptionError(f"Between 1 and {len(maps)} clusters can be made of {len(maps)} maps; got {clusters}.")
    if batch_size < 2:
        raise OptionError(f"Codes are normalised over a batch of at least 2 maps; got batch_size {batch_size}.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, decoder = PatternEncoder(dim, size).to(maps.device), PatternDecoder(dim, size).to(maps.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr)
    with torch.enable_grad():
        for _ in range(steps):
            some = maps[torch.randint(len(maps), (batch_size,), generator=generator)]
            optimizer.zero_grad(set_to_none=True)
            F.mse_loss(decoder(encoder(some)), some).backward()
            optimizer.step()
    encoder.eval()
    with torch.no_grad():
        pieces = [(codes := encoder(some), (decoder(codes) - some).square().sum()) for some in maps.split(256)]
        codes = torch.cat([piece[0] for piece in pieces])
        error = float(sum(piece[1] for piece in pieces)) / maps.numel()
        decoder.low.copy_(codes.amin(0))
        decoder.high.copy_(codes.amax(0))
        assignment = kmeans(codes[None], clusters, 30, seed=seed).assignment
        prototypes = decoder(cluster_means(codes[None], assignment, clusters)[0])
    spread = float(maps.var(0, correction=0).mean())
    shape = attn.shape[:3]
    return PatternEmbedding(
        codes.unflatten(0, shape), assignment[0].unflatten(0, shape), prototypes, encoder, decoder, error, spread
    )


def _pictures(attn: Tensor, size: int) -> Tensor:
    """Maps whose rows have largest weight 1, at one size, ``(layers * batch * heads, size, size)``."""
    maps = attn.flatten(0, 2).float()
    maps = maps / maps.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return F.interpolate(maps[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]


@torch.no_grad()
def sample_grid(decoder: PatternDecoder, n: int = 8) -> Tensor:
    """The atlas of patterns: ``n`` x ``n`` maps ``(n, n, size, size)`` decoded over the box of codes; the first axis is
    the second code from high to low, the second axis the first code from low to high, as a plane is drawn."""
    if len(decoder.low) != 2 or n < 1:
        raise OptionError(
            f"A grid of n >= 1 a side is drawn of 2 codes; this decoder has {len(decoder.low)}, n is {n}."
        )
    share = torch.linspace(0, 1, n, device=decoder.low.device) if n > 1 else decoder.low.new_tensor([0.5])
    across, up = (low + share * (high - low) for low, high in zip(decoder.low, decoder.high, strict=True))
    codes = torch.stack(torch.meshgrid(across, up.flip(0), indexing="xy"), -1)
    return cast(Tensor, decoder(codes.flatten(0, 1))).unflatten(0, (n, n))
