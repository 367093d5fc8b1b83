"""Softmax attention over a part of the keys, and its backward pass for rows that see other parts as well.

A row of attention may be computed in parts, each over some of its keys: :func:`partial_attention` gives a part's output
and its log-sum-exp, and :func:`regard.kernels.merge_attentions` joins parts exactly. Backward, a part needs nothing of
the others but the output ``O`` and log-sum-exp ``L`` of the whole row (Dao, "FlashAttention-2", 2023, arXiv 2307.08691,
algorithm 2), with ``D = rowsum(dO O)``:

    P = exp(scale q k^T - L),   dV = P^T dO,   dS = P (dO V^T - D),   dQ = scale dS K,   dK = scale dS^T Q

Which keys of the part a query sees is one range of their indices, :class:`KeyRanges`: that covers causality, packed
documents and windows while both stand in ascending order, takes memory for the queries alone, and tells which tiles
are hidden, which are seen whole, and which need a mask.

``reference``: all scores at once. ``tiled``: an online softmax, tile by tile; its memory does not grow with ``q_len *
k_len``. ``fused``: torch's own flash kernels, on CPUs and (half precision) on CUDA, for rectangles and triangles of the
pairs; what is neither goes through the CPU kernel with a mask of a few rows, or through tiles. Half precision
accumulates in float32. A row with nothing to see gives zeros and ``-inf``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError, ShapeError
from regard.kernels.backends import resolve
from regard.kernels.shapes import accumulation_dtype, expand_groups, fold_groups, score_scale

__all__ = ["KeyRanges", "partial_attention", "partial_attention_backward"]

FORMS = ("reference", "tiled", "fused")

# Scores of one tile, in elements: on a CPU they stay in the cache, elsewhere the bound is one of memory.
_CACHED, _HELD = 1 << 20, 1 << 26
# Pieces of fewer rows than this share one call with a mask, of so many rows and elements at most.
_SHORT, _MASKED_ROWS, _MASKED = 32, 256, 1 << 22


class _Piece(NamedTuple):
    """Rows that go through one call, with the keys ``start .. stop - 1`` that they see: all of them ("all"), row ``i``
    of them the first ``i + 1`` ("causal": as many rows as keys), or ranges of them ("mask")."""

    rows: slice
    keys: slice
    kind: Literal["all", "causal", "mask"]


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """Query ``i`` sees the keys ``first[i] <= j < last[i]``.

    first, last: integers ``(batch | 1, q_len)`` on the CPU, where calls are planned; a row without keys has ``last <=
    first``. k_len: how many keys there are.
    """

    first: Tensor
    last: Tensor
    k_len: int

    def __post_init__(self) -> None:
        if self.first.dim() != 2 or self.first.shape != self.last.shape:
            raise ShapeError(
                "Key ranges take first and last of one shape (batch | 1, q_len); "
                f"got {tuple(self.first.shape)} and {tuple(self.last.shape)}."
            )

    @classmethod
    def everything(cls, q_len: int, k_len: int) -> KeyRanges:
        """Every query sees every key."""
        return cls(torch.zeros(1, q_len, dtype=torch.int64), torch.full((1, q_len), k_len), k_len)

    @classmethod
    def causal(cls, query_positions: Tensor, key_positions: Tensor) -> KeyRanges:
        """Keys up to the query's own position; both ``(length,)`` ascending."""
        last = torch.searchsorted(key_positions, query_positions, right=True)[None]
        return cls(torch.zeros_like(last), last, len(key_positions))

    @property
    def batch(self) -> int:
        """1 when the ranges are the same for every sequence."""
        return self.first.shape[0]

    @cached_property
    def pairs(self) -> int:
        """How many pairs are seen, in all sequences that the ranges tell apart."""
        return int((self.last - self.first).clamp_min(0).sum())

    @cached_property
    def pieces(self) -> list[list[_Piece]]:
        """For each sequence the pieces that together hold every row that sees anything, each once."""
        return [_pieces(first, last) for first, last in zip(self.first.tolist(), self.last.tolist(), strict=True)]

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """Boolean ``(batch | 1, 1, q_len, k_len)``."""
        return _seen(self.first[:, None], self.last[:, None], 0, self.k_len, device)


def _seen(first: Tensor, last: Tensor, start: int, stop: int, device: torch.device | str | None) -> Tensor:
    """Which of the keys ``start .. stop - 1`` are seen, ``(..., rows, keys)``."""
    key = torch.arange(start, stop, device=device)
    return (key >= first.to(key.device)[..., None]) & (key < last.to(key.device)[..., None])


def _pieces(first: list[int], last: list[int]) -> list[_Piece]:
    """Longest runs of rows that see the same keys, or each one key more than the row before it."""
    runs: list[_Piece] = []
    row, end = 0, len(first)
    while row < end:
        low, high, stop = first[row], last[row], row + 1
        if high <= low:
            row += 1
            continue
        step = int(stop < end and first[stop] == low and last[stop] == high + 1)
        while stop < end and first[stop] == low and last[stop] == last[stop - 1] + step:
            stop += 1
        kind: Literal["all", "causal", "mask"] = "all" if not step else "causal" if high == low + 1 else "mask"
        runs.append(_Piece(slice(row, stop), slice(low, last[stop - 1]), kind))
        row = stop
    pieces: list[_Piece] = []
    loose: list[_Piece] = []
    for run in runs:
        short = run.kind == "mask" or run.rows.stop - run.rows.start < _SHORT
        if loose and (not short or loose[-1].rows.stop != run.rows.start):
            pieces += _masked(loose, first, last)
            loose = []
        if short:
            loose.append(run)
        else:
            pieces.append(run)
    return pieces + _masked(loose, first, last)


def _masked(runs: list[_Piece], first: list[int], last: list[int]) -> list[_Piece]:
    """Neighbouring runs as pieces with a mask, cut so that no mask grows large; a run that needs none stays one."""
    if not runs or (len(runs) == 1 and runs[0].kind != "mask"):
        return runs
    pieces, start, end = [], runs[0].rows.start, runs[-1].rows.stop
    while start < end:
        stop = min(start + _MASKED_ROWS, end)
        width = max(last[start:stop]) - min(first[start:stop])
        stop = min(stop, start + max(_MASKED // width, 1))
        keys = slice(min(first[start:stop]), max(last[start:stop]))
        pieces.append(_Piece(slice(start, stop), keys, "mask"))
        start = stop
    return pieces


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: KeyRanges | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` over these keys alone, and the log-sum-exp of each row. Not differentiable by itself.

    query ``(batch, num_heads, q_len, head_dim)``; key and value ``(batch, kv_heads, k_len, ...)``, ``kv_heads``
    dividing ``num_heads``; ranges: the keys that each query sees (None: all). Returns ``(batch, num_heads, q_len,
    value_dim)`` in the query's dtype and ``(batch, num_heads, q_len)`` in that of accumulation; zeros and ``-inf`` for
    a row with nothing to see.
    """
    seen = _checked(query, key, value, ranges)
    form, factor = _form(query, value, backend), score_scale(query, scale)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=accumulation_dtype(query.dtype))
    if form == "reference":
        return _reference(query, key, value, seen, factor)
    for part, first, last, pieces in _sequences(seen):
        q, k, v = query[part], key[part], value[part]
        if form == "tiled":
            out[part], lse[part] = _tiled(q, k, v, first, last, factor)
            continue
        for rows, keys, kind in pieces:
            near = first[rows] - keys.start, last[rows] - keys.start
            found = _fused(q[:, :, rows], k[:, :, keys], v[:, :, keys], *near, kind, factor)
            out[part, :, rows], lse[part, :, rows] = found
    return out, lse


def partial_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: KeyRanges | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients of query, key and value, in the dtype of accumulation.

    out and lse are those of the whole rows, over all parts, and ``grad_out`` is the gradient of that output. The
    gradients of the query from all parts add up.
    """
    seen = _checked(query, key, value, ranges)
    form, factor, work = _form(query, value, backend), score_scale(query, scale), accumulation_dtype(query.dtype)
    plain = torch.contiguous_format
    grads = tuple(torch.zeros_like(t, dtype=work, memory_format=plain) for t in (query, key, value))
    tile = (query.shape[2], seen.k_len) if form == "reference" else _tile(query)
    for part, first, last, pieces in _sequences(seen):
        q, k, v = query[part], key[part], value[part]
        whole = _Part(q, k, v, out[part], lse[part], grad_out[part], first, last)
        into = tuple(t[part] for t in grads)
        if form != "fused":
            _tiled_backward(whole, into, factor, tile)
            continue
        for piece in pieces:
            some = whole.cut(piece)
            sums = (into[0][:, :, piece.rows], into[1][:, :, piece.keys], into[2][:, :, piece.keys])
            if piece.kind == "mask" and query.is_cuda:
                _tiled_backward(some, sums, factor, tile)
                continue
            for total, more in zip(sums, _fused_backward(some, piece.kind, factor), strict=True):
                total += more
    return grads[0], grads[1], grads[2]


class _Part(NamedTuple):
    """What the backward pass of some rows and keys reads: out, lse and grad_out are those of the whole rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    first: Tensor
    last: Tensor

    def cut(self, piece: _Piece) -> _Part:
        rows, keys, _ = piece
        q, out, lse, grad = (t[:, :, rows] for t in (self.query, self.out, self.lse, self.grad_out))
        k, v = self.key[:, :, keys], self.value[:, :, keys]
        return _Part(q, k, v, out, lse, grad, self.first[rows] - keys.start, self.last[rows] - keys.start)


def _checked(query: Tensor, key: Tensor, value: Tensor, ranges: KeyRanges | None) -> KeyRanges:
    if ranges is None:
        return KeyRanges.everything(query.shape[2], key.shape[2])
    if ranges.batch not in (1, len(query)) or ranges.first.shape[1] != query.shape[2] or ranges.k_len != key.shape[2]:
        raise ShapeError(
            f"Key ranges for {ranges.batch} sequences of {ranges.first.shape[1]} queries and {ranges.k_len} keys do "
            f"not fit query {tuple(query.shape)} and key {tuple(key.shape)}."
        )
    return ranges


def _sequences(ranges: KeyRanges) -> Iterator[tuple[slice, Tensor, Tensor, list[_Piece]]]:
    """The sequences that are computed together, with their ranges and pieces."""
    for row, pieces in enumerate(ranges.pieces):
        yield slice(None) if ranges.batch == 1 else slice(row, row + 1), ranges.first[row], ranges.last[row], pieces


def _form(query: Tensor, value: Tensor, backend: str | None) -> str:
    form = resolve("partial", backend, FORMS)
    if form == "auto":
        return "fused" if _fits(query, value) else "tiled"
    if form == "fused" and not _fits(query, value):
        raise BackendError(
            "The fused form needs a CPU, or CUDA with half precision and head widths up to 256; use backend='auto'."
        )
    return form


def _fits(query: Tensor, value: Tensor) -> bool:
    """Whether torch's flash kernels take these: equal widths, or such as are cheap to fill up with zeros."""
    dims = (query.shape[3], value.shape[3])
    if min(dims) == 0 or max(dims) > 4 * min(dims):
        return False
    if query.device.type == "cpu":
        return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and max(dims) <= 256 and torch.cuda.get_device_capability(query.device)[0] >= 8


@cache
def _groups_natively() -> bool:
    """Whether this torch's CPU kernel takes fewer key than query heads."""
    query, key = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1)
    ops = torch.ops.aten
    try:
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(query, key, key)
        backward = ops._scaled_dot_product_flash_attention_for_cpu_backward
        return bool(backward(out, query, key, key, out, lse, 0.0, False)[1].shape == key.shape)
    except RuntimeError:
        return False


def _equal_widths(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors filled up with zeros to one width; CUDA's kernels want a multiple of eight."""
    width = max(t.shape[3] for t in tensors)
    width += -width % 8 if tensors[0].is_cuda else 0
    return tuple(F.pad(t, (0, width - t.shape[3])) if t.shape[3] < width else t for t in tensors)


def _additive(query: Tensor, keys: int, first: Tensor, last: Tensor, kind: str) -> Tensor | None:
    if kind != "mask":
        return None
    seen = _seen(first, last, 0, keys, query.device)
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, float("-inf"))
    return mask.expand(*query.shape[:2], -1, -1)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, kind: str, scale: float
) -> tuple[Tensor, Tensor]:
    value_dim = value.shape[3]
    if query.is_cuda:
        if kind == "mask":
            return _tiled(query, key, value, first, last, scale)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash(*_equal_widths(query, key, value), 0.0, kind == "causal", False, scale=scale)
        return out[..., :value_dim], lse[..., : query.shape[2]]
    heads = query.shape[1]
    if not _groups_natively():
        key, value = expand_groups(key, heads), expand_groups(value, heads)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_equal_widths(query, key, value),
        0.0,
        kind == "causal",
        attn_mask=_additive(query, key.shape[2], first, last, kind),
        scale=scale,
    )
    return out[..., :value_dim], lse


def _fused_backward(part: _Part, kind: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, lse, grad_out, first, last = part
    dims, kv_heads = (query.shape[3], value.shape[3]), key.shape[1]
    if not query.is_cuda and not _groups_natively():
        key, value = expand_groups(key, query.shape[1]), expand_groups(value, query.shape[1])
    q, k, v, o, grad = _equal_widths(query, key, value, out, grad_out)
    causal, stat = kind == "causal", lse.contiguous()
    if query.is_cuda:
        seed = torch.empty(2, dtype=torch.uint64, device=query.device)  # of the dropout that there is not
        some: tuple[Any, ...] = (grad, q, k, v, o, stat, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(*some, scale=scale)
    else:
        mask = _additive(query, key.shape[2], first, last, kind)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(grad, q, k, v, o, stat, 0.0, causal, attn_mask=mask, scale=scale)
    dq, dk, dv = grads
    return dq[..., : dims[0]], fold_groups(dk[..., : dims[0]], kv_heads), fold_groups(dv[..., : dims[1]], kv_heads)


def _reference(query: Tensor, key: Tensor, value: Tensor, ranges: KeyRanges, scale: float) -> tuple[Tensor, Tensor]:
    work, heads = accumulation_dtype(query.dtype), query.shape[1]
    scores = query.to(work) @ expand_groups(key, heads).to(work).mT * scale
    scores = scores.masked_fill(~ranges.dense(query.device), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isfinite(), lse, 0)[..., None]).exp()
    return (weights @ expand_groups(value, heads).to(work)).to(query.dtype), lse


def _tile(query: Tensor) -> tuple[int, int]:
    """Rows and keys of a tile."""
    bound = _CACHED if query.device.type == "cpu" else _HELD
    side = max(int((bound / max(query.shape[0] * query.shape[1], 1)) ** 0.5), 32)
    return side, side


class _Tile(NamedTuple):
    rows: slice
    keys: slice
    seen: Tensor | None  # (rows, keys); None: all


def _tiles(first: Tensor, last: Tensor, tall: int, wide: int, device: torch.device) -> Iterator[list[_Tile]]:
    """The tiles in which anything is seen, one list for each group of ``tall`` rows."""
    for top in range(0, len(first), tall):
        low, high = first[top : top + tall], last[top : top + tall]
        some = high > low
        if not bool(some.any()):
            continue
        begin, end = int(low[some].min()), int(high[some].max())
        # Keys from inner on, up to outer, are seen by every row.
        inner, outer = (int(low.max()), int(high.min())) if bool(some.all()) else (0, 0)
        rows, tiles = slice(top, top + len(low)), []
        for start in range(begin, end, wide):
            stop = min(start + wide, end)
            whole = inner <= start and stop <= outer
            tiles.append(_Tile(rows, slice(start, stop), None if whole else _seen(low, high, start, stop, device)))
        yield tiles


def _by_group(tensor: Tensor, kv_heads: int) -> Tensor:
    """``(batch, num_heads, ...)`` -> ``(batch, kv_heads, group, ...)``."""
    return tensor.unflatten(1, (kv_heads, -1))


def _tiled(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    work, kv_heads = accumulation_dtype(query.dtype), key.shape[1]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=work)
    for tiles in _tiles(first, last, *_tile(query), query.device):
        rows = tiles[0].rows
        q = _by_group(query[:, :, rows], kv_heads).to(work) * scale
        top = q.new_full(q.shape[:-1], float("-inf"))
        total, mixed = torch.zeros_like(top), q.new_zeros(*q.shape[:-1], value.shape[3])
        for _, keys, seen in tiles:
            scores = q @ key[:, :, None, keys].to(work).mT
            if seen is not None:
                scores.masked_fill_(~seen, float("-inf"))
            new = torch.maximum(top, scores.amax(-1))
            base = torch.where(new.isfinite(), new, 0)
            weights, fade = scores.sub_(base[..., None]).exp_(), (top - base).exp_()
            total = total * fade + weights.sum(-1)
            mixed = mixed * fade[..., None] + weights @ value[:, :, None, keys].to(work)
            top = new
        mixed /= torch.where(total > 0, total, 1)[..., None]
        out[:, :, rows] = mixed.flatten(1, 2).to(out.dtype)
        lse[:, :, rows] = (top + total.log()).flatten(1, 2)
    return out, lse


def _tiled_backward(part: _Part, grads: tuple[Tensor, ...], scale: float, tile: tuple[int, int]) -> None:
    """Adds to the gradients of query, key and value in place."""
    query, key, value, out, lse, grad_out, first, last = part
    grad_query, grad_key, grad_value = grads
    work, kv_heads = accumulation_dtype(query.dtype), key.shape[1]
    for tiles in _tiles(first, last, *tile, query.device):
        rows = tiles[0].rows
        q, grad, o = (_by_group(t[:, :, rows], kv_heads).to(work) for t in (query, grad_out, out))
        stat = _by_group(lse[:, :, rows], kv_heads)
        stat = torch.where(stat.isfinite(), stat, 0)[..., None]
        delta = (grad * o).sum(-1, keepdim=True)
        slope = torch.zeros_like(q)
        for _, keys, seen in tiles:
            k, v = key[:, :, None, keys].to(work), value[:, :, None, keys].to(work)
            weights = (q @ k.mT).mul_(scale).sub_(stat)
            if seen is not None:
                weights.masked_fill_(~seen, float("-inf"))
            weights.exp_()
            grad_value[:, :, keys] += (weights.mT @ grad).sum(2)
            toward = (grad @ v.mT).sub_(delta).mul_(weights).mul_(scale)
            slope += toward @ k
            grad_key[:, :, keys] += (toward.mT @ q).sum(2)
        grad_query[:, :, rows] += slope.flatten(1, 2)
