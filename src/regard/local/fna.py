"""Neighborhood attention, fused and unfused: every query sees the ``w`` nearest keys on each axis.

The neighbourhood of a query is the product over axes of windows that are moved inward at the border; with dilation the
rule holds inside residue classes, and a causal axis ends at the query (as generalized neighborhood attention with
stride 1). With ``nb(i, n)`` its ``n``-th key and a learned bias per head and offset,

    out_i = sum_n softmax_n(scale q_i . k_nb(i, n) + B[offset(i, n)]) v_nb(i, n)

runs in four ways that give the same numbers, chosen by ``backend``:

- ``dense``: all pairs under the neighbourhood's mask;
- ``unfused``: scores ``(tokens, prod(w))`` are stored, key by key; ``gemm``: the same scores from dense products of a
  tile of queries with the union of its windows. :func:`na_qk` and :func:`na_av` are the two halves; they and the
  inverse neighbourhood close under differentiation;
- ``fused``: for a tile of queries its tiles of keys run through an online softmax, scores are never stored, and the
  backward pass forms them again from the log-sum-exp. ``auto`` is this one.

:func:`regard.kernels.use_backend` sets the way for all calls inside it. Source: Hassani et al., "Faster Neighborhood
Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level", 2024, arXiv 2403.04690 (the fused
kernel of its release takes biases forward only; here both ways). Queries and keys ``(batch, heads, *space, head_dim)``
with one to three axes of space, or flattened with a grid. Time ``O(N prod(w) d)``, stored ``N prod(w)`` or ``O(N)``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import (
    Neighbors,
    accumulation_dtype,
    dense_attention,
    masked_softmax,
    neighbor_mix,
    neighbor_scores,
    score_scale,
)
from regard.kernels.backends import resolve
from regard.layers.position_bias import RelativePositionBias
from regard.local.neighborhood import (
    bias_table,
    check_neighborhood,
    fitted_neighborhood,
    neighborhood_plan,
    offset_entries,
    visible_pairs,
    with_zero_keys,
)
from regard.masks import Border, Causal, Mask, Neighborhood
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = [
    "NeighborhoodAttention",
    "na_av",
    "na_flops",
    "na_fused",
    "na_memory",
    "na_qk",
    "na_reference",
    "tuned_tiles",
]

Axes = int | Sequence[int]
Flags = bool | Sequence[bool]
FORMS = ("dense", "unfused", "gemm", "fused")

_STORED: dict[str, str] = {"unfused": "loop", "gemm": "gemm"}


def na_qk(
    query: Tensor,
    key: Tensor,
    window: Axes,
    dilation: Axes = 1,
    causal: Flags = False,
    rpb: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores of each query with its neighbours, ``(batch, heads, *space, prod(window))`` in the accumulation dtype; the
    query is taken as scaled.

    query, key: ``(batch, heads, *space, head_dim)``. rpb: bias ``(heads | 1, 2 w_1 - 1, ...)`` by key minus query.
    Slots run row-major over the window; those that a causal axis leaves empty are ``-inf``. backend: ``"unfused"`` or
    ``"gemm"``.
    """
    space, rule = _rule(query, key, window, dilation, causal)
    neighbors = Neighbors.of(rule, query.device)
    scores = neighbor_scores(query.flatten(2, -2), key.flatten(2, -2), neighbors, backend=_stored(backend))
    if rpb is not None:
        scores = scores + _bias_of(neighbors, rule, _table(rpb, rule)).to(scores.dtype)
    return scores.masked_fill(~neighbors.valid, float("-inf")).unflatten(2, space)


def na_av(
    weights: Tensor,
    value: Tensor,
    window: Axes,
    dilation: Axes = 1,
    causal: Flags = False,
    backend: str | None = None,
) -> Tensor:
    """Neighbours' values summed by ``weights (batch, heads, *space, prod(window))``: ``(batch, heads, *space, d)``."""
    space, rule = _rule(weights, value, window, dilation, causal)
    neighbors = Neighbors.of(rule, value.device)
    out = neighbor_mix(weights.flatten(2, -2), value.flatten(2, -2), neighbors, backend=_stored(backend))
    return out.unflatten(2, space)


def na_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Axes,
    dilation: Axes = 1,
    causal: Flags = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The dense form under the neighbourhood's mask; arguments as in :func:`na_fused`."""
    space, rule = _rule(query, key, window, dilation, causal)
    table = None if rpb is None else _table(rpb, rule)
    q, k, v = (t.flatten(2, -2) for t in (query, key, value))
    return _dense(q, k, v, rule, rule, table, scale).unflatten(2, space)


def na_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Axes,
    dilation: Axes = 1,
    causal: Flags = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    q_tile: Axes | Literal["tuned"] | None = None,
    kv_tile: Axes | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on ``(batch, heads, *space, head_dim)`` without storing scores.

    window, dilation, causal: one value or one per axis, ``window * dilation <= length``. rpb: bias ``(heads | 1,
    2 w_1 - 1, ...)`` by key minus query in steps of the dilation. q_tile, kv_tile: tokens per axis computed together;
    they change speed, not the result; ``"tuned"`` takes those that :func:`tuned_tiles` measured. Returns the output
    and, with ``return_lse``, the log-sum-exp ``(batch, heads, *space)``. Raises ShapeError, OptionError.
    """
    space, rule = _rule(query, key, window, dilation, causal)
    if q_tile == "tuned":
        q_tile, kv_tile = tuned_tiles(space, rule.window, rule.dilation, rule.causal, query.shape[1], query.shape[-1])
    plan = neighborhood_plan(rule, query.device, tile=q_tile, kv_tile=kv_tile)
    q, k, v = (t.flatten(2, -2) for t in (query, key, value))
    table = None if rpb is None else _table(rpb, rule)
    out, lse = plan.run(q, k, v, scale=scale, table=table, return_lse=return_lse)
    return out.unflatten(2, space) if lse is None else (out.unflatten(2, space), lse.unflatten(2, space))


@lru_cache(maxsize=64)
def tuned_tiles(
    space: tuple[int, ...],
    window: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    heads: int = 4,
    head_dim: int = 32,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The quickest (q_tile, kv_tile) on this machine among cubes of powers of two; measured once per process and size.

    Tiles of 16 to 256 tokens are tried, three forward passes each on random input.
    """
    axes = len(space)
    sides = [2**power for power in range(1, 9) if 16 <= 2 ** (power * axes) <= 256]
    query, key, value = (torch.randn(1, heads, math.prod(space), head_dim) for _ in range(3))
    rule = Neighborhood(space, window, (1,) * axes, dilation, causal)
    best: tuple[float, int, int] | None = None
    for q_side in sides:
        for kv_side in sides:
            plan = neighborhood_plan(rule, query.device, tile=q_side, kv_tile=kv_side)
            times = []
            for _ in range(4):
                began = time.perf_counter()
                with torch.no_grad():
                    plan.run(query, key, value)
                times.append(time.perf_counter() - began)
            taken = statistics.median(times[1:])
            if best is None or taken < best[0]:
                best = taken, q_side, kv_side
    assert best is not None
    return (best[1],) * axes, (best[2],) * axes


def na_memory(
    shape: Sequence[int], window: Axes, heads: int, dtype: torch.dtype = torch.float32, form: str = "fused"
) -> int:
    """Bytes that one sequence's attention keeps beyond inputs and output: the log-sum-exp (``"fused"``, in the
    accumulation dtype), the weights of all neighbours (``"unfused"``, ``"gemm"``), or of all pairs (``"dense"``)."""
    if form not in FORMS:
        raise OptionError(f"form is one of {', '.join(FORMS)}, got {form!r}.")
    rule = Neighborhood.of(shape, window)
    tokens = math.prod(shape)
    if form == "fused":
        return heads * tokens * accumulation_dtype(dtype).itemsize
    return heads * tokens * (tokens if form == "dense" else math.prod(rule.window)) * dtype.itemsize


def na_flops(shape: Sequence[int], window: Axes, heads: int, head_dim: int) -> int:
    """Floating-point operations of the two products over visible pairs alone: ``4 heads N prod(window) head_dim``."""
    rule = Neighborhood.of(shape, window)
    return 4 * heads * math.prod(shape) * math.prod(rule.window) * head_dim


@register("fna")
class NeighborhoodAttention(Mechanism):
    """window, dilation, causal_axes: one value, or one per axis of the grid (without a grid the sequence is one axis).
    A window is never larger than its axis: dilation gives way first, then the window. position_bias: learn a bias per
    head and offset (key minus query, in steps of the dilation) on grids of ``axes`` axes. border: a window that sticks
    out is moved inward (``"clamp"``), loses what lies outside (``"mask"``), or sees zeros there (``"zero"``). tile,
    kv_tile: tokens per axis computed together by the fused form. backend: ``"auto"`` (fused), ``"fused"``, ``"gemm"``,
    ``"unfused"`` or ``"dense"``.

    With ``causal=True`` the first axis is causal and, on a grid of several axes, later tokens in row-major order are
    hidden as well.
    """

    patterns = frozenset(("self", "causal-self"))
    growth = "N w"
    grid_axes = frozenset((1, 2, 3))

    def __init__(
        self,
        window: Axes = 13,
        dilation: Axes = 1,
        causal_axes: Flags = False,
        position_bias: bool = False,
        axes: int = 2,
        border: Border = "clamp",
        tile: Axes | None = None,
        kv_tile: Axes | None = None,
        backend: str = "auto",
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        check_neighborhood("fna", border, window=window, dilation=dilation, tile=tile, kv_tile=kv_tile)
        if backend != "auto" and backend not in FORMS:
            raise OptionError(f"fna's backend is auto, {', '.join(FORMS)}; got {backend!r}.")
        self.window, self.dilation, self.causal_axes = window, dilation, causal_axes
        self.border, self.tile, self.kv_tile, self.backend = border, tile, kv_tile, backend
        self.position_bias = None
        if position_bias:
            sides = (window,) * axes if isinstance(window, int) else tuple(window)
            self.position_bias = RelativePositionBias(sides, num_heads)
            # The table knows its number of axes, and a grid must have as many.
            self.grid_axes = frozenset((len(sides),))  # type: ignore[misc]
            self.needs_grid = len(sides) > 1  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"window={self.window}, dilation={self.dilation}, causal_axes={self.causal_axes}"

    def rule(self, grid: Sequence[int], causal: bool = False) -> Neighborhood:
        """The neighbourhood on ``grid``, with window and dilation as large as the axes allow."""
        return fitted_neighborhood(grid, self.window, 1, self.dilation, self.causal_axes, self.border, causal)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        grid = (query.shape[2],) if request.grid is None else request.grid
        rule = self.rule(grid, request.causal)
        table = self._table(rule, query.shape[1])
        raster = request.causal and len(grid) > 1
        form = resolve("neighborhood", self.backend if self.backend != "auto" else None, FORMS)
        if form in ("auto", "fused"):
            plan = neighborhood_plan(rule, query.device, raster=raster, tile=self.tile, kv_tile=self.kv_tile)
            if request.mask is not None:
                plan = plan.restricted(request.mask)
            return plan.run(query, key, value, scale=request.scale, table=table)[0]
        visible: Mask = rule & Causal() if raster else rule
        if request.mask is not None:
            visible = visible & request.mask
        if form == "dense":
            return _dense(query, key, value, rule, visible, table, request.scale)
        return _stored_attention(query, key, value, rule, visible, table, request.scale, _STORED[form])

    def _table(self, rule: Neighborhood, heads: int) -> Tensor | None:
        if self.position_bias is None:
            return None
        axes = len(self.position_bias.window)
        if len(rule.grid) != axes or self.position_bias.num_heads not in (1, heads):
            raise ShapeError(
                f"This fna has a bias for {self.position_bias.num_heads} heads on grids of {axes} axes, got {heads} "
                f"heads on {rule.grid}; build it with num_heads and axes, and pass grid."
            )
        return bias_table(self.position_bias, rule)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float:
        grid = (query.shape[2],) if request.grid is None else request.grid
        raster = request.causal and len(grid) > 1
        rule = self.rule(grid, request.causal)
        plan = neighborhood_plan(rule, query.device, raster=raster, tile=self.tile, kv_tile=self.kv_tile)
        return plan.computed() / query.shape[2] ** 2

    def cost(self, shape: AttentionShape) -> Cost:
        rule = self.rule(shape.grid or (shape.q_len,), shape.causal)
        return dense_cost(shape, visible_pairs(rule) / (shape.q_len * shape.k_len))


def _rule(
    first: Tensor, second: Tensor, window: Axes, dilation: Axes, causal: Flags
) -> tuple[tuple[int, ...], Neighborhood]:
    if first.dim() not in (4, 5, 6) or first.shape[2:-1] != second.shape[2:-1]:
        raise ShapeError(
            "Neighborhood attention takes (batch, heads, *space, dim) with one to three axes of space, the same for "
            f"all; got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    space = tuple(first.shape[2:-1])
    return space, Neighborhood.of(space, window, 1, dilation, causal)


def _stored(backend: str | None) -> str | None:
    if backend is not None and backend not in _STORED:
        raise OptionError(f"Stored scores are made by {', '.join(_STORED)}; got backend={backend!r}.")
    return None if backend is None else _STORED[backend]


def _table(rpb: Tensor, rule: Neighborhood) -> Tensor:
    expected = tuple(2 * side - 1 for side in rule.window)
    if tuple(rpb.shape[1:]) != expected:
        raise ShapeError(f"A bias for windows of {rule.window} is (heads, {expected}), got {tuple(rpb.shape)}.")
    return rpb.flatten(1)


def _bias_of(neighbors: Neighbors, rule: Neighborhood, table: Tensor) -> Tensor:
    """The bias of each slot, ``(heads | 1, tokens, slots)``."""
    tokens = torch.arange(neighbors.q_len, device=table.device)[:, None]
    return table[:, offset_entries(tokens, neighbors.index, rule, rule.window)]


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Neighborhood,
    visible: Mask,
    table: Tensor | None,
    scale: float | None,
) -> Tensor:
    tokens = torch.arange(query.shape[2], device=query.device)
    bias = None if table is None else table[:, offset_entries(tokens[:, None], tokens, rule, rule.window)]
    if rule.border != "zero":
        return dense_attention(query, key, value, mask=visible, bias=bias, scale=scale)
    out, lse = dense_attention(query, key, value, mask=visible, bias=bias, scale=scale, return_lse=True)
    return with_zero_keys(out, lse, rule)[0]


def _stored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Neighborhood,
    visible: Mask,
    table: Tensor | None,
    scale: float | None,
    form: str,
) -> Tensor:
    neighbors = Neighbors.of(rule, query.device)
    scores = neighbor_scores(query * score_scale(query, scale), key, neighbors, backend=form)
    if table is not None:
        scores = scores + _bias_of(neighbors, rule, table).to(scores.dtype)
    tokens = torch.arange(query.shape[2], device=query.device)[:, None]
    seen = neighbors.valid & visible.at(tokens[None, None], neighbors.index[None, None], len(tokens), len(tokens))
    if rule.border == "zero":
        # What lies outside has a logit of zero, whatever the bias says of its offset.
        scores, seen = scores.masked_fill(~neighbors.valid, 0), seen | ~neighbors.valid
    return neighbor_mix(masked_softmax(scores, seen), value, neighbors, backend=form)
