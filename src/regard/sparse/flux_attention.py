"""Flux Attention: a router in every layer of a trained model chooses, per prompt, full or sparse attention.

Router of a layer, at prefill, on queries before rotary positions: the mean over the first ``pool`` and the last
``pool`` tokens of the prompt and over heads gives one vector of size D; ``D -> 8D -> 2D`` and then ``2D -> 4D -> D ->
2`` (SiLU between) give the logits (sparse, full). The last layer begins with weights 0 and bias (0, 4.5): every layer
begins full. One decision per sample, shared by all heads.

- Training: ``soft = softmax((logits + Gumbel noise) / tau)``, ``z`` its hard choice of 'full' with the soft gradient,
  output ``z full + (1 - z) sparse``. ``tau`` falls from 1.5 to 1 along a cosine over the first 60 % of the steps.
- Inference: the larger logit; only the branch chosen runs. The decision of the prefill is kept while decoding, so that
  a sparse layer keeps the KV of the sink and of the recent blocks alone.
- Sparsity ``s = 1 - mean of z over layers`` is bound to a target per task:
  :class:`~regard.layers.losses.SparsityLagrangian`.

Sparse branches: ``'streaming'``, the first block(s) and the recent blocks; ``'triangle'``, the same, the last queries
full; ``'xattn'``, blocks chosen by anti-diagonal scores (:func:`~regard.sparse.scoring.antidiagonal_scores`);
``'topk'``, the keys of largest logit of each query. Whatever the branch, a sparse layer streams while decoding.

"Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference", 2026, arXiv 2604.07394. Query (batch,
num_heads, q_len, head_dim), key and value (batch, num_kv_heads, k_len, ...), causal. A mechanism gets queries with
their rotary positions; :func:`regard.retrofit.flux_attention.attach_flux` takes them before. Cost: that of the branch,
and a router of some 36 D^2 multiplications a sample. The paper's backbone is frozen; its released script also tunes the
projections of queries, keys and values. The released code has no body for ``'topk'``, of which it names the options.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from regard.cache import Cached, DynamicCache, EvictingCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, dense_attention
from regard.layers.gumbel import gumbel_one_hot
from regard.masks import Boolean, KeyPadding, Mask
from regard.mechanism import Mechanism, Pattern, Request
from regard.registry import register
from regard.sparse.branches import BlockStreaming, StreamingBlocks, TopKeys
from regard.sparse.frame import compose
from regard.sparse.scoring import antidiagonal_scores
from regard.sparse.selection import TopP

__all__ = [
    "FluxAttention",
    "FluxState",
    "LayerRouter",
    "Routing",
    "RoutingTable",
    "routing_table",
]

Branch = Literal["streaming", "triangle", "xattn", "topk"]
Mode = Literal["route", "full", "sparse"]
Span = tuple[int, int] | Tensor


class Routing(NamedTuple):
    """``logits (batch, 2)``: sparse, full. ``soft`` and ``hard`` ``(batch,)``: how much, and whether, full; in training
    drawn with Gumbel noise, ``hard`` with the gradient of ``soft``."""

    logits: Tensor
    soft: Tensor
    hard: Tensor


class LayerRouter(nn.Module):
    """Full or sparse, from the queries of a prompt's beginning and end.

    pool: tokens from each end. full_bias: initial logit of full attention.
    """

    def __init__(self, head_dim: int, pool: int = 100, *, full_bias: float = 4.5) -> None:
        super().__init__()
        if head_dim < 1 or pool < 1:
            raise OptionError(f"Need head_dim >= 1 and pool >= 1, got {head_dim} and {pool}.")
        self.pool, self.full_bias = pool, full_bias
        self.features = nn.Sequential(
            nn.Linear(head_dim, 8 * head_dim), nn.SiLU(), nn.Linear(8 * head_dim, 2 * head_dim)
        )
        widths = [2 * head_dim, 4 * head_dim, head_dim, 2]
        first, second, last = (nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.choice = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial choice: full, whatever the input."""
        layers = [layer for layer in self.choice if isinstance(layer, nn.Linear)]
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(layers[-1].weight)
        with torch.no_grad():
            layers[-1].bias[1] = self.full_bias

    @property
    def flops(self) -> int:
        """Operations for one sample."""
        return sum(2 * p.numel() for p in self.parameters() if p.dim() == 2)

    def pooled(self, query: Tensor, span: Span | None = None) -> Tensor:
        """``(batch, head_dim)`` from ``query (batch, num_heads, length, head_dim)``.

        span: first token and one past the last of the prompt (context and question), one pair or ``(batch, 2)``; by
        default all tokens. In a span shorter than ``2 pool`` the middle counts twice.
        """
        batch, _, length, _ = query.shape
        ends = torch.as_tensor((0, length) if span is None else span, device=query.device).expand(batch, 2)
        if bool((ends[:, 0] < 0).any() | (ends[:, 1] > length).any()):
            raise ShapeError(f"A span lies within the {length} tokens of the query; got {ends.tolist()}.")
        start, stop = ends[:, :1], ends[:, 1:]
        step = torch.arange(min(self.pool, length), device=query.device)
        place = torch.cat((start + step, stop - 1 - step), -1)
        counted = ((place >= start) & (place < stop)).to(accumulation_dtype(query.dtype))
        index = place.clamp(0, length - 1)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        total = torch.einsum("bhtd,bt->bd", query.gather(2, index).to(counted.dtype), counted)
        return total / (query.shape[1] * counted.sum(-1, keepdim=True).clamp_min(1))

    def forward(
        self,
        query: Tensor,
        span: Span | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """Decide for ``query (batch, num_heads, length, head_dim)``; ``span`` as in :meth:`pooled`."""
        like = next(self.parameters())
        logits: Tensor = self.choice(self.features(self.pooled(query, span).to(like.dtype)))
        if not self.training:
            return Routing(logits, (logits / temperature).softmax(-1)[:, 1], logits.argmax(-1).to(logits.dtype))
        soft = gumbel_one_hot(logits, temperature, hard=False, generator=generator)
        hard = (soft.detach().argmax(-1) == 1).to(soft.dtype) + (soft[:, 1] - soft[:, 1].detach())
        return Routing(logits, soft[:, 1], hard)


@dataclass
class FluxState:
    """What decoding needs: ``full (batch,)``, the decision; ``whole``, the cache of the samples that are full;
    ``recent``, that of the others, of what a later token can still see. Both are changed in place."""

    full: Tensor
    whole: DynamicCache
    recent: EvictingCache
    seen: int = 0


@register("flux_attention")
class FluxAttention(Mechanism):
    """full, sparse: the branches; mechanisms, or a name for the sparse one (None: exact attention). router: a built one
    (None: ``pool`` and ``full_bias`` make it).

    sink, local: tokens of the streaming branch, rounded up to blocks of ``block_size``. last: full queries of
    ``'triangle'``. threshold, stride: of ``'xattn'``. top_k: keys of ``'topk'``. keep_decision: a call with fewer
    queries than keys, as a model makes it when its own KV cache goes on, keeps the last decision and streams.

    Settings in force: ``mode`` (``"route"``, or one branch for all), ``temperature``, ``generator``, ``span`` (see
    :meth:`LayerRouter.pooled`; by default the keys that a padding mask leaves) and ``router_query``, the queries that
    the next call routes by, if not its own. After a call ``routing`` holds what was decided.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self", "causal-cross"))
    needs_training = True
    true_gradient = False

    def __init__(
        self,
        full: Mechanism | None = None,
        sparse: Branch | Mechanism = "streaming",
        router: LayerRouter | None = None,
        *,
        head_dim: int = 64,
        pool: int = 100,
        full_bias: float = 4.5,
        sink: int = 128,
        local: int = 1024,
        block_size: int = 128,
        last: int = 128,
        threshold: float = 0.9,
        stride: int = 16,
        top_k: int = 2048,
        keep_decision: bool = False,
    ) -> None:
        super().__init__()
        if min(local, block_size, last, top_k, stride) < 1 or sink < 0:
            raise OptionError(
                f"Need local, block_size, last, top_k, stride >= 1 and sink >= 0; got {local}, {block_size}, {last}, "
                f"{top_k}, {stride} and {sink}."
            )
        self.full, self.keep_decision = full, keep_decision
        self.rule = BlockStreaming(-(-sink // block_size) * block_size, -(-local // block_size), block_size)
        self.streaming = StreamingBlocks(self.rule)
        if isinstance(sparse, Mechanism):
            self.sparse: Mechanism = sparse
        elif sparse == "streaming":
            self.sparse = self.streaming
        elif sparse == "triangle":
            self.sparse = StreamingBlocks(BlockStreaming(self.rule.sink, self.rule.local, block_size, last))
        elif sparse == "xattn":
            score = partial(antidiagonal_scores, stride=stride)
            self.sparse = compose(score, TopP(threshold), block_q=block_size, block_k=block_size)
        elif sparse == "topk":
            self.sparse = TopKeys(top_k)
        else:
            raise OptionError(f"sparse is one of {', '.join(get_args(Branch))}, or a mechanism; got {sparse!r}.")
        self.router = LayerRouter(head_dim, pool, full_bias=full_bias) if router is None else router
        self.mode: Mode = "route"
        self.temperature = 1.0
        self.generator: torch.Generator | None = None
        self.span: Span | None = None
        self.router_query: Tensor | None = None
        self.routing: Routing | None = None
        self._held = False

    @property
    def strictly_causal(self) -> bool:
        # The last tokens of a prompt have a say in what its first ones see.
        return False

    @property
    def value_linear(self) -> bool:  # type: ignore[override]
        """Whether both branches are."""
        return self.sparse.value_linear and (self.full is None or self.full.value_linear)

    def __getstate__(self) -> dict[str, Any]:
        # What a pass left behind may hang in its graph: it can be neither copied nor pickled.
        return {**self.__dict__, "routing": None, "router_query": None, "generator": None}

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, {self.rule}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        goes_on = self._goes_on(query, key)
        hard = (self.routing if self._held and self.routing is not None else self._decide(query, key, request)).hard
        sparse = self.streaming if goes_on else self.sparse
        if self.training and self.mode == "route" and not goes_on:
            gate = hard[:, None, None, None].to(value.dtype)
            outputs = (self._run(branch, query, key, value, request) for branch in (self.full, sparse))
            return gate * next(outputs) + (1 - gate) * next(outputs)
        chosen = hard.detach() > 0.5
        if bool(chosen.all()):
            return self._run(self.full, query, key, value, request)
        if not bool(chosen.any()):
            return self._run(sparse, query, key, value, request)
        rows = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
        parts = [
            self._run(branch, query[own], key[own], value[own], _of_rows(request, own, query.shape[2], key.shape[2]))
            for branch, own in zip((self.full, sparse), rows, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _goes_on(self, query: Tensor, key: Tensor) -> bool:
        return self.keep_decision and query.shape[2] < key.shape[2] and self.routing is not None

    def _decide(self, query: Tensor, key: Tensor, request: Request) -> Routing:
        """The decision for this call, made or kept."""
        if not self._goes_on(query, key) or self.routing is None:
            self.routing = self.route(query, request)
        elif len(self.routing.hard) != len(query):
            raise ShapeError(
                f"The decision kept is for {len(self.routing.hard)} samples, but {len(query)} go on. Begin with a call "
                "on whole prompts of this batch."
            )
        return self.routing

    def route(self, query: Tensor, request: Request) -> Routing:
        """A new decision."""
        if self.mode != "route":
            hard = query.new_full((len(query),), float(self.mode == "full"))
            return Routing(query.new_zeros(len(query), 2), hard, hard)
        span = self.span
        if span is None and request.keys is not None and request.keys.shape[-1] == query.shape[2]:
            span = _shown(request.keys)
        asked = query if self.router_query is None else self.router_query
        routing: Routing = self.router(asked, span, self.temperature, self.generator)
        return routing if self.training else Routing(*(part.detach() for part in routing))

    def _run(self, branch: Mechanism | None, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if branch is None:
            return dense_attention(query, key, value, causal=request.causal, mask=request.mask, scale=request.scale)
        out: Tensor = branch(query, key, value, causal=request.causal, mask=request.mask, scale=request.scale)
        return out

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        """As :meth:`Mechanism.implied`, under one decision."""
        self._decide(query, key, request)
        self._held = True
        try:
            return super().implied(query, key, value, request)
        finally:
            self._held = False

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        chosen = self.route(query, request).hard.detach() > 0.5
        parts: list[tuple[float, float | None]] = []
        for branch, mine in ((self.full, chosen), (self.sparse, ~chosen)):
            own = mine.nonzero()[:, 0]
            if not len(own):
                continue
            asked = _of_rows(request, own, query.shape[2], key.shape[2])
            count = super().computed_pairs if branch is None else branch.computed_pairs
            parts.append((len(own) / len(query), count(query[own], key[own], value[own], asked)))
        return None if any(pairs is None for _, pairs in parts) else sum(w * (p or 0) for w, p in parts)

    def cost(self, shape: AttentionShape) -> Cost:
        """Of a layer that is full: what a sparse one costs its branch says."""
        return dense_cost(shape, extra_flops=shape.batch * self.router.flops)

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, FluxState]:
        """Attend to prompts without padding and decide for good: the output and the state to decode with."""
        out: Tensor = self(query, key, value, causal=True, scale=scale)
        assert self.routing is not None
        state = FluxState(self.routing.hard.detach() > 0.5, DynamicCache(), EvictingCache())
        self._append(state, key, value)
        return out, state

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, state: FluxState, *, scale: float | None = None
    ) -> tuple[Tensor, FluxState]:
        """The next token or tokens ``(batch, heads, new, ...)`` after :meth:`prefill`."""
        if len(query) != len(state.full):
            raise ShapeError(f"This state is of {len(state.full)} samples, but {len(query)} go on.")
        out = value.new_empty(*query.shape[:3], value.shape[-1])
        for mine, cached, mask in self._append(state, key, value):
            out[mine] = dense_attention(
                query[mine], cached.key, cached.value, causal=mask is None, mask=mask, scale=scale
            )
        return out, state

    def _append(self, state: FluxState, key: Tensor, value: Tensor) -> list[tuple[Tensor, Cached, Mask | None]]:
        """Samples that decided alike, what they may read now, and the mask if it is more than causal."""
        new = key.shape[2]
        state.seen += new
        read: list[tuple[Tensor, Cached, Mask | None]] = []
        if bool(state.full.any()):
            read.append((state.full, state.whole.append(key[state.full], value[state.full]), None))
        rest = ~state.full
        if bool(rest.any()):
            cached = state.recent.append(key[rest], value[rest])
            place = torch.arange(state.seen - new, state.seen + 1, device=key.device)[:, None]
            positions = state.recent.positions[:, :, None]
            seen = (positions <= place) & self.rule.seen(place, positions)
            read.append((rest, cached, Boolean(seen[:, :, :-1])))
            # The last row is what the token after these will see.
            state.recent.retain(seen[:, :, -1])
        return read


def _of_rows(request: Request, rows: Tensor, q_len: int, k_len: int) -> Request:
    """The request for some samples of the batch."""
    mask = request.mask
    if mask is not None and mask.batch > 1:
        padding = request.keys is not None and request.keys.shape[1] == 1
        mask = KeyPadding(request.keys[rows, 0]) if padding else Boolean(mask.dense(q_len, k_len)[rows])  # type: ignore[index]
    return Request(request.causal, mask, None, None, request.grid, request.scale)


def _shown(keys: Tensor) -> Tensor:
    """First key that counts and one past the last, ``(batch | 1, 2)``, of boolean ``(batch | 1, heads | 1, k_len)``."""
    some = keys.any(1)
    place = torch.arange(some.shape[-1], device=some.device)
    stop = torch.where(some, place + 1, 0).amax(-1)
    start = torch.where(some, place, some.shape[-1]).amin(-1).minimum(stop)
    return torch.stack((start, stop), -1)


@dataclass(frozen=True)
class RoutingTable:
    """Share of each task's samples for which a layer was sparse: ``shares (tasks, layers)``, by task in order of
    appearance."""

    tasks: tuple[Hashable, ...]
    shares: Tensor

    @property
    def sparsity(self) -> dict[Hashable, float]:
        """Mean over layers, by task."""
        return {task: float(row.mean()) for task, row in zip(self.tasks, self.shares, strict=True)}

    def __str__(self) -> str:
        width = max(len(str(task)) for task in (*self.tasks, "task"))
        head = f"{'task':<{width}}  " + " ".join(f"{layer:>4}" for layer in range(self.shares.shape[1])) + "  mean"
        rows = (
            f"{task!s:<{width}}  " + " ".join(f"{share:4.2f}" for share in row.tolist()) + f"  {row.mean():4.2f}"
            for task, row in zip(self.tasks, self.shares, strict=True)
        )
        return "\n".join((head, *rows))


def routing_table(decisions: Tensor, tasks: Sequence[Hashable] | Tensor) -> RoutingTable:
    """Which layers are sparse on which task: ``decisions (samples, layers)``, 1 for full and 0 for sparse, and the task
    of each sample."""
    names: list[Hashable] = tasks.tolist() if isinstance(tasks, Tensor) else list(tasks)
    if decisions.dim() != 2 or len(decisions) != len(names) or not names:
        raise ShapeError(
            f"Decisions are (samples, layers), with one task for each sample; got {tuple(decisions.shape)} and "
            f"{len(names)} tasks."
        )
    known = tuple(dict.fromkeys(names))
    sparse = 1 - decisions.detach().to(torch.float64)
    rows = [sparse[torch.tensor([name == task for name in names], device=sparse.device)].mean(0) for task in known]
    return RoutingTable(known, torch.stack(rows))
