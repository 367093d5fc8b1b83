"""Attention programmed by plain functions: what a pair scores, who sees whom, how a row of scores becomes weights.

``score = score_mod(scale q k, b, h, q_idx, kv_idx)`` where the mask sees the pair, ``out = rowwise(score) v``. Forms:

- ``eager``: the whole map, one block of keys;
- ``tiled``: tiles of queries against the blocks of keys that the mask needs, merged by the online reduction; the
  backward pass computes a tile again, so that memory is linear in length, forward and backward;
- ``fused``: without ``score_mod`` and with softmax, the kernels for masks and block layouts;
- ``flex``: compiled FlexAttention, softmax alone; forward and backward on a GPU, forward alone on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.errors import BackendError, ShapeError
from regard.kernels.backends import compiled_flex, resolve
from regard.kernels.block_sparse import block_sparse_attention
from regard.kernels.dense import dense_attention
from regard.kernels.elementwise import Elementwise
from regard.kernels.lanes import Lanes, by_lanes, needed
from regard.kernels.rowwise import ROWWISE, Rowwise, State
from regard.kernels.shapes import accumulation_dtype, expand_groups, score_scale
from regard.layout import BlockLayout
from regard.masks import Mask, MaskMod

__all__ = ["FORMS", "ProgramCall", "program_attention"]

FORMS = ("eager", "tiled", "fused", "flex")
# Numbers of a map that is kept whole without a thought, and of a row of tiles, which the backward pass holds at once.
_SMALL, _ROW = 1 << 20, 1 << 23
_BLOCK = 256
# Keys up to which neighbouring blocks of a given layout go in one product.
_RUN = 512


@dataclass(frozen=True)
class ProgramCall:
    """What is computed: the three functions and how indices count.

    score_mod: already :class:`~regard.kernels.elementwise.Elementwise`, or None. mask: None for all pairs. offset: what
    is added to a query's place to give the ``q_idx`` of ``score_mod``.
    """

    rowwise: Rowwise
    score_mod: Elementwise | None = None
    mask: Mask | None = None
    scale: float | None = None
    offset: int = 0

    @property
    def softmax_alone(self) -> bool:
        """Whether this is softmax attention under a mask."""
        return self.score_mod is None and self.is_softmax

    @property
    def is_softmax(self) -> bool:
        """Whether the reduction is the library's softmax, and not one's own of that name."""
        return self.rowwise is ROWWISE["softmax"]

    def forms(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[str, ...]:
        """The forms that can run a call, the usual choice first."""
        maps = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        found = ["eager", "tiled"] if maps <= _SMALL else ["tiled", "eager"]
        if self._flexible(query, key, value):
            found.insert(0 if query.is_cuda else len(found), "flex")
        if self.softmax_alone:
            found.insert(0, "fused")
        return tuple(found)

    def _flexible(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        whole = self.is_softmax and query.dtype != torch.float64 and value.shape[-1] > 0
        return whole and min(query.shape[2], key.shape[2]) >= 16 and (query.is_cuda or not differentiated)


def tile_sizes(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Queries and keys of a tile where nothing was measured."""
    k_len = key.shape[2]
    rows = _ROW // max(query.shape[0] * query.shape[1] * k_len, 1)
    return min(max(rows, 16), _BLOCK, query.shape[2]), min(_BLOCK, k_len)


def program_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: ProgramCall,
    *,
    layout: BlockLayout | None = None,
    tile: tuple[int, int] | None = None,
    with_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """The output ``(batch, num_heads, q_len, value_dim)``, and the rows' final state where the form knows it.

    query ``(batch, num_heads, q_len, d)``; key and value ``(batch, kv_heads, k_len, ...)``. layout: blocks that are
    computed, with its own mask, in place of the call's. tile: queries and keys of a tile (those of the layout where
    there is one). with_state: run a form that knows the state (``"flex"`` does on a GPU, ``"fused"`` never). Gradients
    reach the tensors that the functions hold. A row with nothing to see gives zeros.

    Raises BackendError for a form that cannot run the call, ShapeError for lengths that do not fit.
    """
    if layout is not None and (layout.q_len, layout.k_len) != (query.shape[2], key.shape[2]):
        raise ShapeError(
            f"The layout is for {layout.q_len} queries and {layout.k_len} keys; got {query.shape[2]}, {key.shape[2]}."
        )
    form = resolve("program", backend, FORMS)
    able = call.forms(query, key, value)
    if with_state:
        able = tuple(one for one in able if one in ("eager", "tiled") or (one == "flex" and query.is_cuda))
    if form == "auto":
        form = able[0]
    elif form not in able:
        raise BackendError(
            f"The {form} form cannot run this call; it can run as {', '.join(able)}. 'fused' is softmax without "
            "score_mod, and keeps no state; 'flex' is softmax of at least 16 queries and keys, not in float64, and on "
            "a CPU without gradients and without state."
        )
    if form == "fused":
        if layout is not None:
            return block_sparse_attention(query, key, value, layout, scale=call.scale), None
        return dense_attention(query, key, value, mask=call.mask, scale=call.scale), None
    if form == "flex":
        return _flex(query, key, value, call, layout, with_state)
    q_len, k_len = query.shape[2], key.shape[2]
    block_q, block_k = tile or tile_sizes(query, key)
    if form == "eager":
        layout = layout and _whole(layout)
        block_q, block_k = q_len, k_len
    most = max(_RUN // layout.block_k, 1) if layout is not None else 1
    if layout is None:
        layout = BlockLayout.of(call.mask, q_len, k_len, min(block_q, q_len), min(block_k, k_len), query.device)
    return _tiled(query, key, value, call, layout, most)


def _whole(layout: BlockLayout) -> BlockLayout:
    """The same pairs as one block."""
    return BlockLayout.of(layout.as_mask(), layout.q_len, layout.k_len, layout.q_len, layout.k_len, layout.visit.device)


# Which tiles are computed depends on the mask's values: no graph.
@torch.compiler.disable
def _tiled(
    query: Tensor, key: Tensor, value: Tensor, call: ProgramCall, layout: BlockLayout, most: int
) -> tuple[Tensor, State | None]:
    heads, work = query.shape[1], accumulation_dtype(query.dtype)
    query_, key_, value_ = (
        query.to(work) * score_scale(query, call.scale),
        expand_groups(key, heads).to(work),
        expand_groups(value, heads).to(work),
    )
    rule = layout.mask.mod(layout.q_len, layout.k_len)

    def run(lanes: Lanes) -> list[Tensor]:
        q, k, v = (lanes.of(t) for t in (query_, key_, value_))
        parts = []
        for row, runs in enumerate(needed(layout, lanes, most)):
            tile = _Tile(call, layout, rule, row, runs, lanes.index)
            # One row of tiles is the whole map, which there is no point in computing again.
            if torch.is_grad_enabled() and layout.visit.shape[2] > 1:
                parts.append(checkpoint(tile, q, k, v, use_reentrant=False))
            else:
                parts.append(tile(q, k, v))
        return [torch.cat(some, 2) for some in _columns(parts)]

    out, *state = by_lanes(layout, query.shape[0], heads, query.device, run)
    return out.to(query.dtype), tuple(state)


def _columns(parts: list[tuple[Tensor, State]]) -> list[tuple[Tensor, ...]]:
    """Outputs side by side, and each tensor of the states."""
    return list(zip(*((out, *state) for out, state in parts), strict=True))


@dataclass(frozen=True)
class _Tile:
    """A tile of queries against its blocks of keys; lanes: sequences ``(n, 1, 1, 1)`` and heads ``(1, n, 1, 1)``."""

    call: ProgramCall
    layout: BlockLayout
    rule: MaskMod
    row: int
    runs: list[tuple[int, int, bool]]
    lanes: tuple[Tensor, Tensor]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, State]:
        start = self.row * self.layout.block_q
        part = query[:, :, start : start + self.layout.block_q]
        q_idx = torch.arange(start, start + part.shape[2], device=query.device).view(1, 1, -1, 1)
        out, state = None, None
        for first, stop, certain in self.runs:
            span = slice(first * self.layout.block_k, stop * self.layout.block_k)
            weights, new = self._weights(part, key[:, :, span], q_idx, span.start, certain)
            added = weights @ value[:, :, span]
            if out is None or state is None:
                out, state = added, new
            else:
                state, before, after = self.call.rowwise.merge(state, new)
                out = out * before + added * after
        if out is None or state is None:
            # Nothing is seen: what one hidden key gives.
            weights, state = self.call.rowwise.reduce(
                part.new_zeros(*part.shape[:3], 1), torch.zeros(1, dtype=torch.bool, device=part.device)
            )
            out = weights @ value[:, :, :1]
        return self.call.rowwise.finished(out, state), state

    def _weights(self, query: Tensor, key: Tensor, q_idx: Tensor, first: int, certain: bool) -> tuple[Tensor, State]:
        scores = query @ key.transpose(-1, -2)
        kv_idx = torch.arange(first, first + key.shape[2], device=query.device).view(1, 1, 1, -1)
        if self.call.score_mod is not None:
            scores = self.call.score_mod(scores, *self.lanes, q_idx + self.call.offset, kv_idx)
        if certain:
            return self.call.rowwise.block(scores, torch.ones((), dtype=torch.bool, device=query.device))
        mask = self.layout.mask
        # A rule that knows no sequences or heads is asked once for all of them.
        batch, head = (
            lane if size > 1 else lane.new_zeros(1, 1, 1, 1)
            for lane, size in zip(self.lanes, (mask.batch, mask.heads), strict=True)
        )
        return self.call.rowwise.reduce(scores, self.rule(batch, head, q_idx, kv_idx))


def _flex(
    query: Tensor, key: Tensor, value: Tensor, call: ProgramCall, layout: BlockLayout | None, with_state: bool
) -> tuple[Tensor, State | None]:
    from torch.nn.attention.flex_attention import AuxRequest

    if layout is None and call.mask is not None:
        layout = BlockLayout.of(call.mask, query.shape[2], key.shape[2], device=query.device)
    found = compiled_flex()(
        query,
        key,
        value,
        score_mod=None if call.score_mod is None else _shifted(call.score_mod.function, call.offset),
        block_mask=None if layout is None else layout.block_mask(),
        scale=score_scale(query, call.scale),
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True, max_scores=True) if with_state else None,
    )
    if not with_state:
        return found, None
    out, aux = found
    total = torch.where(aux.lse.isfinite(), (aux.lse - aux.max_scores).exp(), 0)
    return out, (aux.max_scores[..., None], total[..., None])


def _shifted(score_mod: Callable[..., Tensor], offset: int) -> Callable[..., Tensor]:
    if not offset:
        return score_mod
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, q_idx + offset, kv_idx)
