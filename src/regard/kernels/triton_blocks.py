"""Block-sparse attention as Triton kernels: forward with tiles that may be skipped, and backward.

A program takes the rows of a query block, or of one of its ``warps`` parts, and walks over the key blocks of its list
with a running maximum, sum and output, as a fused kernel does. A tile whose scores all lie far below the running
maxima is left before its exponentials and its product with the values; which ones were computed to the end can be
written down. Gradients of queries come from the same walk; those of keys and values from a walk over the transposed
lists, block by block, with all query heads of a group in turn. No atomic operation: the same call gives the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels.block_plan import Plan, plan_of
from regard.kernels.triton_base import load_rows, on_device, padded, precision, require_triton, store_rows
from regard.layout import BlockLayout

__all__ = ["TritonBlocks", "skipping_forward"]


@triton.jit
def _scores(
    queries: tl.tensor,
    keys: tl.tensor,
    masks: tl.tensor,
    tile: tl.tensor,
    row: tl.tensor,
    shown: tl.tensor,
    inside: tl.tensor,
    scale: tl.tensor,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Logits of a tile, ``-inf`` for pairs not seen; ``row``: of the query block, for its mask."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    seen = shown[:, None] & inside[None, :]
    if tile >= 0:
        at = (tile.to(tl.int64) * BLOCK_Q + row[:, None]) * BLOCK_K + tl.arange(0, COLUMNS)[None, :]
        seen = seen & (tl.load(masks + at, mask=seen, other=0) != 0)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _forward(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    masks: tl.tensor,
    lists: tl.tensor,
    starts: tl.tensor,
    columns: tl.tensor,
    tiles: tl.tensor,
    limits: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    counted: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    q_len: tl.tensor,
    k_len: tl.tensor,
    q_blocks: tl.tensor,
    k_blocks: tl.tensor,
    scale: tl.tensor,
    WARPS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    unit = tl.program_id(0).to(tl.int64)
    block = unit // WARPS
    lane = block // q_blocks
    kv_lane = lane // heads * (heads // group) + lane % heads // group
    row = unit % WARPS * PART + tl.arange(0, ROWS)
    token = block % q_blocks * BLOCK_Q + row
    shown = (tl.arange(0, ROWS) < PART) & (token < q_len)
    queries = load_rows(query, lane * q_len + token, shown, HEAD, HEAD_PAD)
    limit = tl.load(limits + lane % heads)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, VALUE_PAD), tl.float32)
    number = tl.load(lists + block)
    for entry in range(tl.load(starts + number), tl.load(starts + number + 1)):
        column = tl.load(columns + entry)
        key_token = column * BLOCK_K + tl.arange(0, COLUMNS)
        inside = (tl.arange(0, COLUMNS) < BLOCK_K) & (key_token < k_len)
        keys = load_rows(key, kv_lane * k_len + key_token, inside, HEAD, HEAD_PAD)
        scores = _scores(queries, keys, masks, tl.load(tiles + entry), row, shown, inside, scale,
                         BLOCK_Q, BLOCK_K, COLUMNS, PRECISION)  # fmt: skip
        local = tl.max(scores, 1)
        best = tl.max(tl.where(local == float("-inf"), float("-inf"), local - top), 0)
        if COUNT:
            # 1: some pair is seen; 2: and the tile is computed to the end.
            state = tl.where(best > limit, 2, tl.where(best > float("-inf"), 1, 0))
            tl.store(counted + unit * k_blocks + column, state.to(tl.int8))
        if best > limit:
            values = load_rows(value, kv_lane * k_len + key_token, inside, VALUE, VALUE_PAD)
            new = tl.maximum(top, local)
            base = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp(scores - base[:, None])
            fade = tl.exp(top - base)
            total = total * fade + tl.sum(weights, 1)
            summed = summed * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
            top = new
    some = tl.where(total > 0, total, 1.0)
    store_rows(out, lane * q_len + token, shown, summed / some[:, None], VALUE, VALUE_PAD)
    tl.store(lse + lane * q_len + token, tl.where(total > 0, top + tl.log(some), float("-inf")), mask=shown)


@triton.jit
def _slopes(
    queries: tl.tensor,
    grads: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    base: tl.tensor,
    delta: tl.tensor,
    scores: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Weights of a tile, and the gradient of its logits."""
    # A row that sees nothing has no pair here; its log-sum-exp must not make a NaN of what is thrown away.
    weights = tl.exp(scores - tl.where(base == float("-inf"), 0.0, base)[:, None])
    slope = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    return weights, weights * (slope - delta[:, None])


@triton.jit
def _backward_query(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    masks: tl.tensor,
    lists: tl.tensor,
    starts: tl.tensor,
    columns: tl.tensor,
    tiles: tl.tensor,
    grad_query: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    q_len: tl.tensor,
    k_len: tl.tensor,
    q_blocks: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    lane = block // q_blocks
    kv_lane = lane // heads * (heads // group) + lane % heads // group
    row = tl.arange(0, ROWS)
    token = block % q_blocks * BLOCK_Q + row
    shown = (row < BLOCK_Q) & (token < q_len)
    at = lane * q_len + token
    queries = load_rows(query, at, shown, HEAD, HEAD_PAD)
    grads = load_rows(grad, at, shown, VALUE, VALUE_PAD)
    base = tl.load(lse + at, mask=shown, other=0.0)
    row_delta = tl.load(delta + at, mask=shown, other=0.0)
    summed = tl.zeros((ROWS, HEAD_PAD), tl.float32)
    number = tl.load(lists + block)
    for entry in range(tl.load(starts + number), tl.load(starts + number + 1)):
        key_token = tl.load(columns + entry) * BLOCK_K + tl.arange(0, COLUMNS)
        inside = (tl.arange(0, COLUMNS) < BLOCK_K) & (key_token < k_len)
        keys = load_rows(key, kv_lane * k_len + key_token, inside, HEAD, HEAD_PAD)
        values = load_rows(value, kv_lane * k_len + key_token, inside, VALUE, VALUE_PAD)
        scores = _scores(queries, keys, masks, tl.load(tiles + entry), row, shown, inside, scale,
                         BLOCK_Q, BLOCK_K, COLUMNS, PRECISION)  # fmt: skip
        _, slope = _slopes(queries, grads, keys, values, base, row_delta, scores, PRECISION)
        summed += tl.dot(slope.to(keys.dtype), keys, input_precision=PRECISION)
    store_rows(grad_query, at, shown, summed * scale, HEAD, HEAD_PAD)


@triton.jit
def _backward_key(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    masks: tl.tensor,
    offsets: tl.tensor,
    blocks: tl.tensor,
    tiles: tl.tensor,
    grad_key: tl.tensor,
    grad_value: tl.tensor,
    q_len: tl.tensor,
    k_len: tl.tensor,
    q_blocks: tl.tensor,
    k_blocks: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    number = tl.program_id(0).to(tl.int64)
    key_token = number % k_blocks * BLOCK_K + tl.arange(0, COLUMNS)
    inside = (tl.arange(0, COLUMNS) < BLOCK_K) & (key_token < k_len)
    held = number // k_blocks * k_len + key_token
    keys = load_rows(key, held, inside, HEAD, HEAD_PAD)
    values = load_rows(value, held, inside, VALUE, VALUE_PAD)
    summed_key = tl.zeros((COLUMNS, HEAD_PAD), tl.float32)
    summed_value = tl.zeros((COLUMNS, VALUE_PAD), tl.float32)
    row = tl.arange(0, ROWS)
    for entry in range(tl.load(offsets + number), tl.load(offsets + number + 1)):
        block = tl.load(blocks + entry)
        token = block % q_blocks * BLOCK_Q + row
        shown = (row < BLOCK_Q) & (token < q_len)
        at = block // q_blocks * q_len + token
        queries = load_rows(query, at, shown, HEAD, HEAD_PAD)
        grads = load_rows(grad, at, shown, VALUE, VALUE_PAD)
        base = tl.load(lse + at, mask=shown, other=0.0)
        row_delta = tl.load(delta + at, mask=shown, other=0.0)
        scores = _scores(queries, keys, masks, tl.load(tiles + entry), row, shown, inside, scale,
                         BLOCK_Q, BLOCK_K, COLUMNS, PRECISION)  # fmt: skip
        weights, slope = _slopes(queries, grads, keys, values, base, row_delta, scores, PRECISION)
        summed_value += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
        summed_key += tl.dot(tl.trans(slope.to(queries.dtype)), queries, input_precision=PRECISION)
    store_rows(grad_key, held, inside, summed_key * scale, HEAD, HEAD_PAD)
    store_rows(grad_value, held, inside, summed_value, VALUE, VALUE_PAD)


@dataclass
class _Run:
    """What all kernels of a call share."""

    query: Tensor
    key: Tensor
    value: Tensor
    layout: BlockLayout
    scale: float

    def __post_init__(self) -> None:
        require_triton(self.query, "gather")
        self.query, self.key, self.value = (t.contiguous() for t in (self.query, self.key, self.value))
        self.plan: Plan = plan_of(self.layout)
        self.batch, self.heads = self.query.shape[:2]
        self.kv_heads = self.key.shape[1]
        self.q_blocks, self.k_blocks = self.layout.visit.shape[2:]
        masks = self.plan.visible(self.layout).to(torch.uint8)
        self.masks = masks if masks.numel() else masks.new_zeros(1)
        numbers = torch.arange(self.plan.batch * self.plan.heads * self.q_blocks, device=self.query.device)
        shape = (self.batch, self.heads, self.q_blocks)
        self.lists = numbers.view(self.plan.batch, self.plan.heads, -1).expand(shape).contiguous()

    def constants(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        head, value = self.query.shape[3], self.value.shape[3]
        return {
            "BLOCK_Q": self.layout.block_q,
            "BLOCK_K": self.layout.block_k,
            "COLUMNS": padded(self.layout.block_k),
            "HEAD": head,
            "HEAD_PAD": padded(head),
            "VALUE": value,
            "VALUE_PAD": padded(value),
            "PRECISION": precision(self.query.dtype),
        }

    def forward(self, limits: Tensor | None, warps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp, and with ``limits`` the state of each tile ``(units, num_k_blocks)``."""
        part = self.layout.block_q // warps
        units = self.batch * self.heads * self.q_blocks * warps
        out = self.query.new_empty(*self.query.shape[:3], self.value.shape[-1])
        lse = torch.empty(self.query.shape[:3], dtype=torch.float32, device=self.query.device)
        counted = torch.zeros(units if limits is not None else 1, self.k_blocks, dtype=torch.int8, device=out.device)
        bars = torch.full((self.heads,), -math.inf, device=out.device) if limits is None else limits
        with on_device(self.query):
            _forward[(units,)](
                self.query,
                self.key,
                self.value,
                self.masks,
                self.lists,
                self.plan.starts,
                self.plan.columns,
                self.plan.tiles,
                bars,
                out,
                lse,
                counted,
                self.heads,
                self.heads // self.kv_heads,
                self.layout.q_len,
                self.layout.k_len,
                self.q_blocks,
                self.k_blocks,
                self.scale,
                WARPS=warps,
                PART=part,
                ROWS=padded(part),
                COUNT=limits is not None,
                **self.constants(),
            )
        return out, lse, counted

    def turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each key block of each lane, the query blocks that visit it: where their list begins, which they are
        among all (batch, head, block), and the mask that each needs."""
        plan, device = self.plan, self.query.device
        numbers = self.lists.flatten()
        counts = plan.starts.diff()[numbers]
        block = torch.arange(len(numbers), device=device).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts)[block]
        entry = plan.starts[numbers[block]] + torch.arange(len(block), device=device) - first
        head = block.div(self.q_blocks, rounding_mode="floor")
        group = self.heads // self.kv_heads
        lane = head.div(self.heads, rounding_mode="floor") * self.kv_heads + head % self.heads // group
        owner = lane * self.k_blocks + plan.columns[entry]
        order = owner.argsort(stable=True)
        size = self.batch * self.kv_heads * self.k_blocks
        offsets = torch.zeros(size + 1, dtype=torch.int64, device=device)
        offsets[1:] = owner.bincount(minlength=size).cumsum(0)
        return offsets, block[order], plan.tiles[entry][order]

    def backward(self, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        grads = torch.empty_like(self.query), torch.empty_like(self.key), torch.empty_like(self.value)
        lengths = (self.layout.q_len, self.layout.k_len)
        rows, group = padded(self.layout.block_q), self.heads // self.kv_heads
        given = (self.query, self.key, self.value, grad, lse, delta, self.masks)
        lists = (self.lists, self.plan.starts, self.plan.columns, self.plan.tiles)
        with on_device(self.query):
            _backward_query[(self.lists.numel(),)](
                *given,
                *lists,
                grads[0],
                self.heads,
                group,
                *lengths,
                self.q_blocks,
                self.scale,
                ROWS=rows,
                **self.constants(),
            )
            _backward_key[(self.batch * self.kv_heads * self.k_blocks,)](
                *given,
                *self.turned(),
                *grads[1:],
                *lengths,
                self.q_blocks,
                self.k_blocks,
                self.scale,
                ROWS=rows,
                **self.constants(),
            )
        return grads


class TritonBlocks(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward forms the scores again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, _ = _Run(query, key, value, layout, scale).forward(None, 1)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        delta = (grad_out.float() * out.float()).sum(-1) - grad_lse
        run = _Run(query, key, value, ctx.layout, ctx.scale)
        return *run.backward(grad_out.to(query.dtype).contiguous(), lse, delta), None, None


def skipping_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float, limits: Tensor, warps: int
) -> tuple[Tensor, Tensor]:
    """Output, and per tile ``(batch, heads, num_q_blocks * warps, num_k_blocks)`` int8: 0 where nothing is seen, 1
    where all scores lie at least ``-limits (num_heads,)`` nats below the running maxima of their rows, 2 where it is
    computed to the end. No gradient passes."""
    out, _, counted = _Run(query, key, value, layout, scale).forward(limits, warps)
    return out, counted.view(*query.shape[:2], -1, counted.shape[-1])
