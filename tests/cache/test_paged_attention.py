"""Attention over pages against attention over each sequence by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cache import PagedCache, PagePool
from regard.cache.paged_attention import PagedAttention
from regard.dense.flex_attention import flex, flex_decode
from regard.errors import OptionError, ShapeError
from regard.layers.block_mask import create_block_mask
from regard.layers.mask_mods import and_masks, causal, noop
from regard.layers.score_mods import alibi_slopes
from regard.masks import MaskMod

pytestmark = pytest.mark.paper("flex_attention")

PAGE, LENGTHS, HEADS, DIM = 8, (37, 5, 24), 4, 16


def tensors(length: int, heads: int = HEADS, batch: int = 1) -> Tensor:
    return torch.randn(batch, heads, length, DIM, dtype=torch.float64)


def filled(lengths: tuple[int, ...] = LENGTHS) -> tuple[PagedAttention, list[tuple[Tensor, Tensor]]]:
    """Sequences that grow in turn, so that the pages of each lie scattered, behind one that has left."""
    torch.manual_seed(0)
    paged = PagedAttention(20, PAGE, max_batch=4)
    paged.reserve(3, 3 * PAGE)
    own = [(tensors(length, 2), tensors(length, 2)) for length in lengths]
    for start in range(0, max(lengths), 5):
        for row in sorted(range(len(lengths)), key=lambda row: (row * 7 + start) % 3):
            stop = min(start + 5, lengths[row])
            if start < stop:
                paged.reserve(row, stop)
                key, value = (t[:, :, start:stop] for t in own[row])
                paged.assign([row], torch.arange(start, stop)[None], key, value)
        if start == 10:
            paged.erase(3)
    return paged, own


def test_pages_over_a_shuffled_table_equal_contiguous_attention() -> None:
    """Queries at the end of sequences of different lengths, with a bias by distance, grouped heads and a window."""
    paged, own = filled()
    assert paged.page_table[0, :5].diff().unique().numel() > 1
    ends, count = torch.tensor(LENGTHS), 4
    query, slopes = tensors(count, batch=3), alibi_slopes(HEADS).double()

    def near(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        place = q_idx + ends[b] - count
        return (kv_idx <= place) & (place - kv_idx < 20)

    def bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx + ends[b] - count - kv_idx)

    logical = create_block_mask(near, 3, None, count, 40, (count, PAGE))
    physical = paged.convert_logical_block_mask(logical)
    assert physical.shape == (3, 1, count, 20 * PAGE)
    expected = []
    for row, (key, value) in enumerate(own):
        length = LENGTHS[row]
        i, j = torch.arange(length - count, length)[:, None], torch.arange(length)
        wide_key, wide_value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = query[row : row + 1] @ wide_key.mT / DIM**0.5 - slopes[:, None, None] * (i - j)
        scores = scores.masked_fill((j > i) | (i - j >= 20), float("-inf"))
        expected.append(scores.softmax(-1) @ wide_value)
    score_mod = paged.get_score_mod(bias)
    for run in (
        lambda: flex(query, paged.key, paged.value, score_mod, physical, enable_gqa=True, backend="eager"),
        lambda: flex(query, paged.key, paged.value, score_mod, physical, enable_gqa=True, backend="tiled"),
        lambda: flex_decode(query, paged.key, paged.value, score_mod, physical, enable_gqa=True, splits=3),
    ):
        torch.testing.assert_close(run(), torch.cat(expected))


def test_only_the_pages_that_are_seen_are_computed() -> None:
    paged, _ = filled()
    ends = torch.tensor(LENGTHS)
    logical = create_block_mask(lambda b, h, q, k: k < ends[b], 3, None, 2, 40, (2, PAGE))
    physical = paged.convert_logical_block_mask(logical)
    assert physical.to_dense().sum((1, 2, 3)).tolist() == [5, 1, 3]
    for row in range(3):
        pages = physical.to_dense()[row, 0, 0].nonzero().flatten().tolist()
        assert sorted(paged.page_table[row][paged.page_table[row] >= 0].tolist()) == pages
    # Whole pages need no function: four of the first sequence, none of the second, all of the third.
    assert physical.layout.full.sum((1, 2, 3)).tolist() == [4, 0, 3]


def test_what_no_sequence_wrote_is_never_seen() -> None:
    """A mask that shows everything shows a sequence's own tokens: not the rest of its last page, nor others' pages."""
    paged, own = filled()
    logical = create_block_mask(noop, None, None, 3, 40, (3, PAGE))
    physical = paged.convert_logical_block_mask(logical, rows=[2, 0])
    query = tensors(3, batch=2)
    out = flex(query, paged.key, paged.value, block_mask=physical, enable_gqa=True)
    for row, sequence in enumerate((2, 0)):
        expected = F.scaled_dot_product_attention(query[row : row + 1], *own[sequence], enable_gqa=True)
        torch.testing.assert_close(out[row : row + 1], expected)  # type: ignore[index]
    assert paged.get_mask_mod()(torch.tensor(3), *torch.zeros(2).int(), torch.arange(160)).sum() == 0


def test_erasing_frees_exactly_a_sequence_s_pages() -> None:
    paged, own = filled()
    held = [set(table[table >= 0].tolist()) for table in paged.page_table]
    assert [len(pages) for pages in held] == [5, 1, 3, 0]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    before = paged.pool.free_pages
    paged.erase(0)
    assert paged.pool.free_pages == before + 5
    assert (paged.page_table[0] == -1).all()
    assert (paged.physical_to_logical[0] == -1).all()
    paged.reserve(3, 14 * PAGE)
    assert held[0] <= set(paged.page_table[3].tolist())
    mask = create_block_mask(noop, None, None, 1, 24, (1, PAGE))
    query = tensors(1)
    out = flex(query, paged.key, paged.value, block_mask=paged.convert_logical_block_mask(mask, [2]), enable_gqa=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, *own[2], enable_gqa=True))


def test_a_paged_cache_is_read_without_a_copy() -> None:
    """Two beams share the pages of their prompt; what one writes the other does not see."""
    torch.manual_seed(0)
    pool = PagePool(16, PAGE)
    cache = PagedCache(pool)
    key, value = tensors(19), tensors(19)
    cache.append(key, value)
    paged = PagedAttention.from_cache(cache)
    assert pool.key is not None
    assert paged.key.data_ptr() == pool.key.data_ptr()
    assert paged.key.is_contiguous()
    query = tensors(19)
    mask = create_block_mask(causal, None, None, 19, 19, PAGE)
    out = flex(query, paged.key, paged.value, block_mask=paged.convert_logical_block_mask(mask))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    free = pool.free_pages
    paged.assign(None, torch.tensor([[18]]), tensors(1), tensors(1))
    assert pool.free_pages == free - 1, "the last page is shared, so it was copied before it was written"
    torch.testing.assert_close(cache.read().key, key)
    paged.erase(0)
    assert pool.free_pages == free


def test_a_prompt_and_its_continuation() -> None:
    """Step by step over pages gives the parallel form."""
    torch.manual_seed(0)
    query, key, value = tensors(21), tensors(21), tensors(21)
    paged, expected = PagedAttention(3, PAGE, 1), F.scaled_dot_product_attention(query, key, value, is_causal=True)
    for start, stop in ((0, 13), (13, 14), (14, 18), (18, 21)):
        shift = start

        def shown(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, shift: int = shift) -> Tensor:
            return causal(b, h, q_idx + shift, kv_idx)

        paged.reserve(0, stop)
        paged.assign(None, torch.arange(start, stop)[None], key[:, :, start:stop], value[:, :, start:stop])
        rule: MaskMod = and_masks(shown, noop)
        mask = paged.convert_logical_block_mask(create_block_mask(rule, None, None, stop - start, stop, (4, PAGE)))
        out = flex(query[:, :, start:stop], paged.key, paged.value, block_mask=mask)
        torch.testing.assert_close(out, expected[:, :, start:stop])


def test_what_cannot_be_is_refused() -> None:
    paged = PagedAttention(2, PAGE, 2)
    mask = create_block_mask(causal, None, None, 8, 8, 4)
    with pytest.raises(OptionError, match="empty"):
        _ = paged.key
    with pytest.raises(OptionError, match="3 more pages of 8 tokens and 2 of 2 are free"):
        paged.reserve(0, 17)
    assert paged.pool.free_pages == 2
    with pytest.raises(OptionError, match="reserve more"):
        paged.assign([0], torch.zeros(1, 1).long(), tensors(1), tensors(1))
    with pytest.raises(ShapeError, match="positions"):
        paged.assign([0], torch.zeros(1, 2).long(), tensors(1), tensors(1))
    with pytest.raises(ShapeError, match="numbers of 1 sequences"):
        paged.assign([0, 1], torch.zeros(2, 1).long(), tensors(1), tensors(1))
    with pytest.raises(ShapeError, match="do not fit pages"):
        paged.convert_logical_block_mask(mask)
    with pytest.raises(OptionError, match="max_batch"):
        paged.erase(2)
    with pytest.raises(OptionError, match="empty"):
        PagedAttention.from_cache(PagedCache(PagePool(2)))
