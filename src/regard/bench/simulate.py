"""What tiles make of a neighbourhood's sparsity, without computing attention: bounds, the search for stride and tile,
and which tiles of keys a tile of queries visits.

A speedup over dense attention is bounded by the pairs that are visible (*FLOP bound*), and more tightly by the whole
tiles that hold them (*tile-aware bound*). All counts come from :class:`~regard.local.gna.GNASimulator`. They are
products over the axes, so the search looks at each axis by itself and combines what is left.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.local.gna import GNASimulator
from regard.masks import axis_windows

__all__ = [
    "Bounds",
    "Found",
    "VisitedTiles",
    "bounds",
    "front",
    "parse_sides",
    "parse_tile",
    "search",
    "sides",
    "visited_tiles",
]

Sides = tuple[int, ...]
KvStart = Literal["static", "dynamic"]


def parse_sides(text: str, what: str, axes: int | None = None) -> Sides:
    """``"30x48x80"`` as (30, 48, 80); one number stands for all ``axes``."""
    if not re.fullmatch(r"[1-9]\d*([x,][1-9]\d*){0,2}", text.strip().lower()):
        raise OptionError(
            f"{what} {text!r} is not one to three positive numbers with an x between them: write 64, 64x64 or 16x64x64."
        )
    found = tuple(int(part) for part in re.split("[x,]", text.strip().lower()))
    if axes is not None and len(found) == 1:
        found *= axes
    if axes is not None and len(found) != axes:
        raise OptionError(
            f"{what} {text!r} has {len(found)} numbers and the grid {axes} axes: give one per axis, or one for all."
        )
    return found


def parse_tile(text: str, axes: int) -> tuple[Sides, Sides]:
    """``"4x8x8:2x8x8"`` as the tiles of queries and of keys; one tile stands for both."""
    parts = text.split(":")
    if len(parts) > 2:
        raise OptionError(f"The tile {text!r} has {len(parts)} parts: write QUERIES:KEYS, as in 4x8x8:2x8x8.")
    return parse_sides(parts[0], "The tile of queries", axes), parse_sides(parts[-1], "The tile of keys", axes)


def sides(numbers: Sequence[int]) -> str:
    """(30, 48, 80) as ``"30x48x80"``."""
    return "x".join(str(number) for number in numbers)


@dataclass(frozen=True)
class Bounds:
    """What one way to cut a grid into tiles allows. ``perfect``: visited tiles hold visible pairs alone."""

    tiling: Literal["multi", "flat"]
    kv_start: KvStart
    flop: float
    worst: float
    mean: float
    perfect: bool
    mean_visited: float
    max_visited: int
    total: int

    @classmethod
    def of(cls, simulator: GNASimulator) -> Bounds:
        visited = simulator.visited().to(torch.float64)
        mean, most, total = float(visited.mean()), int(visited.max()), simulator.total_tiles
        return cls(
            simulator.tiling,
            simulator.kv_start,
            simulator.flop_bound,
            total / most,
            total / mean,
            simulator.is_perfectly_block_sparse,
            mean,
            most,
            total,
        )


def bounds(
    grid: Sides, window: Sides, stride: Sides, q_tile: Sides, kv_tile: Sides, causal: Sequence[bool] = ()
) -> list[Bounds]:
    """The bounds of tiles of the grid and, where that is another thing, of runs of the row-major sequence; each with
    tiles of keys on a fixed lattice and beginning with the window."""
    flags = tuple(causal) or (False,) * len(grid)
    check_window(grid, window)
    tilings: tuple[Literal["multi", "flat"], ...] = ("multi", "flat") if len(grid) > 1 else ("multi",)
    starts: tuple[KvStart, ...] = ("static", "dynamic")
    return [
        Bounds.of(GNASimulator(grid, window, stride, flags, q_tile, kv_tile, tiling, start))
        for tiling, start in itertools.product(tilings, starts)
    ]


def check_window(grid: Sides, window: Sides) -> None:
    """Refuse a window that an axis cannot hold."""
    for axis, (length, width) in enumerate(zip(grid, window, strict=True)):
        if width > length:
            raise OptionError(
                f"The window {sides(window)} is larger than the grid {sides(grid)} on axis {axis}: {width} > {length}. "
                f"A window of {length} there sees the whole axis."
            )


@dataclass(frozen=True)
class Found:
    """One setting of the search. ``bound``: the mean tile-aware bound, no more than the FLOP bound."""

    stride: Sides
    q_tile: Sides
    kv_tile: Sides
    bound: float
    worst: float
    perfect: bool

    @property
    def sharing(self) -> int:
        """Queries that share one window."""
        return math.prod(self.stride)


@dataclass(frozen=True)
class _OnAxis:
    """What a stride gives on one axis: all pairs over those visible, all tiles over those visited, mean and worst."""

    stride: int
    flop: float
    mean: float
    worst: float
    perfect: bool


def _powers(grid: Sides, volume: int, what: str) -> list[Sides]:
    """Tiles of ``volume`` tokens whose sides are powers of two, none longer than needed to cover its axis."""
    exponent = volume.bit_length() - 1
    if volume < 1 or volume != 1 << exponent:
        raise OptionError(f"A tile of {what} has sides that are powers of two, so its volume is one: not {volume}.")
    most = [max(length - 1, 0).bit_length() for length in grid]
    found = [
        tuple(1 << e for e in exponents)
        for exponents in itertools.product(*(range(m + 1) for m in most))
        if sum(exponents) == exponent
    ]
    if not found:
        raise OptionError(
            f"No tile of {volume} {what} with sides that are powers of two fits the grid {sides(grid)}, which holds at "
            f"most {1 << sum(most)} in one tile. Try a smaller tile volume."
        )
    return found


def _axis_options(length: int, window: int, causal: bool, q: int, kv: int, kv_start: KvStart) -> list[_OnAxis]:
    """The strides that matter on an axis: each allows more than all smaller ones."""
    kept: list[_OnAxis] = []
    for stride in range(1, window + 1):
        one = GNASimulator((length,), (window,), (stride,), (causal,), (q,), (kv,), "multi", kv_start)
        visited = one.visited().to(torch.float64)
        found = _OnAxis(
            stride,
            one.flop_bound,
            one.total_tiles / float(visited.mean()),
            one.total_tiles / float(visited.max()),
            one.is_perfectly_block_sparse,
        )
        if all(found.mean > k.mean or found.worst > k.worst or found.perfect > k.perfect for k in kept):
            kept.append(found)
    return kept


def search(
    grid: Sides,
    window: Sides,
    q_volume: int,
    kv_volume: int,
    *,
    causal: Sequence[bool] = (),
    kv_start: KvStart = "static",
    progress: Callable[[Sequence[tuple[int, int, int]]], Iterable[tuple[int, int, int]]] = iter,
) -> list[Found]:
    """Every setting of stride and tile that matters for ``window``, the best first.

    Tiles hold ``q_volume`` queries and ``kv_volume`` keys, their sides being powers of two; strides go from 1 to the
    window on each axis. Sorted by the mean tile-aware bound, among equals by how few queries share a window, then by
    the worst tile's bound. A bound above the FLOP bound (short tiles at the border count as whole ones) counts as it.
    """
    flags = tuple(causal) or (False,) * len(grid)
    check_window(grid, window)
    q_tiles, kv_tiles = _powers(grid, q_volume, "queries"), _powers(grid, kv_volume, "keys")
    steps = [
        (axis, q, kv)
        for axis in range(len(grid))
        for q in sorted({tile[axis] for tile in q_tiles})
        for kv in sorted({tile[axis] for tile in kv_tiles})
    ]
    options = {
        (axis, q, kv): _axis_options(grid[axis], window[axis], flags[axis], q, kv, kv_start)
        for axis, q, kv in progress(steps)
    }
    found = []
    for q_tile, kv_tile in itertools.product(q_tiles, kv_tiles):
        per_axis = [options[axis, q, kv] for axis, (q, kv) in enumerate(zip(q_tile, kv_tile, strict=True))]
        for chosen in itertools.product(*per_axis):
            flop = math.prod(one.flop for one in chosen)
            bound = min(math.prod(one.mean for one in chosen), flop)
            worst = min(math.prod(one.worst for one in chosen), flop)
            stride = tuple(one.stride for one in chosen)
            found.append(Found(stride, q_tile, kv_tile, bound, worst, all(one.perfect for one in chosen)))
    # Products in another order differ in their last digits.
    return sorted(found, key=lambda f: (-round(f.bound, 9), f.sharing, f.stride, -round(f.worst, 9)))


def front(found: Sequence[Found]) -> list[Found]:
    """Of a search's result, what more sharing of windows buys: the best for each number of queries that share one,
    where it allows more than all smaller numbers."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda f: f.sharing):  # stable: among equals the best stays first
        if not kept or one.bound > kept[-1].bound + 1e-9:
            kept.append(one)
    return kept


@dataclass(frozen=True)
class VisitedTiles:
    """Which tiles of keys one tile of queries visits. ``query``: its tokens per axis, ``[first, stop)``; ``spans``: the
    tiles of keys per axis, likewise; ``share`` ``(tiles per axis)``: visible pairs of each, 0 where not visited.
    ``total``: tiles that cover the grid."""

    grid: Sides
    query: tuple[tuple[int, int], ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    share: Tensor
    total: int

    @property
    def visited(self) -> int:
        """Tiles of keys visited."""
        return int((self.share > 0).sum())


def visited_tiles(
    grid: Sides,
    window: Sides,
    stride: Sides,
    q_tile: Sides,
    kv_tile: Sides,
    *,
    query: Sides | None = None,
    causal: Sequence[bool] = (),
    kv_start: KvStart = "static",
) -> VisitedTiles:
    """What the tile of queries that holds the position ``query`` (by default the middle) visits."""
    check_window(grid, window)
    flags = tuple(causal) or (False,) * len(grid)
    place = tuple(length // 2 for length in grid) if query is None else query
    if any(not 0 <= at < length for at, length in zip(place, grid, strict=True)):
        raise OptionError(f"The query {sides(place)} is not on the grid {sides(grid)}; positions count from 0.")
    simulator = GNASimulator(grid, window, stride, flags, q_tile, kv_tile)
    rule = simulator.rule
    queries, spans, shares = [], [], []
    for axis, length in enumerate(grid):
        first = place[axis] // q_tile[axis] * q_tile[axis]
        queries.append((first, min(first + q_tile[axis], length)))
        start, stop = axis_windows(length, window[axis], rule.stride[axis], 1, flags[axis])
        start, stop = (t[slice(*queries[-1]), None] for t in (start, stop))
        side, origin = kv_tile[axis], int(start.min()) if kv_start == "dynamic" else 0
        # A lattice that begins with the window goes on to both sides of it.
        edges = sorted({0, *range(origin % side, length, side), length})
        spans.append(tuple(itertools.pairwise(edges)))
        lower, upper = torch.tensor(spans[-1]).T
        pairs = (torch.minimum(stop, upper) - torch.maximum(start, lower)).clamp_min(0).sum(0)
        shares.append(pairs / ((upper - lower) * len(start)))
    share = torch.ones(())
    for axis_share in shares:
        share = share[..., None] * axis_share
    return VisitedTiles(grid, tuple(queries), tuple(spans), share, simulator.total_tiles)
