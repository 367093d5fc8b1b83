"""Attention maps as graphs: token ``j`` sends its features to token ``i`` along an edge of weight ``A_ij``.

:func:`process_adjacency` makes edges fewer or harder, :func:`aggregate` reads the neighbours in several ways at once
(Corso et al., "Principal Neighbourhood Aggregation for Graph Nets", 2020, arXiv 2004.05718), and
:func:`graph_from_attention` gives the graph itself, to be looked at. The modes are those of Buehler, "Graph-Aware
Isomorphic Attention for Adaptive Dynamics in Transformers", 2025, arXiv 2501.02393.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError, UnknownNameError

__all__ = [
    "ADJACENCY_MODES",
    "AGGREGATORS",
    "AttentionGraph",
    "aggregate",
    "check_aggregators",
    "check_mode",
    "graph_from_attention",
    "process_adjacency",
]

AGGREGATORS = ("sum", "mean", "max", "min", "var")


def _above(adjacency: Tensor, threshold: Tensor | float) -> Tensor:
    return (adjacency > threshold).to(adjacency.dtype)


def _below_and_above(soft: Tensor, hard: Tensor) -> Tensor:
    """The soft value up to the threshold, one beyond it."""
    return soft * (1 - hard) + hard


# Of the adjacency, the threshold, and beta, the steepness of two of them.
_POINTWISE: dict[str, Callable[[Tensor, Tensor | float, float], Tensor]] = {
    "none": lambda a, t, beta: a,
    "relu": lambda a, t, beta: F.relu(a - t),
    "silu": lambda a, t, beta: F.silu(a - t),
    "softplus": lambda a, t, beta: F.softplus(a - t),
    "sharp_softplus": lambda a, t, beta: F.softplus(beta * (a - t)) / beta,
    "sigmoid": lambda a, t, beta: torch.sigmoid(beta * (a - t)),
    "flowthreshold": lambda a, t, beta: torch.sigmoid(5 * a) * torch.sigmoid(50 * (a - t)),
    "binary": lambda a, t, beta: _above(a, t),
    "relu_below_binary_above": lambda a, t, beta: _below_and_above(F.relu(a - t), _above(a, t)),
    "silu_below_binary_above": lambda a, t, beta: _below_and_above(F.silu(a - t), _above(a, t)),
    "softplus_below_binary_above": lambda a, t, beta: _below_and_above(F.softplus(a - t), _above(a, t)),
}
ADJACENCY_MODES = (*_POINTWISE, "silu+binary", "top_k")


def process_adjacency(
    adjacency: Tensor,
    mode: str = "none",
    *,
    threshold: Tensor | float = 0.2,
    beta: float = 10.0,
    fraction: float = 0.1,
    binary_scale: float = 1.0,
    visible: Tensor | None = None,
) -> Tensor:
    """Edges ``(..., rows, k_len)`` from weights of the same shape, zero where not ``visible``.

    With ``t`` the threshold: ``relu``, ``silu``, ``softplus`` of ``a - t``; ``sharp_softplus``, ``softplus(beta (a -
    t)) / beta``; ``sigmoid(beta (a - t))``; ``flowthreshold``, ``sigmoid(5 a) sigmoid(50 (a - t))``; ``binary``, one
    where ``a > t``; ``top_k``, one for a ``fraction`` of the keys that a row sees, rounded down, at least one;
    ``silu+binary``, silu plus ``binary_scale`` times binary; ``..._below_binary_above``: one beyond the threshold, the
    soft value up to it. Several of them are positive at weight zero, so what is not seen is zeroed at last.
    visible: boolean, broadcastable to the weights; None for the lower triangle, the last row seeing all.
    """
    check_mode(mode, fraction)
    if adjacency.dim() < 2:
        raise ShapeError(f"An adjacency is (..., rows, k_len), got {tuple(adjacency.shape)}.")
    rows, k_len = adjacency.shape[-2:]
    if visible is None:
        visible = adjacency.new_ones(rows, k_len, dtype=torch.bool).tril(k_len - rows)
    if isinstance(threshold, Tensor):
        threshold = threshold.to(adjacency.dtype)
    if mode == "top_k":
        edges = _largest(adjacency, visible, fraction)
    elif mode == "silu+binary":
        edges = F.silu(adjacency - threshold) + binary_scale * _above(adjacency, threshold)
    else:
        edges = _POINTWISE[mode](adjacency, threshold, beta)
    return edges.masked_fill(~visible, 0)


def check_mode(mode: str, fraction: float) -> None:
    """UnknownNameError for a mode that is none; OptionError for no share of keys."""
    if mode not in ADJACENCY_MODES:
        raise UnknownNameError("adjacency mode", mode, ADJACENCY_MODES, f"There are: {', '.join(ADJACENCY_MODES)}.")
    if not 0 < fraction <= 1:
        raise OptionError(f"fraction is a share of the keys, above 0 and at most 1; got {fraction}.")


def _largest(adjacency: Tensor, visible: Tensor, fraction: float) -> Tensor:
    """One for the largest of what each row sees: how many does not depend on what comes after it."""
    seen = visible.expand(adjacency.shape)
    count = (seen.sum(-1, keepdim=True) * fraction).long().clamp_min(1)
    order = adjacency.detach().masked_fill(~seen, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(-1) < count).to(adjacency.dtype)


def aggregate(weights: Tensor, value: Tensor, names: Sequence[str] = AGGREGATORS) -> Tensor:
    """What each row's neighbours hold, in several ways: weights ``(..., rows, k_len)`` and value ``(..., k_len, d)`` to
    ``(..., rows, len(names) d)``, one block of channels after the other.

    sum: ``sum_j A_ij v_j``. mean: that over the degree ``sum_j A_ij`` (over one where it is zero). max, min: of each
    channel over the neighbours with ``A_ij > 0``, whatever their weight; zero without neighbours. var: the mean of
    ``v^2`` less the square of the mean, at least zero. The extremes form ``d`` numbers for each pair.
    """
    check_aggregators(names)
    total = weights @ value
    degree = weights.sum(-1, keepdim=True)
    degree = torch.where(degree == 0, torch.ones_like(degree), degree)
    mean = total / degree
    blocks = []
    for name in names:
        if name == "sum":
            blocks.append(total)
        elif name == "mean":
            blocks.append(mean)
        elif name == "var":
            blocks.append((weights @ value.square() / degree - mean.square()).clamp_min(0))
        else:
            blocks.append(_extreme(weights > 0, value) if name == "max" else -_extreme(weights > 0, -value))
    return torch.cat(blocks, -1)


def check_aggregators(names: Sequence[str]) -> None:
    """UnknownNameError for a name that is none; OptionError without any."""
    for name in names:
        if name not in AGGREGATORS:
            raise UnknownNameError("aggregator", name, AGGREGATORS, f"There are: {', '.join(AGGREGATORS)}.")
    if not names:
        raise OptionError(f"Give one aggregator or more of {', '.join(AGGREGATORS)}.")


def _extreme(edges: Tensor, value: Tensor) -> Tensor:
    pairs = torch.where(edges[..., None], value[..., None, :, :], float("-inf"))
    return torch.where(edges.any(-1, keepdim=True), pairs.amax(-2), 0)


@dataclass(frozen=True)
class AttentionGraph:
    """The graph of one map of ``length`` tokens.

    edges: ``(count, 2)``, (source, target): a key and the query that reads it, self-loops included. weights:
    ``(count,)``. in_degree: how many tokens each reads; out_degree: how many read it. degree, clustering: number of
    neighbours, and share of their pairs that are neighbours themselves (0 for fewer than two), where an edge in either
    direction makes neighbours and self-loops count for nothing; all ``(length,)``.
    """

    edges: Tensor
    weights: Tensor
    in_degree: Tensor
    out_degree: Tensor
    degree: Tensor
    clustering: Tensor


def graph_from_attention(weights: Tensor, threshold: float = 0.0) -> AttentionGraph:
    """The graph of one map's entries above ``threshold``: ``(length, length)``, rows of queries, columns of keys."""
    if weights.dim() != 2 or weights.shape[0] != weights.shape[1]:
        raise ShapeError(
            f"A graph is made from one map (length, length), got {tuple(weights.shape)}. Choose a batch and a head, or "
            "take the mean over heads first."
        )
    weights = weights.detach()
    linked = weights > threshold
    target, source = linked.nonzero(as_tuple=True)
    friends = (linked | linked.mT) & ~torch.eye(len(weights), dtype=torch.bool, device=weights.device)
    degree, near = friends.sum(-1), friends.float()
    # Ordered pairs of neighbours that are linked, of degree (degree - 1) of them.
    closed = (near @ near * near).sum(-1)
    return AttentionGraph(
        torch.stack((source, target), -1),
        weights[target, source],
        linked.sum(-1),
        linked.sum(0),
        degree,
        closed / (degree * (degree - 1)).clamp_min(1),
    )
