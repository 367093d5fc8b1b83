"""The simulator's command: what it counts, finds and draws is what the masks say."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from regard.bench.simulate import bounds, front, parse_sides, parse_tile, search, sides, visited_tiles
from regard.errors import OptionError
from regard.local.gna import GNASimulator, neighborhood_mask

VIDEO = ((30, 48, 80), (18, 24, 24))


@pytest.mark.parametrize(
    ("text", "axes", "expected"),
    [
        ("64", None, (64,)),
        ("30x48x80", None, (30, 48, 80)),
        ("8", 3, (8, 8, 8)),
        ("4,8", 2, (4, 8)),
        ("4X8", 2, (4, 8)),
    ],
)
def test_sides_are_read_as_written(text: str, axes: int | None, expected: tuple[int, ...]) -> None:
    assert parse_sides(text, "The grid", axes) == expected
    assert parse_sides(sides(expected), "The grid") == expected


@pytest.mark.parametrize("text", ["", "x", "8by8", "0x4", "-3", "4x", "1x2x3x4", "2.5"])
def test_what_is_no_sides_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError, match="16x64x64"):
        parse_sides(text, "The grid")


def test_tiles_are_of_queries_and_of_keys() -> None:
    assert parse_tile("4x8x8:2x8x8", 3) == ((4, 8, 8), (2, 8, 8))
    assert parse_tile("8", 2) == ((8, 8), (8, 8))
    with pytest.raises(OptionError, match="2 numbers and the grid 3 axes"):
        parse_tile("4x8:2x8x8", 3)
    with pytest.raises(OptionError, match="3 parts"):
        parse_tile("4:4:4", 1)


def test_bounds_of_the_papers_video_case() -> None:
    plain = bounds(*VIDEO, (1, 1, 1), (4, 8, 8), (2, 8, 8))
    strided = bounds(*VIDEO, (16, 8, 8), (4, 8, 8), (2, 8, 8))
    assert [(one.tiling, one.kv_start) for one in strided] == list(
        itertools.product(("multi", "flat"), ("static", "dynamic"))
    )
    assert strided[0].flop == plain[0].flop == pytest.approx(11.11, abs=5e-3)
    assert strided[0].worst == strided[0].mean == pytest.approx(11.11, abs=5e-3)
    assert strided[0].perfect and not plain[0].perfect and not strided[2].perfect
    assert plain[0].worst == pytest.approx(3.27, abs=5e-3)
    assert plain[0].mean == pytest.approx(5.24, abs=5e-3)
    assert strided[2].mean < strided[0].mean  # runs of the sequence waste what tiles of the grid do not


def test_a_sequence_has_one_tiling() -> None:
    assert [one.tiling for one in bounds((64,), (8,), (1,), (8,), (8,))] == ["multi", "multi"]


@pytest.mark.parametrize("causal", [(), (True, False)])
@pytest.mark.parametrize("kv_start", ["static", "dynamic"])
def test_search_finds_the_best_of_all_settings(causal: tuple[bool, ...], kv_start: str) -> None:
    grid, window = (12, 10), (5, 6)
    found = search(grid, window, 8, 4, causal=causal, kv_start=kv_start)
    flags = causal or (False, False)
    best: dict[tuple[int, ...], float] = {}
    sizes = [1, 2, 4, 8, 16]
    for q in itertools.product(sizes, repeat=2):
        for kv in itertools.product(sizes, repeat=2):
            if math.prod(q) != 8 or math.prod(kv) != 4:
                continue
            for stride in itertools.product(range(1, 6), range(1, 7)):
                one = GNASimulator(grid, window, stride, flags, q, kv, "multi", kv_start)
                bound = min(one.mean_tile_bound, one.flop_bound)
                best[stride] = max(best.get(stride, 0.0), bound)
    assert found[0].bound == pytest.approx(max(best.values()))
    equal = [stride for stride, bound in best.items() if bound > found[0].bound - 1e-9]
    assert found[0].stride == min(equal, key=lambda s: (math.prod(s), s))


def test_search_tells_of_each_setting_what_the_simulator_does() -> None:
    grid, window = (9, 14), (4, 7)
    found = search(grid, window, 4, 8)
    assert found == sorted(found, key=lambda f: -round(f.bound, 9))
    for one in random.Random(0).sample(found, 12):
        simulator = GNASimulator(grid, window, one.stride, False, one.q_tile, one.kv_tile)
        assert one.bound == pytest.approx(min(simulator.mean_tile_bound, simulator.flop_bound))
        assert one.worst == pytest.approx(min(simulator.tile_bound, simulator.flop_bound))
        assert one.perfect == simulator.is_perfectly_block_sparse
        assert math.prod(one.q_tile) == 4 and math.prod(one.kv_tile) == 8


@pytest.mark.parametrize("kv_start", ["static", "dynamic"])
@pytest.mark.parametrize("causal", [False, True])
def test_flat_tiles_are_runs_of_the_sequence(causal: bool, kv_start: str) -> None:
    grid, window, stride, q_tile, kv_tile = (4, 5, 6), (3, 2, 4), (2, 1, 3), (1, 2, 4), (1, 1, 7)
    simulator = GNASimulator(grid, window, stride, (causal, False, causal), q_tile, kv_tile, "flat", kv_start)
    seen = neighborhood_mask(grid, window, stride, 1, (causal, False, causal))
    counts = []
    for queries in seen.split(8):
        keys = queries.any(0).nonzero()[:, 0]
        origin = int(keys[0]) if kv_start == "dynamic" else 0
        counts.append(len({(key - origin) // 7 for key in keys.tolist()}))
    assert simulator.visited().tolist() == counts


def test_search_finds_the_papers_video_setting() -> None:
    found = search(*VIDEO, 256, 128)
    assert (found[0].stride, found[0].q_tile, found[0].kv_tile) == ((16, 8, 8), (4, 8, 8), (2, 8, 8))
    assert found[0].perfect and found[0].bound == pytest.approx(11.11, abs=5e-3)
    best = front(found)
    assert best[-1].bound == found[0].bound
    for less, more in itertools.pairwise(best):
        assert less.sharing < more.sharing and less.bound < more.bound
    assert all(any(one.sharing <= f.sharing and one.bound >= f.bound - 1e-9 for one in best) for f in found[:500])


@pytest.mark.parametrize(
    ("volumes", "words"), [((48, 64), "powers of two"), ((64, 0), "powers of two"), ((4096, 64), "smaller tile volume")]
)
def test_search_refuses_tiles_that_cannot_be(volumes: tuple[int, int], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        search((12, 10), (5, 5), *volumes)


def test_a_window_larger_than_the_grid_is_refused() -> None:
    for call in (
        lambda: bounds((8, 8), (4, 9), (1, 1), (4, 4), (4, 4)),
        lambda: search((8, 8), (4, 9), 16, 16),
        lambda: visited_tiles((8, 8), (4, 9), (1, 1), (4, 4), (4, 4)),
    ):
        with pytest.raises(OptionError, match="axis 1: 9 > 8"):
            call()


@pytest.mark.parametrize("kv_start", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("grid", "window", "stride", "q_tile", "kv_tile", "query", "causal"),
    [
        ((30,), (7,), (2,), (4,), (5,), None, (True,)),
        ((9, 11), (4, 5), (2, 1), (3, 4), (2, 3), (0, 10), (False, False)),
        ((5, 6, 7), (3, 4, 2), (1, 2, 2), (2, 2, 3), (1, 4, 2), None, (True, False, False)),
    ],
)
def test_visited_tiles_are_those_of_the_mask(grid, window, stride, q_tile, kv_tile, query, causal, kv_start) -> None:
    found = visited_tiles(grid, window, stride, q_tile, kv_tile, query=query, causal=causal, kv_start=kv_start)
    seen = neighborhood_mask(grid, window, stride, 1, causal).view(*grid, *grid)
    place = tuple(n // 2 for n in grid) if query is None else query
    assert all(first <= at < stop for at, (first, stop) in zip(place, found.query, strict=True))
    rows = seen[tuple(slice(*span) for span in found.query)].flatten(0, len(grid) - 1)
    for index in itertools.product(*(range(len(spans)) for spans in found.spans)):
        span = [found.spans[axis][i] for axis, i in enumerate(index)]
        part = rows[(slice(None), *(slice(*s) for s in span))]
        assert float(found.share[index]) == pytest.approx(float(part.float().mean()))
    counts = GNASimulator(grid, window, stride, causal, q_tile, kv_tile, "multi", kv_start)
    tile = tuple(at // side for at, side in zip(place, q_tile, strict=True))
    assert found.visited == int(counts.visited()[tile])
    assert found.total == counts.total_tiles


def test_a_tile_off_the_grid_is_refused() -> None:
    with pytest.raises(OptionError, match="not on the grid"):
        visited_tiles((8, 8), (3, 3), (1, 1), (4, 4), (4, 4), query=(8, 0))


@pytest.mark.parametrize(("grid", "panels"), [((32,), 1), ((16, 24), 1), ((8, 8, 8), 2), ((64, 4, 4), 5)])
def test_a_figure_has_a_panel_a_layer_of_tiles(grid: tuple[int, ...], panels: int) -> None:
    pytest.importorskip("matplotlib")
    from regard.bench.tile_pictures import draw_visited

    tile = (4,) * len(grid) if grid[0] < 64 else (2, 4, 4)
    window = tuple(min(n, 3) for n in grid)
    found = visited_tiles(grid, window, (1,) * len(grid), tile, tile)
    figure = draw_visited(found, "a title")
    named = [axes for axes in figure.axes if axes.axison]
    assert len(named) == panels + 1  # and the colour bar
    assert f"{found.visited} of {found.total}" in figure.get_suptitle()
    colours = {tuple(patch.get_facecolor()) for patch in named[0].patches}
    assert len(colours) > 1 or len(grid) == 3


def test_shares_are_products_over_the_axes() -> None:
    found = visited_tiles((16, 16), (8, 8), (8, 8), (8, 8), (8, 8))
    assert torch.equal(found.share, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
