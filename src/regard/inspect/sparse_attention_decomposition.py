"""Which few directions carry an attention score, and which earlier heads wrote them.

A head's raw score is a sum of terms ``s_k (x_i . u_k) (v_k . x_j)`` over the singular vectors of its
:mod:`~regard.inspect.omega`. Those used are the largest ones, the shortest prefix that exceeds ``frac`` of the total;
with 1.0 the others are negative on balance. An earlier head that wrote ``o`` at a token contributes to the score
through the used directions alone::

    source side:       sum_k sign(x_i . u_k) sqrt(s_k) (v_k . [o_j; 1]) / sigma_j
    destination side:  sum_k sign(x_i . u_k) sqrt(s_k) (u_k . [o_i; 1]) / sigma_i

``o`` is without value biases, which count as the layer's. From a head and a place one traces back: the heads with the
largest contributions, until they make up 0.7 of their sum; then what these heads fire on, at the token they wrote to.

Source: "Sparse Attention Decomposition Applied to Circuit Tracing", 2024, arXiv 2410.00340. The stopping rule and
``[o; 1]`` for every head are the released code's. Works on GPT-2 and what else :mod:`~regard.inspect.omega` takes, one
prompt at a time; beyond its cost a trace is a few products of ``(heads, embed_dim)`` for each pair that it visits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.intervene import Edit, Head, intervene
from regard.inspect.omega import (
    ScoreCache,
    read_scores,
    with_one,
)
from regard.retrofit.sites import discover
from regard.retrofit.switch import Call

__all__ = [
    "Edge",
    "ScoreParts",
    "ablate_edge",
    "edge_signal",
    "firing_edges",
    "score_parts",
    "trace",
    "upstream_contribution",
]


class ScoreParts(NamedTuple):
    """What each part of the source token's residual adds to a raw score: ``heads (layers, heads)``, ``mlps`` and
    ``biases (layers,)``, what entered the first block, and the constant 1. They sum to the score."""

    heads: Tensor
    mlps: Tensor
    biases: Tensor
    embedding: Tensor
    constant: Tensor

    def total(self) -> Tensor:
        """The raw score."""
        return sum((part.sum() for part in self), self.constant.new_zeros(()))


@dataclass(frozen=True)
class Edge:
    """``upstream`` wrote what ``downstream`` used at ``(dst, src)``; ``side``: at which of the two tokens."""

    upstream: Head
    downstream: Head
    dst: int
    src: int
    side: Literal["d", "s"]
    weight: float

    @property
    def token(self) -> int:
        """Where the upstream head wrote."""
        return self.dst if self.side == "d" else self.src

    def networkx(self) -> tuple[Head, tuple[int, int, int], dict[str, Any]]:
        """For ``networkx.MultiDiGraph.add_edges_from``; the downstream node carries the token."""
        facts = {"weight": self.weight, "type": self.side, "dst": self.dst, "src": self.src}
        return self.upstream, (*self.downstream, self.token), facts


def firing_edges(weights: Tensor, scores: Tensor, thresh: float = 0.5, skip_first: bool = True) -> Tensor:
    """Indices ``(edges, dims)`` into ``weights (..., queries, keys)`` of more than ``thresh`` whose raw score is
    positive; without the first key, where heads rest that have nothing to do."""
    if weights.shape != scores.shape:
        raise ShapeError(f"Weights {tuple(weights.shape)} and scores {tuple(scores.shape)} must agree.")
    fires = (weights > thresh) & (scores > 0)
    if skip_first:
        fires[..., 0] = False
    return fires.nonzero()


def upstream_contribution(
    cache: ScoreCache, layer: int, head: int, dst: int, src: int, constant: bool = True
) -> tuple[Tensor, Tensor]:
    """What every earlier head adds to a score through the directions used: ``(layers, heads)`` at the destination and
    at the source, zero from ``layer`` on. constant: give every head the 1 in ``[o; 1]``, as the paper does; without it
    contributions are linear in ``o``."""
    used = cache.used(layer, head, dst, src)
    left, values, right = (t[layer, head][..., used] for t in cache.svd)
    facing = (with_one(cache.normed[layer][dst]) @ left).sign() * values.sqrt()
    sides = []
    for directions, token in ((left, dst), (right, src)):
        found = values.new_zeros(cache.svd.values.shape[:2])
        for before in range(layer):
            wrote = cache.part(layer, cache.written[before][:, token])
            found[before] = with_one(wrote, float(constant)) @ (directions @ facing) / cache.scale[layer][token]
        sides.append(found)
    return sides[0], sides[1]


def score_parts(cache: ScoreCache, layer: int, head: int, dst: int, src: int) -> ScoreParts:
    """The raw score of a pair, by what put the source token's residual together; all singular vectors count."""
    cache.check(layer, head, dst, src)
    left, values, right = (t[layer, head] for t in cache.svd)
    reads = right @ (values * (with_one(cache.normed[layer][dst]) @ left))

    def effect(states: Tensor) -> Tensor:
        return cache.part(layer, states) @ reads[:-1] / cache.scale[layer][src]

    count, heads = cache.svd.values.shape[:2]
    parts = ScoreParts(
        reads.new_zeros(count, heads),
        reads.new_zeros(count),
        reads.new_zeros(count),
        effect(cache.entered[0][src]),
        reads[-1],
    )
    for before in range(layer):
        bias, wrote = cache.folded[before].output_bias, cache.written[before][:, src]
        rest = cache.entered[before + 1][src] - cache.entered[before][src] - bias - wrote.sum(0)
        parts.heads[before], parts.biases[before], parts.mlps[before] = effect(wrote), effect(bias), effect(rest)
    return parts


def trace(
    model: nn.Module | ScoreCache, tokens: Tensor | None, start: tuple[int, ...], cover: float = 0.7
) -> list[Edge]:
    """The edges that lead to ``start``: ``(layer, head, dst)`` for all that the head fires on from there, or ``(layer,
    head, dst, src)``; none where it does not fire (:func:`firing_edges`). cover: share of the heads' summed
    contributions at which the list of heads ends, at each of the two tokens. A :class:`ScoreCache` needs no tokens."""
    if isinstance(model, ScoreCache):
        cache = model
    elif tokens is not None:
        cache = read_scores(model, tokens)
    else:
        raise OptionError("A model is traced on tokens (1, length); none were given.")
    if len(start) not in (3, 4) or not 0 < cover <= 1:
        raise OptionError(f"start is (layer, head, dst) or with src, 0 < cover <= 1; got {start} and {cover}.")
    cache.check(*start)
    fires = [
        {(int(h), int(i), int(j)) for h, i, j in firing_edges(maps, scores)}
        for maps, scores in zip(cache.weights, cache.scores, strict=True)
    ]
    waiting = [(start[0], *at) for at in sorted(fires[start[0]]) if at[: len(start) - 1] == start[1:]]
    edges: list[Edge] = []
    known = set(waiting)
    while waiting:
        layer, head, dst, src = waiting.pop(0)
        if layer == 0:
            continue
        for side, token, found in zip(
            ("d", "s"), (dst, src), upstream_contribution(cache, layer, head, dst, src), strict=True
        ):
            for at in _largest(found[:layer], cover):
                before = (at // found.shape[1], at % found.shape[1])
                weight = float(found[before])
                edges.append(Edge(before, (layer, head), dst, src, "d" if side == "d" else "s", weight))
                for own, i, j in sorted(fires[before[0]]):
                    place = (before[0], own, i, j)
                    if (own, i) == (before[1], token) and place not in known:
                        known.add(place)
                        waiting.append(place)
    return edges


@contextmanager
def ablate_edge(
    cache: ScoreCache,
    edge: Edge,
    mode: Literal["A", "B"] = "A",
    boost: bool = False,
    random: torch.Generator | None = None,
) -> Iterator[None]:
    """While open, the model runs without what ``edge.upstream`` wrote into the directions used: ``P [o; 1]``.

    mode: ``"A"`` takes it from the residual behind the upstream head, for all that follows; ``"B"`` from what the
    downstream head alone reads (queries, keys and values), over the norm's scale. boost: add instead. random: as many
    singular vectors that are not used, drawn from this generator: the control. The prompt must be the cache's.
    """
    if mode not in ("A", "B"):
        raise OptionError(f"mode is 'A' (for all that follows) or 'B' (for one head), got {mode!r}.")
    delta = edge_signal(cache, edge, random) * (1 if boost else -1)
    token, length = edge.token, len(cache.normed[0])

    def added(module: nn.Module, args: Any, output: Any) -> Any:
        states = output if isinstance(output, Tensor) else output[0]
        _check_prompt(states.numel() // states.shape[-1], length)
        step = states.new_zeros(length, states.shape[-1])
        step[token] = delta
        states = states + step.view_as(states)
        return states if isinstance(output, Tensor) else (states, *output[1:])

    if mode == "A":
        handle = discover(cache.model)[edge.upstream[0]].home.register_forward_hook(added)
        try:
            yield
        finally:
            handle.remove()
        return
    (layer, head), own = edge.downstream, cache.folded[edge.downstream[0]]
    step = delta / cache.scale[layer][token]
    moves = {"query": own.query[head] @ step, "key": own.key[head] @ step, "value": own.value[head] @ step}

    def inputs(at: int, call: Call) -> Call:
        if call.key.shape[1] != call.query.shape[1]:
            raise OptionError("Heads that share keys cannot be changed one by one; use mode 'A'.")
        _check_prompt(call.query.shape[0] * call.query.shape[2], length)
        changed = {name: getattr(call, name).clone() for name in moves}
        for name, move in moves.items():
            changed[name][:, head, token] += move
        return replace(call, **changed)

    with intervene(cache.model, Edit(frozenset((layer,)), inputs=inputs)):
        yield


def edge_signal(cache: ScoreCache, edge: Edge, random: torch.Generator | None = None) -> Tensor:
    """``P [o; 1]`` without its last entry ``(embed_dim,)``: what the upstream head wrote into the directions used, of
    zero mean where the downstream norm centres; into as many that are not used with ``random``."""
    layer, head = edge.downstream
    cache.check(*edge.upstream)
    used = cache.used(layer, head, edge.dst, edge.src)
    if not edge.upstream[0] < layer:
        raise OptionError(f"Head {edge.upstream} is not before {edge.downstream}.")
    directions = cache.svd.left if edge.side == "d" else cache.svd.right
    if random is not None:
        rank = directions.shape[-1]
        others = torch.tensor([k for k in range(rank) if k not in used.tolist()], dtype=torch.long)
        if len(others) < len(used):
            raise OptionError(
                f"{len(used)} of {rank} singular vectors are used, which leaves {len(others)}: too few for a control "
                "of as many. Read the scores with a smaller frac."
            )
        used = others[torch.randperm(len(others), generator=random)[: len(used)]]
    basis = directions[layer, head][:, used]
    wrote = cache.part(layer, cache.written[edge.upstream[0]][edge.upstream[1], edge.token])
    return cache.part(layer, (basis @ (basis.mT @ with_one(wrote)))[:-1])


def _check_prompt(tokens: int, length: int) -> None:
    if tokens != length:
        raise ShapeError(f"The edge is of a prompt of {length} tokens, and the model runs on {tokens}.")


def _largest(found: Tensor, cover: float) -> list[int]:
    """Places of the largest entries, until they sum to more than ``cover`` of the total."""
    order = found.flatten().argsort(descending=True)
    beyond = (found.flatten()[order].cumsum(0) > cover * found.sum()).nonzero()
    return [int(at) for at in (order if len(beyond) == 0 else order[: int(beyond[0]) + 1])]
