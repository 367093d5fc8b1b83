"""Which few directions carry an attention score, and which earlier heads wrote them.

A head's raw score (before ``1 / sqrt(head_dim)``) is bilinear in the normalised residual of its two tokens::

    score(i, j) = [x_i; 1]^T Omega [x_j; 1],   Omega = [W_Q; b_Q] [W_K; b_K]^T = sum_k s_k u_k v_k^T

``x``: after the norm's centring and division by ``sigma``; its gain and offset are folded into the weights, which are
centred as ``x`` is. The rank is at most ``head_dim``. Terms ``s_k (x_i . u_k) (v_k . x_j)``, the largest first: those
used are the shortest prefix that exceeds ``frac`` of the total; with 1.0 the others are negative on balance. An earlier
head that wrote ``o`` at a token contributes to the score through the used directions alone::

    source side:       sum_k sign(x_i . u_k) sqrt(s_k) (v_k . [o_j; 1]) / sigma_j
    destination side:  sum_k sign(x_i . u_k) sqrt(s_k) (u_k . [o_i; 1]) / sigma_i

``o`` is without value biases, which count as the layer's. From a head and a place one traces back: the heads with the
largest contributions, until they make up 0.7 of their sum; then what these heads fire on, at the token they wrote to.

Source: "Sparse Attention Decomposition Applied to Circuit Tracing", 2024, arXiv 2410.00340. The stopping rule and
``[o; 1]`` for every head are the released code's. Where all terms are positive, it has no prefix; here all are used.

Scope: pre-norm models and models without norms whose queries and keys are plain projections; rotary positions make
Omega differ from pair to pair and are refused. One prompt at a time. Cost: one forward pass; an SVD of ``head_dim x
head_dim`` a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect.capture import capture
from regard.inspect.intervene import Edit, Head, intervene
from regard.inspect.projections import HeadProjections, head_projections
from regard.kernels import expand_groups
from regard.retrofit.sites import Site, discover
from regard.retrofit.switch import Call

__all__ = [
    "Edge",
    "OmegaSVD",
    "ScoreCache",
    "ScoreParts",
    "ablate_edge",
    "decompose_score",
    "edge_signal",
    "firing_edges",
    "omega",
    "omega_svd",
    "read_scores",
    "score_parts",
    "svs_used",
    "trace",
    "upstream_contribution",
]


class OmegaSVD(NamedTuple):
    """Left ``(layers, heads, embed_dim + 1, rank)``, values ``(layers, heads, rank)``, right as left."""

    left: Tensor
    values: Tensor
    right: Tensor


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
        """For ``networkx.DiGraph.add_edges_from``; the downstream node carries the token."""
        facts = {"weight": self.weight, "type": self.side, "dst": self.dst, "src": self.src}
        return self.upstream, (*self.downstream, self.token), facts


@dataclass(frozen=True, eq=False)
class ScoreCache:
    """A prompt's run, layer by layer: ``normed (length, embed_dim)``, its ``scale (length,)``, ``weights`` and raw
    ``scores (heads, length, length)``, ``written (heads, length, embed_dim)`` and ``entered (length, embed_dim)``, the
    residual before the layer's block."""

    model: nn.Module
    svd: OmegaSVD
    folded: list[HeadProjections]
    centred: list[bool]
    normed: list[Tensor]
    scale: list[Tensor]
    weights: list[Tensor]
    scores: list[Tensor]
    written: list[Tensor]
    entered: list[Tensor]
    frac: float

    def terms(self, layer: int, head: int, dst: int, src: int) -> Tensor:
        """The score's terms ``(rank,)``."""
        return decompose_score(self.normed[layer][dst], self.normed[layer][src], *(t[layer, head] for t in self.svd))

    def used(self, layer: int, head: int, dst: int, src: int) -> Tensor:
        """Indices of the singular vectors that the score uses."""
        return svs_used(self.terms(layer, head, dst, src), self.frac)

    def part(self, layer: int, states: Tensor) -> Tensor:
        """What ``states (..., embed_dim)`` in the residual are to a layer's norm, but for its scale."""
        return states - states.mean(-1, keepdim=True) if self.centred[layer] else states


def omega(model: nn.Module, layer: int, head: int) -> Tensor:
    """``(embed_dim + 1, embed_dim + 1)`` of one head."""
    sites = discover(model)
    if not 0 <= layer < len(sites) or not 0 <= head < sites[layer].context["num_heads"]:
        raise OptionError(f"There is no head ({layer}, {head}): the model has {len(sites)} layers.")
    query, key = _augmented(_folded(sites[layer]))
    return query[head] @ key[head].mT


def omega_svd(model: nn.Module) -> OmegaSVD:
    """The singular vectors of every head's Omega, cut at the rank that the head can have."""
    return _svd([_folded(site) for site in discover(model)])


def decompose_score(x_dst: Tensor, x_src: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Terms ``(..., rank)`` that sum to the raw score of ``x_dst`` with ``x_src``, each ``(..., embed_dim)``."""
    if x_dst.shape[-1] + 1 != left.shape[-2]:
        raise ShapeError(f"Omega acts on {left.shape[-2] - 1} channels and a constant 1; got {tuple(x_dst.shape)}.")
    return (_with(x_dst, 1) @ left) * values * (_with(x_src, 1) @ right)


def svs_used(terms: Tensor, frac: float = 1.0) -> Tensor:
    """Indices of ``terms (rank,)``, the largest first: the shortest prefix that exceeds ``frac`` of the sum (of the
    smallest first, where the sum is negative); all of them if none does."""
    if terms.dim() != 1 or not 0 < frac <= 1:
        raise OptionError(f"terms are (rank,) and 0 < frac <= 1; got {tuple(terms.shape)} and {frac}.")
    facing = -terms if terms.sum() < 0 else terms
    order = facing.argsort(descending=True)
    beyond = (facing[order].cumsum(0) > frac * facing.sum()).nonzero()
    return order if len(beyond) == 0 else order[: int(beyond[0]) + 1]


def firing_edges(weights: Tensor, scores: Tensor, thresh: float = 0.5, skip_first: bool = True) -> Tensor:
    """Indices ``(edges, dims)`` into ``weights (..., queries, keys)`` of more than ``thresh`` whose raw score is
    positive; without the first key, where heads rest that have nothing to do."""
    if weights.shape != scores.shape:
        raise ShapeError(f"Weights {tuple(weights.shape)} and scores {tuple(scores.shape)} must agree.")
    fires = (weights > thresh) & (scores > 0)
    if skip_first:
        fires[..., 0] = False
    return fires.nonzero()


@torch.no_grad()
def read_scores(model: nn.Module, tokens: Tensor, frac: float = 1.0) -> ScoreCache:
    """Run a prompt ``(1, length)``. ``frac``: see :func:`svs_used`. Raises RetrofitError where scores are no
    product of plain projections of a pre-norm residual."""
    if tokens.dim() != 2 or len(tokens) != 1:
        raise ShapeError(f"One prompt (1, length) at a time; got {tuple(tokens.shape)}.")
    if model.training:
        raise OptionError("A model in training drops units at random; call model.eval().")
    sites = discover(model)
    folded = [_folded(site) for site in sites]
    answers: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer, site in enumerate(sites):
            hooks.callback(site.home.register_forward_hook(_keep(answers, layer)).remove)
        with capture(model, "all") as seen:
            model(tokens)
    cache = ScoreCache(model, _svd(folded), folded, [], [], [], [], [], [], [], frac)
    for layer, (site, own, at) in enumerate(zip(sites, folded, seen, strict=True)):
        x, z, q, k, maps = at.hidden_states, at.head_outputs, at.queries, at.keys, at.weights
        if x is None or z is None or q is None or k is None or maps is None:
            raise RetrofitError(f"{site.path} has no residual stream or no weights to look at.")
        x, norm = x.reshape(-1, x.shape[-1]), _norm(site)
        cache.centred.append(isinstance(norm, nn.LayerNorm))
        centred, scale = cache.part(layer, x), x.new_ones(len(x))
        if norm is not None:
            scale = (centred.square().mean(-1) + _epsilon(norm, x)).sqrt()
        normed = centred / scale[:, None]
        queries, keys = (normed @ w.mT + b[:, None] for w, b in ((own.query, own.query_bias), (own.key, own.key_bias)))
        written = (z[0] - own.value_bias[:, None]) @ own.output.mT
        _check(site, queries, q[0], "queries are")
        _check(site, keys, expand_groups(k, len(queries))[0], "keys are")
        _check(site, written.sum(0) + own.output_bias, answers[layer].reshape(-1, x.shape[-1]), "output is")
        cache.normed.append(normed)
        cache.scale.append(scale)
        cache.scores.append(queries @ keys.mT)
        cache.weights.append(maps[0])
        cache.written.append(written)
        cache.entered.append(x)
    return cache


def upstream_contribution(
    cache: ScoreCache, layer: int, head: int, dst: int, src: int, constant: bool = True
) -> tuple[Tensor, Tensor]:
    """What every earlier head adds to a score through the directions used: ``(layers, heads)`` at the destination and
    at the source, zero from ``layer`` on. constant: give every head the 1 in ``[o; 1]``, as the paper does; without it
    contributions are linear in ``o``."""
    used = cache.used(layer, head, dst, src)
    left, values, right = (t[layer, head][..., used] for t in cache.svd)
    facing = (_with(cache.normed[layer][dst], 1) @ left).sign() * values.sqrt()
    sides = []
    for directions, token in ((left, dst), (right, src)):
        found = values.new_zeros(cache.svd.values.shape[:2])
        for before in range(layer):
            wrote = cache.part(layer, cache.written[before][:, token])
            found[before] = _with(wrote, float(constant)) @ (directions @ facing) / cache.scale[layer][token]
        sides.append(found)
    return sides[0], sides[1]


def score_parts(cache: ScoreCache, layer: int, head: int, dst: int, src: int) -> ScoreParts:
    """The raw score of a pair, by what put the source token's residual together; all singular vectors count."""
    left, values, right = (t[layer, head] for t in cache.svd)
    reads = right @ (values * (_with(cache.normed[layer][dst], 1) @ left))

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
    head, dst, src)``. cover: share of the heads' summed contributions at which the list of heads ends, at each of the
    two tokens. A :class:`ScoreCache` needs no tokens."""
    if isinstance(model, ScoreCache):
        cache = model
    elif tokens is not None:
        cache = read_scores(model, tokens)
    else:
        raise OptionError("A model is traced on tokens (1, length); none were given.")
    if len(start) not in (3, 4) or not 0 < cover <= 1:
        raise OptionError(f"start is (layer, head, dst) or with src, 0 < cover <= 1; got {start} and {cover}.")
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
    site, token = discover(cache.model)[edge.upstream[0]], edge.token

    def added(module: nn.Module, args: Any, output: Any) -> Any:
        states = (output if isinstance(output, Tensor) else output[0]).clone()
        states.view(-1, states.shape[-1])[token] += delta
        return states if isinstance(output, Tensor) else (states, *output[1:])

    if mode == "A":
        handle = site.home.register_forward_hook(added)
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
    if not edge.upstream[0] < layer:
        raise OptionError(f"Head {edge.upstream} is not before {edge.downstream}.")
    directions = cache.svd.left if edge.side == "d" else cache.svd.right
    used = cache.used(layer, head, edge.dst, edge.src)
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
    return cache.part(layer, (basis @ (basis.mT @ _with(wrote, 1)))[:-1])


def _with(x: Tensor, last: float) -> Tensor:
    """``[x; last]``."""
    return torch.cat((x, x.new_full((*x.shape[:-1], 1), last)), -1)


def _largest(found: Tensor, cover: float) -> list[int]:
    """Places of the largest entries, until they sum to more than ``cover`` of the total."""
    order = found.flatten().argsort(descending=True)
    beyond = (found.flatten()[order].cumsum(0) > cover * found.sum()).nonzero()
    return [int(at) for at in (order if len(beyond) == 0 else order[: int(beyond[0]) + 1])]


def _augmented(own: HeadProjections) -> tuple[Tensor, Tensor]:
    """``[W_Q; b_Q]`` and ``[W_K; b_K]``, ``(heads, embed_dim + 1, head_dim)``."""
    return (
        torch.cat((own.query.mT, own.query_bias[:, None]), 1),
        torch.cat((own.key.mT, own.key_bias[:, None]), 1),
    )


def _svd(folded: list[HeadProjections]) -> OmegaSVD:
    if len({own.query.shape for own in folded}) > 1:
        raise RetrofitError("These layers differ in heads or widths, so their singular vectors do not stack.")
    query, key = (torch.stack(list(both)) for both in zip(*(_augmented(own) for own in folded), strict=True))
    # Omega is a product of thin matrices: its SVD is that of their triangles.
    (q_basis, q_rest), (k_basis, k_rest) = torch.linalg.qr(query), torch.linalg.qr(key)
    left, values, right = torch.linalg.svd(q_rest @ k_rest.mT)
    return OmegaSVD(q_basis @ left, values, k_basis @ right.mT)


def _folded(site: Site) -> HeadProjections:
    """A layer's projections of the normalised residual, the value biases moved behind the output projection."""
    own, norm = head_projections(site), _norm(site)
    maps = [own.query, own.key, own.value]
    biases = [own.query_bias, own.key_bias, own.value_bias]
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    if isinstance(bias, Tensor):
        biases = [shift + m @ bias.detach() for shift, m in zip(biases, maps, strict=True)]
    if isinstance(weight, Tensor):
        maps = [m * weight.detach() for m in maps]
    if isinstance(norm, nn.LayerNorm):
        # What reads the mean of a centred state reads nothing.
        maps = [m - m.mean(-1, keepdim=True) for m in maps]
    output_bias = own.output_bias + torch.einsum("hdv,hv->d", own.output, biases[2])
    return HeadProjections(maps[0], maps[1], maps[2], own.output, biases[0], biases[1], biases[2], output_bias)


def _norm(site: Site) -> nn.Module | None:
    """The norm before a layer's attention; None where the residual enters as it is."""
    if site.block is site.home:
        return None
    norms = [child for child in site.block.children() if _is_norm(child)]
    if getattr(site.block, "attention_scale", None) is not None:
        raise RetrofitError(f"{site.path}: its block scales what attention writes, which is not followed.")
    if not norms and any(_is_norm(module) for module in site.block.modules()):
        raise RetrofitError(
            f"{site.path}: the norm before attention was not found; pre-norm blocks have it as a child."
        )
    return norms[0] if norms else None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _epsilon(norm: nn.Module, x: Tensor) -> float:
    for name in ("eps", "variance_epsilon"):
        found = getattr(norm, name, None)
        if isinstance(found, float):
            return found
    return torch.finfo(x.dtype).eps


def _keep(into: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        into[layer] = output if isinstance(output, Tensor) else output[0]

    return keep


def _check(site: Site, made: Tensor, own: Tensor, what: str) -> None:
    if made.shape != own.shape or not torch.allclose(made, own, rtol=1e-3, atol=1e-3 * float(own.abs().amax())):
        raise RetrofitError(
            f"{site.path}: its {what} not the plain projection of the normalised residual (rotary positions, norms of "
            "queries, a norm behind attention, an output projection elsewhere), so that Omega does not give its scores."
        )
