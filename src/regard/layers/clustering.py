"""Clusters of the tokens of each example: k-means in batches, and what clusters have in common.

A partition is an ``assignment`` ``(batch, tokens)`` int64 of each token to one of ``clusters`` clusters.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["Clusters", "cluster_means", "cluster_sizes", "kmeans", "nearest", "ordered_clusters"]

Init = Literal["kmeans++", "farthest"]
Metric = Literal["euclidean", "cosine"]


class Clusters(NamedTuple):
    """``assignment`` ``(batch, tokens)``; ``errors`` ``(rounds, batch)``: squared distance of the tokens to their
    clusters' means, summed, at the start and after each round."""

    assignment: Tensor
    errors: Tensor


def cluster_sizes(assignment: Tensor, clusters: int) -> Tensor:
    """Tokens in each cluster ``(batch, clusters)`` int64."""
    return assignment.new_zeros(len(assignment), clusters).scatter_add_(1, assignment, torch.ones_like(assignment))


def cluster_means(x: Tensor, assignment: Tensor, clusters: int, weight: Tensor | None = None) -> Tensor:
    """Means ``(batch, clusters, channels)`` of ``x (batch, tokens, channels)``, weighted by ``weight (batch, tokens)``
    where given. An empty cluster has mean zero. Differentiable in ``x``."""
    work = accumulation_dtype(x.dtype)
    weight = torch.ones(assignment.shape, dtype=work, device=x.device) if weight is None else weight.to(work)
    rows = x.to(work) * weight[..., None]
    total = rows.new_zeros(len(x), clusters, x.shape[-1])
    total = total.scatter_add(1, assignment[..., None].expand_as(rows), rows)
    mass = weight.new_zeros(len(x), clusters).scatter_add(1, assignment, weight)
    return (total / torch.where(mass == 0, 1, mass)[..., None]).to(x.dtype)


def ordered_clusters(assignment: Tensor) -> Tensor:
    """The same partition, its clusters numbered by the place of their first member."""
    batch, tokens = assignment.shape
    place = torch.arange(tokens, device=assignment.device).expand(batch, -1)
    first = place.new_full((batch, int(assignment.max()) + 1), tokens).scatter_reduce_(1, assignment, place, "amin")
    first = first.gather(1, assignment)
    rank = (first == place).cumsum(1) - 1
    return rank.gather(1, first)


def _square_distances(x: Tensor, centres: Tensor) -> Tensor:
    """``(batch, tokens, centres)``, up to a term that is the same for all centres of a token."""
    return centres.square().sum(-1)[:, None] - 2 * x @ centres.mT


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Which of ``centres (batch, m, channels)`` is nearest to each of ``x (batch, tokens, channels)``."""
    work = accumulation_dtype(x.dtype)
    x, centres = x.to(work), centres.to(work)
    # Distances do not change with the origin, and are exacter near it.
    origin = centres.mean(1, keepdim=True)
    return _square_distances(x - origin, centres - origin).argmin(-1)


@torch.no_grad()
def kmeans(
    x: Tensor,
    clusters: int,
    iters: int = 10,
    *,
    init: Init | Tensor = "kmeans++",
    metric: Metric = "euclidean",
    seed: int = 0,
) -> Clusters:
    """Lloyd's algorithm on the tokens of each example ``x (batch, tokens, channels)``; no cluster is left empty.

    init: ``"kmeans++"`` draws centres among the tokens, far ones more likely (Arthur and Vassilvitskii, 2007), by
    ``seed``; ``"farthest"`` takes the token farthest from the mean, then always the one farthest from all taken, which
    depends on the values alone; or an assignment to start from, ``(batch, tokens)`` or ``(tokens,)``. metric:
    ``"cosine"`` clusters tokens brought to unit length. An empty cluster takes the token that lies farthest from its
    own centre. Rounds end early when nothing changes. Time ``O(tokens clusters channels iters)``.
    """
    if x.dim() != 3:
        raise ShapeError(f"k-means takes tokens (batch, tokens, channels); got {tuple(x.shape)}.")
    batch, tokens, _ = x.shape
    if not 1 <= clusters <= tokens or iters < 0:
        raise OptionError(f"Need 1 <= clusters <= {tokens} tokens and iters >= 0; got {clusters} and {iters}.")
    if metric not in ("euclidean", "cosine"):
        raise OptionError(f"metric is 'euclidean' or 'cosine', not {metric!r}.")
    x = x.to(accumulation_dtype(x.dtype))
    x = F.normalize(x, dim=-1) if metric == "cosine" else x
    x = x - x.mean(1, keepdim=True)
    if isinstance(init, Tensor):
        assignment = _checked(init, batch, tokens, clusters)
        assignment = _filled(x, assignment, cluster_means(x, assignment, clusters))
    else:
        assignment = _assign(x, x.gather(1, _seeds(x, clusters, init, seed)[..., None].expand(-1, -1, x.shape[2])))
    centres = cluster_means(x, assignment, clusters)
    errors = [_error(x, assignment, centres)]
    for _ in range(iters):
        before, assignment = assignment, _assign(x, centres)
        centres = cluster_means(x, assignment, clusters)
        errors.append(_error(x, assignment, centres))
        if torch.equal(before, assignment):
            break
    return Clusters(assignment, torch.stack(errors))


def _checked(init: Tensor, batch: int, tokens: int, clusters: int) -> Tensor:
    if init.dtype != torch.int64 or init.shape not in ((tokens,), (batch, tokens)):
        raise ShapeError(
            f"An initial assignment is int64 ({tokens},) or ({batch}, {tokens}); got {init.dtype} {tuple(init.shape)}."
        )
    if int(init.min()) < 0 or int(init.max()) >= clusters:
        raise OptionError(f"An initial assignment names clusters 0 to {clusters - 1}.")
    return init.expand(batch, tokens)


def _seeds(x: Tensor, clusters: int, init: str, seed: int) -> Tensor:
    """Tokens that are the first centres, all different, ``(batch, clusters)``."""
    if init not in ("kmeans++", "farthest"):
        raise OptionError(f"init is 'kmeans++', 'farthest' or an assignment, not {init!r}.")
    batch, tokens, channels = x.shape
    generator = torch.Generator().manual_seed(seed)
    # The same numbers for every example, so that none depends on the others of its batch.
    drawn = torch.rand(clusters, generator=generator, dtype=torch.float64).tolist()
    free = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
    # Before the first, distances are those to the mean, which is the origin.
    distance = x.square().sum(-1) if init == "farthest" else torch.ones_like(x[..., 0])
    chosen = []
    for number in range(clusters):
        if init == "farthest":
            index = distance.masked_fill(~free, -1).argmax(1, keepdim=True)
        else:
            chance = (distance * free).double()
            chance = torch.where(chance.sum(1, keepdim=True) > 0, chance, free.double()).cumsum(1)
            index = (drawn[number] * chance[:, -1:] >= chance).sum(1, keepdim=True).clamp_max(tokens - 1)
        chosen.append(index)
        free = free.scatter(1, index, False)
        new = (x - x.gather(1, index[..., None].expand(-1, -1, channels))).square().sum(-1)
        distance = new if number == 0 else torch.minimum(distance, new)
    return torch.cat(chosen, 1)


def _assign(x: Tensor, centres: Tensor) -> Tensor:
    """Each token to its nearest centre, no cluster empty."""
    return _filled(x, _square_distances(x, centres).argmin(-1), centres)


def _filled(x: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    """The partition in which each empty cluster took the token that lay farthest from its own centre."""
    clusters = centres.shape[1]
    sizes = cluster_sizes(assignment, clusters)
    if bool((sizes > 0).all()):
        return assignment
    assignment, far = assignment.clone(), _own_distances(x, assignment, centres)
    while bool((short := (sizes == 0).any(1)).any()):
        movable = sizes.gather(1, assignment) > 1
        index = far.masked_fill(~movable, -1).argmax(1)[short]
        assignment[short, index] = (sizes == 0).to(torch.int8).argmax(1)[short]
        far[short, index] = 0
        sizes = cluster_sizes(assignment, clusters)
    return assignment


def _own_distances(x: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    """Squared distance of each token to its own centre, ``(batch, tokens)``."""
    return (x - centres.gather(1, assignment[..., None].expand_as(x))).square().sum(-1)


def _error(x: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    return _own_distances(x, assignment, centres).sum(1)
