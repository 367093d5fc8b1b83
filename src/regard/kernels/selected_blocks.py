"""Causal softmax attention of each query over its own short list of key blocks, in two loop orders.

The lists are per key/value head: the query heads of a group share theirs. ``reference``: the dense form under the same
mask. The others differ in speed alone:

- ``query_major``: query by query, its blocks are gathered and its group of heads attends to them as one small matrix
  (NSA; its rows can be filled up to the tile of a matrix unit, which is what small groups cost there);
- ``key_major``: key block by key block, the queries that list it are gathered, as many as there are, so that the size
  of a group does not matter (FSA). What a block gives to a query (a weighted sum of values, the largest score, the sum
  of weights) goes to a place of its own in a buffer; a second pass finds the largest score over its blocks and adds up
  its places. Both directions come from one inverse index, made by counting the block numbers;
- ``triton``: the same order as kernels for GPUs (:mod:`regard.kernels.triton_selected`).

Yan et al., "Flash Sparse Attention: An Alternative Efficient Implementation of Native Sparse Attention Kernel", 2025,
arXiv 2508.18224, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError, OptionError, ShapeError
from regard.kernels.backends import has_triton, resolve
from regard.kernels.dense import dense_attention
from regard.kernels.shapes import accumulation_dtype, cut_blocks, expand_groups, score_scale, take_blocks
from regard.kernels.token_lists import token_list_attention
from regard.layout import num_blocks
from regard.masks import Boolean

__all__ = ["inverse_index", "selected_attention"]

FORMS = ("reference", "query_major", "key_major", "triton")

# Scores of one run of tiles stay below this many elements, so that they live in the cache between the two products.
_GROUP = 1 << 18
# Parts that wait to be added up stay below this many elements.
_PARTS = 1 << 23
# Token numbers of the query-major form stay below this many elements.
_TOKENS = 1 << 22
# Up to so many queries (decoding) lists are too short to be worth turning around.
_FEW = 8


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    block_size: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    tile: int = 1,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` over the tokens of the listed blocks up to the query's own position.

    query ``(batch, num_heads, q_len, head_dim)``, key and value ``(batch, kv_heads, k_len, ...)``; the last query
    stands at the last key. index ``(batch, kv_heads, q_len, slots)`` int64: blocks of ``block_size`` tokens, -1 for an
    empty slot, no block twice in a list. keys ``(batch | 1, kv_heads | 1, k_len)`` boolean: keys that may be seen.
    tile: rows that the query-major form fills each group of query heads up to. Returns ``(batch, num_heads, q_len,
    value_dim)`` and, with ``return_lse``, the log-sum-exp ``(batch, num_heads, q_len)``; a query with nothing to see
    gives zeros (and ``-inf``).
    """
    batch, heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1], key.shape[2]
    if index.dim() != 4 or index.shape[:3] != (batch, kv_heads, q_len) or index.dtype != torch.int64:
        raise ShapeError(
            f"Lists of blocks for {q_len} queries and {kv_heads} key/value heads are int64 ({batch}, {kv_heads}, "
            f"{q_len}, slots), one list for all query heads of a group; got {index.dtype} of {tuple(index.shape)}."
        )
    if block_size < 1 or tile < 1:
        raise OptionError(f"block_size and tile must be at least 1, got {block_size} and {tile}.")
    if keys is not None:
        if keys.dtype != torch.bool or keys.dim() != 3 or keys.shape[2] != k_len:
            raise ShapeError(
                f"keys are boolean (batch, kv_heads, {k_len}), True for visible; got {keys.dtype} {tuple(keys.shape)}."
            )
        keys = keys.expand(batch, kv_heads, -1)
    if not index.shape[3]:
        index = F.pad(index, (0, 1), value=-1)
    form, factor = resolve("selected", backend, FORMS), score_scale(query, scale)
    if form == "auto":
        on_gpu = query.is_cuda and query.dtype != torch.float64 and has_triton()
        form = "query_major" if q_len <= _FEW else "triton" if on_gpu else "key_major"
    if form == "reference":
        mask = Boolean(expand_groups(_seen(index, block_size, k_len, keys), heads))
        if return_lse:
            return dense_attention(query, key, value, mask=mask, scale=scale, return_lse=True, backend="reference")
        return dense_attention(query, key, value, mask=mask, scale=scale, backend="reference")
    out, lse = _run(form, query, key, value, index, keys, block_size, factor, tile)
    return (out, lse) if return_lse else out


# The index work of the forms is no graph: a compiled model calls them as they are.
@torch.compiler.disable
def _run(
    form: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    keys: Tensor | None,
    block_size: int,
    scale: float,
    tile: int,
) -> tuple[Tensor, Tensor]:
    if form == "query_major":
        return _query_major(query, key, value, index, keys, block_size, scale, tile)
    if form == "triton":
        if not has_triton():
            raise BackendError("The triton form needs the package triton, which is not installed; use 'key_major'.")
        from regard.kernels.triton_selected import TritonSelected

        return TritonSelected.apply(query, key, value, index, keys, block_size, scale)
    return _KeyMajor.apply(query, key, value, index, keys, block_size, scale)


def _positions(q_len: int, k_len: int, device: torch.device) -> Tensor:
    return torch.arange(k_len - q_len, k_len, device=device)


def _seen(index: Tensor, block_size: int, k_len: int, keys: Tensor | None) -> Tensor:
    """Boolean ``(batch, kv_heads, q_len, k_len)``: the pairs that are seen."""
    count = num_blocks(k_len, block_size)
    listed = index.new_zeros(*index.shape[:3], count + 1, dtype=torch.bool)
    listed.scatter_(3, torch.where(index < 0, count, index), True)
    seen = listed[..., :count].repeat_interleave(block_size, 3)[..., :k_len]
    token = torch.arange(k_len, device=index.device)
    seen = seen & (token <= _positions(index.shape[2], k_len, index.device)[:, None])
    return seen if keys is None else seen & keys[:, :, None]


def _query_major(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    keys: Tensor | None,
    block_size: int,
    scale: float,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """Lists of blocks as lists of tokens, a stretch of queries at a time."""
    batch, heads, q_len, _ = query.shape
    kv_heads, k_len, group = key.shape[1], key.shape[2], heads // key.shape[1]
    fill = max(tile - group, 0)
    if fill:
        query = F.pad(query.unflatten(1, (kv_heads, group)), (0, 0, 0, 0, 0, fill)).flatten(1, 2)
    position = _positions(q_len, k_len, query.device)[:, None]
    inside = torch.arange(block_size, device=query.device)
    step = max(_TOKENS // max(batch * kv_heads * index.shape[3] * block_size, 1), 1)
    outs, lses = [], []
    for start in range(0, q_len, step):
        rows = slice(start, start + step)
        tokens = (index[:, :, rows, :, None] * block_size + inside).flatten(3)
        shown = (tokens >= 0) & (tokens <= position[rows])
        if keys is not None:
            shown &= keys.gather(2, tokens.clamp(0, k_len - 1).flatten(2)).view(tokens.shape)
        out, lse = token_list_attention(
            query[:, :, rows],
            key,
            value,
            torch.where(shown, tokens, -1),
            1,
            scale=scale,
            return_lse=True,
            backend="gather",
        )
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    if fill:
        out, lse = (x.unflatten(1, (kv_heads, -1))[:, :, :group].flatten(1, 2) for x in (out, lse))
    return out, lse


def inverse_index(number: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Who lists what: ``number (entries,)`` from 0 to ``count``, where ``count`` stands for nothing.

    Returns the entries in order of their numbers, and ``(count + 1,)`` where the entries of each number begin, those of
    ``count`` included. A counting sort, digit by digit, as torch sorts integers stably; the beginnings are read off the
    sorted numbers, so that nobody waits for a GPU to count.
    """
    ordered, order = number.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=number.device))


@dataclass(frozen=True)
class _Tiles:
    """The lists of some queries, turned around: tiles of equally many queries that list the same key block.

    block: ``(tiles,)`` of each tile, among all (batch, kv head, block). rows: ``(tiles, slots)``, its queries among
    all (batch, kv head, query), one past the end for none. masked: the first tile in which a query does not see all
    of the block; those behind it are of that kind too. place: ``(queries, slots)``, where what a query gets from each
    of its blocks lies in the buffer of ``tiles * slots`` parts, one past its end for none.
    """

    block: Tensor
    rows: Tensor
    masked: int
    place: Tensor

    def runs(self, area: int) -> Iterator[tuple[slice, bool]]:
        """Tiles to compute together, given the elements of one, and whether the mask hides something there."""
        step = max(_GROUP // area, 1)
        for first, last, masked in ((0, self.masked, False), (self.masked, len(self.block), True)):
            for start in range(first, last, step):
                yield slice(start, min(start + step, last)), masked


class _Work:
    """What forward and backward share: rows of queries, blocks of keys, tiles, and the scores of a run of them."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, keys: Tensor | None, block: int, scale: float
    ) -> None:
        self.work, self.block = accumulation_dtype(query.dtype), block
        self.batch, self.heads, self.q_len = query.shape[:3]
        self.kv_heads, self.k_len = key.shape[1], key.shape[2]
        self.group, self.blocks = self.heads // self.kv_heads, num_blocks(self.k_len, block)
        self.queries = self.fold(query) * scale
        self.keys, self.values = cut_blocks(key, block, self.work), cut_blocks(value, block, self.work)
        self.index = index.reshape(-1, index.shape[-1])
        self.hidden = None if keys is None else cut_blocks(~keys[..., None], block, torch.bool)[..., 0]

    def fold(self, x: Tensor, spare: float = 0.0) -> Tensor:
        """``(batch, num_heads, q_len, dim)`` -> ``(all queries + 1, group, dim)``; the last row stands for none."""
        rows = x.to(self.work).unflatten(1, (self.kv_heads, self.group)).transpose(2, 3).flatten(0, 2)
        return F.pad(rows, (0, 0, 0, 0, 0, 1), value=spare)

    def unfold(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`fold`, without the last row."""
        split = rows.view(self.batch, self.kv_heads, self.q_len, self.group, rows.shape[-1])
        return split.transpose(2, 3).flatten(1, 2)

    def stretches(self, dim: int) -> Iterator[slice]:
        """Ranges of queries whose parts fit the memory bound."""
        step = max(_PARTS // max(self.index.shape[1] * self.group * dim, 1), 1)
        return (slice(start, start + step) for start in range(0, len(self.index), step))

    def tiles(self, stretch: slice) -> _Tiles:
        index, device = self.index[stretch], self.index.device
        unit = torch.arange(len(self.index), device=device)[stretch]
        lane, position = unit // self.q_len, unit % self.q_len + (self.k_len - self.q_len)
        first = int(lane[0])
        among = (int(lane[-1]) + 1 - first) * self.blocks
        number = (lane[:, None] - first) * self.blocks + index
        masked = (index + 1) * self.block > position[:, None] + 1
        if self.hidden is not None:
            masked |= self.hidden.any(1)[(number + first * self.blocks).clamp_min(0)]
        number = torch.where((index < 0) | (index >= self.blocks), 2 * among, number + among * masked)
        order, offsets = inverse_index(number.flatten(), 2 * among)
        counts = offsets.diff()
        size = _tile_size(int(offsets[-1]), int(counts.count_nonzero()))
        tiles = (counts + size - 1).div(size, rounding_mode="floor")
        owner = torch.arange(2 * among, device=device).repeat_interleave(tiles)
        order = order[: int(offsets[-1])]
        listed = number.flatten()[order]
        rank = torch.arange(len(order), device=device) - offsets[listed]
        place = (tiles.cumsum(0) - tiles)[listed] * size + rank
        rows = unit.new_full((len(owner) * size,), len(self.index))
        rows[place] = unit[order.div(index.shape[1], rounding_mode="floor")]
        back = place.new_full((index.numel(),), len(rows))
        back[order] = place
        return _Tiles(
            owner % among + first * self.blocks,
            rows.view(-1, size),
            int(tiles[:among].sum()),
            back.view(index.shape),
        )

    def scores(self, tiles: _Tiles, run: slice, masked: bool, space: Tensor) -> Tensor:
        """Masked scores ``(tiles, slots * group, block)``, written to ``space``."""
        block, rows = tiles.block[run], tiles.rows[run]
        queries, keys = take_blocks(self.queries, rows), self.keys.index_select(0, block)
        shape = (len(block), queries.shape[1], self.block)
        scores = space[: shape[0] * shape[1] * shape[2]].view(shape)
        torch.bmm(queries, keys.transpose(-1, -2), out=scores)
        if masked:
            position = rows % self.q_len + (self.k_len - self.q_len)
            token = (block % self.blocks)[:, None] * self.block + torch.arange(self.block, device=block.device)
            hidden = token[:, None] > position[..., None]
            if self.hidden is not None:
                hidden |= self.hidden[block][:, None]
            scores.view(*rows.shape, self.group, -1).masked_fill_(hidden[:, :, None], float("-inf"))
        return scores

    def space(self, tiles: _Tiles, count: int = 1) -> Tensor:
        """One workspace serves the scores of all runs, so that its pages stay warm."""
        area = tiles.rows.shape[1] * self.group * self.block
        return self.queries.new_empty(count, max(area, min(_GROUP, len(tiles.block) * area)))

    def gathered(self, parts: Tensor, place: Tensor, shares: Tensor | None = None) -> Tensor:
        """The second pass: sums of ``parts (places + 1, group, dim)`` over the places of each query, ``(queries,
        group, dim)``; shares ``(queries, group, slots)``."""
        group = torch.arange(self.group, device=place.device)[:, None]
        at = (place[:, None] * self.group + group).flatten(0, 1)
        weights = None if shares is None else shares.reshape(at.shape)
        summed = F.embedding_bag(at, parts.flatten(0, 1), mode="sum", per_sample_weights=weights)
        return summed.view(len(place), self.group, -1)


def _tile_size(entries: int, lists: int) -> int:
    """Queries a tile: a power of two between 4 and 64, about half the mean list, so that filling up costs little."""
    half = min(max(entries // (2 * max(lists, 1)), 4), 64)
    return 1 << (half.bit_length() - 1)


class _KeyMajor(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward forms the scores again, tile by tile."""

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
        run = _Work(query, key, value, index, keys, block, scale)
        low = torch.finfo(run.work).min
        out = run.queries.new_zeros(len(run.index), run.group, value.shape[-1])
        lse = run.queries.new_full((len(run.index), run.group, 1), float("-inf"))
        for stretch in run.stretches(value.shape[-1]):
            tiles = run.tiles(stretch)
            places = tiles.rows.numel()
            # The last place is that of an empty slot: it has no weight.
            parts = run.queries.new_empty(places + 1, run.group, value.shape[-1])
            tops = run.queries.new_full((places + 1, run.group), low)
            totals = run.queries.new_zeros(places + 1, run.group)
            parts[-1] = 0
            space, size = run.space(tiles)[0], tiles.rows.shape[1]
            for some, masked in tiles.runs(size * run.group * block):
                here = slice(some.start * size, some.stop * size)
                scores = run.scores(tiles, some, masked, space)
                top = scores.amax(-1, keepdim=True).clamp_min_(low)
                weights = scores.sub_(top).exp_()
                tops[here], totals[here] = top.view(-1, run.group), weights.sum(-1).view(-1, run.group)
                values = run.values.index_select(0, tiles.block[some])
                torch.bmm(weights, values, out=parts[here].view(*weights.shape[:2], -1))
            # The statistics of a query over its blocks, then the sum of its parts.
            each = tops[tiles.place].transpose(1, 2)  # (queries, group, slots)
            top = each.amax(-1, keepdim=True)
            shares = (each - top).exp_()
            total = (totals[tiles.place].transpose(1, 2) * shares).sum(-1, keepdim=True)
            shares /= torch.where(total > 0, total, 1)
            out[stretch] = run.gathered(parts, tiles.place, shares)
            lse[stretch] = torch.where(total > 0, top + total.log(), float("-inf"))
        result, row_lse = run.unfold(out).to(query.dtype), run.unfold(lse)[..., 0]
        ctx.save_for_backward(query, key, value, index, keys, result, row_lse)
        ctx.block, ctx.scale = block, scale
        return result, row_lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, index, keys, out, lse = ctx.saved_tensors
        run = _Work(query, key, value, index, keys, ctx.block, ctx.scale)
        grads = run.fold(grad_out)
        deltas = run.fold(((grad_out.to(run.work) * out.to(run.work)).sum(-1) - grad_lse)[..., None])
        # A row that sees nothing, or stands for none, gets an infinite log-sum-exp: its weights are zeros.
        lses = run.fold(torch.where(lse.isfinite(), lse, float("inf"))[..., None], float("inf"))
        grad_queries = torch.zeros_like(run.queries[:-1])
        grad_keys, grad_values = torch.zeros_like(run.keys), torch.zeros_like(run.values)
        for stretch in run.stretches(query.shape[-1]):
            tiles = run.tiles(stretch)
            parts = run.queries.new_empty(tiles.rows.numel() + 1, run.group, query.shape[-1])
            parts[-1] = 0
            space, size = run.space(tiles, 2), tiles.rows.shape[1]
            for some, masked in tiles.runs(size * run.group * ctx.block):
                block, rows = tiles.block[some], tiles.rows[some]
                grads_here, values_here = take_blocks(grads, rows), run.values.index_select(0, block)
                weights = run.scores(tiles, some, masked, space[0]).sub_(take_blocks(lses, rows)).exp_()
                grad_values.index_add_(0, block, weights.transpose(-1, -2) @ grads_here)
                slope = space[1, : weights.numel()].view(weights.shape)
                torch.bmm(grads_here, values_here.transpose(-1, -2), out=slope)
                slope.sub_(take_blocks(deltas, rows)).mul_(weights)
                here = parts[some.start * size : some.stop * size].view(*weights.shape[:2], -1)
                torch.bmm(slope, run.keys.index_select(0, block), out=here)
                grad_keys.index_add_(0, block, slope.transpose(-1, -2) @ take_blocks(run.queries, rows))
            grad_queries[stretch] = run.gathered(parts, tiles.place)

        def restore(blocks: Tensor, like: Tensor) -> Tensor:
            return blocks.view(*like.shape[:2], -1, like.shape[-1])[:, :, : like.shape[2]].to(like.dtype)

        grad_query = (run.unfold(grad_queries) * ctx.scale).to(query.dtype)
        return grad_query, restore(grad_keys, key), restore(grad_values, value), None, None, None, None
