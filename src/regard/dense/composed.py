"""Dense attention composed of steps: score pairs, change the map, normalise it, read out, allot the heads.

:func:`compose` builds a mechanism from steps that no paper combined, and it says which executor runs it::

    mine = compose("distance", maps=("key_query_conv", "head_mix"), normalizer={"entmax": {"alpha": 1.3}}, num_heads=8)
    mine.executor(query_len=16384, key_len=16384)     # 'tiled'
    print(mine.describe())

    score       s_ij = score(q_i, k_j)                    regard.layers.scorers.SCORERS
    maps        S' = transform(S), A' = transform(A)      regard.layers.map_transforms.MAP_TRANSFORMS
    normaliser  A = normalize(S') over visible keys       regard.layers.normalizers.NORMALIZERS
    read-out    o_i = read(A'_i, q_i, k, v)               regard.layers.read_outs.READ_OUTS
    heads       who sees whom, which are on, what groups  regard.layers.head_allocation.HEADS

Queries go in tiles that the backward pass computes again, so that memory is linear in length. What makes a row from its
neighbours (a convolution over queries) forms so many rows more in each tile; a transform that may read any row, such
as one's own, keeps the map whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.cache import KeyValueCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import dense_attention
from regard.kernels.scored import Tile, mapped_attention, mapped_weights, tile_rows
from regard.kernels.shapes import expand_groups
from regard.layers.head_allocation import HeadAllocation, RoutedHeads, head_allocation
from regard.layers.head_routing import routed_attention
from regard.layers.map_transforms import HeadMix, MapDifference, MapTransform, Nesting, map_transforms
from regard.layers.normalizers import DISTRIBUTIONS, NORMALIZERS, normalizer
from regard.layers.read_outs import Reader, read_out
from regard.layers.scorers import DotScore, Scorer, scorer
from regard.layers.steps import chosen
from regard.masks import Mask
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = ["ComposedDense", "ComposedState", "compose"]


@dataclass(frozen=True)
class ComposedState:
    """Decoding state where rows of the map are made from earlier ones: the cache of keys and values, and the last
    tokens' queries ``(batch, num_heads, at most as many as a row reaches back, head_dim)``."""

    cache: KeyValueCache
    queries: Tensor | None = None


@register("dense_attention")
class ComposedDense(Mechanism):
    """Attention from steps of one's own choice, softmax attention by default.

    Each step is a name, a name with options ``{"entmax": {"alpha": 1.3}}``, or a built one: score, a
    :class:`~regard.layers.scorers.Scorer` (with a difference of maps, for half of ``head_dim``); maps, one or several
    transforms in the order in which they are applied, before the normaliser or after it, each a
    :class:`~regard.layers.map_transforms.MapTransform`; normalizer, ``(scores, visible) -> weights``, zero where
    nothing is visible; read, a :class:`~regard.layers.read_outs.Reader`; heads, a
    :class:`~regard.layers.head_allocation.HeadAllocation`, or ``"pre"`` or ``"post"`` for the map transform
    ``head_mix`` at that place.

    A difference of maps comes first after the normaliser. With a mask, a convolution takes a query's row only from
    those whose tokens it sees, so that packed documents and padding stay apart (where there are as many queries as
    keys, they are taken for the same tokens). Steps that contradict one another are refused.
    """

    needs_training = True
    decodes = True

    def __init__(
        self,
        score: str | Mapping[str, Any] | Scorer = "dot",
        normalizer: str | Mapping[str, Any] | Callable[[Tensor, Tensor | None], Tensor] = "softmax",
        heads: str | Mapping[str, Any] | HeadAllocation | None = None,
        maps: Any = (),
        read: str | Mapping[str, Any] | Reader = "sum",
        num_heads: int = 1,
        head_dim: int = 64,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        transforms = map_transforms(maps, num_heads=num_heads, head_dim=head_dim, layer_index=layer_index)
        if heads in ("pre", "post"):
            transforms.append(HeadMix(num_heads, place=heads))  # type: ignore[arg-type]
            heads = "all"
        self.allocation, heads_name = _built(
            "head allocation", "all" if heads is None else heads, HeadAllocation, head_allocation, num_heads, head_dim
        )
        steps = [step for step in transforms if isinstance(step, MapTransform)]
        self.before = nn.ModuleList(step for step in steps if step.place == "pre")
        self.after = nn.ModuleList(step for step in steps if step.place == "post")
        self.difference = next((step for step in transforms if isinstance(step, MapDifference)), None)
        self.nesting = next((step for step in transforms if isinstance(step, Nesting)), None)
        width = head_dim if self.difference is None else head_dim // 2
        self.scorer, score_name = _built("score", score, Scorer, _scorer, num_heads, width)
        self.reader, read_name = _built("read-out", read, Reader, _reader, num_heads, width)
        self.normalizer, normalizer_name = _normalizer(normalizer, num_heads)
        self.names = {"score": score_name, "normaliser": normalizer_name, "read-out": read_name, "heads": heads_name}
        self._check()
        self.per_pair = self.scorer.per_pair + sum(step.per_pair - 1 for step in steps) + (self.difference is not None)
        self.value_linear = self.nesting is None and self.reader.value_linear  # type: ignore[misc]
        self.true_gradient = self.reader.true_gradient and self.allocation.true_gradient  # type: ignore[misc]
        if self.nesting is not None and "k" in self.nesting.nest:
            self.patterns = frozenset(("self", "causal-self"))  # type: ignore[misc]
        unsafe = self._unsafe()
        if unsafe is not None:
            self.patterns = self.patterns - {"causal-self", "causal-cross"}  # type: ignore[misc]
        reaches = self._reach is None or any(self._reach)
        # Its keys' own outputs, or rows that any query may enter, are not kept in a cache.
        self.decodes = not (  # type: ignore[misc]
            unsafe or self._reach is None or (self.nesting and ("k" in self.nesting.nest or reaches))
        )

    def _check(self) -> None:
        """Whether the steps go together."""
        name = self.names["normaliser"]
        if self.reader.of_distribution:
            changed = self.difference is not None or len(self.after) > 0
            if changed or (name in NORMALIZERS and name not in DISTRIBUTIONS):
                what = "a map transform after the normaliser" if changed else f"the normaliser {name!r}"
                raise OptionError(
                    f"The read-out {self.names['read-out']!r} reads a distribution over keys, and {what} leaves none: "
                    f"take one of {', '.join(sorted(DISTRIBUTIONS))} and transforms before it, or read='sum'."
                )
        if self.allocation.group > 1 and self.scorer.num_heads is not None:
            raise OptionError(
                f"Heads that share a map share its score, and this one has parameters for each of "
                f"{self.scorer.num_heads} heads; take another score (of feed_forward shared_over_heads=True)."
            )

    @property
    def _transforms(self) -> list[MapTransform]:
        return [*self.before, *self.after]

    @property
    def _reach(self) -> tuple[int, int] | None:
        """How many queries before and after its own a row is made from."""
        reaches = [step.reach for step in self._transforms]
        if any(reach is None for reach in reaches):
            return None
        return sum(r[0] for r in reaches if r), sum(r[1] for r in reaches if r)

    def _unsafe(self) -> str | None:
        """A step that takes from later queries, None where there is none."""
        return next((type(step).__name__ for step in self._transforms if not step.causal_safe), None)

    def describe(self) -> str:
        """The choices, place by place, and how the map is computed."""
        steps = [*self.before, *([self.difference] if self.difference is not None else []), *self.after]
        steps += [self.nesting] if self.nesting is not None else []
        maps = ", ".join(f"{type(step).__name__}({step.extra_repr()})" for step in steps)
        if self._fused:
            run = "fused"
        elif self._reach is None:
            run = "whole, since a transform may read any row"
        else:
            run = "in tiles of queries"
            run += f" with {sum(self._reach)} neighbouring rows each" if any(self._reach) else ""
        places = [f"{place} {name}" for place, name in self.names.items()]
        return "; ".join([places[0], f"maps {maps or 'as they are'}", *places[1:], f"computed {run}"])

    def extra_repr(self) -> str:
        return self.describe()

    def executor(self, query_len: int, key_len: int, num_heads: int | None = None, batch: int = 1) -> str:
        """Which executor runs a call of these lengths: ``"fused"`` (torch's softmax kernel), ``"whole"`` (the map is
        kept) or ``"tiled"`` (queries in tiles, memory linear in length)."""
        if self._fused:
            return "fused"
        rows = tile_rows(batch * (num_heads or self.num_heads), key_len, self._numbers(key_len))
        return "whole" if rows >= query_len or self._reach is None else "tiled"

    @property
    def _fused(self) -> bool:
        # Of allocations, those that hide keys or share maps do not reduce to one softmax.
        alike = type(self.allocation) in (HeadAllocation, RoutedHeads)
        plain = type(self.reader) is Reader and self.names["normaliser"] == "softmax" and alike
        changed = self._transforms or self.difference is not None
        return plain and not changed and type(self.scorer) is DotScore

    def _numbers(self, k_len: int) -> int:
        """Numbers formed for each pair."""
        return self.per_pair + self.reader.numbers(self.head_dim, k_len)

    def request(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        grid: Any = None,
        scale: float | None = None,
    ) -> Request:
        unsafe = self._unsafe() if causal else None
        if unsafe is not None:
            raise UnsupportedPatternError(
                f"{unsafe} makes a row from later queries' rows, so with causal=True the future would reach the past. "
                "Give it earlier queries alone (for a convolution both_sides=False), or call it without causal."
            )
        return super().request(query, key, value, causal, mask, grid, scale)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        self.allocation.check(query)
        if self.nesting is None:
            return self._level(query, key, value, request)
        if value.shape[-1] != query.shape[-1]:
            raise ShapeError(
                f"In a nesting outputs are added to queries, so values have as many channels: {query.shape[-1]}, not "
                f"{value.shape[-1]}."
            )
        level_query, level_key = query, key
        for _ in range(self.nesting.order - 1):
            below = self._level(level_query, level_key, value, request)
            if "q" in self.nesting.nest:
                level_query = query + below
            if "k" in self.nesting.nest:
                level_key = expand_groups(key, query.shape[1]) + below
        return self._level(level_query, level_key, value, request)

    def _level(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        """One attention of these queries, keys and values."""
        if key.shape[1] != value.shape[1]:
            value = expand_groups(value, key.shape[1])
        routed = self.allocation.route(query)
        if self._fused:
            scale = self.scorer.scale if request.scale is None else request.scale
            if routed is None or self.training:
                out = dense_attention(query, key, value, causal=request.causal, mask=request.mask, scale=scale)
            else:
                out = routed_attention(query, key, value, routed[1], request.causal, request.mask, scale)
        else:
            out = mapped_attention(
                query,
                key,
                value,
                self._map(request, query.shape[2], key.shape[2]),
                read=self.reader,
                reach=self._reach,
                per_pair=self._numbers(key.shape[2]),
            )
        return out if routed is None else out * routed[0].transpose(1, 2)[..., None]

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        self._require_value_linear()
        if type(self.reader) is not Reader or self.allocation.active < 1:
            return super().implied(query, key, value, request)
        self.allocation.check(query)
        return mapped_weights(query, key, self._map(request, query.shape[2], key.shape[2]))

    def _map(self, request: Request, q_len: int, k_len: int) -> Callable[[Tensor, Tensor, Tile], Tensor]:
        """The whole way from queries and keys to weights, for a tile."""
        own, rule = self.allocation.rule(), request.visible
        rule = own if rule is None else rule if own is None else rule & own
        factor = request.scale
        # Where queries are among the keys, a mask says which of them belong together.
        among = q_len == k_len or (request.causal and q_len < k_len)
        taking = request.mask if among and self._reach != (0, 0) else None

        def run(query: Tensor, key: Tensor, tile: Tile) -> Tensor:
            visible, place = tile.visible(rule, query.device), tile.positions(query.device)
            rows = None if taking is None else _taken(taking, tile, query.device)
            if self.difference is None:
                weights = self._normalized(self._scores(query, key, place, factor, shared=True), visible, rows)
            else:
                (first_q, second_q), (first_k, second_k) = query.chunk(2, -1), key.chunk(2, -1)
                weights = self.difference(
                    self._normalized(self._scores(first_q, first_k, place, factor), visible, rows),
                    self._normalized(self._scores(second_q, second_k, place, factor, shared=True), visible, rows),
                )
            for step in self.after:
                weights = step(weights, visible, rows)
            return weights

        return run

    def _scores(self, query: Tensor, key: Tensor, place: Tensor, factor: float | None, shared: bool = False) -> Tensor:
        """Scores, before any transform; shared: heads of a group have one map."""
        if shared:
            query, key = self.allocation.shared(query), self.allocation.shared(key)
        scores = self.scorer.at(query, key, place)
        # The score has its usual 1 / sqrt(head_dim) already, which the call's scale stands in for.
        scores = scores if factor is None else scores * (factor * query.shape[-1] ** 0.5)
        return self.allocation.spread(scores) if shared else scores

    def _normalized(self, scores: Tensor, visible: Tensor | None, rows: Tensor | None) -> Tensor:
        for step in self.before:
            scores = step(scores, visible, rows)
        return self.normalizer(scores, visible)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        seen = self.allocation.seen(query.shape[2], key.shape[2], request.causal)
        every = super().computed_pairs(query, key, value, request) if seen is None else seen
        return None if every is None else every * (self.allocation.active if self._gathers else 1)

    @property
    def _gathers(self) -> bool:
        """Whether only the (token, head) pairs that are on are computed."""
        return self._fused and not self.training

    def cost(self, shape: AttentionShape) -> Cost:
        levels = 1 if self.nesting is None else self.nesting.order
        seen = self.allocation.seen(shape.q_len, shape.k_len, shape.causal)
        density = (1.0 if seen is None else seen) * (self.allocation.active if self._gathers else 1)
        extra = self.scorer.extra_flops(shape) + sum(step.flops(shape) for step in self._transforms)
        queries = shape.batch * shape.num_heads * shape.q_len
        extra += self.reader.flops(queries, shape.k_len, shape.head_dim)
        one = dense_cost(shape, density, extra)
        return Cost(levels * one.flops, one.bytes, one.state_bytes, one.pairs)

    def init_state(
        self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None
    ) -> KeyValueCache | ComposedState:
        kept: KeyValueCache = super().init_state(batch, like=like, cache=cache)
        return kept if self._reach == (0, 0) else ComposedState(kept)

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, Any]:
        self._require_decoding()
        if not isinstance(state, ComposedState):
            return super().step(query, key, value, state)
        assert self._reach is not None
        kept = state.cache.append(key, value)
        queries = query if state.queries is None else torch.cat((state.queries, query), 2)
        out = self(queries, kept.key, kept.value, causal=True)[:, :, -query.shape[2] :]
        last = queries[:, :, max(queries.shape[2] - self._reach[0], 0) :].clone()
        return out, ComposedState(state.cache, last)


def _taken(mask: Mask, tile: Tile, device: torch.device) -> Tensor:
    """Which queries of a tile see which of them as keys, ``(batch | 1, heads | 1, rows, rows)``."""
    own = torch.arange(tile.start, tile.start + tile.rows, device=device)
    place = tile.positions(device)
    seen = mask.to(device).at(own.view(1, 1, -1, 1), place.view(1, 1, 1, -1), tile.q_len, tile.k_len)
    return seen.expand(*seen.shape[:2], tile.rows, tile.rows)


def _scorer(name: str, num_heads: int, head_dim: int, **options: Any) -> Scorer:
    return scorer(name, head_dim, num_heads=num_heads, **options)


def _reader(name: str, num_heads: int, head_dim: int, **options: Any) -> Reader:
    return read_out(name, num_heads=num_heads, **options)


def _built(place: str, choice: Any, kind: Any, build: Callable[..., Any], num_heads: int, head_dim: int) -> Any:
    """A step and its name."""
    if isinstance(choice, kind):
        return choice, type(choice).__name__
    name, options = chosen(place, choice)
    return build(name, num_heads=num_heads, head_dim=head_dim, **options), name


def _normalizer(choice: Any, num_heads: int) -> tuple[Callable[[Tensor, Tensor | None], Tensor], str]:
    if callable(choice):
        return choice, "own"
    name, options = chosen("normaliser", choice)
    return normalizer(name, num_heads, **options), name


def compose(
    score: str | Mapping[str, Any] | Scorer = "dot",
    *,
    maps: Any = (),
    normalizer: str | Mapping[str, Any] | Callable[[Tensor, Tensor | None], Tensor] = "softmax",
    read: str | Mapping[str, Any] | Reader = "sum",
    heads: str | Mapping[str, Any] | HeadAllocation | None = None,
    num_heads: int = 1,
    head_dim: int = 64,
    layer_index: int = 0,
    **score_options: Any,
) -> ComposedDense:
    """Dense attention from steps of one's own choice, as in :class:`ComposedDense`; ``score_options`` are those of a
    score given by name.

    Raises UnknownNameError for unknown names, OptionError for options out of range and for steps that contradict one
    another.
    """
    if score_options:
        name, options = chosen("score that takes options", score)
        score = {name: {**options, **score_options}}
    return ComposedDense(
        score, normalizer, heads, maps, read, num_heads=num_heads, head_dim=head_dim, layer_index=layer_index
    )
