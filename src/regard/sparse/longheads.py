"""LongHeads: every head attends to a few chunks that it chooses itself, at positions that close the gaps between them,
so that a model reads past the length it was trained for.

Keys are kept without rotary positions, in chunks of ``l`` tokens. A complete chunk is summarised by attention itself:
with queries and keys rotated by their place in the chunk,

    o = attention(q, k, v) inside the chunk, in both directions,   f = mean of o over its tokens,
    r = softmax(scale f . k) k,   the chunk's feature: a convex combination of its rotated keys.

Token ``t`` in chunk ``i`` scores the chunks before by ``q_t . r`` with its query not rotated, and attends, in one
softmax, to ``count = attn_length / l`` chunks: the first, the previous, its own up to itself, and the best of the
others. Their tokens, in order, get the positions ``0, 1, 2, ...``; the query has ``(count - 1) l + t mod l``. No
distance reaches ``attn_length``, which a model of that length knows; heads that choose different chunks see more
together. Tokens before ``begin`` attend to all before them. No training, no parameters.

Lu et al., "LongHeads: Multi-Head Attention is Secretly a Long Context Processor", 2024, arXiv 2402.10685, section 2.
Query (batch, num_heads, length, head_dim), key and value (batch, num_kv_heads, length, head_dim), all *without* rotary
positions, which are applied here; each query head has features and a choice of its own. Time: ``O(N attn_length d)``
for attention, ``O(N l d)`` for features, ``O(N^2 d / l)`` for scores; a step reads ``attn_length`` keys a head and the
features, so far chunks may lie anywhere. The released prefill leaves a token's own key out, and its decoding of the
last token of a chunk takes one chunk less; both are slips, and neither is here. Padding takes no part; other masks act
on the softmax and not on the choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cache import KeyValueCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import (
    accumulation_dtype,
    block_sparse_attention,
    dense_attention,
    masked_softmax,
    merge_attentions,
    score_scale,
)
from regard.kernels.shapes import take_tokens
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layout import BlockLayout, num_blocks
from regard.masks import Boolean, Causal, Mask, Reindexed
from regard.mechanism import Mechanism, Pattern, Request
from regard.registry import register
from regard.sparse.selection import settle_mask

__all__ = [
    "LongHeads",
    "LongHeadsState",
    "chunk_features",
    "head_coverage",
    "longheads_attention",
    "select_chunks",
]

Rope = float | tuple[Tensor, Tensor]
"""A base of rotary frequencies, or tables of cosines and sines ``(positions, head_dim)``, halves alike."""

# Rotated queries of one stretch stay below this many elements.
_STRETCH = 1 << 22
# Up to so many queries (decoding) each gathers its own keys.
_FEW = 8


@torch.compiler.disable
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _angles(length: int, dim: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rotary_angles(length, dim, base=base, device=device, dtype=dtype)


def _table(rope: Rope, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions ``0 .. length - 1`` for heads as wide as ``like``, to be used in its precision."""
    work, dim = accumulation_dtype(like.dtype), like.shape[-1]
    if not isinstance(rope, tuple):
        return _angles(length, dim, rope, like.device, work)
    if any(t.dim() != 2 or t.shape[0] < length or t.shape[1] != dim for t in rope):
        raise ShapeError(
            f"rope is a base, or cosines and sines of at least {length} positions, each ({length}, {dim}); got "
            f"{' and '.join(str(tuple(t.shape)) for t in rope)}."
        )
    cos, sin = (t[:length].to(like.device, work) for t in rope)
    return cos, sin


def _rotate(x: Tensor, table: tuple[Tensor, Tensor], position: Tensor) -> Tensor:
    """``x (..., *position.shape, dim)`` rotated to ``position``."""
    cos, sin = table
    return apply_rotary(x.to(cos.dtype), cos[position], sin[position]).to(x.dtype)


@torch.no_grad()
def chunk_features(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk: int = 256,
    rope: Rope = 10000.0,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Features of the complete chunks ``(batch, num_heads, length // chunk, head_dim)``, from tensors without rotary
    positions. keys ``(batch | 1, heads | 1, length)`` boolean: tokens that count."""
    if value.shape[-1] != query.shape[-1] or query.shape[2] != key.shape[2]:
        raise ShapeError(
            "A chunk's mean output asks for its keys, so values are as wide as queries, and every key comes with its "
            f"query; got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}."
        )
    count, heads = query.shape[2] // chunk, query.shape[1]
    table, inside = _table(rope, chunk, query), torch.arange(chunk, device=query.device)

    def cut(x: Tensor) -> Tensor:
        return x[:, :, : count * chunk].unflatten(2, (count, chunk)).transpose(1, 2).flatten(0, 1)

    queries, rotated = (_rotate(cut(x), table, inside) for x in (query, key))
    mask, shown = None, None
    if keys is not None:
        shown = cut(keys.expand(query.shape[0], -1, -1)[..., None])[..., 0]
        mask = Boolean(shown[:, :, None])
    out = dense_attention(queries, rotated, cut(value), mask=mask, scale=scale)
    if shown is None:
        asked = out.mean(2, keepdim=True)
    else:
        counts = shown.sum(-1).clamp_min(1)[..., None, None]
        asked = (out * shown[..., None]).sum(2, keepdim=True) / counts
    features = dense_attention(asked, rotated, rotated, mask=mask, scale=scale)
    return features.view(-1, count, heads, query.shape[-1]).transpose(1, 2)


@torch.no_grad()
def select_chunks(
    query: Tensor, features: Tensor, count: int, own: Tensor, force_first: int = 1, force_last: int = 2
) -> Tensor:
    """Chosen chunks ``(batch, num_heads, q_len, count)`` int64, ascending.

    query: without rotary positions. features: of the first chunks; all that are neither forced nor later than a query
    must be there. own ``(q_len,)``: the chunk of each query, at least ``count - 1`` (before, there is no choice). The
    ``force_first`` first chunks and the ``force_last`` last ones up to the own are always taken, and
    the rest by ``q . feature``.
    """
    if not 0 < force_first + force_last <= count or min(force_first, force_last) < 0:
        raise OptionError(f"Of {count} chunks {force_first} first and {force_last} last ones cannot be forced.")
    if int(own.min()) < count - 1:
        raise OptionError(f"A query in chunk {int(own.min())} cannot choose {count} chunks; it sees them all.")
    total = int(own.max()) + 1
    work = accumulation_dtype(query.dtype)
    scores = query.to(work) @ features[:, :, :total].to(work).transpose(-1, -2)
    scores = F.pad(scores, (0, total - scores.shape[-1]))
    index = torch.arange(total, device=query.device)
    forced = (index < force_first) | (index > own[:, None] - force_last)
    scores = scores.masked_fill(forced, float("inf")).masked_fill(index > own[:, None], float("-inf"))
    return scores.topk(count, -1).indices.sort(-1).values


def head_coverage(ids: Tensor) -> Tensor:
    """How many chunks the heads of a layer see together, ``(batch, q_len)``, from chosen chunks ``(batch, num_heads,
    q_len, count)``."""
    seen = torch.zeros(*ids.shape[:3], int(ids.max()) + 1, dtype=torch.bool, device=ids.device)
    return seen.scatter_(-1, ids, True).any(1).sum(-1)


def longheads_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: Rope = 10000.0,
    attn_length: int = 4096,
    chunk: int = 256,
    begin: int | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """LongHeads as a function of tensors without rotary positions; see :class:`LongHeads`."""
    return LongHeads(attn_length, chunk, begin, rope=rope)(query, key, value, causal=True, scale=scale)


@dataclass
class LongHeadsState:
    """The cache of keys (without rotary positions) and values; features of the complete chunks ``(batch, num_heads,
    chunks, head_dim)``; the queries of the chunk that is not complete ``(batch, num_heads, tokens, head_dim)``."""

    cache: KeyValueCache
    features: Tensor | None = None
    queries: Tensor | None = None


@register("longheads")
class LongHeads(Mechanism):
    """attn_length: keys that a head attends to at most, ``attn_length / chunk`` chunks, at least 3 of them; no more
    than the length the model was trained for. chunk: tokens a chunk. begin: tokens before it attend to all before them
    (by default ``attn_length``, and never less). rope: the base of the rotary frequencies, or tables of cosines and
    sines.

    Queries and keys come without rotary positions. The choice of chunks reads the values, so the output is not linear
    in them; ``weights`` needs the values too.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self",))
    value_linear = False
    applies_rotary = True
    decodes = True
    growth = "N attn_length + N^2 / chunk"

    def __init__(
        self, attn_length: int = 4096, chunk: int = 256, begin: int | None = None, *, rope: Rope = 10000.0
    ) -> None:
        super().__init__()
        if chunk < 2 or attn_length % chunk or attn_length < 3 * chunk:
            raise OptionError(
                "attn_length holds at least three chunks of two or more tokens (the first, the previous, the own); got "
                f"attn_length={attn_length}, chunk={chunk}."
            )
        if begin is not None and begin < 0:
            raise OptionError(f"begin counts tokens, got {begin}.")
        self.attn_length, self.chunk, self.rope = attn_length, chunk, rope
        self.count = attn_length // chunk
        self.begin = max(attn_length if begin is None else begin, attn_length)

    def extra_repr(self) -> str:
        return f"attn_length={self.attn_length}, chunk={self.chunk}, begin={self.begin}"

    def chosen(self, query: Tensor, features: Tensor, start: int) -> Tensor:
        """Chunks of queries at positions from ``start`` on, none before ``begin``."""
        own = torch.arange(start, start + query.shape[2], device=query.device) // self.chunk
        return select_chunks(query, features, self.count, own)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return self._run(query, key, value, self._features(query, key, value, request), 0, request)

    def _features(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor | None:
        if query.shape[2] <= self.begin:
            return None
        _, keys = settle_mask(request, query.shape[2], key.shape[2])
        return chunk_features(query, key, value, self.chunk, self.rope, keys=keys, scale=request.scale)

    # The choice of chunks is no graph: a compiled model calls it as it is.
    @torch.compiler.disable
    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, features: Tensor | None, start: int, request: Request
    ) -> Tensor:
        """Queries at positions from ``start`` on, over all keys up to the last of them."""
        stop, outs = start + query.shape[2], []
        if start < self.begin:
            outs.append(self._ordinary(query[:, :, : self.begin - start], key, value, start, request))
        first = max(start, self.begin)
        if first < stop:
            assert features is not None
            rule = Causal() if request.mask is None else request.mask & Causal()
            attend = self._gathered if stop - first <= _FEW else self._merged
            late = query[:, :, first - start :]
            outs.append(attend(late, key, value, features, first, rule, request.scale))
        return torch.cat(outs, 2)

    def _ordinary(self, query: Tensor, key: Tensor, value: Tensor, start: int, request: Request) -> Tensor:
        stop = start + query.shape[2]
        table = _table(self.rope, stop, query)
        place = torch.arange(stop, device=query.device)
        queries, keys = _rotate(query, table, place[start:]), _rotate(key[:, :, :stop], table, place)
        mask = request.mask
        if mask is not None and stop < key.shape[2]:
            mask = Reindexed(mask, place, place, q_len=key.shape[2], k_len=key.shape[2])
        return dense_attention(queries, keys, value[:, :, :stop], causal=True, mask=mask, scale=request.scale)

    def _gathered(
        self, query: Tensor, key: Tensor, value: Tensor, features: Tensor, start: int, rule: Mask, scale: float | None
    ) -> Tensor:
        """Query by query: the tokens of its chunks, one behind the other."""
        position = torch.arange(start, start + query.shape[2], device=query.device)
        ids, inside = self.chosen(query, features, start), torch.arange(self.chunk, device=query.device)
        tokens = (ids[..., None] * self.chunk + inside).flatten(3)  # (batch, heads, q_len, attn_length)
        safe = tokens.clamp_max(key.shape[2] - 1)
        seen = rule.at(position.view(1, 1, -1, 1), safe, key.shape[2], key.shape[2]) & (tokens < key.shape[2])
        table = _table(self.rope, self.attn_length, query)
        queries = _rotate(query, table, self.attn_length - self.chunk + position % self.chunk)
        keys, values = (take_tokens(x, safe.flatten(2)).unflatten(2, safe.shape[2:]) for x in (key, value))
        keys = _rotate(keys, table, torch.arange(self.attn_length, device=query.device))
        work = accumulation_dtype(query.dtype)
        scores = (queries.to(work) * score_scale(query, scale))[..., None, :] @ keys.to(work).transpose(-1, -2)
        weights = masked_softmax(scores, seen[..., None, :])
        return (weights @ values.to(work))[..., 0, :].to(query.dtype)

    def _merged(
        self, query: Tensor, key: Tensor, value: Tensor, features: Tensor, start: int, rule: Mask, scale: float | None
    ) -> Tensor:
        """Chunk by chunk. Only distances count, so a key keeps its place in its chunk, and the query is turned once for
        each of its chunks: by how far that chunk's beginning lies before it. The parts of a query are merged by their
        log-sum-exp."""
        length, device = key.shape[2], query.device
        table = _table(self.rope, self.attn_length, query)
        short = -length % self.chunk
        index = torch.arange(length + short, device=device)
        placed = _rotate(key, table, index[:length] % self.chunk)
        keys, values = (F.pad(x, (0, 0, 0, short)) for x in (placed, value))
        before = torch.arange(self.count - 1, -1, -1, device=device) * self.chunk
        rows = query.shape[0] * query.shape[1] * self.count * max(query.shape[3], num_blocks(length, self.chunk))
        step, outs = max(_STRETCH // rows, 1), []
        for first in range(0, query.shape[2], step):
            part = query[:, :, first : first + step]
            position = torch.arange(start + first, start + first + part.shape[2], device=device)
            ids = self.chosen(part, features, start + first).flatten(2)[..., None]
            turned = _rotate(part[..., None, :], table, before + position[:, None] % self.chunk).flatten(2, 3)
            each = position.repeat_interleave(self.count)
            visit = torch.zeros(*ids.shape[:3], len(index) // self.chunk, dtype=torch.bool, device=device)
            visit.scatter_(-1, ids, True)
            full = visit & (ids * self.chunk + self.chunk <= each[:, None]) & isinstance(rule, Causal)
            inner = Reindexed(rule, each, index.clamp_max(length - 1), None, index < length, length, length)
            layout = BlockLayout(visit, full, inner, len(each), len(index), 1, self.chunk)
            out, lse = block_sparse_attention(turned, keys, values, layout, scale=scale, return_lse=True)
            parts = out.unflatten(2, (-1, self.count)).unbind(3), lse.unflatten(2, (-1, self.count)).unbind(3)
            outs.append(merge_attentions(*parts)[0])
        return torch.cat(outs, 2)

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        """The implied attention matrix for these values."""
        if value is None:
            raise UnsupportedPatternError(
                "longheads chooses chunks by features that hold the values, so the matrix depends on them: pass value."
            )
        features = self._features(query, key, value, request)
        identity = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
        return self._run(query, key, identity, features, 0, request)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float:
        return self._share(query.shape[2])

    def _share(self, length: int) -> float:
        position = torch.arange(length)
        late = self.attn_length - self.chunk + position % self.chunk + 1
        return float(torch.where(position < self.begin, position + 1, late).double().mean()) / length

    def cost(self, shape: AttentionShape) -> Cost:
        rows, chunks = shape.batch * shape.num_heads, shape.k_len // self.chunk
        extra = 0
        if shape.k_len > self.begin:
            inside = 4 * rows * chunks * self.chunk * (self.chunk + 1) * shape.head_dim
            extra = inside + 2 * rows * (shape.q_len - self.begin) * chunks * shape.head_dim
        cost = dense_cost(shape, self._share(shape.k_len), extra)
        kept = rows * (chunks + shape.k_len % self.chunk) * shape.head_dim * shape.element_size
        return Cost(cost.flops, cost.bytes, cost.state_bytes + kept, cost.pairs)

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> LongHeadsState:
        return LongHeadsState(super().init_state(batch, like=like, cache=cache))

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, LongHeadsState]:
        request = self.request(query, key, value, causal=True)
        kept = state.cache.append(key, value)
        features, waiting = self.extended(query, kept.key, kept.value, state.features, state.queries)
        out = self._run(query, kept.key, kept.value, features, state.cache.seen - query.shape[2], request)
        return out, LongHeadsState(state.cache, features, waiting)

    def extended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        features: Tensor | None,
        waiting: Tensor | None,
        scale: float | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Features with those of newly completed chunks, and the queries that wait for theirs: ``key`` and ``value``
        hold all tokens, the last of them those of ``query``."""
        queries = query.detach() if waiting is None else torch.cat((waiting, query.detach()), 2)
        done = 0 if features is None else features.shape[2] * self.chunk
        stop = key.shape[2] // self.chunk * self.chunk
        if stop > done:
            new = queries[:, :, : stop - done], key[:, :, done:stop], value[:, :, done:stop]
            fresh = chunk_features(*new, self.chunk, self.rope, scale=scale)
            features = fresh if features is None else torch.cat((features, fresh), 2)
        return features, queries[:, :, stop - done :]
