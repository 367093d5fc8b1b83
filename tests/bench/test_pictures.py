"""Pictures: cells keep mass, shades show what is there, files are what they say."""

from __future__ import annotations

import base64
import io
import math

import pytest
import torch

from regard.bench.pictures import (
    ReceptiveField,
    draw,
    draw_field,
    implied_map,
    map_sprite,
    pooled,
    receptive_field,
    shade,
    text_map,
)
from regard.errors import OptionError
from regard.local.gna import neighborhood_mask


def test_cells_keep_each_querys_whole_attention() -> None:
    weights = torch.rand(3, 40, 60).softmax(-1)
    torch.testing.assert_close(pooled(weights, 10).sum(-1), torch.ones(3, 10))
    torch.testing.assert_close(pooled(weights, 100), weights)


def test_cells_are_means_over_queries_and_sums_over_keys() -> None:
    weights = torch.rand(1, 8, 16)
    torch.testing.assert_close(pooled(weights, 4), weights.view(1, 4, 2, 4, 4).sum(-1).mean(2))


def test_nothing_is_black_and_the_largest_is_full() -> None:
    levels = shade(torch.tensor([[0.0, 1e-9, 0.5, 1.0]]))
    assert levels[0, 0] == 0 and levels[0, 3] == 1
    assert 0 < levels[0, 1] < levels[0, 2] < 1


def test_a_sprite_holds_heads_side_by_side() -> None:
    image = pytest.importorskip("PIL.Image")
    weights = torch.eye(16).expand(3, 16, 16)
    picture = image.open(io.BytesIO(base64.b64decode(map_sprite(weights, 8))))
    assert picture.size == (24, 8) and picture.mode == "L"
    assert picture.getpixel((0, 0)) == 255 and picture.getpixel((7, 0)) == 0 and picture.getpixel((8, 0)) == 255


def test_a_causal_window_looks_like_one() -> None:
    weights = implied_map("sliding_window", 32, window=4, sinks=0)
    assert weights.shape == (4, 32, 32)
    distance = torch.arange(32)[:, None] - torch.arange(32)
    assert (weights[:, (distance < 0) | (distance >= 4)] == 0).all()


@pytest.mark.parametrize("name", ["cbam", "moh"])
def test_layers_and_features_show_their_influence(name: str) -> None:
    influence = implied_map(name, 16)
    assert influence.shape == (1, 16, 16)
    torch.testing.assert_close(influence.sum(-1), torch.ones(1, 16))


def test_text_maps_are_as_wide_as_asked() -> None:
    lines = text_map(torch.eye(64), 16).splitlines()
    assert len(lines) == 8 and all(len(line) == 16 for line in lines)
    assert lines[0].startswith("\u2580\u2584")


def test_a_figure_has_a_panel_a_head() -> None:
    pytest.importorskip("matplotlib")
    assert len(draw("full", 16).axes) == 4


@pytest.mark.parametrize(("grid", "query"), [((20,), (3,)), ((7, 9), (0, 8)), ((4, 5, 6), None)])
def test_a_querys_view_is_its_row_of_the_neighbourhood(grid: tuple[int, ...], query: tuple[int, ...] | None) -> None:
    field = receptive_field("gna", grid, query, window=3, stride=1)
    place = tuple(n // 2 for n in grid) if query is None else query
    index = sum(at * math.prod(grid[axis + 1 :]) for axis, at in enumerate(place))
    expected = neighborhood_mask(grid, 3)[index].view(grid)
    assert field.query == place and field.grid == grid and not field.influence
    assert torch.equal(field.seen, expected.expand(4, *grid))
    torch.testing.assert_close(field.weights.flatten(1).sum(-1), torch.ones(4))
    assert field.groups() == [[0, 1, 2, 3]]


def test_a_causal_view_ends_at_the_query() -> None:
    field = receptive_field("sliding_window", (30,), (20,), causal=True, window=5, sinks=1)
    assert field.causal
    assert field.seen[0].nonzero()[:, 0].tolist() == [0, 16, 17, 18, 19, 20]


def test_a_layers_view_comes_from_its_gradient() -> None:
    field = receptive_field("hilo", (6, 6), (4, 1), alpha=0.0, window=3)
    assert field.influence and field.weights.shape == (1, 6, 6)
    rows, columns = torch.arange(6)[:, None], torch.arange(6)
    assert torch.equal(field.seen[0], (rows >= 3) & (columns < 3))
    torch.testing.assert_close(field.weights.sum(), torch.tensor(1.0))


def test_a_features_view_comes_from_its_gradient() -> None:
    field = receptive_field("ccnet", (5, 7), (1, 2), recurrence=1)
    rows, columns = torch.arange(5)[:, None], torch.arange(7)
    assert field.influence
    assert torch.equal(field.seen[0], (rows == 1) | (columns == 2))


def test_what_is_causal_by_nature_is_drawn_so() -> None:
    assert receptive_field("lightning_attention", (12,)).causal
    field = receptive_field("dynamic_mask_attention", (12,), (5,))  # not linear in the values
    assert field.causal and field.influence and not field.seen[0, 6:].any()


def test_heads_that_see_the_same_are_a_group() -> None:
    seen = torch.tensor([[1, 0], [0, 1], [1, 0]], dtype=torch.bool)
    assert ReceptiveField(seen.float(), seen, (0,), False, False).groups() == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("swin", (16,)), {}, "2 axes"),
        (("gna", (8, 8), (8, 0)), {}, "position"),
        (("gna", (8, 8), (3,)), {}, "position"),
        (("gna", (80, 80)), {}, "4096"),
        (("swin", (8, 8)), {"causal": True}, "causal-self"),
        (("lightning_attention", (8,)), {"causal": False}, "causal-self"),
        (("cbam", (8, 8)), {"causal": True}, "self"),
    ],
)
def test_a_view_that_cannot_be_drawn_says_why(arguments, options, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        receptive_field(*arguments, **options)


@pytest.mark.parametrize(
    ("name", "grid", "panels"), [("gna", (24,), 4), ("gna", (6, 7), 5), ("gna", (3, 4, 5), 4), ("hilo", (6, 6), 2)]
)
def test_views_have_a_panel_a_head_or_a_frame(name: str, grid: tuple[int, ...], panels: int) -> None:
    pytest.importorskip("matplotlib")
    figure = draw_field(name, grid)
    assert len(figure.axes) == panels  # images have a colour bar besides
    assert f"of {math.prod(grid)} positions" in figure.get_suptitle()


def test_a_view_of_one_position_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    figure = draw_field("gna", (1, 1))
    assert "1 of 1" in figure.get_suptitle()
