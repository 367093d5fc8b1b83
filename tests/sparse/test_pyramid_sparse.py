"""Pyramid sparse attention: levels against repeated keys, their assignment against plain loops, and limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention
from regard.layers.curves import hilbert_order
from regard.layout import BlockLayout
from regard.masks import Causal, KeyPadding, SlidingWindow
from regard.sparse.pyramid_sparse import (
    TOPK_RATIOS,
    VIDEO_THRESHOLDS,
    PyramidSparseAttention,
    assign_levels,
    key_similarity_cap,
    level_density,
    pyramid_attention,
    sampled_block_importance,
)
from regard.sparse.scoring import Reduction

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
BLOCKS = {"block_q": 8, "block_k": 16}
SMALL = {"align": False, **BLOCKS}


def qkv(q_len: int = 64, k_len: int | None = None, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    k_len = q_len if k_len is None else k_len
    query = 1.5 * torch.randn(2, 4, q_len, 6, dtype=torch.float64)
    return query, *(torch.randn(2, kv_heads, k_len, d, dtype=torch.float64) for d in (6, 5))


def some_levels(q_len: int, k_len: int, choices: tuple[int, ...] = (0, 1, 2, 4, 8)) -> Tensor:
    """Random levels, the first block of keys always in sight."""
    picked = torch.tensor(choices)[torch.randint(len(choices), (2, 4, -(-q_len // 8), -(-k_len // 16)))]
    picked[..., 0] = 1
    return picked


def full(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def repeated(query: Tensor, key: Tensor, value: Tensor, levels: Tensor, causal: bool = False) -> Tensor:
    """One head, explicitly: each row's list of tokens and means, biases and all."""
    rows = []
    offset = len(key) - len(query)
    for i in range(len(query)):
        keys, values, biases = [], [], []
        for b in range(levels.shape[1]):
            level = int(levels[i // 8, b])
            if level == 0:
                continue
            for start in range(16 * b, min(16 * b + 16, len(key)), level):
                members = list(range(start, min(start + level, len(key))))
                if causal and members[-1] > i + offset:
                    continue
                keys.append(key[members].mean(0))
                values.append(value[members].mean(0))
                biases.append(math.log(len(members)))
        logits = torch.stack(keys) @ query[i] / len(query[i]) ** 0.5 + torch.tensor(biases, dtype=torch.float64)
        rows.append(logits.softmax(0) @ torch.stack(values))
    return torch.stack(rows)


@pytest.mark.paper("pyramid_sparse")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(64, 64), (37, 37), (21, 61)])
def test_levels_are_means_that_count_as_what_they_stand_for(lengths: tuple[int, int], causal: bool) -> None:
    query, key, value = qkv(*lengths)
    levels = some_levels(*lengths)
    out = pyramid_attention(query, key, value, levels, causal, **BLOCKS)
    for b in range(2):
        for h in range(4):
            wanted = repeated(query[b, h], key[b, h // 2], value[b, h // 2], levels[b, h], causal)
            torch.testing.assert_close(out[b, h], wanted, **TIGHT)


@pytest.mark.paper("pyramid_sparse")
@pytest.mark.parametrize("causal", [False, True])
def test_level_one_is_full_and_binary_levels_are_block_sparse(causal: bool) -> None:
    query, key, value = qkv(61)
    ones = torch.ones(1, 1, 8, 4, dtype=torch.int64)
    out = pyramid_attention(query, key, value, ones, causal, **BLOCKS)
    torch.testing.assert_close(out, full(query, key, value, causal), **TIGHT)
    levels = some_levels(61, 61, (0, 1))
    layout = BlockLayout.of(Causal() if causal else None, 61, 61, 8, 16).only(levels > 0)
    out = pyramid_attention(query, key, value, levels, causal, **BLOCKS)
    torch.testing.assert_close(out, block_sparse_attention(query, key, value, layout), **TIGHT)
    module = PyramidSparseAttention(8, 16, {1: (0, 1)})
    torch.testing.assert_close(module(query, key, value, causal=causal), full(query, key, value, causal), **TIGHT)


@pytest.mark.paper("pyramid_sparse")
@pytest.mark.parametrize("level", [2, 4, 8])
@pytest.mark.parametrize("length", [64, 61])
def test_groups_of_equal_keys_are_exact(level: int, length: int) -> None:
    query, key, value = qkv(length)
    key = key[:, :, ::level].repeat_interleave(level, 2)[:, :, :length]
    levels = torch.full((1, 1, 8, 4), level)
    out = pyramid_attention(query, key, value, levels, **BLOCKS)
    torch.testing.assert_close(out, full(query, key, value), **TIGHT)


@pytest.mark.paper("pyramid_sparse")
@pytest.mark.parametrize("length", [64, 61])
def test_uniform_attention_is_the_mean(length: int) -> None:
    query, key, value = qkv(length)
    out = pyramid_attention(query * 0, key, value, some_levels(length, length, (1, 2, 4, 8)), **BLOCKS)
    wanted = value.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(out)
    torch.testing.assert_close(out, wanted, **TIGHT)


@pytest.mark.paper("pyramid_sparse")
def test_nothing_comes_from_later_tokens() -> None:
    query, key, value = qkv(64)
    levels = some_levels(64, 64)
    before = pyramid_attention(query, key, value, levels, True, **BLOCKS)
    for cut in (9, 30, 31, 32, 50):
        other = [torch.cat((t[:, :, :cut], 7 * torch.randn_like(t[:, :, cut:])), 2) for t in (query, key, value)]
        after = pyramid_attention(*other, levels, True, **BLOCKS)
        assert torch.equal(after[:, :, :cut], before[:, :, :cut])
    # A mean is out of sight until its last member is seen: only the first block's tokens are left then.
    levels = torch.tensor([1, 8, 0, 0]).expand(1, 1, 8, 4)
    eye = torch.eye(64, dtype=torch.float64).expand(2, 2, 64, 64)
    weights = pyramid_attention(query, key, eye, levels, True, **BLOCKS)
    assert not bool(weights[:, :, 16:23, 16:].any()) and bool((weights[:, :, 23, 16:24] > 0).all())


@pytest.mark.paper("pyramid_sparse")
def test_density_of_the_default_ratios() -> None:
    importance = torch.rand(1, 2, 8, 320)
    for align in (False, True):
        levels = assign_levels(importance, align=align)
        shares = [float((levels == level).double().mean()) for level in (1, 2, 4, 8, 0)]
        assert shares == pytest.approx([0.1, 0.05, 0, 0.2, 0.65])
        assert level_density(levels) == pytest.approx(0.1 + 0.05 / 2 + 0.2 / 8)
    assert level_density(assign_levels(torch.rand(1, 1, 4, 100))) == pytest.approx(0.15, abs=0.02)


@pytest.mark.paper("pyramid_sparse")
def test_gradients_are_those_of_repeated_means() -> None:
    """Against autograd of tokens pooled by index, written out as one dense softmax with biases."""
    query, key, value = (t[:1].requires_grad_() for t in qkv(32, kv_heads=4))
    levels = some_levels(32, 32)[:1]
    out = pyramid_attention(query, key, value, levels, **BLOCKS)
    pooled = [(t.unflatten(2, (-1, p)).mean(3).repeat_interleave(p, 2), p) for t in (key, value) for p in (1, 2, 4, 8)]
    wide = levels.repeat_interleave(8, 2).repeat_interleave(16, 3)
    # A mean of p keys, written p times without a bias, is one mean with bias log p.
    logits = torch.stack([query @ k.transpose(-1, -2) / 6**0.5 for k, _ in pooled[:4]])
    chosen = torch.stack([wide == p for _, p in pooled[:4]])
    weights = logits.masked_fill(~chosen, float("-inf")).permute(1, 2, 3, 0, 4).flatten(3).softmax(-1)
    wanted = weights @ torch.cat([v for v, _ in pooled[4:]], 2)
    torch.testing.assert_close(out, wanted, **TIGHT)
    seed = torch.randn_like(out)
    for found, expected in zip(
        torch.autograd.grad(out, (query, key, value), seed),
        torch.autograd.grad(wanted, (query, key, value), seed),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.paper("pyramid_sparse")
@pytest.mark.parametrize("probabilities", [False, True])
def test_importance_of_all_tokens(probabilities: bool) -> None:
    query, key, _ = qkv(21, 40)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 6**0.5
    scores = logits.softmax(-1) if probabilities else (logits - logits.amax(-1, keepdim=True)).exp()
    reductions: tuple[Reduction, ...] = ("max", "mean")
    for reduce in reductions:
        found = sampled_block_importance(query, key, 8, 16, 1.0, reduce, probabilities=probabilities)
        for i in range(3):
            for j in range(3):
                part = scores[:, :, 8 * i : 8 * i + 8, 16 * j : 16 * j + 16].flatten(2)
                wanted = part.amax(-1) if reduce == "max" else part.mean(-1)
                torch.testing.assert_close(found[:, :, i, j], wanted, **TIGHT)


def test_importance_of_samples() -> None:
    """A quarter of the positions, the same in every block: in a row, the largest logit of those is worth 1."""
    query, key, _ = qkv(64)
    found = sampled_block_importance(query, key, 8, 16)
    assert bool((found <= 1).all())
    torch.testing.assert_close(found.amax(-1), torch.ones(2, 4, 8, dtype=torch.float64), **TIGHT)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 6**0.5
    inside_q, inside_k = (
        torch.randperm(b, generator=torch.Generator().manual_seed(0))[: b // 4].sort().values for b in (8, 16)
    )
    rows = (torch.arange(8)[:, None] * 8 + inside_q).flatten()
    columns = (torch.arange(4)[:, None] * 16 + inside_k).flatten()
    part = logits[:, :, rows][..., columns]
    part = (part - part.amax(-1, keepdim=True)).exp()
    torch.testing.assert_close(found, part.unflatten(3, (4, 4)).unflatten(2, (8, 2)).amax((3, 5)), **TIGHT)


@pytest.mark.paper("pyramid_sparse")
def test_levels_by_rank_and_by_share() -> None:
    importance = torch.tensor([0.30, 0.02, 0.22, 0.01, 0.15, 0.04, 0.12, 0.03, 0.08, 0.05])
    ratios = {1: (0, 0.1), 2: (0.1, 0.4), 4: (0.4, 0.6), 0: (0.6, 1.0)}
    found = assign_levels(importance, ratios, align=False)
    assert found.tolist() == [1, 0, 2, 0, 2, 0, 2, 0, 4, 4]
    # Three at level 2 become four, two at level 4 become four.
    assert assign_levels(importance, ratios).tolist() == [1, 4, 2, 0, 2, 4, 2, 4, 2, 4]
    # Running sums, of 1.02: .30 .52 .67 .79 .87 .92 .96 .99 1.01: the block that crosses a bound lies below it.
    found = assign_levels(importance, VIDEO_THRESHOLDS, "threshold", align=False)
    assert found.tolist() == [1, 0, 1, 0, 4, 0, 8, 0, 8, 0]
    # One block has everything, but level 1 gets int(0.06 n) + 1 of n.
    single = torch.zeros(50).index_fill(0, torch.tensor([7]), 1.0)
    found = assign_levels(single, VIDEO_THRESHOLDS, "threshold", align=False)
    assert int((found == 1).sum()) == 4 and found[7] == 1
    seen = torch.arange(10) < 4
    found = assign_levels(importance, ratios, align=False, seen=seen)
    assert not bool(found[4:].any()) and found[0] == 1 and int((found > 0).sum()) == 3


@pytest.mark.paper("pyramid_sparse")
def test_cap_by_similarity_of_keys() -> None:
    """Keys that turn by a fixed angle: their cosines at distance 1, 3 and 7 are known."""
    angle = torch.arange(32, dtype=torch.float64) * 0.2
    key = torch.stack((angle.cos(), angle.sin()), -1)[None, None] * torch.rand(32, 1).double().add(0.1)
    cos = {p: math.cos(0.2 * (p - 1)) for p in (2, 4, 8)}
    for t2, t4, t8, wanted in (
        (0.0, 0.0, -1.0, 8),
        (cos[2] - 0.01, cos[4] - 0.01, cos[8] + 0.01, 4),
        (cos[2] - 0.01, cos[4] + 0.01, cos[8] + 0.01, 2),
        (cos[2] + 0.01, 0.99, 0.99, 1),
        (0.999, 0.999, cos[8] - 0.01, 8),
    ):
        assert key_similarity_cap(key, 16, t2, t4, t8).tolist() == [[[wanted, wanted]]]
    query, key, _ = qkv(64)
    module = PyramidSparseAttention(mode="threshold", t2=0.999, t4=0.999, t8=0.999, **SMALL)
    free = PyramidSparseAttention(mode="threshold", **SMALL)
    view = module.view(query, key, module.request(query, key, key))
    capped, assigned = module.levels(query, key, view), free.levels(query, key, view)
    assert torch.equal(capped, assigned.clamp_max(1)) and int(assigned.max()) > 1


def test_module_runs_its_levels() -> None:
    query, key, value = qkv(61)
    valid = torch.ones(2, 61, dtype=torch.bool)
    valid[0, 40:] = False
    module = PyramidSparseAttention(mode="threshold", **SMALL)
    for causal, mask in ((False, None), (True, None), (True, KeyPadding(valid)), (False, SlidingWindow(30))):
        request = module.request(query, key, value, causal, mask)
        view = module.view(query, key, request)
        levels = module.levels(query, key, view)
        assert bool((levels[(view.layout.partial & view.seen).expand_as(levels)] == 1).all())
        assert {2, 4, 8} & set(levels.unique().tolist())
        out = module(query, key, value, causal=causal, mask=mask)
        if mask is None:
            torch.testing.assert_close(out, pyramid_attention(query, key, value, levels, causal, **BLOCKS), **TIGHT)
        weights = module.weights(query, key, causal=causal, mask=mask)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **TIGHT)
    query, key, value = qkv(48)
    levels = module.levels(query, key, module.view(query, key, module.request(query, key, value)))
    assert module.pairs(query, key) == pytest.approx(level_density(levels))


def test_text_is_exact() -> None:
    query, key, value = qkv(70)
    module = PyramidSparseAttention(text=10, **SMALL)
    levels = module.levels(query, key, module.view(query, key, module.request(query, key, value)))
    assert bool((levels[:, :, 7:] == 1).all()) and bool((levels[..., 3:] == 1).all())
    out = module(query, key, value)
    torch.testing.assert_close(out[:, :, 60:], full(query, key, value)[:, :, 60:], **TIGHT)


def test_order_of_tokens() -> None:
    """Along the curve and back: what a call without grid makes of tokens that come along the curve."""
    query, key, value = qkv(70)
    valid = torch.rand(2, 70) < 0.9
    place = torch.cat((hilbert_order((4, 4, 4)), torch.arange(64, 70)))
    module = PyramidSparseAttention(mode="threshold", text=6, order="hilbert", **SMALL)
    for mask, moved in ((None, None), (KeyPadding(valid), KeyPadding(valid[:, place]))):
        out = module(query, key, value, grid=(4, 4, 4), mask=mask)
        wanted = module(*(t[:, :, place] for t in (query, key, value)), mask=moved)
        torch.testing.assert_close(out[:, :, place], wanted, **TIGHT)
        assert module.pairs(query, key, grid=(4, 4, 4), mask=mask) == pytest.approx(
            module.pairs(query[:, :, place], key[:, :, place], mask=moved)
        )
    assert float((module(query, key, value, grid=(4, 4, 4)) - module(query, key, value)).abs().max()) > 1e-3
    causal = module(query, key, value, grid=(4, 4, 4), causal=True)
    torch.testing.assert_close(causal, module(query, key, value, causal=True), **TIGHT)


@pytest.mark.paper("pyramid_sparse")
def test_official_fills_up_the_last_group() -> None:
    query, key, value = qkv(61)
    levels = some_levels(61, 61, (2, 4, 8))
    levels[..., 0] = 2
    filled = [torch.cat((t, t[:, :, -1:].expand(-1, -1, 3, -1)), 2) for t in (key, value)]
    out = pyramid_attention(query, key, value, levels, official=True, **BLOCKS)
    # Every level here divides the filled length; the last group is a mean with the copies in it.
    wanted = pyramid_attention(query, *filled, levels, **BLOCKS)
    last = levels[..., -1].repeat_interleave(8, 2)[:, :, :61]
    torch.testing.assert_close(out[last > 2], wanted[last > 2], **TIGHT)
    assert float((out - pyramid_attention(query, key, value, levels, **BLOCKS)).abs().max()) > 1e-3


def test_names_and_errors() -> None:
    module = regard.create("pyramid_sparse")
    assert isinstance(module, PyramidSparseAttention) and module.ratios == TOPK_RATIOS
    assert PyramidSparseAttention(mode="threshold").ratios == VIDEO_THRESHOLDS
    query, key, value = qkv(64)
    with pytest.raises(ShapeError, match="levels of shape"):
        pyramid_attention(query, key, value, torch.ones(1, 1, 3, 4, dtype=torch.int64), **BLOCKS)
    with pytest.raises(OptionError, match="powers of two"):
        pyramid_attention(query, key, value, torch.full((1, 1, 8, 4), 3), **BLOCKS)
    with pytest.raises(OptionError, match="multiple of the highest"):
        PyramidSparseAttention(block_k=12)
    with pytest.raises(OptionError, match="follow one another"):
        PyramidSparseAttention(ratios={1: (0, 0.2), 2: (0.3, 1)})
    with pytest.raises(OptionError, match="reach up to 1"):
        PyramidSparseAttention(ratios={1: (0, 0.2)})
    with pytest.raises(OptionError, match="mode"):
        PyramidSparseAttention(mode="ranks")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="sample"):
        PyramidSparseAttention(sample=0.0)
    with pytest.raises(OptionError, match="order"):
        PyramidSparseAttention(order="peano")  # type: ignore[arg-type]
