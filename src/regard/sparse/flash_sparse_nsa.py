"""Native sparse attention: compressed, selected and windowed keys, a gate over the three; run key block by key block.

Native sparse attention (NSA) of token ``t``, with query heads in groups that share a key/value head:

- *compressed*: windows of ``kernel`` consecutive keys (before rotary positions, plus a vector per place in the window)
  are flattened and times a learned matrix per key/value head, every ``stride`` tokens; values likewise, without the
  vector. Compressed keys take the rotary position of their window's start. Token t sees window j iff its last token
  ``j stride + kernel - 1 <= t``, and ``p_tj`` is the softmax.
- *selected*: ``p`` is summed over the query heads of a group and over the windows that overlap a block of
  ``block_size`` tokens, weighted by how many strides they share. The first ``sinks`` blocks and the ``local`` nearest
  are always taken; with them the ``top_k`` blocks of largest score, none behind the token's own. One softmax over
  their tokens up to t. The choice carries no gradient.
- *window*: softmax over the last ``window`` tokens.

    o_t = sum_i sigmoid(W_g x_t)_i o_t^i,  three scalars per token; then the output projection.

Flash Sparse Attention (FSA) changes the loop order of the selected branch alone: see
:mod:`regard.kernels.selected_blocks`. A group of g heads fills g rows of a tile of ``tile`` in NSA's order
(:func:`padding_cost`); FSA fills its tiles with queries, and pays with a buffer of partial results
(:func:`selected_cost`).

Yan et al., "Flash Sparse Attention: An Alternative Efficient Implementation of Native Sparse Attention Kernel", 2025,
arXiv 2508.18224, sections 2 and 3; NSA: Yuan et al., 2025, arXiv 2502.11089. Layer: ``(batch, length, embed_dim)`` in
and out, causal. Time ``O(N (N / stride + top_k block_size + window) d)``. The released code scores blocks by the first
query head of a group alone, has a window of one key more, and draws the compression from the bounds of the whole
stack of matrices, ``sqrt(head_dim)`` times narrower: ``official=True``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache import DynamicCache, EvictingCache, KeyValueCache
from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import accumulation_dtype, block_sparse_attention, dense_attention, masked_softmax, score_scale
from regard.kernels.selected_blocks import selected_attention
from regard.layers.heads import head_sizes
from regard.layers.padding import layer_keys
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layout import BlockLayout, kept_layout, num_blocks
from regard.masks import Boolean, Causal, Mask, SlidingWindow
from regard.mechanism import Layer, Pattern
from regard.registry import register
from regard.sparse.scoring import grouped_scores

__all__ = [
    "NativeSparseAttention",
    "NativeSparseState",
    "SelectedCost",
    "compressed_attention",
    "compressed_to_block_scores",
    "linear_compress",
    "nsa_topk",
    "padding_cost",
    "selected_cost",
]

Executor = Literal["auto", "query_major", "key_major", "triton", "reference"]
ScoreHeads = Literal["sum", "first"]

# Probabilities over compressed keys that are formed at once on the way to a choice of blocks.
_AREA = 1 << 22


def linear_compress(x: Tensor, weight: Tensor, kernel: int = 32, stride: int = 16, pe: Tensor | None = None) -> Tensor:
    """Windows of ``x (batch, kv_heads, length, dim)`` as one vector each: ``(batch, kv_heads, windows, out_dim)``.

    weight ``(kv_heads, kernel * dim, out_dim)``, rows token by token. pe ``(kv_heads, kernel, dim)`` is added to the
    tokens of each window. ``windows = (length - kernel) // stride + 1``, none for a shorter sequence.
    """
    batch, heads, length, dim = x.shape
    if weight.shape[:2] != (heads, kernel * dim):
        raise ShapeError(
            f"Compressing windows of {kernel} tokens of width {dim} in {heads} heads takes a weight ({heads}, "
            f"{kernel * dim}, out_dim); got {tuple(weight.shape)}."
        )
    if length < kernel:
        return x.new_zeros(batch, heads, 0, weight.shape[2])
    windows = x.unfold(2, kernel, stride).transpose(-1, -2)  # (batch, heads, windows, kernel, dim)
    if pe is not None:
        windows = windows + pe[:, None]
    return windows.flatten(3) @ weight


def compressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: int = 32,
    stride: int = 16,
    *,
    start: int = 0,
    windows: Tensor | None = None,
    score_heads: ScoreHeads = "sum",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries at positions from ``start`` on to compressed keys and values ``(batch, kv_heads, windows,
    dim)``: the output, and the probabilities per key/value head ``(batch, kv_heads, q_len, windows)``, no gradient.

    windows: boolean ``(batch | 1, windows)``, those that may be seen at all. score_heads: probabilities are summed over
    the query heads of a group, or those of its first.
    """
    q_len, count = query.shape[2], key.shape[2]
    if count == 0:
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        return out, query.new_zeros(query.shape[0], key.shape[1], q_len, 0)
    position = torch.arange(start, start + q_len, device=query.device)
    last = torch.arange(count, device=query.device) * stride + (kernel - 1)
    seen = (last <= position[:, None])[None, None]
    if windows is not None:
        seen = seen & windows[:, None, None]
    out = dense_attention(query, key, value, mask=Boolean(seen), scale=scale)
    with torch.no_grad():
        work = accumulation_dtype(query.dtype)
        heads = query.unflatten(1, (key.shape[1], -1))
        if score_heads == "first":
            heads = heads[:, :, :1]
        rows = heads.flatten(1, 2).to(work) * score_scale(query, scale)
        shares = masked_softmax(grouped_scores(rows, key.to(work)), seen)
        return out, shares.unflatten(1, (key.shape[1], -1)).sum(2)


def compressed_to_block_scores(
    shares: Tensor, kernel: int = 32, stride: int = 16, block_size: int = 64, blocks: int | None = None
) -> Tensor:
    """Scores of blocks ``(..., blocks)`` from probabilities of windows ``(..., windows)``.

    A window counts for a block as many times as strides of the one are strides of the other. blocks: how many there
    are (default: those that the windows reach).
    """
    if block_size % stride or kernel % stride:
        raise OptionError(f"stride {stride} must divide kernel {kernel} and block_size {block_size}.")
    per_window, per_block = kernel // stride, block_size // stride
    if blocks is None:
        blocks = num_blocks((shares.shape[-1] - 1) * stride + kernel, block_size)
    ones = shares.new_ones(1, 1, per_block)
    weights = F.conv1d(F.pad(ones, (per_window - 1,) * 2), shares.new_ones(1, 1, per_window)).flatten()
    before = per_window - 1
    behind = (blocks - 1) * per_block + len(weights) - before - shares.shape[-1]
    return F.pad(shares, (before, behind)).unfold(-1, len(weights), per_block) @ weights


def nsa_topk(
    scores: Tensor, top_k: int = 16, *, sinks: int = 1, local: int = 2, block_size: int = 64, start: int = 0
) -> Tensor:
    """Blocks of each query, ``(batch, kv_heads, q_len, slots)`` in rising order, -1 behind the last.

    scores ``(batch, kv_heads, q_len, blocks)`` of queries at positions from ``start`` on. The first ``sinks`` blocks
    and the ``local`` nearest (the own included) come before all others, ties go to earlier blocks, and no block behind
    the query's own is taken. ``slots = min(top_k, blocks)``.
    """
    q_len, count = scores.shape[-2:]
    own = torch.arange(start, start + q_len, device=scores.device).div(block_size, rounding_mode="floor")[:, None]
    block = torch.arange(count, device=scores.device)
    forced = (block < sinks) | (block > own - local)
    ranked = scores.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))
    # A stable sort, so that decoding chooses as the parallel form does, whose rows are longer.
    best = ranked.sort(dim=-1, descending=True, stable=True)
    chosen = best.indices[..., :top_k].masked_fill(best.values[..., :top_k] == float("-inf"), count).sort(-1).values
    return chosen.masked_fill(chosen == count, -1)


def padding_cost(group: int, tile: int = 16) -> float:
    """Rows computed over rows needed where a group of ``group`` query heads fills tiles of at least ``tile`` rows."""
    if group < 1 or tile < 1:
        raise OptionError(f"group and tile count rows, at least 1 each; got {group} and {tile}.")
    return max(tile / group, 1.0)


@dataclass(frozen=True)
class SelectedCost:
    """flops: of the two products. read, written: bytes moved. buffer: bytes held besides inputs and outputs."""

    flops: int
    read: int
    written: int
    buffer: int


def selected_cost(
    executor: Literal["query_major", "key_major"],
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int = 128,
    *,
    block_size: int = 64,
    top_k: int = 16,
    tile: int = 16,
    element_size: int = 2,
) -> SelectedCost:
    """What the selected branch costs on one sequence in either order.

    Query-major reads the keys and values of each listed block for each query, and computes tiles of ``tile`` rows.
    Key-major reads a block once and the queries that list it instead, and writes and reads a float32 part for each.
    """
    if executor not in ("query_major", "key_major"):
        raise OptionError(f"The model knows the orders 'query_major' and 'key_major', not {executor!r}.")
    group = num_heads // num_kv_heads
    listed = sum(min(t // block_size + 1, top_k) for t in range(length)) * num_kv_heads
    products = 4 * group * block_size * head_dim * listed
    queries, blocks = length * num_heads * head_dim * element_size, listed * 2 * block_size * head_dim * element_size
    if executor == "query_major":
        return SelectedCost(round(products * padding_cost(group, tile)), queries + blocks, queries, 0)
    parts = listed * group * (head_dim + 2) * 4
    once = length * num_kv_heads * 2 * head_dim * element_size
    return SelectedCost(
        products, listed * group * head_dim * element_size + once + parts, parts + queries, parts + listed * 8
    )


@dataclass
class NativeSparseState:
    """What decoding keeps. cache: rotated keys and values of all tokens. windows: compressed ones of the full windows.
    open_key, open_value: ``(batch, kv_heads, tokens, head_dim)``, the tokens of windows that are not full yet, before
    rotary positions, fewer than ``kernel``."""

    cache: KeyValueCache
    windows: KeyValueCache
    open_key: Tensor
    open_value: Tensor

    def copy(self) -> NativeSparseState:
        """An independent state of the same content; a step changes the caches of its own in place."""
        return NativeSparseState(self.cache.copy(), self.windows.copy(), self.open_key, self.open_value)


@register("flash_sparse_nsa")
class NativeSparseAttention(Layer):
    """kernel, stride: of the windows that are compressed. block_size, top_k, sinks, local: of the selected blocks.
    window: tokens of the window branch. executor: order of the selected branch (see
    :func:`~regard.kernels.selected_blocks.selected_attention`); it changes speed alone. rotary: rotary positions with
    base ``rotary_base``. official: as the released code, see above.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self",))
    needs_training = True
    growth = "N (N / s + k c + w)"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        kernel: int = 32,
        stride: int = 16,
        block_size: int = 64,
        top_k: int = 16,
        sinks: int = 1,
        local: int = 2,
        window: int = 512,
        executor: Executor = "auto",
        rotary: bool = True,
        rotary_base: float = 10000.0,
        official: bool = False,
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.num_heads, self.rotary_base = num_heads, rotary_base if rotary else None
        if min(kernel, stride, block_size, window) < 1 or kernel % stride or block_size % stride:
            raise OptionError(
                f"stride must divide kernel and block_size, all at least 1, and window be at least 1; got kernel "
                f"{kernel}, stride {stride}, block_size {block_size}, window {window}."
            )
        if sinks < 0 or local < 1 or top_k < sinks + local:
            raise OptionError(
                f"top_k counts the {sinks} first and {local} nearest blocks too, so it is at least their sum, with "
                f"local at least 1; got top_k {top_k}."
            )
        if executor not in ("auto", "query_major", "key_major", "triton", "reference"):
            raise OptionError(
                f"executor is 'auto', 'query_major', 'key_major', 'triton' or 'reference', not {executor!r}."
            )
        self.kernel, self.stride, self.block_size, self.top_k = kernel, stride, block_size, top_k
        self.sinks, self.local, self.executor = sinks, local, executor
        self.window, self.official = window + official, official
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(embed_dim, width, bias=False)
        self.key = nn.Linear(embed_dim, kv_width, bias=False)
        self.value = nn.Linear(embed_dim, kv_width, bias=False)
        self.out = nn.Linear(width, embed_dim, bias=False)
        self.gate = nn.Linear(embed_dim, 3, bias=False)
        shape = (self.num_kv_heads, kernel * self.head_dim, self.head_dim)
        self.compress_key, self.compress_value = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.window_position = nn.Parameter(torch.empty(self.num_kv_heads, kernel, self.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's uniform bounds for every matrix."""
        for linear in (self.query, self.key, self.value, self.out, self.gate):
            nn.init.xavier_uniform_(linear.weight)
        for stack in (self.compress_key, self.compress_value, self.window_position):
            for matrix in [stack] if self.official else stack:
                nn.init.xavier_uniform_(matrix)

    def extra_repr(self) -> str:
        return (
            f"kernel={self.kernel}, stride={self.stride}, block_size={self.block_size}, top_k={self.top_k}, "
            f"window={self.window}, executor={self.executor!r}"
        )

    def forward(self, x: Tensor, *, causal: bool = True, mask: Mask | None = None) -> Tensor:
        """Attend within ``x (batch, length, embed_dim)``. mask: of keys alone (``KeyPadding``); a hidden token counts
        as zeros in its windows, and a window of hidden tokens alone is not seen."""
        if not causal:
            raise UnsupportedPatternError("Native sparse attention is defined for causal attention alone.")
        keys = layer_keys(mask, x.shape[1], x.device, "NativeSparseAttention")
        if keys is not None and keys.shape[1] != 1:
            raise UnsupportedMaskError("NativeSparseAttention hides keys from all heads alike; the mask differs.")
        query, key, value = self._project(x)
        raw = key, value
        if keys is not None:
            raw = key.masked_fill(~keys[..., None], 0), value.masked_fill(~keys[..., None], 0)
        windows = self._compress(raw[0], raw[1], 0)
        query, key = self._rotate(query, 0), self._rotate(key, 0)
        compressed, index = self._compressed(query, *windows, 0, keys)
        return self._mix(
            x, compressed, self._selected(query, key, value, index, keys), self._near(query, key, value, mask)
        )

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> NativeSparseState:
        """The state before the first token. cache: where tokens are kept, any that does not evict."""
        if isinstance(cache, EvictingCache):
            raise OptionError("Native sparse attention finds tokens by their place, so its cache cannot evict any.")
        none = like.new_zeros(batch, self.num_kv_heads, 0, self.head_dim)
        return NativeSparseState(DynamicCache() if cache is None else cache, DynamicCache(), none, none)

    def step(self, x: Tensor, state: NativeSparseState) -> tuple[Tensor, NativeSparseState]:
        """The next token or tokens ``(batch, tokens, embed_dim)``; gives the numbers of :meth:`forward`."""
        start, known = state.cache.seen, state.windows.seen
        query, key, value = self._project(x)
        open_key, open_value = torch.cat((state.open_key, key), 2), torch.cat((state.open_value, value), 2)
        fresh = self._compress(open_key, open_value, known)
        windows = state.windows.append(*fresh) if fresh[0].shape[2] or not known else state.windows.read()
        query = self._rotate(query, start)
        kept = state.cache.append(self._rotate(key, start), value)
        compressed, index = self._compressed(query, windows.key, windows.value, start, None)
        selected = self._selected(query, kept.key, kept.value, index, None)
        out = self._mix(x, compressed, selected, self._near(query, kept.key, kept.value, None))
        used = fresh[0].shape[2] * self.stride
        return out, NativeSparseState(state.cache, state.windows, open_key[:, :, used:], open_value[:, :, used:])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(batch, heads, length, head_dim)``, before rotary positions."""
        if x.dim() != 3 or x.shape[2] != self.query.in_features:
            raise ShapeError(
                f"NativeSparseAttention takes (batch, length, {self.query.in_features}), got {tuple(x.shape)}."
            )
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return query, key, value

    def _compress(self, key: Tensor, value: Tensor, known: int) -> tuple[Tensor, Tensor]:
        """The windows of these tokens, of which the first begins window ``known``."""
        keys = linear_compress(key, self.compress_key, self.kernel, self.stride, self.window_position)
        values = linear_compress(value, self.compress_value, self.kernel, self.stride)
        return self._rotate(keys, known * self.stride, self.stride), values

    def _selected(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, keys: Tensor | None) -> Tensor:
        backend = None if self.executor == "auto" else self.executor
        return cast(Tensor, selected_attention(query, key, value, index, self.block_size, keys=keys, backend=backend))

    def _mix(self, x: Tensor, compressed: Tensor, selected: Tensor, near: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid().transpose(1, 2)[..., None]  # (batch, 3, tokens, 1)
        mixed = gate[:, :1] * compressed + gate[:, 1:2] * selected + gate[:, 2:] * near
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def _rotate(self, x: Tensor, start: int, step: int = 1) -> Tensor:
        if self.rotary_base is None:
            return x
        angles = rotary_angles(
            x.shape[2], self.head_dim, base=self.rotary_base, start=start, step=step, device=x.device, dtype=x.dtype
        )
        return apply_rotary(x, *angles)

    def _compressed(
        self, query: Tensor, key: Tensor, value: Tensor, start: int, keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The compressed branch, and the blocks that it selects; a stretch of queries at a time."""
        batch, heads, length, _ = query.shape
        windows = None
        if keys is not None and key.shape[2]:
            windows = keys[:, 0].unfold(1, self.kernel, self.stride).any(-1)
        step = max(_AREA // (batch * heads * max(key.shape[2], 1)), 64)
        outs, lists = [], []
        for first in range(0, length, step):
            rows, at = query[:, :, first : first + step], start + first
            last = at + rows.shape[2]
            known = slice(0, max((last - self.kernel) // self.stride + 1, 0))
            out, shares = compressed_attention(
                rows,
                key[:, :, known],
                value[:, :, known],
                self.kernel,
                self.stride,
                start=at,
                windows=None if windows is None else windows[:, known],
                score_heads="first" if self.official else "sum",
            )
            blocks = num_blocks(last, self.block_size)
            scores = compressed_to_block_scores(shares, self.kernel, self.stride, self.block_size, blocks)
            index = nsa_topk(
                scores, self.top_k, sinks=self.sinks, local=self.local, block_size=self.block_size, start=at
            )
            outs.append(out)
            lists.append(F.pad(index, (0, self.top_k - index.shape[3]), value=-1))
        return torch.cat(outs, 2), torch.cat(lists, 2)

    def _near(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        """The window branch; keys that no query can reach are left out first."""
        reach = query.shape[2] + self.window - 1
        key, value, rule = key[:, :, -reach:], value[:, :, -reach:], Causal() & SlidingWindow(self.window)
        make, rule = (kept_layout, rule) if mask is None else (BlockLayout.of, rule & mask)
        layout = make(rule, query.shape[2], key.shape[2], 64, 64, query.device)
        return block_sparse_attention(query, key, value, layout)
