"""The key-block-major order of :mod:`regard.kernels.selected_blocks` as Triton kernels, forward and backward.

A program takes a segment of the list of queries of one key block, loads the block once, and walks over the segment in
tiles of ``ROWS`` rows: as many queries as their group of heads leaves room for, so that a group of one fills a tile as
well as a group of sixteen. What it computes for an entry of a query's list (a partial sum of values with its largest
score and sum of weights; in the backward pass a part of the query's gradient) it writes to the place of that entry,
which nobody else writes; a second kernel adds up the entries of each query. Gradients of a block's keys and values
stay in registers over a segment, and a third kernel adds up the segments of each block. No atomic operation: the same
call gives the same bits.

Where it runs: :mod:`regard.kernels.triton_base`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels.selected_blocks import inverse_index
from regard.kernels.triton_base import load_rows, on_device, padded, precision, require_triton, store_rows
from regard.layout import num_blocks

__all__ = ["TritonSelected"]

# Rows of a segment, and elements that the parts of one stretch of queries stay below (1 GiB).
_SEGMENT, _PARTS = 1024, 1 << 28


@triton.jit
def _tile(
    order: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    start: tl.tensor,
    lane: tl.tensor,
    slots: tl.tensor,
    q_len: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Of each row of the tile that begins at ``first``: its place among the parts, its row among all queries and its
    query's position among ``q_len``, and whether it is any."""
    row = tl.arange(0, ROWS)
    at, head = first + row // GROUP, row % GROUP
    real = (row // GROUP < ROWS // GROUP) & (at < last)
    entry = tl.load(order + at, mask=real, other=0)
    token = start + entry // slots - lane * q_len
    return entry * GROUP + head, (lane * GROUP + head) * q_len + token, token, real


@triton.jit
def _seen(
    hidden: tl.tensor,
    lane: tl.tensor,
    key_token: tl.tensor,
    token: tl.tensor,
    real: tl.tensor,
    inside: tl.tensor,
    q_len: tl.tensor,
    k_len: tl.tensor,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """Which pairs of a tile are seen."""
    seen = real[:, None] & inside[None, :] & (key_token[None, :] <= token[:, None] + (k_len - q_len))
    if HIDDEN:
        away = tl.load(hidden + lane * k_len + key_token, mask=inside, other=1)
        seen = seen & (away == 0)[None, :]
    return seen


@triton.jit
def _forward(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    hidden: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    segment_block: tl.tensor,
    segment_first: tl.tensor,
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    lane_first: tl.tensor,
    start: tl.tensor,
    slots: tl.tensor,
    q_len: tl.tensor,
    k_len: tl.tensor,
    blocks: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    block = tl.load(segment_block + tl.program_id(0))
    if block < count:
        first = tl.load(segment_first + tl.program_id(0))
        last = tl.minimum(first + SEGMENT, tl.load(offsets + block + 1))
        lane = lane_first + block // blocks
        key_token = block % blocks * BLOCK + tl.arange(0, COLUMNS)
        inside = (tl.arange(0, COLUMNS) < BLOCK) & (key_token < k_len)
        keys = load_rows(key, lane * k_len + key_token, inside, HEAD, HEAD_PAD)
        values = load_rows(value, lane * k_len + key_token, inside, VALUE, VALUE_PAD)
        for begin in range(first, last, ROWS // GROUP):
            place, row, token, real = _tile(order, begin, last, start, lane, slots, q_len, GROUP, ROWS)
            queries = load_rows(query, row, real, HEAD, HEAD_PAD)
            seen = _seen(hidden, lane, key_token, token, real, inside, q_len, k_len, HIDDEN)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            scores = tl.where(seen, scores, float("-inf"))
            top = tl.max(scores, 1)
            weights = tl.exp(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
            tl.store(tops + place, top, mask=real)
            tl.store(totals + place, tl.sum(weights, 1), mask=real)
            part = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
            store_rows(parts, place, real, part, VALUE, VALUE_PAD)


@triton.jit
def _gather(
    index: tl.tensor,
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    start: tl.tensor,
    slots: tl.tensor,
    q_len: tl.tensor,
    factor: tl.tensor,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    """The entries of a query and head, summed: weighted by their statistics (forward), or plainly, times ``factor``."""
    head = tl.program_id(1)
    local = tl.program_id(0).to(tl.int64)
    unit = start + local
    row = (unit // q_len * GROUP + head) * q_len + unit % q_len
    slot, column = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    listed = tl.load(index + unit * slots + slot, mask=slot < slots, other=-1) >= 0
    place = (local * slots + slot) * GROUP + head
    part = load_rows(parts, place, listed, WIDTH, PADDED)
    if WEIGHTED:
        each = tl.load(tops + place, mask=listed, other=float("-inf"))
        top = tl.max(each, 0)
        shares = tl.exp(each - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(shares * tl.load(totals + place, mask=listed, other=0.0), 0)
        summed = tl.sum(part * shares[:, None], 0) / tl.where(total > 0, total, 1.0)
        tl.store(lse + row, tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf")))
    else:
        summed = tl.sum(part, 0) * factor
    tl.store(out + row * WIDTH + column, summed, mask=column < WIDTH)


@triton.jit
def _backward(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    hidden: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    segment_block: tl.tensor,
    segment_first: tl.tensor,
    parts: tl.tensor,
    key_parts: tl.tensor,
    value_parts: tl.tensor,
    lane_first: tl.tensor,
    start: tl.tensor,
    slots: tl.tensor,
    q_len: tl.tensor,
    k_len: tl.tensor,
    blocks: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    block = tl.load(segment_block + tl.program_id(0))
    if block < count:
        first = tl.load(segment_first + tl.program_id(0))
        last = tl.minimum(first + SEGMENT, tl.load(offsets + block + 1))
        lane = lane_first + block // blocks
        key_token = block % blocks * BLOCK + tl.arange(0, COLUMNS)
        inside = (tl.arange(0, COLUMNS) < BLOCK) & (key_token < k_len)
        keys = load_rows(key, lane * k_len + key_token, inside, HEAD, HEAD_PAD)
        values = load_rows(value, lane * k_len + key_token, inside, VALUE, VALUE_PAD)
        grad_keys = tl.zeros((COLUMNS, HEAD_PAD), tl.float32)
        grad_values = tl.zeros((COLUMNS, VALUE_PAD), tl.float32)
        for begin in range(first, last, ROWS // GROUP):
            place, row, token, real = _tile(order, begin, last, start, lane, slots, q_len, GROUP, ROWS)
            queries = load_rows(query, row, real, HEAD, HEAD_PAD)
            grads = load_rows(grad, row, real, VALUE, VALUE_PAD)
            row_lse = tl.load(lse + row, mask=real, other=0.0)
            row_delta = tl.load(delta + row, mask=real, other=0.0)
            seen = _seen(hidden, lane, key_token, token, real, inside, q_len, k_len, HIDDEN)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            # A row that sees nothing has no pair here; its log-sum-exp must not make a NaN of what is thrown away.
            base = tl.where(row_lse == float("-inf"), 0.0, row_lse)
            weights = tl.exp(tl.where(seen, scores - base[:, None], float("-inf")))
            grad_values += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
            slope = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            slope = (weights * (slope - row_delta[:, None])).to(keys.dtype)
            part = tl.dot(slope, keys, input_precision=PRECISION)
            store_rows(parts, place, real, part, HEAD, HEAD_PAD)
            grad_keys += tl.dot(tl.trans(slope), queries, input_precision=PRECISION)
        held = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, COLUMNS)
        owned = tl.arange(0, COLUMNS) < BLOCK
        store_rows(key_parts, held, owned, grad_keys * scale, HEAD, HEAD_PAD)
        store_rows(value_parts, held, owned, grad_values, VALUE, VALUE_PAD)


@triton.jit
def _sum_segments(parts: tl.tensor, offsets: tl.tensor, out: tl.tensor, AREA: tl.constexpr, STEP: tl.constexpr) -> None:
    """Adds to the ``AREA`` numbers of a block in ``out`` those of its segments in ``parts``."""
    block = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * STEP + tl.arange(0, STEP)
    total = tl.load(out + block * AREA + at, mask=at < AREA, other=0.0)
    for segment in range(tl.load(offsets + block), tl.load(offsets + block + 1)):
        total += tl.load(parts + segment * AREA + at, mask=at < AREA, other=0.0)
    tl.store(out + block * AREA + at, total, mask=at < AREA)


@dataclass(frozen=True)
class _Segments:
    """Stretches of the lists of key blocks. ``block`` and ``first`` ``(segments,)``: of each, its block among those of
    the stretch (as many as there are: no segment) and its first entry in ``order``; ``offsets`` ``(blocks + 1,)``: the
    first entry of each block, ``held`` ``(blocks + 1,)``: its first segment."""

    order: Tensor
    offsets: Tensor
    block: Tensor
    first: Tensor
    held: Tensor


class _Run:
    """What forward and backward share: contiguous inputs, sizes, and the lists of a stretch of queries."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, keys: Tensor | None, block: int, scale: float
    ) -> None:
        require_triton(query, "key_major")
        self.query, self.key, self.value = query.contiguous(), key.contiguous(), value.contiguous()
        self.index = index.reshape(-1, index.shape[3])
        self.hidden = self.index if keys is None else (~keys).to(torch.uint8).contiguous()
        self.q_len, self.k_len, self.lanes = query.shape[2], key.shape[2], key.shape[0] * key.shape[1]
        self.group, self.blocks, self.block = query.shape[1] // key.shape[1], num_blocks(key.shape[2], block), block
        # What a tile holds has to fit a multiprocessor's own memory.
        self.width = max(padded(query.shape[3]), padded(value.shape[3]))
        rows = (32 if query.dtype == torch.float32 else 64) // (2 if self.width > 128 else 1)
        self.scale, self.rows = scale, max(rows, triton.next_power_of_2(self.group))
        # Entries a segment, whole tiles.
        self.segment = self.rows // self.group * max(_SEGMENT // self.rows, 1)

    def stretches(self, dim: int) -> Iterator[tuple[int, int]]:
        """Ranges of queries whose parts fit the memory bound."""
        step = max(_PARTS // max(self.index.shape[1] * self.group * dim, 1), 1)
        return ((start, min(start + step, len(self.index))) for start in range(0, len(self.index), step))

    def lists(self, start: int, stop: int) -> tuple[_Segments, int]:
        """The lists of queries ``start .. stop - 1`` turned around, and the first lane that they belong to. Nothing
        here waits for the device: there may be a few segments too many."""
        index = self.index[start:stop]
        first_lane = start // self.q_len
        count = ((stop - 1) // self.q_len + 1 - first_lane) * self.blocks
        lane = torch.arange(start, stop, device=index.device).div(self.q_len, rounding_mode="floor") - first_lane
        number = torch.where((index < 0) | (index >= self.blocks), count, lane[:, None] * self.blocks + index)
        order, offsets = inverse_index(number.flatten(), count)
        pieces = (offsets.diff() + self.segment - 1).div(self.segment, rounding_mode="floor")
        held = F.pad(pieces.cumsum(0), (1, 0))
        segment = torch.arange(index.numel() // self.segment + min(count, index.numel()), device=index.device)
        block = torch.searchsorted(held[1:], segment, right=True)
        owner = block.clamp_max(count - 1)
        return _Segments(
            order, offsets, block, offsets[owner] + (segment - held[owner]) * self.segment, held
        ), first_lane

    def sizes(self, lists: _Segments, first_lane: int, start: int) -> tuple[Any, ...]:
        """The numbers that both main kernels take, in their order."""
        lengths = (self.index.shape[1], self.q_len, self.k_len, self.blocks, len(lists.offsets) - 1, self.scale)
        return (first_lane, start, *lengths)

    def constants(self) -> dict[str, Any]:
        """What both main kernels are compiled for."""
        head, value = self.query.shape[3], self.value.shape[3]
        return {
            "GROUP": self.group,
            "SEGMENT": self.segment,
            "ROWS": self.rows,
            "BLOCK": self.block,
            "COLUMNS": padded(self.block),
            "HEAD": head,
            "HEAD_PAD": padded(head),
            "VALUE": value,
            "VALUE_PAD": padded(value),
            "HIDDEN": self.hidden is not self.index,
            "PRECISION": precision(self.query.dtype),
            "num_warps": 8 if self.width > 128 else 4,
        }

    def gather(self, stretch: tuple[int, int], out: Tensor, lse: Tensor, *parts: Tensor, factor: float = 1.0) -> None:
        """The second kernel over the queries of a stretch; parts: with or without statistics."""
        start, stop = stretch
        slots, width = self.index.shape[1], out.shape[-1]
        _gather[(stop - start, self.group)](
            self.index,
            parts[0],
            parts[-2],
            parts[-1],
            out,
            lse,
            start,
            slots,
            self.q_len,
            factor,
            GROUP=self.group,
            SLOTS=triton.next_power_of_2(slots),
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            WEIGHTED=len(parts) == 3,
        )


class TritonSelected(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward forms the scores again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        index: Tensor,
        keys: Tensor | None,
        block: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        run = _Run(query, key, value, index, keys, block, scale)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for stretch in run.stretches(value.shape[-1]):
            lists, lane = run.lists(*stretch)
            places = (stretch[1] - stretch[0]) * run.index.shape[1] * run.group
            parts = lse.new_empty(places, value.shape[-1])
            tops, totals = lse.new_empty(2, places)
            with on_device(query):
                _forward[(len(lists.block),)](
                    run.query,
                    run.key,
                    run.value,
                    run.hidden,
                    lists.order,
                    lists.offsets,
                    lists.block,
                    lists.first,
                    parts,
                    tops,
                    totals,
                    *run.sizes(lists, lane, stretch[0]),
                    **run.constants(),
                )
                run.gather(stretch, out, lse, parts, tops, totals)
        ctx.save_for_backward(query, key, value, index, keys, out, lse)
        ctx.block, ctx.scale = block, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, index, keys, out, lse = ctx.saved_tensors
        run = _Run(query, key, value, index, keys, ctx.block, ctx.scale)
        grad = grad_out.to(query.dtype).contiguous()
        delta = (grad_out.float() * out.float()).sum(-1) - grad_lse
        grad_query = torch.empty_like(run.query)
        width = run.blocks * ctx.block
        grad_key, grad_value = (lse.new_zeros(run.lanes, width, x.shape[3]) for x in (key, value))
        for stretch in run.stretches(query.shape[-1]):
            lists, lane = run.lists(*stretch)
            parts = lse.new_empty((stretch[1] - stretch[0]) * run.index.shape[1] * run.group, query.shape[-1])
            segments = [lse.new_empty(len(lists.block), ctx.block, x.shape[3]) for x in (key, value)]
            with on_device(query):
                _backward[(len(lists.block),)](
                    run.query,
                    run.key,
                    run.value,
                    run.hidden,
                    grad,
                    lse,
                    delta,
                    lists.order,
                    lists.offsets,
                    lists.block,
                    lists.first,
                    parts,
                    *segments,
                    *run.sizes(lists, lane, stretch[0]),
                    **run.constants(),
                )
                run.gather(stretch, grad_query, lse, parts, parts, factor=ctx.scale)
                for total, each in zip((grad_key, grad_value), segments, strict=True):
                    area = ctx.block * total.shape[-1]
                    _sum_segments[(len(lists.offsets) - 1, triton.cdiv(area, 1024))](
                        each, lists.held, total[lane:], AREA=area, STEP=1024
                    )

        def restore(blocks: Tensor, like: Tensor) -> Tensor:
            return blocks[:, : like.shape[2]].reshape(like.shape).to(like.dtype)

        return grad_query, restore(grad_key, key), restore(grad_value, value), None, None, None, None
