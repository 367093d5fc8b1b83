"""Block masks: what their lists hold, and the way to torch's own and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from regard.errors import OptionError, ShapeError
from regard.layers.block_mask import BlockMask, create_block_mask, create_mask
from regard.layers.mask_mods import and_masks, causal, document, noop, sliding_window
from regard.layout import BlockLayout
from regard.masks import Causal, Mask, SlidingWindow
from tests.layers.mask_cases import CASES, Case

pytestmark = pytest.mark.paper("flex_attention")


def made(case: Case, block_size: int | tuple[int, int] = 16) -> tuple[BlockMask, Tensor]:
    heads = 3 if case.name == "heads" else None
    mask = create_block_mask(case.mask, case.batch, heads, case.q_len, case.k_len, block_size)
    return mask, create_mask(case.mask, case.batch, heads, case.q_len, case.k_len)


def of_lists(counts: Tensor, indices: Tensor) -> Tensor:
    """Lists as booleans, one entry after the other."""
    found = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).view(-1, counts.dim()).tolist():
        for slot in range(int(counts[tuple(place)])):
            found[(*place, int(indices[(*place, slot)]))] = True
    return found


def cut(dense: Tensor, block_q: int, block_k: int) -> list[list[Tensor]]:
    return [list(rows.split(block_k, -1)) for rows in dense.split(block_q, -2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_are_empty_full_or_partial(case: Case) -> None:
    mask, dense = made(case, (16, 8))
    partial, full = (
        of_lists(mask.kv_num_blocks, mask.kv_indices),
        of_lists(mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    for row, blocks in enumerate(cut(dense, 16, 8)):
        for column, block in enumerate(blocks):
            some, every = block.flatten(2).any(-1), block.flatten(2).all(-1)
            assert full[:, :, row, column].equal(every)
            assert partial[:, :, row, column].equal(some & ~every)
    visited = mask.to_dense().repeat_interleave(16, 2).repeat_interleave(8, 3)[:, :, : case.q_len, : case.k_len]
    assert bool((dense & ~visited).sum() == 0)
    assert mask.layout.dense().equal(dense)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sparsity_is_the_share_of_blocks_left_out(case: Case) -> None:
    mask, dense = made(case)
    kept = [bool(block.any()) for lane in dense.flatten(0, 1) for row in cut(lane, 16, 16) for block in row]
    assert mask.sparsity() == pytest.approx(1 - sum(kept) / len(kept))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transposed_lists_lead_back(case: Case) -> None:
    mask, _ = made(case, (16, 8))
    q_counts, q_indices, full_counts, full_indices = mask.q_blocks
    assert of_lists(q_counts, q_indices).mT.equal(of_lists(mask.kv_num_blocks, mask.kv_indices))
    assert of_lists(full_counts, full_indices).mT.equal(of_lists(mask.full_kv_num_blocks, mask.full_kv_indices))


@pytest.mark.parametrize("case", [case for case in CASES if case.q_len % 8 == 0], ids=lambda case: case.name)
def test_torch_makes_the_same_blocks(case: Case) -> None:
    """torch fills short last blocks up with hidden pairs; whole blocks are classed alike."""
    heads = 3 if case.name == "heads" else None
    sizes = (case.batch, heads, case.q_len, case.k_len)
    ours = create_block_mask(case.mask, *sizes, 8)
    theirs = torch_flex.create_block_mask(case.mask, *sizes, "cpu", BLOCK_SIZE=8)
    assert ours.to_dense().equal(theirs.to_dense().bool())
    assert ours.full_kv_num_blocks.equal(theirs.full_kv_num_blocks)
    assert 100 * ours.sparsity() == pytest.approx(theirs.sparsity(), abs=1e-4)
    back = BlockMask.from_torch(theirs)
    assert back.layout.dense().equal(ours.layout.dense())
    again = BlockMask.from_torch(ours.to_torch())
    assert again.layout.visit.equal(ours.layout.visit)
    assert again.layout.full.equal(ours.layout.full)


def test_a_layout_and_a_rule_become_block_masks() -> None:
    rule: Mask = Causal() & SlidingWindow(20)
    by_rule = create_block_mask(rule, None, None, 100, 100, 16)
    by_pairs = create_block_mask(and_masks(causal, sliding_window(19)), None, None, 100, 100, 16)
    assert by_rule.layout.visit.equal(by_pairs.layout.visit)
    assert by_rule.layout.full.equal(by_pairs.layout.full)
    layout = BlockLayout.of(rule, 100, 100, 16, 16)
    mask = BlockMask.from_layout(layout)
    assert mask.layout is layout
    assert create_mask(mask.mask_mod, None, None, 100, 100).equal(layout.dense())


def test_full_lists_are_believed_and_partial_ones_asked() -> None:
    """Two rows of three blocks: block 2 of row 0 is said to be full, which the function would hide."""
    mask = BlockMask.from_kv_blocks(
        torch.tensor([[[1, 1]]]),
        torch.tensor([[[[0, 9, 9], [1, 0, 0]]]]),
        torch.tensor([[[1, 0]]]),
        torch.tensor([[[[2, 0, 0], [0, 0, 0]]]]),
        block_size=4,
        mask_mod=causal,
    )
    assert mask.shape == (1, 1, 8, 12)
    seen = mask.layout.dense()[0, 0]
    i, j = torch.arange(8)[:, None], torch.arange(12)
    assert seen[:4].equal(((j < 4) & (j <= i))[:4] | (j >= 8))
    assert seen[4:].equal(((j >= 4) & (j < 8) & (j <= i))[4:])


def test_a_part_answers_as_the_whole_did() -> None:
    """torch refuses to run a part, as it no longer knows which queries it stands for."""
    where = torch.arange(3)
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 10 * (h + 1) + where[b]), 3, 2, 40, 40, 8)
    whole = mask.layout.dense()
    for index, expected in (
        ((1,), whole[1:2]),
        ((slice(None), 1), whole[:, 1:2]),
        ((-1, slice(0, 2), slice(2, 4)), whole[-1:, :, 16:32]),
        ((slice(None), 0, torch.tensor([4, 1])), whole[:, :1][:, :, [*range(32, 40), *range(8, 16)]]),
    ):
        part = mask[index]  # type: ignore[index]
        assert part.layout.dense().equal(expected)
        assert create_mask(part.mask_mod, part.shape[0], part.shape[1], *part.seq_lengths).equal(expected)
    short = create_block_mask(causal, None, None, 20, 20, 8)
    assert short[:, :, 1:].layout.dense().equal(short.layout.dense()[:, :, 8:])
    with pytest.raises(ShapeError, match="stays the last"):
        short[:, :, torch.tensor([2, 0])]
    for wrong in ((3,), (0, 0, 9), (0, 0, 0, 0)):
        with pytest.raises(OptionError):
            mask[wrong]  # type: ignore[index]


@pytest.mark.parametrize("lengths", [(40, 40), (33, 33), (8, 24), (5, 17), (1, 1)])
def test_a_causal_mask_is_cut_to_shorter_lengths(lengths: tuple[int, int]) -> None:
    longest = create_block_mask(and_masks(causal, sliding_window(12)), None, None, 40, 40, 8)
    found, made_anew = longest._adjust(*lengths), create_block_mask(longest.mask_mod, None, None, *lengths, 8)
    assert found.layout.dense().equal(made_anew.layout.dense())
    assert found.layout.visit.equal(made_anew.layout.visit)
    by_rule = create_block_mask(Causal(), None, None, 40, 40, 8)._adjust(*lengths)
    assert by_rule.layout.dense().equal(torch.ones(1, 1, *lengths, dtype=torch.bool).tril())
    with pytest.raises(ShapeError, match="longest"):
        longest._adjust(41, 40)


def test_the_picture() -> None:
    mask = create_block_mask(causal, None, None, 32, 32, 8)
    assert mask.to_string() == "(0, 0)\n░░\n██░░\n████░░\n██████░░"
    assert mask.to_string(2) == "(0, 0)\n░░\n██░░"
    assert str(mask).startswith("BlockMask(shape=(1, 1, 32, 32), sparsity=37.5%)\n(0, 0)")
    heads = create_block_mask(lambda b, h, q, k: q >= k + 8 * h, None, 6, 32, 32, 8)
    assert heads.to_string(limit=2).splitlines()[-1] == "... and 4 more: mask[batch, head] shows one."


def test_only_what_is_read_has_to_be_in_range() -> None:
    counts, indices = torch.tensor([[[1]]]), torch.tensor([[[[3, 1]]]])
    with pytest.raises(OptionError, match=r"blocks \[3\]"):
        BlockMask.from_kv_blocks(counts, indices, block_size=4)
    with pytest.raises(OptionError, match="can be one of them"):
        BlockMask.from_kv_blocks(counts, indices % 2, counts, indices % 2, block_size=4)
    with pytest.raises(ShapeError, match="come together"):
        BlockMask.from_kv_blocks(counts, indices % 2, counts, block_size=4)
    with pytest.raises(ShapeError, match="Lists for 2 rows"):
        BlockMask.from_kv_blocks(counts, indices % 2, block_size=4, seq_lengths=(8, 8))
    for wrong in (
        lambda: create_block_mask(causal, 0, None, 4, 4),
        lambda: create_block_mask(causal, None, None, 4, 4, 0),
        lambda: create_block_mask(lambda b, h, q, k: q - k, None, None, 4, 4),
        lambda: create_block_mask(causal, None, None, 4, 4).to_string(0),
    ):
        with pytest.raises((OptionError, ShapeError)):
            wrong()


def test_lists_do_not_grow_with_the_square_of_the_length() -> None:
    """A block of 128 x 128 pairs takes one entry of each list."""
    mask = create_block_mask(and_masks(causal, document([3000, 1096])), None, None, 4096, 4096)
    assert mask.kv_indices.numel() == mask.full_kv_indices.numel() == 32 * 32
    assert create_block_mask(noop, None, None, 4096, 4096).sparsity() == 0
