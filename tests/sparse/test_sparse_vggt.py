"""Block-sparse global attention: special tokens, the two conditions against plain loops, and frames."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.masks import KeyPadding
from regard.models.alternating import AlternatingAttention, ViewAttention
from regard.sparse.sparse_vggt import (
    SparseVGGTAttention,
    block_sparse_global_attention,
    match_concentration,
    merge_special,
    pooled_block_probs,
    select_blocks,
    split_special,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
BLOCKS = {"block_q": 8, "block_k": 4}


def inputs(length: int, size: float = 1.5, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    query = size * torch.randn(2, 4, length, dim, dtype=torch.float64)
    return query, size * torch.randn(2, 2, length, dim, dtype=torch.float64), torch.randn(2, 2, length, 5).double()


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


def is_special(frames: int, per_frame: int, special: int) -> Tensor:
    return torch.arange(frames * per_frame) % per_frame < special


@pytest.mark.paper("sparse_vggt")
@pytest.mark.parametrize("options", [{"sparse_ratio": 0.0}, {"top_p": 1.0}, {"sparse_ratio": 0.0, "top_p": 0.2}])
@pytest.mark.parametrize("sizes", [(3, 21, 5), (4, 16, 0), (1, 30, 2), (2, 5, 5)])
def test_no_sparsity_is_dense(options: dict[str, float], sizes: tuple[int, int, int]) -> None:
    frames, per_frame, special = sizes
    for size in (1.5, 60.0):  # whose pooled softmax rounds to zero
        query, key, value = inputs(frames * per_frame, size)
        given = {"sparse_ratio": None, "top_p": None, **options}
        out, sparsity = block_sparse_global_attention(query, key, value, frames, special, **given, **BLOCKS)  # type: ignore[arg-type]
        torch.testing.assert_close(out, dense(query, key, value), **TIGHT)
        assert sparsity == pytest.approx(0)


def reference(
    query: Tensor, key: Tensor, frames: int, special: int, ratio: float | None, top_p: float | None, pool: str
) -> Tensor:
    """The pairs that one head ``(length, dim)`` computes, by the formulas."""
    length, dim = query.shape
    beside = is_special(frames, length // frames, special)
    at = torch.arange(length)
    patches = at[~beside]
    seen = beside[:, None] | beside[None].expand(length, -1)
    reduce = (lambda rows: rows.mean(0)) if pool == "mean" else (lambda rows: rows.amax(0))
    columns = patches.split(4)
    for rows in patches.split(8):
        logits = [float(reduce(query[rows]) @ reduce(key[block])) / math.sqrt(dim) for block in columns]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        ordered = sorted(range(len(columns)), key=lambda b: -weights[b])
        count = 1
        if top_p is not None:
            running = 0.0
            for place, block in enumerate(ordered):
                running += weights[block] / sum(weights)
                if running <= top_p + 1e-5:
                    count = max(count, place + 1)
        if ratio is not None:
            count = max(count, math.floor(len(columns) * (1 - ratio)))
        for block in ordered[:count]:
            seen[rows[:, None], columns[block]] = True
    return seen


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize(("ratio", "top_p"), [(0.5, None), (None, 0.6), (0.6, 0.5), (0.9, 0.3)])
def test_output_is_that_of_the_formulas(pool: str, ratio: float | None, top_p: float | None) -> None:
    """With short last blocks, and two heads that share keys."""
    frames, special = 3, 2
    query, key, value = inputs(3 * 17, 2.0)
    expected = torch.stack(
        [
            torch.stack([reference(query[b, h], key[b, h // 2], frames, special, ratio, top_p, pool) for h in range(4)])
            for b in range(2)
        ]
    )
    out, sparsity = block_sparse_global_attention(query, key, value, frames, special, ratio, top_p, pool=pool, **BLOCKS)
    torch.testing.assert_close(out, dense(query, key, value, expected), **TIGHT)
    assert sparsity == pytest.approx(1 - float(expected.double().mean()))
    assert sparsity > 0.05


@pytest.mark.paper("sparse_vggt")
@pytest.mark.parametrize("ratio", [0.3, 0.8, 1.0])
def test_special_rows_are_dense_and_special_keys_are_seen(ratio: float) -> None:
    query, key, value = inputs(3 * 21, 3.0)
    module = SparseVGGTAttention(5, ratio, None, **BLOCKS)
    out = module(query, key, value, grid=(3, 21))
    beside = is_special(3, 21, 5)
    torch.testing.assert_close(out[:, :, beside], dense(query, key, value)[:, :, beside], **TIGHT)
    weights = module.weights(query, key, grid=(3, 21))
    assert bool((weights[..., beside] > 0).all()) and bool((weights[:, :, beside] > 0).all())
    patches = weights[:, :, ~beside][..., ~beside] > 0
    kept = max(math.floor(12 * (1 - ratio) + 1e-9), 1)
    assert torch.equal(patches.sum(-1), torch.full_like(patches[..., 0], 4 * kept, dtype=torch.int64))


@pytest.mark.paper("sparse_vggt")
def test_of_two_conditions_the_larger_count_is_kept_row_by_row() -> None:
    probs = (1.3 * torch.randn(2, 4, 9, 20, dtype=torch.float64)).softmax(-1)
    by_ratio, by_share = select_blocks(probs, sparse_ratio=0.8), select_blocks(probs, top_p=0.7)
    assert bool((by_ratio.sum(-1) == 4).all())
    both = select_blocks(probs, 0.8, 0.7)
    assert torch.equal(both.sum(-1), by_ratio.sum(-1).maximum(by_share.sum(-1)))
    assert torch.equal(both, by_ratio | by_share)
    assert bool((by_share.sum(-1) > 4).any()) and bool((by_share.sum(-1) < 4).any())
    # The share kept stays within top_p where more than one is kept, and one more would exceed it.
    kept = (probs * by_share).sum(-1)
    following = probs.masked_fill(by_share, 0).amax(-1)
    assert bool(((kept <= 0.7 + 1e-5) | (by_share.sum(-1) == 1)).all()) and bool((kept + following > 0.7).all())
    assert torch.equal(select_blocks(probs, 0.9, top_k=5).sum(-1), torch.full((2, 4, 9), 5))
    assert int(select_blocks(probs, sparse_ratio=0.9)[0, 0, 0].sum()) == 2  # 20 (1 - 0.9) is 1.99... in floating point


@pytest.mark.paper("sparse_vggt")
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("special", [0, 1, 5])
@pytest.mark.parametrize("size", [(0, 0), (1, 1), (4, 6), (3, 7)])
def test_split_and_merge(frames: int, special: int, size: tuple[int, int]) -> None:
    count = size[0] * size[1]
    if count + special == 0:
        return
    x = torch.randn(2, 3, frames * (special + count), 8)
    patches, beside = split_special(x, frames, special + count, special)
    assert patches.shape == (2, 3, frames * count, 8) and beside.shape == (2, 3, frames * special, 8)
    assert torch.equal(merge_special(patches, beside, frames), x)
    flags = is_special(frames, special + count, special)
    assert torch.equal(beside, x[:, :, flags]) and torch.equal(patches, x[:, :, ~flags])


@pytest.mark.paper("sparse_vggt")
def test_identical_frames_choose_and_give_the_same() -> None:
    frames, special, patches = 4, 3, 16
    one = inputs(special + patches, 2.0)
    query, key, value = (x.repeat(1, 1, frames, 1) for x in one)
    module = SparseVGGTAttention(special, 0.6, 0.4, **BLOCKS)
    request = module.request(query, key, value, grid=(frames, special + patches))
    visit = module.select(query, key, request).visit[:, :, : frames * 2].unflatten(2, (frames, 2))
    out = module(query, key, value, grid=(frames, special + patches)).unflatten(2, (frames, -1))
    for frame in range(1, frames):
        assert torch.equal(visit[:, :, frame], visit[:, :, 0])
        torch.testing.assert_close(out[:, :, frame], out[:, :, 0], **TIGHT)


@pytest.mark.paper("sparse_vggt")
def test_order_of_frames_does_not_matter() -> None:
    """Blocks align with frames: outputs, and the pairs chosen, move with the frames."""
    frames, per_frame = 4, 3 + 16
    tensors = inputs(frames * per_frame, 2.0)
    order = torch.tensor([2, 0, 3, 1])
    tokens = torch.arange(frames * per_frame).view(frames, per_frame)[order].flatten()
    module = SparseVGGTAttention(3, 0.6, 0.4, **BLOCKS)
    moved = [x[:, :, tokens] for x in tensors]
    out = module(*moved, grid=(frames, per_frame))
    torch.testing.assert_close(out, module(*tensors, grid=(frames, per_frame))[:, :, tokens], **TIGHT)
    weights = module.weights(*tensors[:2], grid=(frames, per_frame))
    again = module.weights(*moved[:2], grid=(frames, per_frame))
    assert torch.equal(again > 0, weights[:, :, tokens][..., tokens] > 0)


@pytest.mark.paper("sparse_vggt")
@pytest.mark.parametrize("top_p", [None, 0.3, 0.8])
def test_density_falls_with_the_ratio(top_p: float | None) -> None:
    query, key, _ = inputs(3 * 37, 2.0)
    found = [
        SparseVGGTAttention(5, ratio, top_p, **BLOCKS).pairs(query, key, grid=(3, 37)) or 0.0
        for ratio in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    ]
    assert all(later <= before + 1e-12 for before, later in pairwise(found))
    assert found[0] == pytest.approx(1) and found[-1] < 0.9
    if top_p is None:  # then the sizes tell
        shape = AttentionShape(111, 111, 4, 16, grid=(3, 37))
        for ratio, density in ((0.5, found[3]), (0.9, found[5])):
            assert SparseVGGTAttention(5, ratio, None, **BLOCKS).cost(shape).pairs == pytest.approx(density)
        assert SparseVGGTAttention(5, 0.5, 0.5).cost(shape).pairs == 1


def test_pooled_probabilities() -> None:
    query, key, _ = inputs(30)
    for mode in ("mean", "max"):
        probs = pooled_block_probs(query, key, 8, 4, mode)  # type: ignore[arg-type]
        assert probs.shape == (2, 4, 4, 8)
        rows, columns = query[1, 3, 24:], key[1, 1].split(4)
        pool = (lambda x: x.mean(0)) if mode == "mean" else (lambda x: x.amax(0))
        logits = torch.stack([pool(rows) @ pool(block) for block in columns]) / 4
        torch.testing.assert_close(probs[1, 3, 3], logits.softmax(0), **TIGHT)


def test_hidden_keys_have_no_part() -> None:
    query, key, value = inputs(3 * 21, 2.0)
    valid = torch.ones(2, 63, dtype=torch.bool)
    valid[0, 42:], valid[1, 10:23] = False, False
    for pool in ("mean", "max"):
        module = SparseVGGTAttention(5, 0.6, 0.3, pool=pool, **BLOCKS)  # type: ignore[arg-type]
        call = {"grid": (3, 21), "mask": KeyPadding(valid)}
        other = torch.where(valid[:, None, :, None], key, 1e3)
        torch.testing.assert_close(module(query, key, value, **call), module(query, other, value, **call), **TIGHT)
    # A last frame that is all padding is as good as none.
    query, key, value = (x[:1] for x in (query, key, value))
    module = SparseVGGTAttention(5, None, 0.6, **BLOCKS)
    padded = module(query, key, value, grid=(3, 21), mask=KeyPadding(valid[:1]))[:, :, :42]
    alone = module(*(x[:, :, :42] for x in (query, key, value)), grid=(2, 21))
    torch.testing.assert_close(padded, alone, **TIGHT)


def test_concentration() -> None:
    even = torch.full((1, 2, 10, 10), 0.1)
    torch.testing.assert_close(match_concentration(even), torch.full((1, 2), 0.1))
    torch.testing.assert_close(match_concentration(torch.eye(10)[None, None]), torch.ones(1, 1))
    with pytest.raises(ShapeError, match="top"):
        match_concentration(even, 0.0)


def test_alternating_model_made_sparse() -> None:
    torch.manual_seed(0)
    model = AlternatingAttention(32, 2, 4, 3, layer_scale=None).eval().double()
    x = torch.randn(2, 3, 24, 32).double()
    out = model(x, (4, 6))
    assert out.shape == (2, 3, 27, 32)

    def globally(path: str) -> bool:
        return "global_blocks" in path

    options = {"special": 3, "frames": 3, "top_p": None, **BLOCKS}
    with regard.retrofit(model, "sparse_vggt", layers=globally, sparse_ratio=0.0, **options) as handle:
        assert len(handle.modules) == 2
        torch.testing.assert_close(model(x, (4, 6)), out, **TIGHT)
    with regard.retrofit(model, "sparse_vggt", layers=globally, sparse_ratio=0.7, **options):
        sparse = model(x, (4, 6))
        assert model(x[:, :2], (4, 6)).shape == (2, 2, 27, 32)  # the call's own grid counts
    assert float((sparse - out).detach().abs().max()) > 1e-3
    # Views after the first are told apart by content alone.
    order = torch.tensor([0, 2, 1])
    torch.testing.assert_close(model(x[:, order], (4, 6)), out[:, order], **TIGHT)
    with pytest.raises(ShapeError, match="grid"):
        model(x, (4, 5))
    with pytest.raises(OptionError, match="head_dim"):
        ViewAttention(24, 4)
    with pytest.raises(OptionError, match="depth"):
        AlternatingAttention(depth=0)


def test_alternating_model_knows_positions_on_both_axes() -> None:
    """Turned queries and keys depend on the offset of rows and of columns."""
    model = AlternatingAttention(32, 1, 1, 2)
    cos, sin = model.turn(3, 5, torch.zeros(1, dtype=torch.float64))
    assert cos.shape == (17, 2, 16)
    assert bool((cos[:2] == 1).all()) and bool((sin[:2] == 0).all())
    angle = torch.atan2(sin[2 + 2 * 5 + 3], cos[2 + 2 * 5 + 3])  # row 2, column 3: positions 3 and 4
    torch.testing.assert_close(angle[:, 1], torch.tensor([3.0, 4.0]).double() * 100 ** (-2 / 16), **TIGHT)


def test_errors() -> None:
    query, key, value = inputs(30)
    with pytest.raises(OptionError, match="how many"):
        SparseVGGTAttention(sparse_ratio=None, top_p=None)
    with pytest.raises(OptionError, match="how many"):
        select_blocks(torch.ones(2, 3))
    with pytest.raises(OptionError, match="between 0 and 1"):
        SparseVGGTAttention(top_p=1.5)
    with pytest.raises(OptionError, match="pooled"):
        SparseVGGTAttention(pool="median")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="block_q"):
        SparseVGGTAttention(block_q=0)
    with pytest.raises(ShapeError, match="frames"):
        SparseVGGTAttention()(query, key, value)
    with pytest.raises(ShapeError, match="frames=7"):
        SparseVGGTAttention(frames=7)(query, key, value)
    with pytest.raises(ShapeError, match="5 of these special"):
        SparseVGGTAttention()(query, key, value, grid=(10, 3))
    with pytest.raises(ShapeError, match="4 frames"):
        split_special(query, 4, 7)
    with pytest.raises(ShapeError, match="4 frames"):
        merge_special(query, key, 4)
