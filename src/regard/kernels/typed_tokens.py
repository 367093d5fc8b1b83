"""Causal attention in which every key has one of three lifetimes, with a gradient for the two it does not have.

Per mask head, key ``j`` is global (seen by all later queries), local (seen up to and including the next global key) or
sliding (seen by the next ``window`` queries). A key's type moves the output through its own visibility, and a global
key also through the local keys that it ends. With ``E(j)`` the next global key after ``j`` and ``prev(j)`` the last one
before it, the visibility is a polynomial in the one-hot types ``g, l, s``,

    M[i, j] = g_j + l_j prod_{j < m < i} (1 - g_m) + s_j [i <= j + window]        (i >= j)

With ``P0`` the softmax over all causal keys, ``dP = dO V^T`` and ``delta = rowsum(dO O)``, an entry of the mask has
the gradient ``G = P0 (dP - delta)`` (Deng & Lindauer's form: bounded, where the exact one has the sum over visible keys
below the line and so is larger by one factor a row), and its derivatives give those of the types:

- sliding: the sum of ``G[i, j]`` over ``i`` in ``[j, j + window]``; local: over ``[j, E(j)]``; global: over all rows,
  less the sum over ``i`` in ``(j, E(j)]`` of ``G[i, n]`` for the local ``n`` between ``prev(j)`` and ``j``.

Scores are formed for a stretch of queries at a time and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels.shapes import accumulation_dtype

__all__ = ["GLOBAL", "LOCAL", "SLIDING", "lifetimes", "next_marked", "previous_marked", "typed_attention"]

GLOBAL, LOCAL, SLIDING = range(3)
"""Places of the types in a one-hot vector."""

# A lifetime that never ends.
_FOREVER = 2**62
# Scores of one stretch of queries: what stays in a core's own cache.
_AREA = 1 << 18
# The released kernel looks this far around a token for what it would end as a global one.
_NEAR = 16


def next_marked(marked: Tensor, positions: Tensor | None = None, none: int | None = None) -> Tensor:
    """Position of the first marked token at or after each, ``none`` (default: the length) where there is none.

    marked ``(..., length)`` boolean; positions, ascending, are by default ``0 ... length - 1``.
    """
    length = marked.shape[-1]
    places = torch.arange(length, device=marked.device) if positions is None else positions
    found = torch.where(marked, places, length if none is None else none)
    return found.flip(-1).cummin(-1).values.flip(-1)


def previous_marked(marked: Tensor) -> Tensor:
    """Position of the last marked token strictly before each, -1 where there is none."""
    found = torch.where(marked, torch.arange(marked.shape[-1], device=marked.device), -1).cummax(-1).values
    return torch.cat((torch.full_like(found[..., :1], -1), found[..., :-1]), -1)


def _after(upto: Tensor, none: int) -> Tensor:
    """From "at or after" to "strictly after"."""
    return torch.cat((upto[..., 1:], torch.full_like(upto[..., :1], none)), -1)


def lifetimes(kinds: Tensor, window: int, positions: Tensor | None = None) -> Tensor:
    """One past the last query that sees each key, int64 as ``kinds (..., length)`` (0 global, 1 local, 2 sliding).

    positions: of the keys in the sequence, ascending, -1 in empty slots before all others (which die at 0).
    """
    places = torch.arange(kinds.shape[-1], device=kinds.device) if positions is None else positions
    places = places.expand_as(kinds)
    boundary = next_marked((kinds == GLOBAL) & (places >= 0), places, none=_FOREVER)
    local = _after(boundary, _FOREVER) + 1
    death = torch.where(kinds == GLOBAL, _FOREVER, torch.where(kinds == LOCAL, local, places + window + 1))
    return torch.where(places >= 0, death, 0)


def typed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    types: Tensor,
    window: int,
    *,
    reg: float = 0.0,
    keys: Tensor | None = None,
    scale: float,
    official: bool = False,
) -> Tensor:
    """Attention whose one-hot ``types (batch, mask_heads, length, 3)`` get the gradient that stands above.

    Shapes as in :func:`regard.kernels.dense_attention`, queries and keys of one length; ``mask_heads`` divides the
    query heads. reg: added to the gradient of a global type, times the share of the sequence that comes from it on, and
    of a local type, times the share up to the next global key, for each query head: descent then shortens lifetimes.
    keys: boolean ``(batch | 1, mask_heads | 1, length)``, tokens that exist.

    official: the gradient of the released kernel. A global type gets its own ``G`` only in the rows beyond ``E(j)``; a
    local one up to the next global key at or after ``j``; in the rows from a global key up to the one after it, the
    ``G`` of all keys since the one before count against it; and the visible ``G`` of the 16 keys before a token in the
    16 rows after it counts against making it global. (That kernel also skips some tiles; that is left out.)
    """
    out: Tensor = _Typed.apply(query, key, value, types, keys, window, reg, scale, official)
    return out


class _Rows:
    """Scores and what is seen, for a stretch of queries at a time: ``(batch, mask_heads, group, rows, keys)``."""

    def __init__(
        self, query: Tensor, key: Tensor, kinds: Tensor, keys: Tensor | None, window: int, scale: float
    ) -> None:
        work = accumulation_dtype(query.dtype)
        self.batch, self.heads, self.length, _ = query.shape
        self.kv_heads, self.mask_heads = key.shape[1], kinds.shape[1]
        self.query, self.key = query.to(work) * scale, key.to(work)
        self.death, self.keys = lifetimes(kinds, window)[:, :, None], keys
        self.position = torch.arange(self.length, device=query.device)

    def stretches(self) -> Iterator[slice]:
        step = max(_AREA // max(self.batch * self.heads * self.length, 1), 1)
        return (slice(start, min(start + step, self.length)) for start in range(0, self.length, step))

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """``left (batch, heads, rows, a) @ right (batch, kv_heads, a, b)``."""
        rows = left.shape[2]
        folded = left.reshape(self.batch, self.kv_heads, -1, left.shape[3])
        return (folded @ right).view(self.batch, self.heads, rows, right.shape[-1])

    def gathered(self, left: Tensor, right: Tensor) -> Tensor:
        """``left^T right`` summed over the query heads of a key head: ``(batch, kv_heads, a, b)``."""
        left, right = (x.reshape(self.batch, self.kv_heads, -1, x.shape[3]) for x in (left, right))
        return left.transpose(-1, -2) @ right

    def grouped(self, x: Tensor) -> Tensor:
        return x.view(self.batch, self.mask_heads, -1, *x.shape[2:])

    def scores(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scores that are ``-inf`` after the diagonal, and what is dead by then ``(batch, mask_heads, rows, keys)``."""
        last = rows.stop
        hidden = self.position[rows, None] < self.position[:last]
        if self.keys is not None:
            hidden = hidden | ~self.keys[:, :, None, None, :last]
        scores = self.grouped(self.times(self.query[:, :, rows], self.key[:, :, :last].transpose(-1, -2)))
        return scores.masked_fill_(hidden, float("-inf")), self.position[rows, None] >= self.death[..., :last]


def _shares(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(scores - lse)``; a row without any key has an infinite log-sum-exp and gets zeros."""
    return (scores - torch.where(lse.isfinite(), lse, float("inf"))[..., None]).exp_()


class _Typed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        types: Tensor,
        keys: Tensor | None,
        window: int,
        reg: float,
        scale: float,
        official: bool,
    ) -> Tensor:
        kinds = types.detach().argmax(-1)
        run = _Rows(query, key, kinds, keys, window, scale)
        values = value.to(run.query.dtype)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = run.query.new_empty(2, *query.shape[:3])
        for rows in run.stretches():
            scores, dead = run.scores(rows)
            lse[0, :, :, rows] = scores.logsumexp(-1).flatten(1, 2)
            scores.masked_fill_(dead[:, :, None], float("-inf"))
            lse[1, :, :, rows] = scores.logsumexp(-1).flatten(1, 2)
            weights = _shares(scores, run.grouped(lse[1, :, :, rows])).flatten(1, 2)
            out[:, :, rows] = run.times(weights, values[:, :, : rows.stop]).to(out.dtype)
        ctx.save_for_backward(query, key, value, kinds, keys, out, lse)
        ctx.options = window, reg, scale, official, types.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, kinds, keys, out, lse = ctx.saved_tensors
        window, reg, scale, official, dtype = ctx.options
        run = _Rows(query, key, kinds, keys, window, scale)
        values, grads = value.to(run.query.dtype), grad_out.to(run.query.dtype)
        delta = (grads * out.to(run.query.dtype)).sum(-1, keepdim=True)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(run.key), torch.zeros_like(values)
        collect = (_Released if official else _Exact)(kinds, window, lse.dtype)
        for rows in run.stretches():
            last = rows.stop
            scores, dead = run.scores(rows)
            slope = run.times(grads[:, :, rows], values[:, :, :last].transpose(-1, -2)).sub_(delta[:, :, rows])
            entries = _shares(scores, run.grouped(lse[0, :, :, rows])).mul_(run.grouped(slope))
            collect.add(rows, entries.sum(2) if entries.shape[2] > 1 else entries[:, :, 0], dead)
            scores.masked_fill_(dead[:, :, None], float("-inf"))
            weights = _shares(scores, run.grouped(lse[1, :, :, rows])).flatten(1, 2)
            grad_value[:, :, :last] += run.gathered(weights, grads[:, :, rows])
            grad_scores = weights.mul_(slope)
            grad_query[:, :, rows] = (run.times(grad_scores, run.key[:, :, :last]) * scale).to(query.dtype)
            grad_key[:, :, :last] += run.gathered(grad_scores, run.query[:, :, rows])
        grad_types = collect.finish(reg * run.heads / run.mask_heads).to(dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_types, None, None, None, None, None


class _Sums:
    """Sums over ranges of rows, and of columns too, of some rows of a matrix: by differences of running sums."""

    def __init__(self, entries: Tensor, start: int) -> None:
        self.start, (self.rows, self.columns) = start, entries.shape[-2:]
        self.down = entries.new_zeros(*entries.shape[:2], self.rows + 1, self.columns)
        self.down[:, :, 1:] = entries.cumsum(-2)

    def _at(self, table: Tensor, before: Tensor, column: Tensor) -> Tensor:
        """Running sums over the rows before position ``before``, at ``column``."""
        index = (before - self.start).clamp(0, self.rows) * table.shape[-1] + column
        return table.flatten(-2).gather(-1, index.expand(*table.shape[:2], -1))

    def rows_from(self, first: Tensor, end: Tensor) -> Tensor:
        """Of each column over the rows ``first <= i < end``."""
        column = torch.arange(self.columns, device=self.down.device)
        return self._at(self.down, end, column) - self._at(self.down, first, column)

    def across(self) -> Tensor:
        """Running sums over both: ``(..., rows + 1, columns + 1)``, what lies before a row and before a column."""
        both = self.down.new_zeros(*self.down.shape[:-1], self.columns + 1)
        both[..., 1:] = self.down.cumsum(-1)
        return both

    def boxes(self, table: Tensor, first: Tensor, end: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Of :meth:`across`: over the rows ``first <= i < end`` and the columns ``left <= n < right``."""
        high = self._at(table, end, right) - self._at(table, end, left)
        return high - (self._at(table, first, right) - self._at(table, first, left))


class _Exact:
    """Sums of ``G`` over the rows in which a type matters: the derivative of the mask's polynomial."""

    def __init__(self, kinds: Tensor, window: int, dtype: torch.dtype) -> None:
        self.kinds, self.window, self.length = kinds, window, kinds.shape[-1]
        marked = kinds == GLOBAL
        self.upto = next_marked(marked)
        self.after = _after(self.upto, self.length)
        self.before = previous_marked(marked)
        self.position = torch.arange(self.length, device=kinds.device)
        self.total = torch.zeros(3, *kinds.shape, dtype=dtype, device=kinds.device)

    def add(self, rows: slice, entries: Tensor, dead: Tensor) -> None:
        """``entries (batch, mask_heads, rows, keys)``: ``G`` of these rows; ``dead``: which keys live no more."""
        last = rows.stop
        sums, column = _Sums(entries, rows.start), self.position[:last]
        self.total[SLIDING, :, :, :last] += sums.rows_from(column, column + self.window + 1)
        self._own(sums, column)
        self._ended(rows, column, entries, dead)

    def _own(self, sums: _Sums, column: Tensor) -> None:
        last = len(column)
        self.total[GLOBAL, :, :, :last] += sums.rows_from(column, column + self.length)
        self.total[LOCAL, :, :, :last] += sums.rows_from(column, self.after[..., :last] + 1)

    def _ended(self, rows: slice, column: Tensor, entries: Tensor, dead: Tensor) -> None:
        """The local keys that a global one ends, or would."""
        last = len(column)
        sums = _Sums(entries * (self.kinds == LOCAL)[:, :, None, :last], rows.start)
        left, end = self.before[..., :last] + 1, self.after[..., :last] + 1
        self.total[GLOBAL, :, :, :last] -= sums.boxes(sums.across(), column + 1, end, left, column)

    def finish(self, reg: float) -> Tensor:
        """``(batch, mask_heads, length, 3)``, the regulariser included."""
        share = reg / self.length
        beyond, upto = self.length - self.position, self.upto.clamp_max(self.length - 1) - self.position
        self.total[GLOBAL] += share * torch.where(self.kinds == GLOBAL, beyond, 0).to(self.total.dtype)
        self.total[LOCAL] += share * torch.where(self.kinds == LOCAL, upto, 0).to(self.total.dtype)
        return self.total.movedim(0, -1)


class _Released(_Exact):
    """As the released kernel sums."""

    def __init__(self, kinds: Tensor, window: int, dtype: torch.dtype) -> None:
        super().__init__(kinds, window, dtype)
        self.lower = self.after.clamp_max(self.length - 1)
        following = self.after.gather(-1, self.lower)
        self.upper = torch.where(following < self.length, following, self.lower)

    def _own(self, sums: _Sums, column: Tensor) -> None:
        last = len(column)
        lower, upper = self.lower[..., :last], self.upper[..., :last]
        self.total[GLOBAL, :, :, :last] += sums.rows_from(lower + 1, column + self.length)
        self.total[LOCAL, :, :, :last] += sums.rows_from(column, self.upto[..., :last] + 1)
        self.total[GLOBAL].scatter_add_(-1, lower, -sums.rows_from(lower, upper))

    def _ended(self, rows: slice, column: Tensor, entries: Tensor, dead: Tensor) -> None:
        sums = _Sums(entries.masked_fill(dead, 0), rows.start)
        left = (column - _NEAR).clamp_min(0)
        near = sums.boxes(sums.across(), column + 1, column + _NEAR + 1, left, column)
        self.total[GLOBAL, :, :, : len(column)] -= near
