"""Scores of pairs: modules ``(query (..., rows, d), key (..., k_len, d)) -> (..., rows, k_len)``.

Only the dot product and its likes are matrix products of queries and keys; the others cost more, and what each forms
per pair (``per_pair`` numbers) sets how many queries are taken at once. Weights are shared by all heads unless said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, linear_layer_flops
from regard.errors import OptionError, ShapeError
from regard.layers.attention_functions import ACTIVATIONS, activation
from regard.layers.linear_dynamics import decay, dle_variance, rotated_residual
from regard.layers.steps import build_step

__all__ = [
    "SCORERS",
    "AdditiveScore",
    "BilinearScore",
    "DistanceScore",
    "DotScore",
    "FilteredScore",
    "GaussianScore",
    "LowRankScore",
    "MLPScorer",
    "RelationalScore",
    "Scorer",
    "relations",
    "scorer",
]


class Scorer(nn.Module):
    """A score of pairs. ``per_pair``: numbers that it forms for each."""

    per_pair = 1
    num_heads: int | None = None
    """Heads that it has parameters for, each its own; None where all heads share them."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        raise NotImplementedError

    def at(self, query: Tensor, key: Tensor, place: Tensor) -> Tensor:
        """Scores of queries that stand at ``place (rows,)``, counted as the keys are: as :meth:`forward`, unless the
        score reads positions."""
        scores: Tensor = self(query, key)
        return scores

    def extra_flops(self, shape: AttentionShape) -> int:
        """FLOPs of a call's scores beyond those of the dot product."""
        return 0


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

    def extra_flops(self, shape: AttentionShape) -> int:
        rank = self.query.out_features
        return _tokens_and_pairs(shape, rank, rank)


class LowRankScore(BilinearScore):
    """:class:`BilinearScore` of a rank below ``head_dim``, by default a quarter of it (at least 1)."""

    def __init__(self, head_dim: int, rank: int | None = None) -> None:
        super().__init__(head_dim, max(head_dim // 4, 1) if rank is None else rank)
        if rank is not None and rank >= head_dim > 1:
            raise OptionError(f"A low rank is below head_dim {head_dim}, got {rank}; 'bilinear' takes any.")


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

    def extra_flops(self, shape: AttentionShape) -> int:
        return _tokens_and_pairs(shape, self.per_pair, self.per_pair)


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


class GaussianScore(Scorer):
    """``-sum_c w_c (q_c - k_c)^2 / 2``: the exponent of a Gaussian of one precision ``w_c > 0`` per channel, learned
    from ``precision`` on (default: ``1 / sqrt(head_dim)``, which makes it :class:`DistanceScore`)."""

    def __init__(self, head_dim: int, precision: float | None = None) -> None:
        super().__init__()
        begin = head_dim**-0.5 if precision is None else precision
        if not begin > 0:
            raise OptionError(f"A precision is above 0, got {begin}.")
        self.log_precision = nn.Parameter(torch.full((head_dim,), begin).log())

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        precision = self.log_precision.to(query.dtype).exp()
        squares = (query.square() @ precision)[..., None] + (key.square() @ precision)[..., None, :]
        return (query * precision) @ key.transpose(-1, -2) - squares / 2


class FilteredScore(Scorer):
    """``-log V_ij - log(1 + |q_i - e^(mu dt) k_j|^2 / (nu d V_ij))``: how likely a key, carried on ``dt = max(i - j,
    0)`` tokens by a system that fades with ``mu <= 0``, is the query seen through noise of variance ``V_ij``
    (:func:`~regard.layers.linear_dynamics.dle_variance`); not robust: the Gaussian's ``-|.|^2 / (nu d V_ij)`` for the
    logarithm.

    Each head learns its ``mu`` in ``[-5 / max_len, 0]``, the three noises in ``V`` and ``nu``. Rotary positions on
    queries and keys are the system's turning. Racioppo, "Attention as an Adaptive Filter", 2025, arXiv 2509.04154.
    """

    per_pair = 4

    def __init__(self, head_dim: int, num_heads: int = 1, max_len: int = 512, robust: bool = True) -> None:
        super().__init__()
        if max_len < 1:
            raise OptionError(f"max_len is at least 1, got {max_len}.")
        self.num_heads, self.max_len, self.robust = num_heads, max_len, robust
        self.fading = nn.Parameter(torch.linspace(-2, 2, num_heads) if num_heads > 1 else torch.zeros(1))
        # Of the process, the key's measurement, the query's, and nu.
        self.log_noise = nn.Parameter(torch.zeros(4, num_heads))

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads, max_len={self.max_len}, {'robust' if self.robust else 'Gaussian'}"

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """The last query stands where the last key does."""
        rows, k_len = query.shape[-2], key.shape[-2]
        return self.at(query, key, torch.arange(k_len - rows, k_len, device=query.device))

    def at(self, query: Tensor, key: Tensor, place: Tensor) -> Tensor:
        if query.shape[-3] != self.num_heads:
            raise ShapeError(
                f"This score has a system for each of {self.num_heads} heads and got {query.shape[-3]}; build it with "
                f"num_heads={query.shape[-3]}."
            )
        mu = (torch.sigmoid(self.fading.to(query.dtype)) - 1) * (5 / self.max_len)
        process, measured, anchor, nu = self.log_noise.to(query.dtype).exp()[..., None, None]
        dt = (
            (place[:, None] - torch.arange(key.shape[-2], device=query.device)).clamp_min(0).to(query.dtype)[None, None]
        )
        variance = dle_variance(mu[:, None, None], process, measured, anchor, dt)
        misfit = rotated_residual(query, key, decay(mu, dt)) / (nu * query.shape[-1] * variance)
        return -variance.log() - (torch.log1p(misfit) if self.robust else misfit)


def relations(query: Tensor, key: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(q . k / sqrt(d))``: how far two tokens relate in one learned respect, ``(..., rows, k_len)``.

    Altabaa and Lafferty, 2024, arXiv 2405.16727, section 3.
    """
    return function((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2))


class RelationalScore(Scorer):
    """``sum_l w_l f((U_l q) . (V_l k) / sqrt(rel_dim))`` over ``num_relations`` relations: tokens are compared in
    several learned respects instead of one. ``f``: ``function``, a name in
    :data:`~regard.layers.attention_functions.ACTIVATIONS`; symmetric: ``V = U``. rel_dim: by default an equal share of
    ``head_dim``."""

    def __init__(
        self,
        head_dim: int,
        num_relations: int = 4,
        rel_dim: int | None = None,
        function: str = "relu",
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        width = max(head_dim // max(num_relations, 1), 1) if rel_dim is None else rel_dim
        if num_relations < 1 or width < 1:
            raise OptionError(f"num_relations and rel_dim are at least 1, got {num_relations} and {width}.")
        self.function, self.function_name = activation(function), function
        self.num_relations, self.per_pair = num_relations, 2 * num_relations + 1
        self.query = nn.Linear(head_dim, num_relations * width, bias=False)
        self.key = self.query if symmetric else nn.Linear(head_dim, num_relations * width, bias=False)
        self.out = nn.Linear(num_relations, 1, bias=False)

    def extra_repr(self) -> str:
        return f"num_relations={self.num_relations}, function={self.function_name!r}"

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        left, right = (
            _linear(layer, x).unflatten(-1, (self.num_relations, -1)).transpose(-2, -3)
            for layer, x in ((self.query, query), (self.key, key))
        )
        found = relations(left, right, self.function)
        return (found * self.out.weight.to(found.dtype).view(-1, 1, 1)).sum(-3)

    def extra_flops(self, shape: AttentionShape) -> int:
        return _tokens_and_pairs(shape, self.query.out_features, self.query.out_features)


class _HeadLinear(nn.Module):
    """Linear maps, one for all heads or one each: ``weight (1 | heads, out, in)``, begun as ``nn.Linear``'s."""

    def __init__(self, heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(heads, out_features))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(in_features**-0.5), in_features**-0.5)

    def forward(self, columns: Tensor) -> Tensor:
        """``(..., heads, in, n) -> (..., heads, out, n)``: channels come before tokens or pairs, of which there are
        many."""
        return self.weight.to(columns.dtype) @ columns + self.bias.to(columns.dtype)[..., None]


class MLPScorer(Scorer):
    """Scores from a network: query ``(..., heads, rows, head_dim)`` and key ``(..., heads, k_len, head_dim)`` to
    ``(..., heads, rows, k_len)``.

    proj_dim: d' (default: ``head_dim // 32``, at least 1). hidden: units of each hidden layer (default: d' and half of
    it, at least 1). activation: ``"relu"`` or ``"tanh"``. shared_over_heads: one network for all heads; otherwise
    ``num_heads`` of them.
    """

    def __init__(
        self,
        head_dim: int,
        proj_dim: int | None = None,
        hidden: Sequence[int] | None = None,
        *,
        activation: Literal["relu", "tanh"] = "relu",
        shared_over_heads: bool = True,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        proj_dim = max(head_dim // 32, 1) if proj_dim is None else proj_dim
        units = (proj_dim, max(proj_dim // 2, 1)) if hidden is None else tuple(hidden)
        if proj_dim < 1 or not units or min(units) < 1:
            raise OptionError(
                f"proj_dim is at least 1 and hidden names one or more layers of at least 1 unit; got {proj_dim} and "
                f"{units}. Without a hidden layer the query would only add a constant, which softmax does not see."
            )
        if activation not in ("relu", "tanh"):
            raise OptionError(f"activation is 'relu' or 'tanh', got {activation!r}.")
        heads = 1 if shared_over_heads else num_heads
        self.head_dim, self.proj_dim, self.hidden, self.heads = head_dim, proj_dim, units, heads
        self.activation, self.num_heads = activation, None if heads == 1 else heads
        # Of every hidden unit, its sum and its activation.
        self.per_pair = 2 * sum(units) + 1
        self.query, self.key = _HeadLinear(heads, head_dim, proj_dim), _HeadLinear(heads, head_dim, proj_dim)
        widths = (2 * proj_dim, *units, 1)
        self.layers = nn.ModuleList(_HeadLinear(heads, wide, narrow) for wide, narrow in pairwise(widths))

    def extra_repr(self) -> str:
        return f"proj_dim={self.proj_dim}, hidden={self.hidden}, activation={self.activation!r}, networks={self.heads}"

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        if query.dim() < 3 or self.heads not in (1, query.shape[-3]):
            raise ShapeError(
                f"This scorer takes (..., heads, length, {self.head_dim}) and has {self.heads} networks for heads; got "
                f"queries {tuple(query.shape)}. Build it with num_heads as there are, or shared_over_heads=True."
            )
        rows, k_len, query, key = query.shape[-2], key.shape[-2], query.mT, key.mT
        first, function = self.layers[0], ACTIVATIONS[self.activation]
        assert isinstance(first, _HeadLinear)
        of_query, of_key = first.weight.to(query.dtype).split(self.proj_dim, -1)
        left = of_query @ self.query(query) + first.bias.to(query.dtype)[..., None]
        right = of_key @ self.key(key)
        pairs = function(left[..., :, None] + right[..., None, :]).flatten(-2)
        for layer in self.layers[1:-1]:
            pairs = function(layer(pairs))
        scores: Tensor = self.layers[-1](pairs)[..., 0, :].unflatten(-1, (rows, k_len))
        return scores

    def extra_flops(self, shape: AttentionShape) -> int:
        dot = linear_layer_flops(shape.batch * shape.num_heads * shape.q_len * shape.k_len, shape.head_dim, 1)
        return self.flops(shape) - dot

    def flops(self, shape: AttentionShape) -> int:
        """FLOPs of all scores of a call."""
        maps = shape.batch * shape.num_heads
        tokens, pairs = maps * (shape.q_len + shape.k_len), maps * shape.q_len * shape.k_len
        widths = (self.head_dim, self.proj_dim, self.hidden[0])
        once = sum(linear_layer_flops(tokens, a, b) for a, b in pairwise(widths))
        rest = (*self.hidden, 1)
        return once + sum(linear_layer_flops(pairs, a, b) for a, b in pairwise(rest))


SCORERS: dict[str, Callable[..., Scorer]] = {
    "dot": DotScore,
    "bilinear": BilinearScore,
    "low_rank": LowRankScore,
    "additive": AdditiveScore,
    "feed_forward": MLPScorer,
    "distance": DistanceScore,
    "gaussian": GaussianScore,
    "filtered": FilteredScore,
    "relational": RelationalScore,
}
"""By name, each built from ``head_dim``, ``num_heads`` where it has parameters per head, and options."""


def scorer(name: str, head_dim: int, *, num_heads: int = 1, **options: Any) -> Scorer:
    """A score by name; UnknownNameError shows the names, OptionError the options."""
    return build_step("score", SCORERS, name, options, head_dim=head_dim, num_heads=num_heads)


def _tokens_and_pairs(shape: AttentionShape, width: int, per_pair: int) -> int:
    """FLOPs of projections of all tokens to ``width`` and of ``per_pair`` products a pair, less the dot product's."""
    maps = shape.batch * shape.num_heads
    once = linear_layer_flops(maps * (shape.q_len + shape.k_len), shape.head_dim, width)
    return once + linear_layer_flops(maps * shape.q_len * shape.k_len, per_pair - shape.head_dim, 1)
