"""Cluster and aggregate: an image's tokens are clustered, and each cluster's mean takes its members' place.

``N`` visual tokens, as they leave the vision encoder and before the language model reads them, become ``m``:

    assignment = kmeans(x_1 .. x_N, m)            y_c = mean of x_i over cluster c            nothing is trained

The mean is the best single substitute of a cluster in the squared error, which k-means makes small; choosing ``m``
tokens drops what the others say. Around it, behind one call :func:`compress`, stand what it is compared with: random
choice, strided and pooled grids, choice by attention saliency, bipartite merging (ToMe: Bolya et al., 2023, arXiv
2210.09461), and the token nearest to each cluster's mean.

Omri et al., "Token Sequence Compression for Efficient Multimodal Computing", 2025, arXiv 2504.17892, which has no
released code. The rounds and the start of k-means and the order of what comes out are choices made here: ten rounds
from k-means++, and clusters in the order of their first members, since language models read positions. Where ``s``
equal keys became one, ``log s`` on its logit (:func:`proportional_bias`, a float mask of ``full``) makes attention
exact again, as in ToMe.

Tokens ``(batch, N, channels)``. Time ``O(N m channels)`` a round; behind it, linear layers cost ``m / N`` of before and
scores ``(m / N)^2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype
from regard.layers.clustering import (
    Init,
    Metric,
    cluster_means,
    cluster_sizes,
    kmeans,
    nearest,
    ordered_clusters,
)

__all__ = [
    "Compressed",
    "Stability",
    "attention_saliency",
    "bipartite_merge",
    "cluster_aggregate",
    "compress",
    "grid_cells",
    "proportional_bias",
    "reconstruction_error",
    "saliency_stability",
    "unmerge",
]

Method = Literal["cluster", "cluster_select", "random", "strided", "pooling", "saliency", "tome"]
Order = Literal["first", "size"]


class Compressed(NamedTuple):
    """``tokens`` ``(batch, m, channels)``; ``sizes`` ``(batch, m)`` int64: how many tokens each stands for;
    ``assignment`` ``(batch, N)`` int64: which of them stands for each token. A partition: no size is zero."""

    tokens: Tensor
    sizes: Tensor
    assignment: Tensor


def cluster_aggregate(
    x: Tensor,
    m: int,
    iters: int = 10,
    seed: int = 0,
    init: Init | Tensor = "kmeans++",
    metric: Metric = "euclidean",
    order: Order = "first",
) -> Compressed:
    """Means of ``m`` clusters of ``x (batch, N, channels)``.

    iters, seed, init, metric: of :func:`regard.layers.clustering.kmeans`. order: of the clusters, by the place of the
    first member or, the largest first, by size. Gradients flow through the means, not through the assignment.
    """
    _check_tokens(x, m)
    if order not in ("first", "size"):
        raise OptionError(f"order is 'first' or 'size', not {order!r}.")
    assignment = ordered_clusters(kmeans(x, m, iters, init=init, metric=metric, seed=seed).assignment)
    if order == "size":
        rank = cluster_sizes(assignment, m).argsort(dim=1, descending=True, stable=True).argsort(1)
        assignment = rank.gather(1, assignment)
    return _merged(x, assignment, m)


def compress(
    x: Tensor,
    m: int,
    method: Method = "cluster",
    *,
    grid: Sequence[int] | None = None,
    scores: Tensor | None = None,
    key: Tensor | None = None,
    iters: int = 10,
    seed: int = 0,
) -> Compressed:
    """``x (batch, N, channels)`` to ``m`` tokens.

    ``"cluster"``: means of clusters; ``"cluster_select"``: the token nearest to each mean. ``"random"``: drawn evenly,
    by ``seed``. ``"pooling"``: the mean of each cell of the ``grid`` (None: a row of N), cut into ``m``; ``"strided"``:
    the token in its middle. ``"saliency"``: the ``m`` largest ``scores (batch, N)``. ``"tome"``: bipartite merging by
    the cosine of ``key (batch, N, any)`` (None: of ``x``), as many rounds as it takes.

    Tokens come in the order of their first (or only) member. The methods that choose drop the other tokens; their
    ``assignment`` tells the nearest one kept.
    """
    _check_tokens(x, m)
    batch, tokens = x.shape[:2]
    if method not in get_args(Method):
        raise OptionError(f"There is no method {method!r}; there are {', '.join(get_args(Method))}.")
    if (scores is not None) != (method == "saliency") or (key is not None and method != "tome"):
        raise OptionError(f"scores go with method='saliency' and key with 'tome'; the method is {method!r}.")
    if method == "cluster":
        return cluster_aggregate(x, m, iters, seed)
    if method == "cluster_select":
        return _medoids(x, cluster_aggregate(x, m, iters, seed))
    if method == "tome":
        return _merged_down(x, m, key)
    if method == "pooling":
        cells = grid_cells((tokens,) if grid is None else grid, m, tokens)
        return _merged(x, ordered_clusters(cells.to(x.device).expand(batch, -1)), m)
    if method == "random":
        drawn = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :m]
    elif method == "strided":
        drawn = _middles((tokens,) if grid is None else grid, m, tokens).expand(batch, -1)
    else:
        if scores is None or scores.shape != (batch, tokens):
            raise ShapeError(f"Saliency has one score a token, ({batch}, {tokens}).")
        drawn = scores.topk(m, 1).indices
    return _chosen(x, drawn.to(x.device).sort(1).values)


def _check_tokens(x: Tensor, m: int) -> None:
    if x.dim() != 3:
        raise ShapeError(f"Compression takes tokens (batch, N, channels); got {tuple(x.shape)}.")
    if not 1 <= m <= x.shape[1]:
        raise OptionError(f"{x.shape[1]} tokens can become 1 to {x.shape[1]}; got m={m}.")


def _merged(x: Tensor, assignment: Tensor, m: int) -> Compressed:
    return Compressed(cluster_means(x, assignment, m), cluster_sizes(assignment, m), assignment)


def _chosen(x: Tensor, index: Tensor) -> Compressed:
    tokens = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    slots = torch.arange(index.shape[1], device=x.device).expand_as(index)
    # A token that is kept stands for itself, even beside one that equals it.
    assignment = nearest(x.detach(), tokens.detach()).scatter(1, index, slots)
    return Compressed(tokens, cluster_sizes(assignment, index.shape[1]), assignment)


def _medoids(x: Tensor, merged: Compressed) -> Compressed:
    """The member nearest to each mean; clusters keep their number, so medoids may stand out of order."""
    work = x.detach().to(accumulation_dtype(x.dtype))
    distance = (work - unmerge(merged.tokens.detach().to(work.dtype), merged.assignment)).square().sum(-1)
    place = torch.arange(merged.sizes.shape[1], device=x.device)
    own = merged.assignment[:, None] == place[:, None]
    index = distance[:, None].masked_fill(~own, float("inf")).argmin(-1)
    return Compressed(x.gather(1, index[..., None].expand(-1, -1, x.shape[2])), merged.sizes, merged.assignment)


def _axes(grid: Sequence[int], m: int, tokens: int) -> tuple[int, int, int, int]:
    """A grid's sides, and how many cells each is cut into so that there are ``m``, as square as can be."""
    sides = (1, *grid) if len(grid) == 1 else tuple(grid)
    if len(sides) != 2 or math.prod(sides) != tokens:
        raise ShapeError(f"grid is (length,) or (height, width) of {tokens} tokens; got {tuple(grid)}.")
    height, width = sides
    cuts = [(rows, m // rows) for rows in range(1, height + 1) if m % rows == 0 and m // rows <= width]
    if not cuts:
        raise OptionError(f"A grid of {height} x {width} cannot be cut into {m} cells; choose m with fitting factors.")
    rows, columns = min(cuts, key=lambda cut: abs(math.log(height / cut[0] * cut[1] / width)))
    return height, width, rows, columns


def grid_cells(grid: Sequence[int], m: int, tokens: int | None = None) -> Tensor:
    """Which of ``m`` cells, as square as can be, each token of a grid lies in: ``(tokens,)`` int64."""
    height, width, rows, columns = _axes(grid, m, math.prod(grid) if tokens is None else tokens)
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return (row[:, None] * columns + column).flatten()


def _middles(grid: Sequence[int], m: int, tokens: int) -> Tensor:
    """The token in the middle of each cell, ``(m,)``."""
    height, width, rows, columns = _axes(grid, m, tokens)
    row, column = (
        (2 * torch.arange(rows) + 1) * height // (2 * rows),
        (2 * torch.arange(columns) + 1) * width // (2 * columns),
    )
    return (row[:, None] * width + column).flatten()


def bipartite_merge(x: Tensor, r: int, *, sizes: Tensor | None = None, key: Tensor | None = None) -> Compressed:
    """One round of ToMe: ``N`` tokens become ``N - r``.

    Tokens at even places are matched with those at odd places of largest cosine of ``key`` (None: ``x``); the ``r``
    best matches are merged, to means weighted by ``sizes (batch, N)``, how many tokens each stands for already (None:
    one). ``r`` is at most ``N // 2``.
    """
    batch, tokens = x.shape[:2]
    _check_tokens(x, 1)
    if not 0 <= r <= tokens // 2:
        raise OptionError(f"One round merges at most half of {tokens} tokens; got r={r}. Merge in several rounds.")
    key = x if key is None else key
    if key.shape[:2] != (batch, tokens) or (sizes is not None and sizes.shape != (batch, tokens)):
        raise ShapeError(f"key is ({batch}, {tokens}, channels) and sizes ({batch}, {tokens}).")
    with torch.no_grad():
        unit = F.normalize(key.detach().to(accumulation_dtype(key.dtype)), dim=-1)
        place = torch.arange(tokens, device=x.device).expand(batch, -1)
        target = place.clone()
        if r > 0:
            best = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
            merged = best.values.argsort(dim=1, descending=True, stable=True)[:, :r]
            target = target.scatter(1, 2 * merged, 2 * best.indices.gather(1, merged) + 1)
        assignment = ordered_clusters(target)
    weight = torch.ones_like(place) if sizes is None else sizes
    means = cluster_means(x, assignment, tokens - r, weight)
    return Compressed(means, place.new_zeros(batch, tokens - r).scatter_add(1, assignment, weight), assignment)


def _merged_down(x: Tensor, m: int, key: Tensor | None) -> Compressed:
    current = Compressed(
        x, x.new_ones(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    )
    while (tokens := current.tokens.shape[1]) > m:
        found = bipartite_merge(current.tokens, min(tokens - m, tokens // 2), sizes=current.sizes, key=key)
        if key is not None:
            key = cluster_means(key, found.assignment, found.tokens.shape[1], current.sizes)
        current = Compressed(found.tokens, found.sizes, found.assignment.gather(1, current.assignment))
    return current


def unmerge(tokens: Tensor, assignment: Tensor) -> Tensor:
    """Every token's substitute at its place: ``tokens (batch, m, channels)`` -> ``(batch, N, channels)``."""
    return tokens.gather(1, assignment[..., None].expand(-1, -1, tokens.shape[2]))


def reconstruction_error(x: Tensor, tokens: Tensor, assignment: Tensor) -> Tensor:
    """Mean squared distance of the tokens of each example to their substitutes, ``(batch,)``."""
    return (x - unmerge(tokens, assignment)).square().sum(-1).mean(1)


def proportional_bias(sizes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``log(size)`` for the logits of each key, ``(batch, 1, 1, m)``: the additive mask of proportional attention."""
    return sizes.to(dtype).log()[:, None, None]


def attention_saliency(weights: Tensor, queries: slice, keys: slice) -> Tensor:
    """How much some queries attend to some keys, mean over heads and queries: ``(batch, keys)``.

    weights ``(batch, heads, q_len, k_len)``. In an encoder ``queries`` is the class token; in a language model, text.
    """
    return weights[:, :, queries, keys].mean((1, 2))


class Stability(NamedTuple):
    """Between each two layers, mean over the batch, ``(layers, layers)``: the rank correlation of their saliencies,
    and the share of the ``top`` most salient tokens that they have in common."""

    correlation: Tensor
    overlap: Tensor


def saliency_stability(scores_by_layer: Sequence[Tensor] | Tensor, top: int | None = None) -> Stability:
    """How far layers (or prompts) agree on which tokens matter. Scores ``(batch, N)`` each; top: default a quarter."""
    scores = torch.stack(list(scores_by_layer)).double()
    if scores.dim() != 3 or len(scores) < 2 or scores.shape[2] < 2:
        raise ShapeError(f"Stability compares two or more score tensors (batch, N); got {tuple(scores.shape)}.")
    count = max(scores.shape[2] // 4, 1) if top is None else top
    if not 1 <= count <= scores.shape[2]:
        raise OptionError(f"top lies between 1 and {scores.shape[2]}, got {count}.")
    # Equal scores share the mean of their ranks.
    rank = (scores[..., None, :] < scores[..., None]).sum(-1) + (scores[..., None, :] == scores[..., None]).sum(-1) / 2
    unit = F.normalize(rank - rank.mean(-1, keepdim=True), dim=-1)
    best = torch.zeros_like(scores).scatter_(-1, scores.topk(count, -1).indices, 1.0)
    return Stability(
        torch.einsum("lbn,mbn->lmb", unit, unit).mean(-1), torch.einsum("lbn,mbn->lmb", best, best).mean(-1) / count
    )
