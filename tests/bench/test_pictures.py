"""Pictures: cells keep mass, shades show what is there, files are what they say."""

from __future__ import annotations

import base64
import io

import pytest
import torch

from regard.bench.pictures import draw, implied_map, map_sprite, pooled, shade, text_map


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
