"""Attention over an explicit, short list of keys per query, as three operators that close under differentiation.

With ``nb(i, n)`` the key in slot ``n`` of query ``i``:

- ``neighbor_scores``: ``A[i, n] = q_i . k_nb(i, n)``;
- ``neighbor_mix``: ``o_i = sum_n P[i, n] v_nb(i, n)``;
- ``neighbor_scatter``: ``x_j = sum over (i, n) with nb(i, n) = j of P[i, n] y_i``, the adjoint of the second.

The gradients of each are the others, so all are differentiable any number of times: Hassani et al., "Faster
Neighborhood Attention", 2024, arXiv 2403.04690, section 3 (its PN, NN and IN). Weights are stored, ``N n`` of them.

``reference``: keys gathered for all queries at once. ``loop``: one slot after the other, for short lists. ``gemm``: a
tile of queries and the union of their keys form dense products, from which the entries of the lists are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.backends import resolve
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.masks import Neighborhood, axis_windows

__all__ = ["Neighbors", "neighbor_mix", "neighbor_scatter", "neighbor_scores"]

FORMS = ("reference", "loop", "gemm")

# From so many slots on, dense products of tiles beat passes over single slots.
_MANY = 16
# Elements of the dense scores of a few tiles, kept within the caches.
_TILES = 1 << 20


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Keys of each query: ``index`` ``(q_len, slots)`` int64 and ``valid`` ``(q_len, slots)``, False where a slot holds
    none (its index is any), for ``k_len`` keys. ``tile``: so many queries that follow one another in ``order``
    ``(q_len,)`` have most keys in common."""

    index: Tensor
    valid: Tensor
    k_len: int
    order: Tensor
    tile: int

    def __post_init__(self) -> None:
        if self.index.dim() != 2 or self.index.shape != self.valid.shape or len(self.order) != len(self.index):
            raise ShapeError(
                "Neighbours need index and valid (q_len, slots) and order (q_len,); got "
                f"{tuple(self.index.shape)}, {tuple(self.valid.shape)} and {tuple(self.order.shape)}."
            )

    @property
    def q_len(self) -> int:
        return self.index.shape[0]

    @property
    def slots(self) -> int:
        return self.index.shape[1]

    @staticmethod
    def of(rule: Neighborhood, device: torch.device | str = "cpu") -> Neighbors:
        """The neighbourhood on its grid: ``prod(window)`` slots in row-major order of each query's window; a causal
        axis, or a window cut off by the border, leaves slots empty."""
        return _of_rule(rule, torch.device(device))

    @staticmethod
    def stencil(
        grid: Sequence[int],
        offsets: Sequence[Sequence[int]],
        border: Literal["empty", "replicate"] = "empty",
        factor: int = 1,
        device: torch.device | str = "cpu",
    ) -> Neighbors:
        """Fixed offsets around each query, one slot an offset. Outside ``grid`` a slot is empty or repeats the border.

        factor: queries stand on a grid ``factor`` times as fine on every axis as the keys.
        """
        shape = tuple(tuple(offset) for offset in offsets)
        if not shape or any(len(offset) != len(grid) for offset in shape):
            raise OptionError(f"A stencil on grid {tuple(grid)} needs offsets of {len(grid)} numbers, got {shape}.")
        if border not in ("empty", "replicate") or factor < 1:
            raise OptionError(f"border is 'empty' or 'replicate' and factor at least 1, got {border!r} and {factor}.")
        return _of_stencil(tuple(grid), shape, border, factor, torch.device(device))


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _of_rule(rule: Neighborhood, device: torch.device) -> Neighbors:
    axes = len(rule.grid)
    index = torch.zeros((1,) * (2 * axes), dtype=torch.int64)
    valid = torch.ones((1,) * (2 * axes), dtype=torch.bool)
    for axis, length in enumerate(rule.grid):
        window, dilation = rule.window[axis], rule.dilation[axis]
        start, stop = axis_windows(length, window, rule.stride[axis], dilation, rule.causal[axis], rule.border)
        key = start[:, None] + torch.arange(window) * dilation
        form = [1] * (2 * axes)
        form[axis], form[axes + axis] = length, window
        index = index * length + key.clamp_max(length - 1).view(form)
        valid = valid & (key < stop[:, None]).view(form)
    slots = 1
    for window in rule.window:
        slots *= window
    index = index.reshape(-1, slots)
    return _placed(
        index, valid.expand_as(valid).reshape(-1, slots), len(index), _order(rule.grid, rule.dilation), device
    )


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _of_stencil(
    grid: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], border: str, factor: int, device: torch.device
) -> Neighbors:
    fine = tuple(length * factor for length in grid)
    places = torch.meshgrid(*(torch.arange(length) // factor for length in fine), indexing="ij")
    index = torch.zeros(1, 1, dtype=torch.int64)
    valid = torch.ones(1, 1, dtype=torch.bool)
    for axis, (length, place) in enumerate(zip(grid, places, strict=True)):
        key = place.reshape(-1, 1) + torch.tensor([offset[axis] for offset in offsets])
        index = index * length + key.clamp(0, length - 1)
        valid = valid & (key >= 0) & (key < length)
    if border == "replicate":
        valid = torch.ones_like(valid)
    count = 1
    for length in grid:
        count *= length
    return _placed(index, valid, count, _order(fine, (1,) * len(grid)), device)


def _placed(index: Tensor, valid: Tensor, k_len: int, order: tuple[Tensor, int], device: torch.device) -> Neighbors:
    return Neighbors(index.to(device), valid.to(device), k_len, order[0].to(device), order[1])


def _order(grid: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, int]:
    """Tokens of a grid tile by tile, residue class by residue class, and the tokens of a tile."""
    side = {1: 32, 2: 8, 3: 4}.get(len(grid), 2)
    key = torch.zeros((1,) * len(grid), dtype=torch.int64)
    within = torch.zeros_like(key)
    for axis, (length, rate) in enumerate(zip(grid, dilation, strict=True)):
        form = [1] * len(grid)
        form[axis] = length
        place = torch.arange(length)
        inner = place // rate
        tiles = -(-length // (rate * side))
        key = key * (rate * tiles) + (place % rate * tiles + inner // side).view(form)
        within = within * side + (inner % side).view(form)
    tile: int = side ** len(grid)
    return (key * tile + within).flatten().argsort(), tile


def neighbor_scores(query: Tensor, key: Tensor, neighbors: Neighbors, *, backend: str | None = None) -> Tensor:
    """``q_i . k_nb(i, n)``, ``(batch, num_heads, q_len, slots)`` in the accumulation dtype; 0 in empty slots. No scale
    is applied.

    query ``(batch, num_heads, q_len, head_dim)``, key ``(batch, kv_heads, k_len, head_dim)``.
    """
    _check(neighbors, query, key)
    work = accumulation_dtype(query.dtype)
    keys = expand_groups(key, query.shape[1]).to(work)
    out: Tensor = _Scores.apply(query.to(work), keys, neighbors, _form(neighbors, backend))
    return out


def neighbor_mix(weights: Tensor, value: Tensor, neighbors: Neighbors, *, backend: str | None = None) -> Tensor:
    """``sum_n P[i, n] v_nb(i, n)``, ``(batch, num_heads, q_len, value_dim)``; empty slots add nothing.

    weights ``(batch, num_heads, q_len, slots)``, value ``(batch, kv_heads, k_len, value_dim)``.
    """
    _check(neighbors, weights, value)
    if weights.shape[-1] != neighbors.slots:
        raise ShapeError(f"Weights for {neighbors.slots} slots are needed, got {tuple(weights.shape)}.")
    work = accumulation_dtype(value.dtype)
    values = expand_groups(value, weights.shape[1]).to(work)
    out: Tensor = _Mix.apply(weights.to(work), values, neighbors, _form(neighbors, backend))
    return out.to(value.dtype)


def neighbor_scatter(weights: Tensor, source: Tensor, neighbors: Neighbors, *, backend: str | None = None) -> Tensor:
    """``x_j = sum over (i, n) with nb(i, n) = j of P[i, n] y_i``, ``(batch, num_heads, k_len, dim)``.

    weights ``(batch, num_heads, q_len, slots)``, source ``(batch, num_heads, q_len, dim)``.
    """
    if weights.shape[:3] != source.shape[:3] or weights.shape[2:] != neighbors.index.shape:
        raise ShapeError(
            f"Weights (batch, heads, {neighbors.q_len}, {neighbors.slots}) and a source with as many queries are "
            f"needed; got {tuple(weights.shape)} and {tuple(source.shape)}."
        )
    work = accumulation_dtype(source.dtype)
    out: Tensor = _Scatter.apply(weights.to(work), source.to(work), neighbors, _form(neighbors, backend))
    return out.to(source.dtype)


def _check(neighbors: Neighbors, rows: Tensor, keys: Tensor) -> None:
    if rows.dim() != 4 or keys.dim() != 4 or rows.shape[2] != neighbors.q_len or keys.shape[2] != neighbors.k_len:
        raise ShapeError(
            f"These neighbours take {neighbors.q_len} queries, {neighbors.k_len} keys, (batch, heads, length, dim); "
            f"got {tuple(rows.shape)} and {tuple(keys.shape)}."
        )


def _form(neighbors: Neighbors, backend: str | None) -> str:
    form = resolve("neighbors", backend, FORMS)
    return ("gemm" if neighbors.slots >= _MANY else "loop") if form == "auto" else form


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, neighbors: Neighbors, form: str) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.neighbors, ctx.form = neighbors, form
        if form == "gemm":
            return _tiled_scores(query, key, neighbors)
        if form == "reference":
            picked = key[:, :, neighbors.index]
            return torch.einsum("bhid,bhind->bhin", query, picked).masked_fill_(~neighbors.valid, 0)
        out = query.new_empty(*query.shape[:3], neighbors.slots)
        for slot in range(neighbors.slots):
            out[..., slot] = (query * key.index_select(2, neighbors.index[:, slot])).sum(-1)
        return out.masked_fill_(~neighbors.valid, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key = ctx.saved_tensors
        run = ctx.neighbors, ctx.form
        return _Mix.apply(grad, key, *run), _Scatter.apply(grad, query, *run), None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, neighbors: Neighbors, form: str) -> Tensor:
        ctx.save_for_backward(weights, value)
        ctx.neighbors, ctx.form = neighbors, form
        if form == "gemm":
            return _tiled_mix(weights, value, neighbors)
        shown = weights.masked_fill(~neighbors.valid, 0)
        if form == "reference":
            return torch.einsum("bhin,bhind->bhid", shown, value[:, :, neighbors.index])
        out = value.new_zeros(*weights.shape[:3], value.shape[-1])
        for slot in range(neighbors.slots):
            out.addcmul_(shown[..., slot, None], value.index_select(2, neighbors.index[:, slot]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, value = ctx.saved_tensors
        run = ctx.neighbors, ctx.form
        return _Scores.apply(grad, value, *run), _Scatter.apply(weights, grad, *run), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, source: Tensor, neighbors: Neighbors, form: str) -> Tensor:
        ctx.save_for_backward(weights, source)
        ctx.neighbors, ctx.form = neighbors, form
        if form == "gemm":
            return _tiled_scatter(weights, source, neighbors)
        shown = weights.masked_fill(~neighbors.valid, 0)
        out = source.new_zeros(*source.shape[:2], neighbors.k_len, source.shape[-1])
        for slot in range(neighbors.slots):
            out.index_add_(2, neighbors.index[:, slot], shown[..., slot, None] * source)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, source = ctx.saved_tensors
        run = ctx.neighbors, ctx.form
        return _Scores.apply(source, grad, *run), _Mix.apply(weights, grad, *run), None, None


@dataclass(frozen=True)
class _Tiles:
    """queries ``(tiles, rows)``: those of each tile, the last repeated where it is short; keys ``(tiles, union)``: the
    union of their keys; at ``(tiles, rows, slots)``: where in it each slot is found, one past the end if empty."""

    queries: Tensor
    keys: Tensor
    at: Tensor
    filled: Tensor  # (tiles, rows), False for repeated queries

    def chunks(self, lanes: int) -> list[_Tiles]:
        """Cut so that the dense scores of ``lanes`` (batch, head) pairs stay small."""
        per_tile = lanes * self.queries.shape[1] * (self.keys.shape[1] + 1)
        parts = (part.split(max(_TILES // per_tile, 1)) for part in (self.queries, self.keys, self.at, self.filled))
        return list(itertools.starmap(_Tiles, zip(*parts, strict=True)))


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _tiles(neighbors: Neighbors) -> _Tiles:
    rows, order = neighbors.tile, neighbors.order
    short = -len(order) % rows
    filled = torch.ones(len(order) + short, dtype=torch.bool, device=order.device)
    filled[len(order) :] = False
    queries = torch.cat((order, order[-1:].expand(short))).view(-1, rows)
    # Sorted, equal keys of a tile stand together, and empty slots, as the largest number, at the end.
    wanted = torch.where(neighbors.valid, neighbors.index, neighbors.k_len)[queries].flatten(1)
    wanted, origin = wanted.sort(-1)
    first = torch.ones_like(wanted, dtype=torch.bool)
    first[:, 1:] = wanted[:, 1:] != wanted[:, :-1]
    place, empty = first.cumsum(-1) - 1, wanted == neighbors.k_len
    width = max(int((first & ~empty).sum(-1).max()), 1)
    place = place.masked_fill(empty, width)
    # Places that a shorter union leaves free name any key; nothing is read from them.
    keys = torch.zeros(len(queries), width + 1, dtype=torch.int64, device=order.device)
    keys = keys.scatter_(1, place, wanted)[:, :-1].contiguous()
    at = torch.empty_like(place).scatter_(1, origin, place).unflatten(1, (rows, neighbors.slots))
    return _Tiles(queries, keys, at, filled.view(-1, rows))


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """``(batch, heads, length, dim)`` at ``index (tiles, rows)``: ``(batch, heads, tiles, rows, dim)``."""
    return x.index_select(2, index.flatten()).unflatten(2, index.shape)


def _spread(weights: Tensor, tiles: _Tiles) -> Tensor:
    """Weights ``(batch, heads, q_len, slots)`` as dense ``(batch, heads, tiles, rows, union)``."""
    picked = _gathered(weights, tiles.queries) * tiles.filled[..., None]
    dense = picked.new_zeros(*picked.shape[:-1], tiles.keys.shape[1] + 1)
    # A list may name a key twice (a border that repeats itself), hence added, not written.
    dense.scatter_add_(-1, tiles.at.expand_as(picked), picked)
    return dense[..., :-1]


def _tiled_scores(query: Tensor, key: Tensor, neighbors: Neighbors) -> Tensor:
    out = query.new_empty(*query.shape[:3], neighbors.slots)
    for part in _tiles(neighbors).chunks(query.shape[0] * query.shape[1]):
        dense = _gathered(query, part.queries) @ _gathered(key, part.keys).transpose(-1, -2)
        dense = torch.nn.functional.pad(dense, (0, 1))
        kept = dense.gather(-1, part.at.expand(*dense.shape[:-1], -1))
        out[:, :, part.queries.flatten()] = kept.flatten(2, 3)
    return out


def _tiled_mix(weights: Tensor, value: Tensor, neighbors: Neighbors) -> Tensor:
    out = value.new_empty(*weights.shape[:3], value.shape[-1])
    parts = _tiles(neighbors).chunks(weights.shape[0] * weights.shape[1])
    # Repeated queries stand behind the real one and would write zeros over it, so only filled places are kept.
    for part in parts:
        mixed = (_spread(weights, part) @ _gathered(value, part.keys)).flatten(2, 3)
        kept = part.filled.flatten()
        out[:, :, part.queries.flatten()[kept]] = mixed[:, :, kept]
    return out


def _tiled_scatter(weights: Tensor, source: Tensor, neighbors: Neighbors) -> Tensor:
    out = source.new_zeros(*source.shape[:2], neighbors.k_len, source.shape[-1])
    for part in _tiles(neighbors).chunks(weights.shape[0] * weights.shape[1]):
        sums = _spread(weights, part).transpose(-1, -2) @ _gathered(source, part.queries)
        out.index_add_(2, part.keys.flatten(), sums.flatten(2, 3))
    return out
