"""Rank against heads: finding the nearest point takes one head of full rank, or very many heads of low rank.

"On the Benefits of Rank in Attention Layers", 2024, arXiv 2407.16153 (official code: NoahAmsel/attention-formers).

The target is ``f(X, y) = argmax over x in X of x . y`` for unit vectors. One head with ``Q = beta I`` and ``K = V = I``
computes ``softmax(beta X y) X``, which is exact for ``beta`` towards infinity, for any number of points. A head of rank
``r < d`` sees ``Q_h y`` and ``K_h x`` only; to approximate the target by a sum of such heads takes a number of them
exponential in ``d``, already for two points. A second layer can count the heads' votes, which helps for few points.

With two points, ``w = x_1 - x_2`` and rank 1, a head picks by the sign of ``(q . y) (k . w)``:

- one random head with ``q = k`` is right with probability ``1 - arccos|cos(w, y)| / pi``, one with independent ``q``
  and ``k`` with 1/2 (:func:`tied_head_probability`);
- two heads agree with probability ``C = 1/2 + (2 / pi^2) arcsin(q . q') arcsin(k . k')`` (:func:`head_kernel`), and a
  head agrees with the target with probability ``b`` (:func:`target_correlation`), so that heads weighted by ``a`` have
  the mean squared error ``1 - 2 b . a + a . C a``, least where ``C a = b`` (:func:`optimal_weights`).

Shapes: points ``(batch, N, d)``, queries ``(batch, M, d)``, outputs and labels ``(batch, M, d)``; where no queries are
given each point asks, and its label is the farthest point. Errors are mean squared distances to the label, whose length
is 1. A layer costs ``H (r d (N + M) + r N M + d N M + d^2 M)`` products a batch row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError

__all__ = [
    "FreeRankAttention",
    "LowRankEncoder",
    "NearestPointTask",
    "TradeoffRow",
    "equally_spaced_2d",
    "full_rank_solution",
    "head_kernel",
    "majority_vote",
    "nearest_point_task",
    "optimal_weights",
    "optimally_weighted_rank1",
    "random_tied_heads",
    "rank_head_tradeoff",
    "squared_error",
    "target_correlation",
    "tied_head_probability",
]

Variant = Literal["uniform", "orthogonal", "doubled"]
Pairs = Literal["independent", "tied", "spread"]


@dataclass
class NearestPointTask:
    """Points and queries on the unit sphere; the label is the point nearest to a query, or, where points ask, the
    farthest from it. For :func:`regard.bench.training.fit` with ``num_queries=None``; :meth:`draw` gives all variants.
    """

    dim: int
    num_points: int
    num_queries: int | None = None
    variant: Variant = "uniform"
    metric: ClassVar[str] = "squared error"
    higher_is_better: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise OptionError(f"variant is one of {', '.join(get_args(Variant))}; got {self.variant!r}.")
        if min(self.dim, self.num_points, self.num_queries or 1) < 1:
            raise OptionError(f"Sizes are at least 1; got {self}.")
        if self.variant == "orthogonal" and self.num_points > self.dim:
            raise OptionError(f"{self.dim} dimensions hold no {self.num_points} orthogonal points.")
        self.num_classes = self.dim

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Points, queries and labels; 'doubled' has each point's opposite as well, ``2 num_points`` in all."""
        points = _sphere((size, self.num_points, self.dim), generator)
        if self.variant == "orthogonal":
            square = torch.randn(size, self.dim, self.dim, generator=generator)
            points = cast(Tensor, torch.linalg.qr(square)[0])[:, :, : self.num_points].transpose(1, 2)
        elif self.variant == "doubled":
            points = torch.cat((points, -points), 1)
        queries, sign = points, -1
        if self.num_queries is not None:
            queries, sign = _sphere((size, self.num_queries, self.dim), generator), 1
        best = (sign * queries @ points.transpose(1, 2)).argmax(-1)
        return points, queries, points.gather(1, best[..., None].expand(-1, -1, self.dim))

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Points and labels, fresh in either split."""
        if self.num_queries is not None:
            raise OptionError("Only points that ask themselves make one input; take num_queries=None, or draw().")
        points, _, labels = self.draw(size, generator)
        return points, labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return squared_error(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        return float((outputs - targets).square().sum()), targets.shape[0] * targets.shape[1]


def nearest_point_task(
    dim: int, num_points: int, num_queries: int | None = None, variant: Variant = "uniform"
) -> NearestPointTask:
    """The task of finding the point nearest to a query, or with ``num_queries=None`` the farthest from each point.

    variant: 'uniform' points, 'orthogonal' ones, or 'doubled' by their opposites.
    """
    return NearestPointTask(dim, num_points, num_queries, variant)


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance: summed over the dimensions, not averaged."""
    return (outputs - labels).square().sum(-1).mean()


class FreeRankAttention(nn.Module):
    """Attention whose query/key rank is free of the number of heads: per head ``Q`` and ``K`` ``(rank, dim)`` and one
    full value-output matrix ``(dim, dim)``; ``rank = dim / heads`` is the usual parameterisation, without biases.

    Scores are divided by ``sqrt(rank)``. hard: each head attends to its best point alone, without gradients for ``Q``
    and ``K``. Initialised uniformly within ``sqrt(6 / (rank + dim))``, value-output ``sqrt(6 / ((heads + 1) dim))``.
    """

    def __init__(self, dim: int, rank: int, heads: int, hard: bool = False) -> None:
        super().__init__()
        if min(dim, rank, heads) < 1:
            raise OptionError(f"dim, rank and heads are at least 1; got {dim}, {rank} and {heads}.")
        self.dim, self.rank, self.heads, self.hard = dim, rank, heads, hard
        self.query, self.key = (nn.Parameter(torch.empty(heads, rank, dim)) for _ in range(2))
        self.value = nn.Parameter(torch.empty(heads, dim, dim))
        for parameter, bound in ((self.query, rank + dim), (self.key, rank + dim), (self.value, (heads + 1) * dim)):
            nn.init.uniform_(parameter, -math.sqrt(6 / bound), math.sqrt(6 / bound))

    def scores(self, points: Tensor, queries: Tensor | None = None) -> Tensor:
        """Logits ``(batch, heads, M, N)``."""
        queries = points if queries is None else queries
        for what, tensor in (("points", points), ("queries", queries)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.dim:
                raise ShapeError(f"{what} are (batch, count, {self.dim}); got {tuple(tensor.shape)}.")
        asked = torch.einsum("bmd,hrd->bhmr", queries, self.query)
        offered = torch.einsum("bnd,hrd->bhnr", points, self.key)
        return asked @ offered.transpose(-1, -2) / math.sqrt(self.rank)

    def attended(self, points: Tensor, queries: Tensor | None = None) -> Tensor:
        """What each head looks at before its value-output matrix, ``(batch, heads, M, dim)``."""
        scores = self.scores(points, queries)
        if not self.hard:
            return scores.softmax(-1) @ points[:, None]
        picks = scores.argmax(-1).flatten(1)[..., None].expand(-1, -1, self.dim)
        return points.gather(1, picks).unflatten(1, scores.shape[1:3])

    def forward(self, points: Tensor, queries: Tensor | None = None) -> Tensor:
        """``(batch, M, dim)``; without queries the points ask."""
        return torch.einsum("bhmd,hde->bme", self.attended(points, queries), self.value)


class LowRankEncoder(nn.Module):
    """The deep variant: ``depth`` layers of low-rank heads, each with a ReLU MLP, residuals and norms after them, as in
    the paper's transformers; ``(batch, N, dim)`` in and out."""

    def __init__(self, dim: int, rank: int, heads: int, depth: int = 2, hidden: int = 2048) -> None:
        super().__init__()
        self.attention = nn.ModuleList(FreeRankAttention(dim, rank, heads) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))

    def forward(self, points: Tensor) -> Tensor:
        """Each point asks."""
        x = points
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = self.norms[2 * layer](x + attention(x))
            x = self.norms[2 * layer + 1](x + mlp(x))
        return x


def full_rank_solution(
    dim: int, temperature: float = 1.0, *, hard: bool = False, farthest: bool = False
) -> FreeRankAttention:
    """One head of full rank that solves the task: ``softmax(temperature X y) X``, sharper for larger temperatures (the
    paper's ``beta``). farthest: for points that ask themselves."""
    module = FreeRankAttention(dim, dim, 1, hard)
    sharpness = (-1 if farthest else 1) * temperature * math.sqrt(dim)
    return _filled(module, sharpness * torch.eye(dim)[None], torch.eye(dim)[None], torch.ones(1))


def random_tied_heads(
    dim: int, rank: int, heads: int, *, temperature: float = 1.0, hard: bool = True, seed: int = 0
) -> FreeRankAttention:
    """The average of heads with ``Q = K``, orthonormal rows of a random subspace each."""
    if rank > dim:
        raise OptionError(f"{dim} dimensions have no {rank} orthonormal rows.")
    module = FreeRankAttention(dim, rank, heads, hard)
    drawn = torch.randn(heads, dim, rank, generator=torch.Generator().manual_seed(seed))
    rows = cast(Tensor, torch.linalg.qr(drawn)[0]).transpose(1, 2)
    return _filled(module, temperature * math.sqrt(rank) * rows, rows, torch.full((heads,), 1 / heads))


def equally_spaced_2d(heads: int, *, temperature: float = 1.0, hard: bool = True) -> FreeRankAttention:
    """The average of rank-1 heads with ``q = k`` at equal angles of the half plane."""
    module = FreeRankAttention(2, 1, heads, hard)
    angles = torch.arange(heads) * torch.pi / heads
    rows = torch.stack((angles.cos(), angles.sin()), -1)[:, None]
    return _filled(module, temperature * rows, rows, torch.full((heads,), 1 / heads))


def optimally_weighted_rank1(dim: int, heads: int, *, pairs: Pairs = "independent", seed: int = 0) -> FreeRankAttention:
    """Random hard rank-1 heads with the weights that are best for two points (:func:`optimal_weights`).

    pairs: ``q`` and ``k`` 'independent', 'tied' (equal), or 'spread': at an angle whose cosine is uniform.
    """
    if pairs not in get_args(Pairs):
        raise OptionError(f"pairs is one of {', '.join(get_args(Pairs))}; got {pairs!r}.")
    generator = torch.Generator().manual_seed(seed)
    query, other = (_sphere((heads, dim), generator).double() for _ in range(2))
    key = other
    if pairs == "tied":
        key = query
    elif pairs == "spread":
        cosine = 2 * torch.rand(heads, 1, generator=generator).double() - 1
        across = F.normalize(other - (other * query).sum(-1, keepdim=True) * query, dim=-1)
        key = cosine * query + (1 - cosine.square()).sqrt() * across
    weights, _ = optimal_weights(query, key)
    module = FreeRankAttention(dim, 1, heads, hard=True)
    return _filled(module, query[:, None].float(), key[:, None].float(), weights.float())


def _filled(module: FreeRankAttention, query: Tensor, key: Tensor, weights: Tensor) -> FreeRankAttention:
    with torch.no_grad():
        module.query.copy_(query)
        module.key.copy_(key)
        module.value.copy_(weights[:, None, None] * torch.eye(module.dim))
    return module


def head_kernel(query: Tensor, key: Tensor) -> Tensor:
    """``C``, how often two hard rank-1 heads agree about two points: unit ``(heads, dim)`` to ``(heads, heads)``."""
    parts = [torch.asin((rows @ rows.T).clamp(-1, 1)) for rows in (query, key)]
    return 0.5 + 2 / math.pi**2 * parts[0] * parts[1]


def target_correlation(query: Tensor, key: Tensor, nodes: int = 64) -> Tensor:
    """``b``, how often each hard rank-1 head picks the right one of two points: unit ``(heads, dim)`` to ``(heads,)``.

    ``1/2 + E[sign(q . y) arcsin(k . y)] / pi`` over unit ``y``, by Gauss-Legendre quadrature over the angles of ``y``
    to ``q`` and, around it, to ``k``, whose densities are ``sin^(d-2)`` and ``sin^(d-3)``.
    """
    dim = query.shape[-1]
    if dim < 2:
        raise OptionError("Rank-1 heads on a line have nothing to miss; take at least two dimensions.")
    cosine = (query * key).sum(-1).double().clamp(-1, 1)[:, None, None]
    alpha, weight = _angles(dim - 2, math.pi / 2, nodes)
    if dim == 2:
        beta, around = torch.tensor([0.0, math.pi], dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    else:
        beta, around = _angles(dim - 3, math.pi, nodes)
    along, across = alpha.cos()[:, None], alpha.sin()[:, None] * beta.cos()
    grid = weight[:, None] * around
    sums = [
        (torch.asin((c * along + (1 - c.square()).sqrt() * across).clamp(-1, 1)) * grid).sum((-1, -2))
        for c in cosine.split(256)
    ]
    return (0.5 + torch.cat(sums) / math.pi).to(query.dtype)


def _angles(power: int, end: float, nodes: int) -> tuple[Tensor, Tensor]:
    """Places in ``[0, end]`` and weights, summing to one, of a density in proportion to ``sin^power``."""
    places, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(nodes))
    angle = (places + 1) * end / 2
    density = weights * angle.sin().pow(power)
    return angle, density / density.sum()


def optimal_weights(query: Tensor, key: Tensor) -> tuple[Tensor, float]:
    """Weights ``C a = b`` of hard rank-1 heads for two points, ``(heads,)``, and the mean squared error they leave."""
    kernel, target = head_kernel(query.double(), key.double()), target_correlation(query.double(), key.double())
    weights = torch.linalg.solve(kernel, target)
    return weights, float(1 - target @ weights)


def tied_head_probability(cosine: Tensor) -> Tensor:
    """How likely a random rank-1 head with ``q = k`` is to pick the right one of two points, by the cosine of the angle
    between ``x_1 - x_2`` and the query."""
    return 1 - torch.acos(cosine.abs().clamp_max(1)) / math.pi


def majority_vote(heads: FreeRankAttention, points: Tensor, queries: Tensor | None = None) -> Tensor:
    """The point that most heads pick, ``(batch, M, dim)``: what one layer of attention cannot do and a second can."""
    votes = F.one_hot(heads.scores(points, queries).argmax(-1), points.shape[1]).sum(1)
    return points.gather(1, votes.argmax(-1, keepdim=True).expand(-1, -1, points.shape[-1]))


@dataclass(frozen=True)
class TradeoffRow:
    """Mean squared errors of ``heads`` random tied hard heads of one rank: of their average times the best one number
    (``average``), of each head times its own best number (``readout``), and of their majority (``vote``)."""

    dim: int
    rank: int
    heads: int
    average: float
    readout: float | None
    vote: float


@torch.no_grad()
def rank_head_tradeoff(
    dims: Sequence[int],
    ranks: Sequence[int],
    heads: Sequence[int],
    *,
    num_points: int = 2,
    samples: int = 4096,
    readout: bool = False,
    seed: int = 0,
) -> list[TradeoffRow]:
    """Errors for every dimension, rank below or at it, and number of heads.

    The best numbers are found by least squares on ``samples`` drawings, the errors measured on as many others. readout:
    one number for each head as well (a system of ``heads`` equations).
    """
    rows = []
    for dim in dims:
        task = nearest_point_task(dim, num_points, 1)
        for rank in (rank for rank in ranks if rank <= dim):
            for count in heads:
                module = random_tied_heads(dim, rank, count, seed=seed)
                rows.append(_judge(module, task, samples, readout, seed))
    return rows


def _judge(module: FreeRankAttention, task: NearestPointTask, samples: int, readout: bool, seed: int) -> TradeoffRow:
    count = module.heads if readout else 1
    gram, target = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for points, queries, labels in _chunks(module, task, samples, seed + 1):
        seen = module.attended(points, queries)
        features = (seen if readout else seen.mean(1, keepdim=True)).transpose(0, 1).flatten(1).double()
        gram += features @ features.T
        target += features @ labels.flatten().double()
    # Heads may all but repeat one another: of the weights that fit, the smallest are taken.
    weights = torch.linalg.lstsq(gram, target[:, None], driver="gelsd").solution[:, 0]
    scale = count * float(target.sum() / gram.sum())
    average, own, vote = 0.0, 0.0, 0.0
    for points, queries, labels in _chunks(module, task, samples, seed + 2):
        seen, share = module.attended(points, queries), len(points) / samples
        average += share * float(squared_error(scale * seen.mean(1), labels))
        if readout:
            own += share * float(squared_error(torch.einsum("h,bhmd->bmd", weights.float(), seen), labels))
        vote += share * float(squared_error(majority_vote(module, points, queries), labels))
    return TradeoffRow(module.dim, module.rank, module.heads, average, own if readout else None, vote)


def _chunks(
    module: FreeRankAttention, task: NearestPointTask, samples: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Drawings a few at a time: every head's view of each is held at once."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, min(samples, 2**22 // (module.heads * module.dim)))
    for start in range(0, samples, size):
        yield task.draw(min(size, samples - start), generator)


def _sphere(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(shape, generator=generator), dim=-1)
