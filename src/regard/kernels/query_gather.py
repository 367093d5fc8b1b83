"""The form of block-sparse attention for rows of single queries: key block by key block.

For each key block the queries that visit it are gathered and attend to it, and the parts of a query are merged by their
log-sum-exp; recomputed in a hand-written backward pass. Where each query has blocks of its own, gathering keys per row
would copy far more than it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.shapes import accumulation_dtype, cut_blocks, take_blocks
from regard.layout import BlockLayout
from regard.masks import Causal

__all__ = ["MergedBlocks"]

# Scores of one group stay below this many elements, so that they live in the cache between the two products.
_GROUP = 1 << 20
# Parts that wait to be merged, and the lists of who visits whom, stay below this many elements.
_PARTS = 1 << 24
_FUSED = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


@dataclass(frozen=True)
class _Group:
    """Key blocks that are computed together, with equally many gathered query blocks each."""

    keys: Tensor  # (rows,) index of each key block among all (batch, kv head, block)
    queries: Tensor  # (rows, slots) index of each query block among all (batch, head, block); one past the end: none
    masked: bool  # whether the mask hides pairs inside these blocks
    tail: Tensor | None  # (rows,), True for the short last key block


@dataclass(frozen=True)
class _Plan:
    """A layout spread over all (batch, kv head) lanes, and how to cut it."""

    layout: BlockLayout
    batch: int
    heads: int
    kv_heads: int

    def stretches(self, value_dim: int) -> Iterator[tuple[int, int]]:
        """Ranges of lanes whose parts fit the memory bound."""
        nq, lanes = self.layout.visit.shape[2], self.batch * self.kv_heads
        per_row = int(self.layout.visit.count_nonzero()) / self.layout.visit[..., 0].numel()
        group = self.heads // self.kv_heads
        per_lane = max(nq * group * max(per_row * self.layout.block_q * value_dim, self.layout.visit.shape[3]), 1.0)
        step = max(int(_PARTS / per_lane), 1)
        return ((start, min(start + step, lanes)) for start in range(0, lanes, step))

    def _lanes(self, blocks: Tensor, start: int, stop: int) -> Tensor:
        """``(batch | 1, heads | 1, nq, nk)`` -> ``(lanes, nk, group * nq)`` for lanes ``start .. stop - 1``."""
        nq, nk = blocks.shape[-2:]
        wide = blocks.expand(self.batch, self.heads, nq, nk).unflatten(1, (self.kv_heads, -1))
        lane = torch.arange(start, stop, device=blocks.device)
        chosen = wide[lane // self.kv_heads, lane % self.kv_heads]  # (lanes, group, nq, nk)
        return chosen.permute(0, 3, 1, 2).flatten(2)

    def groups(self, start: int, stop: int) -> list[_Group]:
        """The key blocks of some lanes: lists of visiting queries, cut to pieces, pieces of like length together."""
        layout, device = self.layout, self.layout.visit.device
        nq, nk = layout.visit.shape[-2:]
        per_lane = self.heads // self.kv_heads * nq
        visit = self._lanes(layout.visit, start, stop)
        masked = self._lanes(layout.partial, start, stop)
        lists = torch.stack((visit & ~masked, masked), 2).view(
            -1, per_lane
        )  # two lists a key block: without mask, with
        row, column = lists.nonzero(as_tuple=True)
        counts = row.bincount(minlength=len(lists))
        member = row.div(2 * nk, rounding_mode="floor").add_(start).mul_(per_lane).add_(column)
        member = F.pad(member, (0, 1), value=self.batch * self.heads * nq)
        piece = max(_GROUP // (layout.block_q * layout.block_k), 1)
        pieces = (counts + piece - 1).div(piece, rounding_mode="floor")
        owner = torch.arange(len(lists), device=device).repeat_interleave(pieces)
        place = torch.arange(len(owner), device=device) - (pieces.cumsum(0) - pieces)[owner]
        first = (counts.cumsum(0) - counts)[owner] + place * piece
        length = (counts[owner] - place * piece).clamp_max(piece)
        order = (length + (owner % 2) * (piece + 1)).argsort(stable=True)
        sizes, flags = length[order].tolist(), (owner[order] % 2).tolist()
        begin, found = 0, []
        while begin < len(sizes):
            end = begin + 1
            while end < len(sizes) and flags[end] == flags[begin]:
                area = (end + 1 - begin) * sizes[end] * layout.block_q * layout.block_k
                if area > _GROUP or sizes[end] > 1.25 * sizes[begin] + 1:
                    break
                end += 1
            unit = order[begin:end]
            slot = torch.arange(sizes[end - 1], device=device)
            at = torch.where(slot < length[unit][:, None], first[unit][:, None] + slot, len(member) - 1)
            queries, blocks = member[at], owner[unit].div(2, rounding_mode="floor")
            tail = (blocks % nk == nk - 1) if layout.k_len % layout.block_k else None
            found.append(_Group(blocks + start * nk, queries, bool(flags[begin]), tail))
            begin = end
        return found

    def area(self, groups: list[_Group]) -> int:
        """The largest number of scores of a group: one workspace serves all, so that its pages stay warm."""
        return max((g.queries.numel() * self.layout.block_q * self.layout.block_k for g in groups), default=0)

    def scores(self, group: _Group, queries: Tensor, keys: Tensor, space: Tensor) -> Tensor:
        """Masked scores ``(rows, slots * block_q, block_k)``, written to ``space``; queries are already scaled."""
        rows = take_blocks(queries, group.queries)
        area = space[: rows.shape[0] * rows.shape[1] * keys.shape[1]].view(*rows.shape[:2], -1)
        scores = torch.bmm(rows, keys.index_select(0, group.keys).transpose(-1, -2), out=area)
        if group.masked:
            scores.masked_fill_(self._hidden(group.queries, group.keys), float("-inf"))
        if group.tail is not None:
            short = -self.layout.k_len % self.layout.block_k
            scores[..., -short:].masked_fill_(group.tail[:, None, None], float("-inf"))
        return scores

    def fused(
        self, group: _Group, queries: Tensor, keys: Tensor, values: Tensor, part: Tensor, lse: Tensor, total: Tensor
    ) -> bool:
        """Torch's fused CPU attention where it can: without a mask, or on causal squares. Says whether it did."""
        if not _FUSED or queries.device.type != "cpu" or keys.shape[-1] != values.shape[-1] or group.tail is not None:
            return False
        if group.masked and not self._square(group):
            return False
        out, row_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            take_blocks(queries, group.queries)[:, None],
            keys.index_select(0, group.keys)[:, None],
            values.index_select(0, group.keys)[:, None],
            0.0,
            group.masked,
            scale=1.0,
        )
        part.view(out.shape).copy_(out)
        lse.view(row_lse.shape).copy_(row_lse)
        total.fill_(1)
        return True

    def _square(self, group: _Group) -> bool:
        """Whether all key blocks of a group, under a plain causal mask, are visited by the queries on them in order."""
        layout = self.layout
        if not isinstance(layout.mask, Causal) or layout.q_len != layout.k_len or layout.block_q > 1:
            return False
        # The last query of a block sees all of it, and is among those without a mask.
        (nq, nk), count = layout.visit.shape[-2:], group.queries.shape[1]
        own = (group.keys % nk)[:, None] * layout.block_k + torch.arange(count, device=group.keys.device)
        return torch.equal(group.queries % nq, own)

    def _hidden(self, queries: Tensor, keys: Tensor) -> Tensor:
        layout = self.layout
        (nq, nk), device = layout.visit.shape[-2:], queries.device
        token_q = (queries % nq)[..., None] * layout.block_q + torch.arange(layout.block_q, device=device)
        token_k = (keys % nk)[:, None] * layout.block_k + torch.arange(layout.block_k, device=device)
        head = (queries // nq).clamp_max(self.batch * self.heads - 1).repeat_interleave(layout.block_q, 1)[..., None]
        rule, mask = layout.mask.mod(layout.q_len, layout.k_len), layout.mask
        return ~rule(
            torch.zeros_like(head) if mask.batch == 1 else head // self.heads,
            torch.zeros_like(head) if mask.heads == 1 else head % self.heads,
            token_q.clamp_max(layout.q_len - 1).flatten(1)[..., None],
            token_k.clamp_max(layout.k_len - 1)[:, None],
        )


class MergedBlocks(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward forms the scores again, group by group."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        work, (batch, heads, q_len, _) = accumulation_dtype(query.dtype), query.shape
        value_dim = value.shape[-1]
        queries = cut_blocks(query, layout.block_q, work, spare=1) * scale
        keys, values = cut_blocks(key, layout.block_k, work), cut_blocks(value, layout.block_k, work)
        rows, block = queries.shape[:2]
        out, lse = queries.new_zeros(rows, block, value_dim), queries.new_full((rows, block), float("-inf"))
        plan = _Plan(layout, batch, heads, key.shape[1])
        for stretch in plan.stretches(value_dim):
            groups = plan.groups(*stretch)
            if not groups:
                continue
            member = torch.cat([group.queries.flatten() for group in groups])
            parts = queries.new_empty(len(member) * block, value_dim)
            tops, totals = queries.new_empty(len(parts)), queries.new_empty(len(parts))
            space = queries.new_empty(plan.area(groups))
            start = 0
            for group in groups:
                stop = start + group.queries.numel() * block
                here = parts[start:stop], tops[start:stop], totals[start:stop]
                if not plan.fused(group, queries, keys, values, *here):
                    scores = plan.scores(group, queries, keys, space)
                    top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(work).min)
                    weights = scores.sub_(top).exp_()
                    torch.sum(weights, -1, out=here[2].view(weights.shape[:2]))
                    here[1].copy_(top.flatten())
                    torch.bmm(weights, values.index_select(0, group.keys), out=here[0].view(*weights.shape[:2], -1))
                start = stop
            _merge_into(
                out, lse, member, parts.view(-1, block, value_dim), tops.view(-1, block), totals.view(-1, block)
            )
        out = out[:-1].view(batch, heads, -1, value_dim)[:, :, :q_len].to(query.dtype)
        lse = lse[:-1].view(batch, heads, -1)[:, :, :q_len]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        layout: BlockLayout = ctx.layout
        work, (batch, heads, _, head_dim) = lse.dtype, query.shape
        block = layout.block_q
        queries = cut_blocks(query, block, work, spare=1) * ctx.scale
        keys, values = cut_blocks(key, layout.block_k, work), cut_blocks(value, layout.block_k, work)
        grads = cut_blocks(grad_out, block, work, spare=1)
        delta = (grad_out.to(work) * out.to(work)).sum(-1) - grad_lse
        deltas = cut_blocks(delta[..., None], block, work, spare=1)
        # A row that sees nothing, or stands for none, gets an infinite log-sum-exp: its weights are zeros.
        lses = cut_blocks(torch.where(lse.isfinite(), lse, float("inf"))[..., None], block, work, spare=1)
        lses[-1] = float("inf")
        grad_queries = torch.zeros_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        plan = _Plan(layout, batch, heads, key.shape[1])
        for stretch in plan.stretches(value.shape[-1]):
            groups = plan.groups(*stretch)
            space = queries.new_empty(2, plan.area(groups))
            for group in groups:
                member = group.queries.flatten()
                queries_here, grads_here = take_blocks(queries, group.queries), take_blocks(grads, group.queries)
                keys_here, values_here = keys.index_select(0, group.keys), values.index_select(0, group.keys)
                weights = plan.scores(group, queries, keys, space[0]).sub_(take_blocks(lses, group.queries)).exp_()
                grad_values.index_add_(0, group.keys, weights.transpose(-1, -2) @ grads_here)
                slope = space[1, : weights.numel()].view(weights.shape)
                torch.bmm(grads_here, values_here.transpose(-1, -2), out=slope)
                slope.sub_(take_blocks(deltas, group.queries)).mul_(weights)
                grad_queries.index_add_(0, member, (slope @ keys_here).view(-1, block, head_dim))
                grad_keys.index_add_(0, group.keys, slope.transpose(-1, -2) @ queries_here)

        def restore(blocks: Tensor, like: Tensor) -> Tensor:
            return blocks.view(*like.shape[:2], -1, like.shape[-1])[:, :, : like.shape[2]].to(like.dtype)

        grad_query = restore(grad_queries[:-1] * ctx.scale, query)
        return grad_query, restore(grad_keys, key), restore(grad_values, value), None, None


def _merge_into(out: Tensor, lse: Tensor, member: Tensor, parts: Tensor, tops: Tensor, totals: Tensor) -> None:
    """Fill in the rows of ``member`` from their parts: sums of weighted values and of weights, relative to ``tops``."""
    wide = member[:, None].expand_as(tops)
    top = torch.full_like(lse, torch.finfo(lse.dtype).min).scatter_reduce_(0, wide, tops, "amax")
    shares = (tops - top.index_select(0, member)).exp_()
    total = torch.zeros_like(lse).index_add_(0, member, totals * shares)
    out.index_add_(0, member, parts.mul_(shares[..., None]))
    seen = total > 0
    # Rows that these parts do not speak of keep what they have: their sum of weights is zero.
    out.div_(torch.where(seen, total, 1)[..., None])
    lse.copy_(torch.where(seen, top + total.log(), lse))
