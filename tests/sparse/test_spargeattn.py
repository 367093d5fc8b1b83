"""SpargeAttn: selection against its limits and a loop, tile skipping against its bound, calibration against its
target."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError
from regard.kernels.tiled import quantize_block_int8, smooth_k, tiled_attention
from regard.layout import BlockLayout
from regard.masks import Causal
from regard.sparse.spargeattn import (
    SpargeAttention,
    block_self_similarity,
    calibrate_sparge,
    sparge_attention,
    sparge_block_mask,
)


def inputs(q_len: int, k_len: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k_len = q_len if k_len is None else k_len
    query = torch.randn(2, 4, q_len, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, k_len, 8, generator=generator, dtype=torch.float64)
    return query, key, torch.randn(2, 2, k_len, 8, generator=generator, dtype=torch.float64)


def smooth(length: int, heads: int = 2, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that drift slowly along the sequence, so that block means tell."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(2, 1, heads, length, dim, generator=generator, dtype=torch.float64).cumsum(3)
    walk = F.layer_norm(walk, (dim,)) * 1.6
    return walk[0], walk[1] + walk[0], torch.randn(1, heads, length, dim, generator=generator, dtype=torch.float64)


@pytest.mark.paper("spargeattn")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("skip", [math.inf, 50.0])
def test_keeping_all_is_full_attention(causal: bool, skip: float) -> None:
    for length in (64, 61):
        query, key, value = inputs(length)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        out = sparge_attention(query, key, value, causal=causal, block_q=16, block_k=8, top_p=1.0, skip_threshold=skip)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        base = BlockLayout.of(Causal() if causal else None, length, length, 16, 8)
        tiled, _ = tiled_attention(query, key, value, base, skip_threshold=skip)
        torch.testing.assert_close(tiled, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("spargeattn")
def test_top_p_of_one_keeps_blocks_that_rounding_would_drop() -> None:
    query, key, _ = (t.float() for t in smooth(512))
    assert bool(sparge_block_mask(30 * query, key, 16, 8, sim=-1.0, top_p=1.0).all())


@pytest.mark.paper("spargeattn")
@pytest.mark.parametrize("causal", [False, True])
def test_gate_limits(causal: bool) -> None:
    """sim = 1 trusts no block; sim = -1 trusts all, which leaves plain top-p over pooled attention (here: a loop)."""
    query, key, _ = smooth(96)
    visible = BlockLayout.of(Causal() if causal else None, 96, 96, 16, 8).visit
    assert torch.equal(
        sparge_block_mask(query, key, 16, 8, sim=1.0, top_p=0.1, causal=causal), visible.expand(1, 2, -1, -1)
    )
    mask = sparge_block_mask(query, key, 16, 8, sim=-1.0, top_p=0.8, causal=causal)
    for h in range(2):
        for i in range(6):
            seen = visible[0, 0, i].nonzero().flatten().tolist()
            mean = query[0, h, 16 * i : 16 * i + 16].mean(0)
            logits = torch.stack([mean @ key[0, h, 8 * j : 8 * j + 8].mean(0) / 4 for j in seen])
            shares, kept, total = logits.softmax(-1).tolist(), set(), 0.0
            for place in sorted(range(len(seen)), key=lambda p: -shares[p]):
                total += shares[place]
                if kept and total > 0.8:
                    break
                kept.add(seen[place])
            if causal:
                kept |= {2 * i, 2 * i + 1}
            assert set(mask[0, h, i].nonzero().flatten().tolist()) == kept


@pytest.mark.paper("spargeattn")
def test_blocks_that_means_cannot_summarise_are_computed() -> None:
    query, key, _ = smooth(128)
    key = key.clone()
    key[:, :, 40:48] = 3 * torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    query = query.clone()
    query[:, :, 48:64] = torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = sparge_block_mask(query, key, 16, 8, sim=0.4, top_p=0.3)
    assert bool(mask[..., 5].all()) and bool(mask[:, :, 3].all())
    assert not bool(mask.all())


@pytest.mark.paper("spargeattn")
def test_subtracting_the_mean_key_changes_nothing() -> None:
    query, key, value = inputs(50)
    for causal in (False, True):
        first = F.scaled_dot_product_attention(query, key + 5, value, is_causal=causal, enable_gqa=True)
        second = F.scaled_dot_product_attention(query, smooth_k(key + 5), value, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
        masks = [sparge_block_mask(query, k, 16, 8, sim=0.1, top_p=0.7, causal=causal) for k in (key, key + 5)]
        assert torch.equal(*masks)


@pytest.mark.paper("spargeattn")
@pytest.mark.parametrize("threshold", [1.0, 3.0, 8.0, math.inf])
@pytest.mark.parametrize("warps", [1, 4])
def test_lost_mass_of_skipped_tiles_is_bounded(threshold: float, warps: int) -> None:
    query, key, _ = smooth(128)
    query = query * 3
    identity = torch.eye(128, dtype=torch.float64).expand(1, 2, -1, -1)
    layout = BlockLayout.of(Causal(), 128, 128, 16, 8)
    weights, stats = tiled_attention(query, key, identity, layout, skip_threshold=threshold, warps=warps)
    scores = (query @ key.mT / 4).masked_fill(~Causal().dense(128, 128), -math.inf)
    kept = stats.kept.repeat_interleave(16 // warps, 2).repeat_interleave(8, 3)
    lost = (scores.softmax(-1) * ~kept).sum(-1)
    dropped = (~kept & Causal().dense(128, 128)).sum(-1)
    assert bool((lost <= dropped * 2.0**-threshold + 1e-12).all())
    if threshold == math.inf:
        assert not bool(stats.skipped.any()) and float(lost.max()) == 0
        torch.testing.assert_close(weights, scores.softmax(-1))
    elif threshold < 8:
        assert bool(stats.skipped.any()), "smooth inputs let tiles be skipped"
        renormalised = (scores.masked_fill(~kept, -math.inf)).softmax(-1)
        torch.testing.assert_close(weights, renormalised)


@pytest.mark.paper("spargeattn")
def test_self_similarity_of_known_blocks() -> None:
    same = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 8, 8)
    torch.testing.assert_close(block_self_similarity(same, 8), torch.ones(1, 1, 1, dtype=torch.float64))
    orthonormal = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[None, None] * 3
    torch.testing.assert_close(block_self_similarity(orthonormal, 8), torch.full((1, 1, 1), 1 / 8, dtype=torch.float64))
    x = torch.randn(1, 2, 21, 8, dtype=torch.float64)
    for block, similarity in enumerate(block_self_similarity(x, 8)[0, 1]):
        rows = x[0, 1, 8 * block : 8 * block + 8]
        torch.testing.assert_close(similarity, F.cosine_similarity(rows[:, None], rows[None], dim=-1).mean())


@pytest.mark.paper("spargeattn")
@pytest.mark.parametrize("causal", [False, True])
def test_calibration_meets_its_target(causal: bool) -> None:
    data = [tuple(t.float() for t in smooth(192, seed=seed)) for seed in range(2)]
    sparsities = []
    for l1, pv_l1 in ((0.03, 0.04), (0.1, 0.12), (0.3, 0.35)):
        found = calibrate_sparge(data, l1, pv_l1, causal=causal, block_q=16, block_k=8, sims=(-1.0, 0.6), steps=6)
        sparsities.append(found.sparsity)
        assert all(error < pv_l1 for error in found.error)
        module = SpargeAttention(16, 8, **found.options())
        for query, key, value in data:
            exact = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
            gap = (module(query, key, value, causal=causal) - exact).abs().sum((0, 2, 3))
            assert bool((gap / exact.abs().sum((0, 2, 3)) < pv_l1).all())
    for loose, tight in zip(sparsities[1:], sparsities, strict=False):
        assert all(a >= b for a, b in zip(loose, tight, strict=True))
    assert min(sparsities[-1]) > 0


@pytest.mark.paper("spargeattn")
def test_causal_selection_sees_no_later_block() -> None:
    """Tokens behind the end of a query block, and of the key blocks under it, change none of its rows."""
    query, key, value = inputs(96)
    options = {"block_q": 16, "block_k": 8, "sim": 0.1, "top_p": 0.6}
    mask = sparge_block_mask(query, key, 16, 8, 0.1, 0.6, causal=True)
    out = sparge_attention(query, key, value, causal=True, **options)
    for end in (16, 48, 80):
        late = [torch.cat((x[:, :, :end], 9 * torch.randn_like(x[:, :, end:]) + 4), 2) for x in (query, key, value)]
        changed = sparge_block_mask(late[0], late[1], 16, 8, 0.1, 0.6, causal=True)
        assert torch.equal(changed[:, :, : end // 16], mask[:, :, : end // 16])
        torch.testing.assert_close(sparge_attention(*late, causal=True, **options)[:, :, :end], out[:, :, :end])
    official = sparge_block_mask(query, key, 16, 8, 0.1, 0.3, causal=True, official=True)
    forced = sparge_block_mask(query, key, 16, 8, -1.0, 0.01, causal=True)
    diagonal = torch.arange(12) // 2 == torch.arange(6)[:, None]
    assert bool(forced[..., diagonal].all()) and not bool(official[..., diagonal].all())


@pytest.mark.paper("spargeattn")
def test_int8_scores_and_smoothing() -> None:
    query, key, value = (t.float() for t in inputs(128))
    key = key + 20
    whole, scale = quantize_block_int8(key, 16)
    assert whole.dtype == torch.int8 and int(whole.abs().max()) == 127
    error = (whole * scale.repeat_interleave(16, -1)[..., None] - key).abs()
    assert bool((error <= scale.repeat_interleave(16, -1)[..., None] * 0.501).all())
    exact = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    layout = BlockLayout.of(None, 128, 128, 32, 16)
    gaps = [
        float(
            (tiled_attention(query, key, value, layout, quant="int8", smooth=s)[0] - exact).abs().sum()
            / exact.abs().sum()
        )
        for s in (True, False)
    ]
    assert gaps[0] < 0.01 and gaps[1] > 3 * gaps[0]


def test_tiled_gradient_is_that_of_the_tiles_computed() -> None:
    results = []
    for quant in (None, "int8"):
        tensors = [t.requires_grad_() for t in inputs(40)]
        module = SpargeAttention(16, 8, sim=0.1, top_p=0.6, skip_threshold=20.0, quant=quant)  # type: ignore[arg-type]
        results.append(torch.autograd.grad(module(*tensors, causal=True).sum(), tensors))
        assert module.stats is not None
    plain = [t.requires_grad_() for t in inputs(40)]
    expected = torch.autograd.grad(
        sparge_attention(*plain, causal=True, block_q=16, block_k=8, sim=0.1, top_p=0.6).sum(), plain
    )
    for ours in results:
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_ratio_and_sink() -> None:
    query, key, _ = smooth(128)
    mask = sparge_block_mask(query, key, 16, 8, ratio=0.25)
    assert torch.equal(mask.sum(-1), torch.full((1, 2, 8), 4))
    assert bool(sparge_block_mask(query, key, 16, 8, ratio=0.25, sink=True)[..., 0].all())


def test_thresholds_a_head() -> None:
    query, key, value = inputs(64)
    module = SpargeAttention(16, 8, sim=(1.0, -1.0, -1.0, -1.0), top_p=(0.5, 1.0, 0.5, 0.5))
    full = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    out = module(query, key, value)
    torch.testing.assert_close(out[:, :2], full[:, :2])
    assert float((out[:, 2:] - full[:, 2:]).abs().max()) > 1e-3
    with pytest.raises(OptionError):
        SpargeAttention(16, 8, top_p=(0.5, 0.5))(query, key, value)


def test_errors_teach() -> None:
    for options in ({"block_q": 0}, {"ratio": 1.5}, {"quant": "fp8"}):
        with pytest.raises(OptionError):
            SpargeAttention(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        calibrate_sparge([], 0.1, 0.2)
