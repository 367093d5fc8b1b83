"""Layouts: which blocks or tokens are computed, and that they add up to the mask."""

from __future__ import annotations

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.layout import BlockLayout, TokenLayout, block_members, kept_layout, num_blocks
from regard.masks import Boolean, Causal, KeyPadding, SlidingWindow


def test_blocks_cover_the_tokens() -> None:
    assert [num_blocks(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert block_members(6, 4).tolist() == [[0, 1, 2, 3], [4, 5, 5, 5]]


def test_causal_layout() -> None:
    """The lower blocks are full, the diagonal ones partial."""
    layout = BlockLayout.of(Causal(), 12, 12, 4, 4)
    assert torch.equal(layout.visit[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())
    assert torch.equal(layout.full[0, 0], torch.ones(3, 3, dtype=torch.bool).tril(-1))
    assert torch.equal(layout.partial[0, 0], torch.eye(3, dtype=torch.bool))
    assert layout.density() == pytest.approx(6 / 9)


def test_no_mask_is_everything() -> None:
    layout = BlockLayout.of(None, 5, 7, 2, 3)
    assert bool(layout.full.all()) and bool(layout.dense().all())
    assert layout.density() == 1.0


def test_a_kept_layout_is_made_once() -> None:
    cpu = torch.device("cpu")
    with torch.inference_mode():
        layout = kept_layout(Causal() & SlidingWindow(3), 20, 20, 4, 4, cpu)
    assert kept_layout(Causal() & SlidingWindow(3), 20, 20, 4, 4, cpu) is layout
    assert kept_layout(Causal() | SlidingWindow(3), 20, 20, 4, 4, cpu) is not layout
    assert torch.equal(layout.dense(), (Causal() & SlidingWindow(3)).dense(20, 20))
    assert not layout.visit.is_inference()


def test_only_keeps_the_chosen_blocks() -> None:
    """Per head, and the mask still holds inside."""
    chosen = torch.rand(2, 3, 4, 4) < 0.5
    layout = BlockLayout.of(Causal(), 15, 15, 4, 4).only(chosen)
    wide = chosen.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :15, :15]
    expected = wide & Causal().dense(15, 15)
    assert torch.equal(layout.dense(), expected)
    assert torch.equal(layout.as_mask().dense(15, 15), expected)
    assert not bool((layout.full & ~layout.visit).any())


def test_density_counts_a_short_last_block_by_its_tokens() -> None:
    """Whole blocks are computed, but the last one has fewer rows and columns."""
    chosen = torch.rand(1, 2, 3, 3) < 0.5
    layout = BlockLayout.of(None, 10, 11, 4, 4).only(chosen)
    assert layout.density() == pytest.approx(float(layout.dense().double().mean()))


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (16, 2)])
def test_block_mask_round_trip(sizes: tuple[int, int]) -> None:
    valid = torch.rand(2, 18) < 0.7
    layout = BlockLayout.of((Causal() & SlidingWindow(6)) & KeyPadding(valid), 13, 18, *sizes)
    block_mask = layout.block_mask()
    assert torch.equal(block_mask.to_dense().bool(), layout.visit)
    assert block_mask.seq_lengths == (13, 18)
    visited, full = block_mask.kv_num_blocks.sum(), block_mask.full_kv_num_blocks
    assert full is not None
    assert int(visited + full.sum()) == int(layout.visit.sum())


def test_token_layout_round_trip() -> None:
    seen = torch.rand(2, 3, 7, 11) < 0.4
    seen[0, 0, 3] = False
    layout = TokenLayout.of(seen)
    assert torch.equal(layout.dense(), seen)
    assert layout.indices.shape[-1] == int(seen.sum(-1).max())
    assert layout.density() == pytest.approx(float(seen.double().mean()))
    assert torch.equal(layout.valid.sum(-1), seen.sum(-1))


def test_token_layout_of_nothing_keeps_one_empty_slot() -> None:
    layout = TokenLayout.of(torch.zeros(1, 1, 4, 5, dtype=torch.bool))
    assert layout.indices.tolist() == [[[[-1]] * 4]]
    assert layout.density() == 0.0


def test_boolean_layout_depends_on_batch_and_head() -> None:
    seen = torch.rand(2, 3, 9, 9) < 0.3
    layout = BlockLayout.of(Boolean(seen), 9, 9, 2, 4)
    assert layout.visit.shape == (2, 3, 5, 3)
    assert torch.equal(layout.dense(), seen)


def test_errors_teach() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        BlockLayout.of(None, 4, 4, 0, 2)
    good = BlockLayout.of(None, 4, 4, 2, 2)
    with pytest.raises(ShapeError, match=r"\(batch, heads, 3, 2\)"):
        BlockLayout(good.visit, good.full, good.mask, 6, 4, 2, 2)
    with pytest.raises(ShapeError, match="int64"):
        TokenLayout(torch.zeros(1, 1, 4, 5), 5)
