"""Mask functions against the same rules for two plain numbers, and their algebra."""

from __future__ import annotations

import inspect

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.layers import mask_mods as masks
from regard.layers.block_mask import create_mask
from regard.layers.mask_mods import MASKS, and_masks, causal, noop, not_mask, or_masks, sliding_window
from regard.masks import Causal, Document, MaskMod, Neighborhood, SlidingWindow
from tests.layers.mask_cases import CASES, LENGTHS, Case

pytestmark = pytest.mark.paper("flex_attention")


def dense(mask: MaskMod, q_len: int = 40, k_len: int = 40) -> torch.Tensor:
    return create_mask(mask, None, None, q_len, k_len)[0, 0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mask_shows_what_its_rule_says(case: Case) -> None:
    batch, heads = case.batch or 1, 2 if case.name == "heads" else 1
    expected = torch.tensor(
        [
            [[[case.shown(b, h, q, k) for k in range(case.k_len)] for q in range(case.q_len)] for h in range(heads)]
            for b in range(batch)
        ]
    )
    assert create_mask(case.mask, batch, heads, case.q_len, case.k_len).equal(expected)


def test_every_mask_by_name_is_tried() -> None:
    assert set(MASKS) <= {case.name for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mask_is_ten_lines_at_most(case: Case) -> None:
    lines = [line for line in inspect.getsource(case.mask).splitlines() if line.strip()]
    assert len(lines) <= 10


def test_the_algebra_has_its_neutral_elements() -> None:
    for case in CASES:
        if case.batch is None and case.name != "heads":
            sizes = case.q_len, case.k_len
            plain = dense(case.mask, *sizes)
            assert dense(and_masks(case.mask, noop), *sizes).equal(plain)
            assert dense(or_masks(case.mask, noop), *sizes).all()
            assert dense(and_masks(case.mask, not_mask(case.mask)), *sizes).sum() == 0
            assert dense(not_mask(not_mask(case.mask)), *sizes).equal(plain)
    assert dense(or_masks()).sum() == 0
    assert dense(and_masks()).all()


def test_a_causal_window_is_a_band() -> None:
    i, j = torch.arange(40)[:, None], torch.arange(40)
    assert dense(and_masks(sliding_window(5), causal)).equal((i - j >= 0) & (i - j <= 5))


def test_rules_that_know_their_lengths_show_the_same() -> None:
    """For as many queries as keys the two conventions meet; a window counts the query's own key in one of them."""
    rule = Causal() & SlidingWindow(6)
    assert dense(rule.mod(40, 40)).equal(dense(and_masks(causal, sliding_window(5))))
    near = Neighborhood.of((6, 8), (3, 4))
    assert dense(near.mod(48, 48), 48, 48).equal(dense(masks.neighborhood((6, 8), (3, 4)), 48, 48))
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    assert dense(Document(ids).mod(40, 40)).equal(dense(masks.document(LENGTHS)))


def test_behind_the_last_document_nothing_is_seen() -> None:
    assert dense(masks.document([4, 6])).sum() == 4 * 4 + 6 * 6


def test_what_cannot_be_is_refused() -> None:
    for wrong in (
        lambda: sliding_window(-1),
        lambda: masks.dilated_sliding_window(4, 0),
        lambda: masks.document(),
        lambda: masks.document([3], offsets=[0, 3]),
        lambda: masks.document(offsets=[1, 3]),
        lambda: masks.neighborhood((4, 4), (5, 1)),
        lambda: masks.tiled_neighborhood((4, 6), (3, 3), (4, 4)),
        lambda: masks.sliding_tile((4, 4), (3, 4), (2, 2)),
        lambda: masks.svg_spatial(0, 0),
        lambda: masks.batchify(causal, 0),
        lambda: and_masks(causal, Causal()),
    ):
        with pytest.raises(OptionError):
            wrong()
    with pytest.raises(ShapeError, match="images, 2"):
        masks.flamingo([[1, 2, 3]], 4)
