"""The form of block-sparse attention for a layout that is the same for every sequence and head.

What depends on positions alone (windows, neighbourhoods, stripes) needs its index work once: which key blocks each
query block visits, and which pairs inside them are hidden, is kept with the layout, and query blocks that see the same
picture (nearly all of them inside a grid) share one mask and one bias. For a few query blocks at a time their key
blocks are gathered and go through torch's fused CPU attention, forward and backward, so scores never leave the cache;
it needs no compiler, and its memory does not grow with the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError
from regard.kernels.block_plan import Pictures
from regard.kernels.score_bias import TableBias
from regard.kernels.shapes import accumulation_dtype, expand_groups, fold_groups
from regard.layout import BlockLayout

__all__ = ["SharedBlocks", "fits", "require"]

# Gathered keys of one group stay below this many elements.
_GROUP = 1 << 20
# Pairs whose mask is evaluated at once, and bytes of masks that are kept with a layout.
_EVALUATED, _KEPT = 1 << 22, 1 << 27


def fits(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, bias: TableBias | None, return_lse: bool
) -> bool:
    """Whether this form can run the call."""
    shared = layout.visit.shape[:2] == (1, 1) and layout.mask.batch == layout.mask.heads == 1
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    can = query.device.type == "cpu" and shared and query.shape[3] == value.shape[3] > 0
    return can and not (return_lse and tracked) and _plan(layout, bias) is not None


def require(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, bias: TableBias | None, return_lse: bool
) -> None:
    """Raise a BackendError where it cannot."""
    if not fits(query, key, value, layout, bias, return_lse):
        raise BackendError(
            "The fused form needs CPU tensors, a layout shared by all sequences and heads whose masks are few enough "
            "to keep, values as wide as the keys, and no gradient of the log-sum-exp; use backend='auto'."
        )


@dataclass(frozen=True)
class _Rows:
    """Query blocks that visit the same number of key blocks.

    queries ``(rows,)``: index of each query block. keys ``(rows, slots)``: index of each key block. codes ``(pictures,
    block_q, slots * block_k)``: for each pair its place in the bias table, -1 where it is not seen; None where nothing
    is hidden and there is no bias. picture ``(rows,)``: which picture each row has; equal ones stand together.
    """

    queries: Tensor
    keys: Tensor
    codes: Tensor | None
    picture: Tensor

    def cut(self, start: int, stop: int) -> _Rows:
        part = slice(start, stop)
        return _Rows(self.queries[part], self.keys[part], self.codes, self.picture[part])

    def repeated(self, sequences: int, nq: int, nk: int) -> _Rows:
        """The same rows in so many sequences of ``nq`` and ``nk`` blocks that stand one behind the other."""
        if sequences == 1:
            return self
        at = torch.arange(sequences, device=self.queries.device)[:, None]
        queries, keys = (self.queries + at * nq).flatten(), (self.keys + at[..., None] * nk).flatten(0, 1)
        return _Rows(queries, keys, self.codes, self.picture.repeat(sequences))

    def code(self) -> Tensor | None:
        """The pictures of these rows: one if it is the same for all, else one a row."""
        if self.codes is None:
            return None
        return self.codes[self.picture[:1] if bool((self.picture == self.picture[0]).all()) else self.picture]


@dataclass(frozen=True)
class _Plan:
    """rows: query blocks that visit anything. blind ``(q_len,)``: queries that see nothing; None: there are none."""

    rows: list[_Rows]
    blind: Tensor | None


_Index = Callable[[Tensor, Tensor], Tensor]
_plans: WeakKeyDictionary[BlockLayout, WeakKeyDictionary[_Index, _Plan | None]] = WeakKeyDictionary()


def _no_bias(query: Tensor, key: Tensor) -> Tensor:
    return (query + key) * 0


def _plan(layout: BlockLayout, bias: TableBias | None) -> _Plan | None:
    """The plan of a layout under a rule of biases, made once; None if its masks are too many to keep."""
    kept = _plans.setdefault(layout, WeakKeyDictionary())
    index = _no_bias if bias is None else bias.index
    if index not in kept:
        kept[index] = _made(layout, bias)
    return kept[index]


@torch.compiler.disable
@torch.inference_mode(False)
def _made(layout: BlockLayout, bias: TableBias | None) -> _Plan | None:
    visit, device = layout.visit[0, 0], layout.visit.device
    counts = visit.sum(-1)
    blind = torch.ones(len(visit), layout.block_q, dtype=torch.bool, device=device)
    plan: list[_Rows] = []
    spent = 0
    for count in counts[counts > 0].unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        keys = visit[rows].to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :count]
        step = max(_EVALUATED // (layout.block_q * count * layout.block_k), 1)
        pictures, picture = Pictures(), []
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            codes = _codes(layout, bias, rows[part], keys[part])
            nothing = (codes < 0).all(-1)
            blind[rows[part]] = nothing
            # A row with nothing to see is given every key and zeroed afterwards, so that nothing is ever NaN.
            codes.masked_fill_(nothing[..., None], 0)
            picture += pictures.add(codes)
            if spent + pictures.bytes > _KEPT:
                return None
        spent += pictures.bytes
        found = torch.tensor(picture, device=device)
        order = found.argsort(stable=True)
        plan += _masked_apart(_Rows(rows[order], keys[order], torch.stack(pictures.rows), found[order]), bias is None)
    hidden = blind.flatten()[: layout.q_len]
    return _Plan(plan, hidden if bool(hidden.any()) else None)


def _codes(layout: BlockLayout, bias: TableBias | None, rows: Tensor, keys: Tensor) -> Tensor:
    """Places in the bias table ``(rows, block_q, slots * block_k)`` (0 without one), -1 where a pair is not seen."""
    device = rows.device
    at_q = (rows[:, None] * layout.block_q + torch.arange(layout.block_q, device=device))[..., None]
    at_k = (keys[..., None] * layout.block_k + torch.arange(layout.block_k, device=device)).flatten(1)[:, None]
    query, key = at_q.clamp_max(layout.q_len - 1), at_k.clamp_max(layout.k_len - 1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    # Rows after the end show what the last query sees: they are cut off, and tiles stay alike.
    seen = layout.mask.mod(layout.q_len, layout.k_len)(zero, zero, query, key) & (at_k < layout.k_len)
    places = _no_bias(query, key) if bias is None else bias.entries(query, key)
    return torch.where(seen, places, -1)


def _masked_apart(rows: _Rows, plain: bool) -> list[_Rows]:
    """Rows that need no mask (where there is no bias) apart from those that do."""
    assert rows.codes is not None
    masked = (rows.codes < 0).flatten(1).any(-1)[rows.picture] if plain else torch.ones_like(rows.picture).bool()
    parts = []
    for some, codes in ((True, rows.codes), (False, None)):
        chosen = masked if some else ~masked
        if bool(chosen.any()):
            parts.append(_Rows(rows.queries[chosen], rows.keys[chosen], codes, rows.picture[chosen]))
    return parts


def _blocks(tensor: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """``(sequences, heads, length, dim)`` -> ``(all blocks, block * heads * dim)``: one gathered row is a block of all
    heads."""
    short = -tensor.shape[2] % block
    padded = F.pad(tensor, (0, 0, 0, short)) if short else tensor
    return padded.to(dtype).transpose(1, 2).reshape(-1, block * tensor.shape[1] * tensor.shape[3])


def _groups(plan: _Plan, layout: BlockLayout, sequences: int, width: int) -> Iterator[_Rows]:
    """Rows of so many sequences, cut so that their gathered keys, ``width`` elements a block, stay within a group's
    size, and rows of one picture go together."""
    nq, nk = layout.visit.shape[-2:]
    for rows in plan.rows:
        runs = [len(rows.queries)]
        if rows.codes is not None:
            runs = rows.picture.unique_consecutive(return_counts=True)[1].tolist()
        start = 0
        for length in _pieces(runs, max(_GROUP // (rows.keys.shape[1] * width * sequences), 1)):
            yield rows.cut(start, start + length).repeated(sequences, nq, nk)
            start += length


def _pieces(runs: list[int], step: int) -> Iterator[int]:
    """Lengths of at most ``step`` that cut runs of like rows; rows that are like no other share a piece."""
    loose = 0
    for run in runs:
        if loose and (run > 1 or loose == step):
            yield loose
            loose = 0
        if run == 1:
            loose += 1
            continue
        for begin in range(0, run, step):
            yield min(step, run - begin)
    if loose:
        yield loose


def _mask(group: _Rows, heads: int, table: Tensor | None, work: torch.dtype) -> Tensor | None:
    """What is added to the scores of a group, ``(rows, heads, block_q, keys)``."""
    code = group.code()
    if code is None:
        return None
    if table is None:
        added = torch.zeros(code.shape, dtype=work)[:, None]
    else:
        added = table.to(work).index_select(1, code.clamp_min(0).flatten())
        added = added.view(len(table), *code.shape).transpose(0, 1)
    added = added.masked_fill((code < 0)[:, None], float("-inf"))
    return added.expand(len(group.queries), heads, -1, -1)


class SharedBlocks(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward goes through torch's own fused backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        layout: BlockLayout,
        scale: float,
        bias: TableBias | None,
    ) -> tuple[Tensor, Tensor]:
        work, (batch, heads, q_len, dim) = accumulation_dtype(query.dtype), query.shape
        plan = _plan(layout, bias)
        assert plan is not None
        outs, lses = [], []
        for part_of_batch in _stretches(layout, batch, heads * dim):
            q, k, v = (t[part_of_batch] for t in (query, key, value))
            queries, keys, values = _in_blocks(q, k, v, layout, work)
            sequences = len(q)
            out = torch.zeros_like(queries)
            lse = queries.new_full((len(queries), heads, layout.block_q), float("-inf"))
            for group in _groups(plan, layout, sequences, layout.block_k * heads * dim):
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *_heads_first(queries, keys, values, group, heads, dim),
                    attn_mask=_mask(group, heads, table, work),
                    scale=scale,
                )
                out[group.queries] = part.transpose(1, 2).flatten(1)
                lse[group.queries] = part_lse.to(lse.dtype)
            outs.append(_tokens(out, sequences, heads, dim, q_len))
            lses.append(lse.unflatten(0, (sequences, -1)).transpose(1, 2).flatten(2)[..., :q_len])
        whole, whole_lse = torch.cat(outs), torch.cat(lses)
        if plan.blind is not None:
            whole = whole.masked_fill(plan.blind[:, None], 0)
            whole_lse = whole_lse.masked_fill(plan.blind, float("-inf"))
        whole = whole.to(query.dtype)
        ctx.save_for_backward(query, key, value, table, whole, whole_lse)
        ctx.layout, ctx.scale, ctx.bias = layout, scale, bias
        ctx.mark_non_differentiable(whole_lse)
        return whole, whole_lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, table, whole, whole_lse = ctx.saved_tensors
        layout: BlockLayout = ctx.layout
        work, (batch, heads, q_len, dim) = whole_lse.dtype, query.shape
        plan = _plan(layout, ctx.bias)
        assert plan is not None
        if plan.blind is not None:
            grad_out, whole_lse = grad_out.masked_fill(plan.blind[:, None], 0), whole_lse.masked_fill(plan.blind, 0)
        grads: list[list[Tensor]] = [[], [], []]
        grad_table = None if table is None or not ctx.needs_input_grad[3] else torch.zeros_like(table, dtype=work)
        short = -q_len % layout.block_q
        for part_of_batch in _stretches(layout, batch, heads * dim):
            q, k, v = (t[part_of_batch] for t in (query, key, value))
            queries, keys, values = _in_blocks(q, k, v, layout, work)
            sequences = len(q)
            out, grad = (_blocks(t[part_of_batch], layout.block_q, work) for t in (whole, grad_out))
            padded = F.pad(whole_lse[part_of_batch], (0, short))
            lse = padded.unflatten(2, (-1, layout.block_q)).transpose(1, 2).flatten(0, 1)
            totals = [torch.zeros_like(t) for t in (queries, keys, values)]
            for group in _groups(plan, layout, sequences, layout.block_k * heads * dim):
                rows, mask = len(group.queries), _mask(group, heads, table, work)
                grad_here, out_here = (
                    t.index_select(0, group.queries).view(rows, -1, heads, dim).transpose(1, 2) for t in (grad, out)
                )
                inputs, lse_here = _heads_first(queries, keys, values, group, heads, dim), lse[group.queries]
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad_here,
                    *inputs,
                    out_here,
                    lse_here.contiguous(),
                    0.0,
                    False,
                    attn_mask=mask,
                    scale=ctx.scale,
                )
                grad_queries, *grad_pairs = (p.transpose(1, 2).flatten(1) for p in parts)
                totals[0][group.queries] = grad_queries
                for total, part in zip(totals[1:], grad_pairs, strict=True):
                    total.index_add_(0, group.keys.flatten(), part.reshape(-1, total.shape[1]))
                if grad_table is not None:
                    slopes = _slopes(inputs, ctx.scale, mask, lse_here, out_here, grad_here)
                    _add_to_table(grad_table, group, slopes)
            for kept, total, length in zip(grads, totals, (q_len, key.shape[2], key.shape[2]), strict=True):
                kept.append(_tokens(total, sequences, heads, dim, length))
        grad_query, grad_key, grad_value = (torch.cat(kept) for kept in grads)
        kv_heads = key.shape[1]
        return (
            grad_query.to(query.dtype),
            fold_groups(grad_key, kv_heads).to(key.dtype),
            fold_groups(grad_value, kv_heads).to(value.dtype),
            None if grad_table is None else grad_table.to(table.dtype),
            None,
            None,
            None,
        )


def _slopes(
    inputs: tuple[Tensor, ...],
    scale: float,
    mask: Tensor | None,
    lse: Tensor,
    out: Tensor,
    grad: Tensor,
) -> Tensor:
    """Gradient of the scores of a group, ``(rows, heads, block_q, keys)``, which torch's backward keeps to itself."""
    queries, keys, values = inputs
    scores = (queries * scale) @ keys.transpose(-1, -2)
    if mask is not None:
        scores += mask
    # No score exceeds its row's log-sum-exp, but in a row with nothing to see, whose gradient is zero.
    weights = scores.sub_(lse[..., None]).clamp_max_(0).exp_()
    toward = grad @ values.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)
    return toward.mul_(weights)


def _add_to_table(grad_table: Tensor, group: _Rows, slopes: Tensor) -> None:
    code = group.code()
    assert code is not None
    if len(code) == 1:
        slopes = slopes.sum(0, keepdim=True)
    by_head = slopes.transpose(0, 1).flatten(1)
    if len(grad_table) == 1:
        by_head = by_head.sum(0, keepdim=True)
    places = code.flatten()
    seen = (places >= 0).nonzero()[:, 0]
    grad_table.scatter_add_(1, places[seen].long().expand(len(grad_table), -1), by_head.index_select(1, seen))


def _stretches(layout: BlockLayout, batch: int, width: int) -> Iterator[slice]:
    """Sequences that go together: many short ones, a long one alone."""
    step = max(_GROUP // (max(layout.q_len, layout.k_len) * width), 1)
    return (slice(start, start + step) for start in range(0, batch, step))


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (expand_groups(t, query.shape[1]) for t in (key, value))
    return (
        _blocks(query, layout.block_q, work),
        _blocks(keys, layout.block_k, work),
        _blocks(values, layout.block_k, work),
    )


def _tokens(blocks: Tensor, sequences: int, heads: int, dim: int, length: int) -> Tensor:
    """The inverse of :func:`_blocks`."""
    return blocks.view(sequences, -1, heads, dim).transpose(1, 2)[:, :, :length]


def _heads_first(
    queries: Tensor, keys: Tensor, values: Tensor, group: _Rows, heads: int, dim: int
) -> tuple[Tensor, ...]:
    """Queries of a group and the tokens of their key blocks, each ``(rows, heads, tokens, dim)``."""
    rows, flat = len(group.queries), group.keys.flatten()
    taken = (queries.index_select(0, group.queries), keys.index_select(0, flat), values.index_select(0, flat))
    return tuple(t.view(rows, -1, heads, dim).transpose(1, 2) for t in taken)
