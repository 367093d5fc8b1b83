"""Combiner: full attention as an expectation in two steps, over single tokens and over spans of tokens.

Attention is ``E_{p(j|i)} v_j``. What a query i may see is split into a direct set D and spans S_1 .. S_m, and

    p(j|i) = [j in D] pt(j|i) + sum_r [j in S_r] pt(S_r|i) p(j|S_r)

with pt ONE softmax over the logits ``q_i . k_j`` of D and ``q_i . k_S`` of the spans, and ``p(j|S)`` the softmax of
``q_S . k_j`` inside the span, free of i; all over ``sqrt(d)``. So ``v_S = sum_j p(j|S) v_j`` is formed once, and every
visible token has a positive weight. ``k_S`` and ``q_S`` are pooled over the members, by element-wise maximum.

- ``fixed``: D is the own block up to i, spans are the other blocks (causal: earlier ones). ``O(N (s + N / s) d)``.
- ``logsparse``: D is i; the earlier tokens are split by the binary digits of i. ``O(N log N d)``. Without causality the
  later ones are split likewise from the end.
- On a grid of rows and columns, ``O(N (rows + columns) d)``. ``axial_row``: D is the own row up to i, spans are the
  other rows (earlier ones). A row's summary is one for each column: its span query is the row's own query in the
  column of i, its key the same attention over the row's keys (:class:`CombinerAttention`: over its values, projected).
  ``axial_column``: D is the own row up to i and the own column above; spans are the other columns above the row.
  ``axial_mixture``: these, and each row above as two spans, left and right of the column of i; a token may stand in
  two terms, and weights still sum to 1. Without causality what holds above holds below too.

Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", 2021, arXiv 2107.05768, sections 3 and
4. Its section 3.3 mixes splits by averaging their outputs; here, as in the released code, all logits share one softmax.
Query (batch, num_heads, length, head_dim), key and value (batch, num_kv_heads, length, ...).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache import KeyValueCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import accumulation_dtype, expand_groups, score_scale
from regard.kernels.spans import Pool, RowKey, SpanCall, axial_spans, binary_spans, block_spans, summarise
from regard.layers.maps import merge_heads, split_heads
from regard.masks import Mask
from regard.mechanism import Layer, Mechanism, Pattern, Request
from regard.registry import register

__all__ = [
    "Combiner",
    "CombinerAttention",
    "CombinerReport",
    "CombinerState",
    "combiner_report",
    "implied_matrix",
    "span_summary",
]

Variant = Literal["fixed", "logsparse", "axial_row", "axial_column", "axial_mixture"]
Summary = Literal["max", "mean", "relu-max", "relu-mean", "deepset-max", "deepset-mean"]


class _Features(nn.Module):
    """What is pooled to span queries and span keys: the vectors, their positive part, or that of a learned map."""

    def __init__(self, summary: Summary, head_dim: int | None) -> None:
        super().__init__()
        if summary not in get_args(Summary):
            raise OptionError(f"summary is one of {', '.join(get_args(Summary))}; got {summary!r}.")
        self.act, _, pool = summary.rpartition("-")
        self.pool = cast(Pool, pool)
        self.maps = nn.ModuleList()
        if self.act == "deepset":
            if head_dim is None:
                raise OptionError(f"summary={summary!r} learns maps of head_dim, so give head_dim to Combiner.")
            self.maps.extend(nn.Linear(head_dim, head_dim, bias=False) for _ in range(2))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.act == "deepset":
            maps = [cast(nn.Linear, module).weight.to(query.dtype) for module in self.maps]
            query, key = F.linear(query, maps[0]), F.linear(key, maps[1])
        return (query.relu(), key.relu()) if self.act else (query, key)

    def call(
        self, query: Tensor, key: Tensor, value: Tensor, shown: Tensor, scale: float, causal: bool = True
    ) -> SpanCall:
        query_features, key_features = self(query, key)
        return SpanCall(query, key, value, query_features, key_features, shown, causal, self.pool, scale)


def span_summary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: int | Sequence[int],
    *,
    summary: Summary = "max",
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, queries and values of spans, each ``(..., spans, dim)``, from tensors ``(..., length, dim)``.

    segments: the length of every span (the last may be short), or of each. A ``"deepset-"`` summary has parameters: it
    is an option of :class:`Combiner`.
    """
    length = key.shape[-2]
    if isinstance(segments, int):
        whole, rest = divmod(length, max(segments, 1))
        segments = [segments] * whole + [rest] * (rest > 0)
    if sum(segments) != length or min(segments, default=0) < 1:
        raise ShapeError(f"Segments {segments} do not cut {length} tokens into spans of at least one token.")
    features, work = _Features(summary, None), accumulation_dtype(key.dtype)
    parts = []
    for q, k, v in zip(*(t.to(work).split(list(segments), -2) for t in (query, key, value)), strict=True):
        shown = torch.ones(k.shape[-2], dtype=torch.bool, device=k.device)
        spans = summarise(features.call(q, k, v, shown, score_scale(query, scale)))
        parts.append((spans.key, spans.query, spans.value))
    keys, queries, values = (torch.stack(group, -2).to(key.dtype) for group in zip(*parts, strict=True))
    return keys, queries, values


@dataclass(frozen=True)
class CombinerState:
    """Between decoding steps: how many tokens came; query, key and value of those that may still be made a span
    (``fixed``: the open block, ``logsparse``: all); and the spans ``(batch, heads, spans, dim)`` that the next token
    reads."""

    count: int
    query: Tensor
    key: Tensor
    value: Tensor
    span_key: Tensor
    span_value: Tensor


@register("combiner")
class Combiner(Mechanism):
    """variant: how what is visible is split (see the module). span: tokens of a block, or columns of the grid where a
    call names none (default: the rounded square root of the length). summary: of a span's queries and keys, their
    maximum or mean, bare, of their positive part (``relu-``) or of that of a learned map (``deepset-``)."""

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("self", "causal-self"))
    mask_support = "keys"
    grid_axes: ClassVar[frozenset[int]] = frozenset({2})
    needs_training = True
    decodes = True
    growth = "N^1.5"

    def __init__(
        self,
        variant: Variant = "fixed",
        span: int | None = None,
        summary: Summary = "max",
        *,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise OptionError(f"variant is one of {', '.join(get_args(Variant))}; got {variant!r}.")
        if span is not None and span < 1:
            raise OptionError(f"A span has at least one token, got {span}.")
        self.variant: Variant = variant
        self.span, self.summary = span, summary
        self.features = _Features(summary, head_dim)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, span={self.span}, summary={self.summary!r}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return self.run(query, key, value, request)

    def run(self, query: Tensor, key: Tensor, value: Tensor, request: Request, row_key: RowKey | None = None) -> Tensor:
        """As :meth:`attend`. row_key: for ``axial_row``, how keys of rows come from the attention inside rows (default:
        the row's keys under that attention)."""
        call, length = self._call(query, key, value, request), query.shape[2]
        if self.variant == "fixed":
            out = block_spans(call, _span(self.span, length))
        elif self.variant == "logsparse":
            out = binary_spans(call)
        else:
            out = axial_spans(call, self.variant, *_grid(request.grid, self.span, length), row_key)
        return out.to(query.dtype)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> SpanCall:
        work = accumulation_dtype(query.dtype)
        q, k, v = (expand_groups(t, query.shape[1]).to(work) for t in (query, key, value))
        shown = request.keys
        if shown is None:
            shown = torch.ones(1, 1, k.shape[2], dtype=torch.bool, device=k.device)
        return self.features.call(q, k, v, shown, score_scale(query, request.scale), request.causal)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        length = query.shape[2]
        return min(_work(self.variant, length, self.span, request.grid, request.causal)[0] / length, 1.0)

    def cost(self, shape: AttentionShape) -> Cost:
        """``pairs``: logits of the joint softmax per query, over the length."""
        found = _report(self.variant, shape, self.span)
        rows, dims = shape.batch * shape.num_heads * shape.element_size, shape.head_dim + shape.v_dim
        kept = shape.k_len * (dims + shape.head_dim)
        if self.variant == "fixed":
            span = _span(self.span, shape.k_len)
            kept = -(-shape.k_len // span) * dims + span * (dims + shape.head_dim)
        plain = dense_cost(shape)
        return dataclasses.replace(
            plain,
            flops=found.flops,
            bytes=plain.bytes + found.score_bytes,
            state_bytes=rows * kept,
            pairs=min(found.score_share, 1.0),
        )

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> Any:
        """None, for nothing yet. Refused where the split of what is visible depends on the length to come."""
        self._own_state(cache)
        if self.variant.startswith("axial") or (self.variant == "fixed" and self.span is None):
            raise UnsupportedPatternError(
                f"Combiner with variant={self.variant!r} and span={self.span} cannot decode step by step; use 'fixed' "
                "with a span of your choice, or 'logsparse'."
            )
        return None

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, CombinerState]:
        call, outs = self._call(query, key, value, self.request(query, key, value, causal=True)), []
        if state is None:
            self.init_state(len(query), like=query)
            state = CombinerState(0, *(t[:, :, :0] for t in (call.query, call.key, call.value, call.key, call.value)))
        for at in range(query.shape[2]):
            new = call.map(lambda t, at=at: t[:, :, at : at + 1])  # type: ignore[misc]
            outs.append(self._read(new, state))
            state = self._grow(new, state)
        return torch.cat(outs, 2).to(query.dtype), state

    def _read(self, new: SpanCall, state: CombinerState) -> Tensor:
        keys, values = [new.key, state.span_key], [new.value, state.span_value]
        if self.variant == "fixed":
            keys.append(state.key)
            values.append(state.value)
        return ((new.query * new.scale) @ torch.cat(keys, 2).mT).softmax(-1) @ torch.cat(values, 2)

    def _grow(self, new: SpanCall, state: CombinerState) -> CombinerState:
        pairs = ((state.query, new.query), (state.key, new.key), (state.value, new.value))
        q, k, v = (torch.cat(pair, 2) for pair in pairs)
        count, span_key, span_value = state.count + 1, state.span_key, state.span_value
        # A full block becomes a span; or, as a binary counter carries, the tokens of the lowest digit that is set do,
        # in place of the spans of the digits below, all of which were set.
        zeros = (count & -count).bit_length() - 1
        size, gone = (self.span or 1, 0) if self.variant == "fixed" else (1 << zeros, zeros)
        if count % size == 0:
            shown = torch.ones(size, dtype=torch.bool, device=k.device)
            made = summarise(self.features.call(q[:, :, -size:], k[:, :, -size:], v[:, :, -size:], shown, new.scale))
            kept = span_key.shape[2] - gone
            span_key = torch.cat((span_key[:, :, :kept], made.key[:, :, None]), 2)
            span_value = torch.cat((span_value[:, :, :kept], made.value[:, :, None]), 2)
            if self.variant == "fixed":
                q, k, v = (t[:, :, :0] for t in (q, k, v))
        return CombinerState(count, q, k, v, span_key, span_value)


def _span(span: int | None, length: int) -> int:
    return max(round(math.sqrt(length)), 1) if span is None else min(span, length)


def _grid(grid: tuple[int, ...] | None, span: int | None, length: int) -> tuple[int, int]:
    """Rows and columns; without a grid the sequence is cut into rows of ``span``."""
    if grid is None:
        columns = _span(span, length)
        return -(-length // columns), columns
    if len(grid) != 2:
        raise ShapeError(f"An axial Combiner reads a grid of rows and columns, got {grid}.")
    return grid[0], grid[1]


def implied_matrix(
    query: Tensor,
    key: Tensor,
    variant: Variant = "fixed",
    *,
    span: int | None = None,
    summary: Summary = "max",
    causal: bool = True,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The conditional probabilities ``p(j|i)``, dense: ``(batch, heads, length, length)``."""
    return Combiner(variant, span, summary).weights(query, key, causal=causal, grid=grid, scale=scale)


@dataclass(frozen=True)
class CombinerReport:
    """What a variant costs: logits in the joint softmax of a token, FLOPs, bytes of these logits, and the shares of
    dense attention's FLOPs and scores (all pairs)."""

    logits_per_token: int
    flops: int
    score_bytes: int
    flops_share: float
    score_share: float


def combiner_report(
    length: int, head_dim: int = 64, num_heads: int = 1, *, span: int | None = None, causal: bool = True
) -> dict[str, CombinerReport]:
    """The cost of every variant at one length; ``span`` tokens a block, or columns of the grid."""
    shape = AttentionShape(length, length, num_heads, head_dim, causal=causal)
    return {variant: _report(variant, shape, span) for variant in get_args(Variant)}


def _report(variant: Variant, shape: AttentionShape, span: int | None) -> CombinerReport:
    width, products, tokens = _work(variant, shape.k_len, span, shape.grid, shape.causal)
    rows = shape.batch * shape.num_heads
    flops = 2 * rows * tokens * products * (shape.head_dim + shape.v_dim)
    scores = rows * shape.k_len * width * shape.element_size
    return CombinerReport(width, flops, scores, flops / dense_cost(shape).flops, width / shape.k_len)


def _work(
    variant: Variant, length: int, span: int | None, grid: tuple[int, ...] | None, causal: bool
) -> tuple[int, int, int]:
    """Logits of a token; products of vectors per token, as many in scores as in read-outs, summaries included; and
    tokens with filling."""
    if variant == "logsparse":
        digits = (length - 1).bit_length()
        width = 1 + (digits if causal else 2 * digits)
        return width, width, 1 << digits
    if variant == "fixed":
        size = _span(span, length)
        count = -(-length // size)
        return size + count, size + count + 1, size * count
    rows, columns = _grid(grid, span, length)
    if variant == "axial_row":
        return columns + rows, 2 * columns + rows, rows * columns
    sides = 1 if causal else 2
    width, made = rows + (1 + sides) * columns, sides * rows
    if variant == "axial_mixture":
        width, made = width + 2 * rows, made + 2 * columns
    return width, width + made, rows * columns


class CombinerAttention(Layer):
    """Combiner with its projections, in place of multi-head attention: ``(batch, length, embed_dim)`` in and out.

    variant, span, summary: as in :class:`Combiner`. causal: what a call does unless told. row_key: the key of a row in
    ``axial_row``, ``"projected"`` from the attention inside the row (output projection, residual, layer norm and one
    projection more, as released), or ``"weighted"``, the row's keys under that attention. bias: of the projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = Combiner.patterns
    grid_axes: ClassVar[frozenset[int]] = Combiner.grid_axes
    needs_training = True
    growth = "N^1.5"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        variant: Variant = "fixed",
        span: int | None = None,
        summary: Summary = "max",
        causal: bool = True,
        *,
        row_key: Literal["projected", "weighted"] = "projected",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}; choose another.")
        if row_key not in ("projected", "weighted"):
            raise OptionError(f"row_key is 'projected' or 'weighted', got {row_key!r}.")
        self.embed_dim, self.num_heads, self.causal = embed_dim, num_heads, causal
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.mechanism = Combiner(variant, span, summary, head_dim=embed_dim // num_heads)
        projected = variant == "axial_row" and row_key == "projected"
        self.row_out = nn.Linear(embed_dim, embed_dim, bias=bias) if projected else None
        self.row_norm = nn.LayerNorm(embed_dim) if projected else None
        self.row_key = nn.Linear(embed_dim, embed_dim, bias=bias) if projected else None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"CombinerAttention takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        return query, key, value

    def _row_key(self, x: Tensor, keys: Tensor | None) -> RowKey | None:
        if self.row_out is None or self.row_norm is None or self.row_key is None:
            return None
        out, norm, key = self.row_out, self.row_norm, self.row_key
        # What stands at a token that does not count has no part in the key of its row.
        own = x if keys is None else torch.where(keys.any(1)[..., None], x, 0)

        def keys_of(inside: Tensor) -> Tensor:
            whole = F.pad(own, (0, 0, 0, inside.shape[2] - own.shape[1]))
            return split_heads(key(norm(whole + out(merge_heads(inside).to(x.dtype)))), self.num_heads)[0]

        return keys_of

    def forward(
        self, x: Tensor, *, causal: bool | None = None, mask: Mask | None = None, grid: Sequence[int] | None = None
    ) -> Tensor:
        """Attend. causal: None for the layer's own. mask: of keys alone (padding). grid: rows and columns."""
        query, key, value = self._project(x)
        causal = self.causal if causal is None else causal
        request = self.mechanism.request(query, key, value, causal, mask, grid)
        heads = self.mechanism.run(query, key, value, request, self._row_key(x, request.keys))
        return cast(Tensor, self.out(merge_heads(heads)))

    def init_state(self, batch: int, *, like: Tensor) -> Any:
        """The decoding state before the first token."""
        return self.mechanism.init_state(batch, like=like)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next tokens ``(batch, new, embed_dim)``: their outputs and the new state."""
        heads, state = self.mechanism.step(*self._project(x), state)
        return self.out(merge_heads(heads)), state
