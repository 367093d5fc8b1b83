"""Scores of pairs: modules ``(query (..., rows, d), key (..., k_len, d)) -> (..., rows, k_len)``.

None but the dot product is a matrix product of queries and keys, so they cost more; what each forms per pair
(``per_pair`` numbers) sets how many queries are taken at once. Weights are shared by all heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, UnknownNameError

__all__ = ["SCORERS", "AdditiveScore", "BilinearScore", "DistanceScore", "DotScore", "Scorer", "scorer"]


class Scorer(nn.Module):
    """A score of pairs. ``per_pair``: numbers that it forms for each."""

    per_pair = 1

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        raise NotImplementedError


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the dtype of ``x``: scores of half precision are computed in float32."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


class DotScore(Scorer):
    """``q . k / sqrt(d)``, or times ``scale``."""

    def __init__(self, head_dim: int, scale: float | None = None) -> None:
        super().__init__()
        self.scale = head_dim**-0.5 if scale is None else scale

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return (query * self.scale) @ key.transpose(-1, -2)


class BilinearScore(Scorer):
    """``q U^T V k / sqrt(rank)``, of rank at most ``rank`` (Luong et al., 2015, arXiv 1508.04025, "general")."""

    def __init__(self, head_dim: int, rank: int | None = None) -> None:
        super().__init__()
        rank = head_dim if rank is None else rank
        if rank < 1:
            raise OptionError(f"rank is at least 1, got {rank}.")
        self.query, self.key = nn.Linear(head_dim, rank, bias=False), nn.Linear(head_dim, rank, bias=False)
        self.scale = rank**-0.5

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return (_linear(self.query, query) * self.scale) @ _linear(self.key, key).transpose(-1, -2)


class AdditiveScore(Scorer):
    """``w . tanh(A q + C k + b)`` (Bahdanau et al., 2014, arXiv 1409.0473, section A.1.2)."""

    def __init__(self, head_dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = head_dim if hidden is None else hidden
        if hidden < 1:
            raise OptionError(f"hidden is at least 1, got {hidden}.")
        self.per_pair = hidden
        self.query, self.key = nn.Linear(head_dim, hidden), nn.Linear(head_dim, hidden, bias=False)
        self.out = nn.Linear(hidden, 1, bias=False)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        pairs = _linear(self.query, query)[..., :, None, :] + _linear(self.key, key)[..., None, :, :]
        return _linear(self.out, torch.tanh(pairs))[..., 0]


class DistanceScore(Scorer):
    """``-|q - k|_p^p / scale``; ``p`` is 1 or 2. Twice the square root of ``d`` is the default scale for squares, which
    makes scores those of the dot product less the squares of both sides; ``d`` for absolute differences."""

    def __init__(self, head_dim: int, p: int = 2, scale: float | None = None) -> None:
        super().__init__()
        if p not in (1, 2):
            raise OptionError(f"p is 1 or 2, got {p}.")
        self.p = p
        self.scale = (2 * head_dim**0.5 if p == 2 else head_dim) if scale is None else scale

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        if self.p == 1:
            return -torch.cdist(query, key, p=1) / self.scale
        squares = query.square().sum(-1, keepdim=True) + key.square().sum(-1)[..., None, :]
        return (2 * query @ key.transpose(-1, -2) - squares) / self.scale


SCORERS: dict[str, type[Scorer]] = {
    "dot": DotScore,
    "bilinear": BilinearScore,
    "additive": AdditiveScore,
    "distance": DistanceScore,
}
"""By name, each built from ``head_dim`` and options."""


def scorer(name: str, head_dim: int, **options: float) -> Scorer:
    """A score by name; UnknownNameError shows the names."""
    if name not in SCORERS:
        raise UnknownNameError("score", name, SCORERS, f"There are: {', '.join(SCORERS)}.")
    return SCORERS[name](head_dim, **options)
