"""Attention to single tokens and to spans of tokens that stand for themselves by one key and one value each.

A span S has a key ``k_S = pool k_j`` by which queries find it, and a value ``v_S = sum_{j in S} softmax_j(scale q_S .
k_j) v_j`` with ``q_S = pool q_j`` over its own members. Because no query outside has a part in ``v_S``, it is formed
once. :func:`joint_weights` is the one softmax over single tokens and spans; a row with nothing to see gives zeros.

Three executors, for spans that are blocks (:func:`block_spans`), powers of two (:func:`binary_spans`), or rows and
columns of a grid (:func:`axial_spans`), take a :class:`SpanCall` ``(batch, heads, length, dim)`` and give ``(batch,
heads, length, value_dim)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.dense import masked_softmax

__all__ = [
    "AxialVariant",
    "Pool",
    "RowKey",
    "SpanCall",
    "Spans",
    "axial_spans",
    "axis_spans",
    "binary_spans",
    "block_spans",
    "joint_weights",
    "pool_members",
    "pool_prefix",
    "summarise",
]

Pool = Literal["max", "mean"]
AxialVariant = Literal["axial_row", "axial_column", "axial_mixture"]
RowKey = Callable[[Tensor], Tensor]
"""From the attention inside each row, ``(batch, heads, rows * columns, value_dim)``, to a key of the row for each
column, ``(batch, heads, rows * columns, head_dim)``; places without a token read their row evenly."""


@dataclass(frozen=True)
class SpanCall:
    """Tensors ``(..., tokens, dim)`` in the accumulation dtype, with as many heads each; the features that are pooled
    to span queries and span keys; and which tokens count, boolean, broadcastable to ``(..., tokens)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_features: Tensor
    key_features: Tensor
    shown: Tensor
    causal: bool
    pool: Pool
    scale: float

    def map(self, change: Callable[[Tensor], Tensor]) -> SpanCall:
        """The call with ``change`` done to all tensors, to ``shown`` as one of a single channel."""
        return dataclasses.replace(
            self,
            query=change(self.query),
            key=change(self.key),
            value=change(self.value),
            query_features=change(self.query_features),
            key_features=change(self.key_features),
            shown=change(self.shown[..., None])[..., 0],
        )

    def others(self, count: int, own: bool = False) -> Tensor:
        """Which of ``count`` places each sees ``(count, count)``: those before it, all others without causality; and
        itself with ``own``."""
        place = torch.arange(count, device=self.shown.device)
        seen = place[:, None] > place if self.causal else place[:, None] != place
        return seen | (place[:, None] == place) if own else seen


class Spans(NamedTuple):
    """Summaries: ``key`` and ``query`` ``(..., head_dim)``, ``value`` ``(..., value_dim)``; ``seen`` ``(...)`` tells
    whether any member counts."""

    key: Tensor
    query: Tensor
    value: Tensor
    seen: Tensor


def pool_members(x: Tensor, shown: Tensor, pool: Pool) -> Tensor:
    """``(..., members, dim)`` to ``(..., dim)``: element-wise maximum or mean over the members that count."""
    if pool == "mean":
        return torch.where(shown[..., None], x, 0).sum(-2) / shown.sum(-1).clamp_min(1)[..., None]
    largest = x.masked_fill(~shown[..., None], float("-inf")).amax(-2)
    return torch.where(shown.any(-1)[..., None], largest, 0)


def pool_prefix(x: Tensor, shown: Tensor, pool: Pool) -> Tensor:
    """``(..., positions, dim)``: at each position the maximum or mean over those before it, zeros where there is none
    that counts."""
    counts = shown.cumsum(-1)[..., None]
    if pool == "mean":
        running = torch.where(shown[..., None], x, 0).cumsum(-2) / counts.clamp_min(1)
    else:
        largest = x.masked_fill(~shown[..., None], float("-inf")).cummax(-2).values
        running = torch.where(counts > 0, largest, 0)
    return F.pad(running, (0, 0, 1, 0))[..., :-1, :]


def summarise(call: SpanCall) -> Spans:
    """Summaries of whole spans, their members along the axis before the last."""
    span_query = pool_members(call.query_features, call.shown, call.pool)
    span_key = pool_members(call.key_features, call.shown, call.pool)
    scores = (span_query * call.scale)[..., None, :] @ call.key.mT
    value = masked_softmax(scores, call.shown[..., None, :]) @ call.value
    return Spans(span_key, span_query, value[..., 0, :], call.shown.any(-1))


def axis_spans(call: SpanCall, behind: bool = False) -> Spans:
    """At each position the summary of all positions before it (``behind``: after it)."""
    if behind:
        spans = axis_spans(call.map(lambda t: t.flip(-2)))
        return Spans(spans.key.flip(-2), spans.query.flip(-2), spans.value.flip(-2), spans.seen.flip(-1))
    span_query = pool_prefix(call.query_features, call.shown, call.pool)
    span_key = pool_prefix(call.key_features, call.shown, call.pool)
    place = torch.arange(call.shown.shape[-1], device=call.shown.device)
    members = call.shown[..., None, :] & (place[:, None] > place)
    value = masked_softmax((span_query * call.scale) @ call.key.mT, members) @ call.value
    return Spans(span_key, span_query, value, members.any(-1))


def joint_weights(logits: Sequence[Tensor], seen: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One softmax over several groups of logits ``(..., count)``, given back group by group."""
    visible = torch.cat([mask.expand(group.shape) for group, mask in zip(logits, seen, strict=True)], -1)
    weights = masked_softmax(torch.cat(list(logits), -1), visible)
    return weights.split([group.shape[-1] for group in logits], -1)


def block_spans(call: SpanCall, span: int) -> Tensor:
    """Tokens of the own block one by one (with causality up to the own), other blocks (earlier ones) as spans."""
    length = call.query.shape[2]
    blocks = call.map(lambda t: F.pad(t, (0, 0, 0, -length % span)).unflatten(2, (-1, span)))
    spans, count = summarise(blocks), blocks.query.shape[2]
    query = blocks.query * call.scale
    near = query @ blocks.key.mT
    far = (query.flatten(2, 3) @ spans.key.mT).unflatten(2, (count, span))
    at_near = blocks.shown[..., None, :] & call.others(span, own=True)
    at_far = spans.seen[:, :, None, None] & call.others(count)[:, None]
    to_near, to_far = joint_weights((near, far), (at_near, at_far))
    out = (to_near @ blocks.value).flatten(2, 3) + to_far.flatten(2, 3) @ spans.value
    return out[:, :, :length]


def binary_spans(call: SpanCall) -> Tensor:
    """The own token, and those before it as the spans of the binary digits of its position; without causality those
    behind it likewise, counted from the end."""
    own = (call.query * call.key).sum(-1, keepdim=True) * call.scale
    parts = [_Level(own, call.shown[..., None], lambda weight: weight * call.value), *_levels(call)]
    if not call.causal:
        parts += [level.flip() for level in _levels(call.map(lambda t: t.flip(-2)))]
    weights = joint_weights([part.logits for part in parts], [part.seen for part in parts])
    out = parts[0].read(weights[0])
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out = out + part.read(weight)
    return out


class _Level(NamedTuple):
    """One thing that each token may read: logits and visibility ``(batch, heads, length, 1)``, and the function from
    weights to what is read."""

    logits: Tensor
    seen: Tensor
    read: Callable[[Tensor], Tensor]

    def flip(self) -> _Level:
        """The same with tokens in reverse."""
        return _Level(self.logits.flip(-2), self.seen.flip(-2), lambda weight: self.read(weight.flip(-2)).flip(-2))


def _levels(call: SpanCall) -> list[_Level]:
    """Spans of ``2^level`` tokens. A token whose binary digit is set stands in the second block of a pair of that size,
    and reads the first as a span: no two tokens of a block read different spans, so nothing is gathered."""
    length = call.query.shape[2]
    whole = 1 << (length - 1).bit_length()

    def pairs(x: Tensor, size: int) -> Tensor:
        return F.pad(x, (0, 0, 0, whole - length)).unflatten(-2, (-1, 2, size))

    def spread(x: Tensor) -> Tensor:
        """What second blocks ``(batch, heads, pairs, size, dim)`` have, at the places of all tokens."""
        return torch.stack((torch.zeros_like(x), x), -3).flatten(2, 4)[:, :, :length]

    def level(size: int) -> _Level:
        spans = summarise(call.map(lambda t: pairs(t, size)[..., 0, :, :]))
        second = pairs(call.query, size)[..., 1, :, :] * call.scale
        seen = spans.seen[..., None, None].expand(*spans.seen.shape, size, 1)

        def read(weight: Tensor) -> Tensor:
            return spread(pairs(weight, size)[..., 1, :, :] * spans.value[..., None, :])

        return _Level(spread(second @ spans.key[..., None]), spread(seen), read)

    return [level(1 << digit) for digit in range((length - 1).bit_length())]


def axial_spans(
    call: SpanCall, variant: AxialVariant, rows: int, columns: int, row_key: RowKey | None = None
) -> Tensor:
    """Tokens as ``rows`` of ``columns``, filled up at the end. The own row one by one (with causality up to the own
    token), and

    - ``"axial_row"``: other rows as spans, each by what its token in the own column reads in it;
    - ``"axial_column"``: other tokens of the own column, and other columns above (and below) the row as spans;
    - ``"axial_mixture"``: the same, and other rows left and right of the own column as spans.
    """
    length = call.query.shape[2]

    def grid(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, rows * columns - length)).unflatten(2, (rows, columns))

    across = call.map(grid)
    down = across.map(lambda t: t.transpose(2, 3))
    query, query_down = across.query * call.scale, down.query * call.scale
    near = query @ across.key.mT
    # Groups of logits (batch, heads, rows, columns, count): visibility, values, and whether these run down a column.
    groups = [(near, across.shown[..., None, :] & call.others(columns, own=True), across.value, False)]

    def column_wise(key: Tensor, value: Tensor, seen: Tensor) -> None:
        """Something of each other row, in the own column; tensors ``(batch, heads, columns, rows, ...)``."""
        logits = (query_down @ key.mT).transpose(2, 3)
        groups.append((logits, (seen[..., None, :] & call.others(rows)).transpose(2, 3), value, True))

    if variant == "axial_row":
        # A token that does not count asks for nothing: its place reads the row evenly.
        asked = torch.where(across.shown[..., None], near, 0)
        weights = masked_softmax(asked, across.shown[..., None, :].expand(asked.shape))
        inside = weights @ across.value
        keys = weights @ across.key if row_key is None else row_key(inside.flatten(2, 3)).unflatten(2, (rows, columns))
        there = across.shown.any(-1)[:, :, None].expand(-1, -1, columns, -1)
        column_wise(keys.transpose(2, 3), inside.transpose(2, 3), there)
    else:
        column_wise(down.key, down.value, down.shown)
        other = ~torch.eye(columns, dtype=torch.bool, device=near.device)
        for behind in (False,) if call.causal else (False, True):
            spans = axis_spans(down, behind)
            seen = spans.seen.transpose(2, 3)[..., None, :] & other
            groups.append((query @ spans.key.transpose(2, 3).mT, seen, spans.value.transpose(2, 3), False))
    if variant == "axial_mixture":
        for behind in (False, True):
            spans = axis_spans(across, behind)
            column_wise(spans.key.transpose(2, 3), spans.value.transpose(2, 3), spans.seen.transpose(2, 3))
    out = torch.zeros_like(across.value)
    weights_of = joint_weights([group[0] for group in groups], [group[1] for group in groups])
    for weight, (_, _, value, downwards) in zip(weights_of, groups, strict=True):
        out = out + ((weight.transpose(2, 3) @ value).transpose(2, 3) if downwards else weight @ value)
    return out.flatten(2, 3)[:, :, :length]
