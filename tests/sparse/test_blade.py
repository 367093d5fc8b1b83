"""BLADE's attention: importance and the choice of blocks against plain loops, the pooled branch in its limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import dense_attention
from regard.layers.curves import gilbert3d
from regard.layout import BlockLayout
from regard.masks import Causal, KeyPadding
from regard.sparse.blade import (
    BLADE_PRESETS,
    AdaptiveBlockSparseAttention,
    adaptive_block_sparse,
    energy_mask,
    sampled_block_importance,
)
from regard.sparse.compensation import pooled_background

TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def inputs(length: int = 60, dim: int = 8, size: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    query = size * torch.randn(2, 4, length, dim, dtype=torch.float64)
    return query, size * torch.randn(2, 2, length, dim, dtype=torch.float64), torch.randn(2, 2, length, 5).double()


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


@pytest.mark.paper("blade")
@pytest.mark.parametrize("grid", [None, (60,), (6, 10), (3, 4, 5)])
@pytest.mark.parametrize("block", [7, 16, 128])
def test_all_energy_is_full_attention(grid: tuple[int, ...] | None, block: int) -> None:
    """Also where importance is so uneven that the share of most blocks is lost to rounding."""
    for size in (1.0, 40.0):
        tensors = inputs(size=size)
        out = adaptive_block_sparse(*tensors, block_size=block, keep=4, energy=1.0, max_ratio=1.0, grid=grid)
        torch.testing.assert_close(out, dense(*tensors), **TIGHT)


@pytest.mark.paper("blade")
@pytest.mark.parametrize("gap", [1, 4, 15])
def test_double_counting_cancels_for_keys_constant_in_runs(gap: int) -> None:
    query, key, value = inputs()
    key = key[:, :, ::gap].repeat_interleave(gap, 2)[:, :, :60]
    out = adaptive_block_sparse(query, key, value, global_gap=gap, block_size=8, keep=4, energy=1.0, max_ratio=1.0)
    torch.testing.assert_close(out, dense(query, key, value), **TIGHT)
    # With other keys it does not: the branch is there.
    query, key, value = inputs()
    out = adaptive_block_sparse(query, key, value, global_gap=gap, block_size=8, keep=4, energy=1.0, max_ratio=1.0)
    assert (float((out - dense(query, key, value)).abs().max()) > 1e-3) == (gap > 1)


@pytest.mark.paper("blade")
@pytest.mark.parametrize("gap", [1, 4, 7])
def test_without_any_block_the_pooled_attention_is_left(gap: int) -> None:
    """60 tokens are no multiple of 7: the last run counts as the 4 tokens that it has."""
    query, key, value = inputs()
    nothing = BlockLayout.of(None, 60, 60, 8, 8).only(torch.zeros(8, 8, dtype=torch.bool))
    out = pooled_background(query, key, value, nothing, gap, scale=8**-0.5)
    runs = [slice(start, start + gap) for start in range(0, 60, gap)]
    means, values = (torch.stack([x[:, :, run].mean(2) for run in runs], 2) for x in (key, value))
    sizes = torch.tensor([len(range(60)[run]) for run in runs], dtype=torch.float64)
    expected = dense(query, means, values, sizes.log().expand(60, -1))
    torch.testing.assert_close(out, expected, **TIGHT)
    if gap == 1:
        torch.testing.assert_close(out, dense(query, key, value), **TIGHT)


@pytest.mark.paper("blade")
def test_the_two_branches_are_merged_by_the_sigmoid_of_their_log_sums() -> None:
    """Row by row, from the formula, and the gradient through both log-sum-exps."""
    query, key, value = (x.requires_grad_() for x in inputs(48))
    module = AdaptiveBlockSparseAttention(8, 4, min_ratio=0.1, max_ratio=0.4, global_gap=6)
    out = module(query, key, value)
    seen = module.select(query, key, module.request(query, key, value)).dense()
    assert 0.1 < float(seen.double().mean()) < 0.6
    first, lse1 = dense_attention(query, key, value, bias=torch.where(seen, 0.0, -math.inf).double(), return_lse=True)
    means, values = (x.unflatten(2, (8, 6)).mean(3) for x in (key, value))
    second, lse2 = dense_attention(query, means, values, return_lse=True)
    share = torch.sigmoid(lse1 - (lse2 + math.log(6)))[..., None]
    expected = share * first + (1 - share) * second
    torch.testing.assert_close(out, expected, **TIGHT)
    weight = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, (query, key, value), weight),
        torch.autograd.grad(expected, (query, key, value), weight),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, **TIGHT)


@pytest.mark.paper("blade")
def test_importance_by_a_loop() -> None:
    """With all tokens sampled, and with some: those are the same in all blocks, so a loop can find them out."""
    query, key, _ = inputs(48)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5

    def by_loop(places: list[int]) -> Tensor:
        at = torch.tensor([8 * block + place for block in range(6) for place in places])
        picked = scores[:, :, at][..., at]
        picked = (picked - picked.amax(-1, keepdim=True)).exp()
        found = torch.stack(
            [
                torch.stack([b.amax((-2, -1)) for b in rows.split(len(places), -1)], -1)
                for rows in picked.split(len(places), -2)
            ],
            -2,
        )
        return found / found.sum(-1, keepdim=True)

    torch.testing.assert_close(sampled_block_importance(query, key, 8, 8), by_loop(list(range(8))), **TIGHT)
    found = sampled_block_importance(query, key, 8, 2)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64), **TIGHT)
    matches = [(a, b) for a in range(8) for b in range(a + 1, 8) if torch.allclose(found, by_loop([a, b]), rtol=1e-9)]
    assert len(matches) == 1
    seeds = {
        next((a, b) for a in range(8) for b in range(a + 1, 8) if torch.allclose(drawn, by_loop([a, b])))
        for drawn in (sampled_block_importance(query, key, 8, 2, seed=seed) for seed in range(6))
    }
    assert len(seeds) > 1


@pytest.mark.paper("blade")
@pytest.mark.parametrize("blocks", [7, 40])
@pytest.mark.parametrize("shares", [(0.95, 0.05, 0.17), (0.5, 0.0, 1.0), (0.8, 0.3, 0.6), (1.0, 0.1, 0.9)])
def test_energy_and_bounds(blocks: int, shares: tuple[float, float, float]) -> None:
    energy, least, most = shares
    importance = torch.rand(2, 3, blocks, blocks, dtype=torch.float64) ** 6
    kept = energy_mask(importance, energy, least, most)
    counts = kept.sum(-1)
    assert int(counts.min()) >= min(max(least * blocks, 1), max(int(most * blocks), 1))
    assert int(counts.max()) <= max(most * blocks, 1)
    ordered = importance.sort(-1, descending=True).values
    for row, chosen, best in zip(importance.flatten(0, 2), kept.flatten(0, 2), ordered.flatten(0, 2), strict=True):
        count = int(chosen.sum())
        assert torch.equal(row[chosen].sort(descending=True).values, best[:count])  # the largest
        if count < int(most * blocks + 1e-9):
            assert float(best[:count].sum()) >= energy * float(best.sum()) - 1e-12
        if count > max(least * blocks + 1, 1):
            assert float(best[: count - 1].sum()) < energy * float(best.sum())  # and no more than needed


@pytest.mark.paper("blade")
def test_text_is_dense_both_ways() -> None:
    kept = energy_mask(torch.rand(1, 2, 10, 10), 0.9, 0.1, 0.2, dense_tail=2)
    assert bool(kept[..., -2:, :].all()) and bool(kept[..., -2:].all())
    assert int(kept[..., :-2, :-2].sum(-1).max()) <= 2
    # 45 + 15 tokens: the text begins in the middle of block 5 of 8.
    module = AdaptiveBlockSparseAttention(8, 4, max_ratio=0.2, text=15)
    query, key, value = inputs()
    visit = module.select(query, key, module.request(query, key, value, grid=(3, 3, 5))).visit
    assert bool(visit[..., 5:, :].all()) and bool(visit[..., 5:].all())
    assert int(visit[..., :5, :5].sum(-1).max()) <= 2


@pytest.mark.paper("blade")
@pytest.mark.parametrize("gap", [None, 5])
@pytest.mark.parametrize("text_first", [False, True])
def test_tokens_go_along_the_curve_and_back(gap: int | None, text_first: bool) -> None:
    """The same as a call on tokens that someone else put in order, text at the end."""
    frames, height, width, text = 3, 4, 5, 7
    query, key, value = inputs(67)
    options = {"block_size": 8, "keep": 4, "min_ratio": 0.1, "max_ratio": 0.3, "global_gap": gap, "text": text}
    order, _ = gilbert3d(width, height, frames)
    beside = torch.arange(text) if text_first else torch.arange(60, 67)
    order = torch.cat((order + text if text_first else order, beside))
    out = adaptive_block_sparse(query, key, value, grid=(frames, height, width), text_first=text_first, **options)
    expected = adaptive_block_sparse(query[:, :, order], key[:, :, order], value[:, :, order], **options)
    torch.testing.assert_close(out[:, :, order], expected, **TIGHT)
    assert not torch.allclose(out, adaptive_block_sparse(query, key, value, **options))


@pytest.mark.paper("blade")
def test_the_choice_is_not_differentiated() -> None:
    """The gradient is that of attention to the blocks that were chosen."""
    query, key, value = (x.requires_grad_() for x in inputs(48))
    module = AdaptiveBlockSparseAttention(8, 4, max_ratio=0.4)
    layout = module.select(query, key, module.request(query, key, value))
    assert not sampled_block_importance(query, key, 8, 4).requires_grad
    found = torch.autograd.grad(module(query, key, value).square().sum(), (query, key, value))
    fixed = torch.autograd.grad(dense(query, key, value, layout.dense()).square().sum(), (query, key, value))
    for one, other in zip(found, fixed, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@pytest.mark.paper("blade")
@pytest.mark.parametrize("gap", [None, 6])
def test_padded_tokens_do_not_matter(gap: int | None) -> None:
    query, key, value = inputs()
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[0, 21:] = False
    module = AdaptiveBlockSparseAttention(8, 8, max_ratio=0.4, global_gap=gap)
    out = module(query, key, value, mask=KeyPadding(valid))
    alone = AdaptiveBlockSparseAttention(8, 8, max_ratio=0.4, global_gap=gap)
    # In a call on the real tokens alone importance of their blocks is the same but for rows that are cut short.
    whole = slice(0, 16)
    expected = alone(query[:1, :, :21], key[:1, :, :21], value[:1, :, :21])
    torch.testing.assert_close(out[:1, :, whole], expected[:, :, whole], **TIGHT)


def test_cost_is_an_upper_bound() -> None:
    module = AdaptiveBlockSparseAttention(8, 4, max_ratio=0.4, global_gap=6, text=10)
    query, key, value = inputs(80)
    shape = AttentionShape(80, 80, num_heads=4, head_dim=8)
    density = module.pairs(query, key, value)
    assert density is not None and density <= (module.cost(shape).pairs or 0) <= 1.2
    assert density > 14 / 80  # the means are counted
    sampled = (80 // 8 * 4) ** 2
    assert module.scoring_flops(shape) == 2 * 4 * sampled * 8


def test_presets_build() -> None:
    for options in BLADE_PRESETS.values():
        module = regard.create("blade", **options)
        assert module.max_ratio == options["max_ratio"] and module.global_gap == options["global_gap"]


def test_refusals() -> None:
    tensors = inputs()
    for options in ({"keep": 0}, {"keep": 300}, {"energy": 0.0}, {"min_ratio": 0.5}, {"global_gap": 0}, {"text": -1}):
        with pytest.raises(OptionError):
            AdaptiveBlockSparseAttention(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="keep"):
        sampled_block_importance(*tensors[:2], 8, 9)
    with pytest.raises(ShapeError, match="axes"):
        AdaptiveBlockSparseAttention()(*tensors, grid=(1, 1, 6, 10))
    with pytest.raises(UnsupportedPatternError):
        AdaptiveBlockSparseAttention()(*tensors, causal=True)
    with pytest.raises(UnsupportedMaskError):
        AdaptiveBlockSparseAttention()(*tensors, mask=Causal())
