"""Prism: what block means do to rotary pairs, the two bands against plain loops, and its limits."""

from __future__ import annotations

import cmath

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layout import BlockLayout
from regard.masks import Causal, KeyPadding
from regard.reproduce.prism import slash_and_topics
from regard.sparse.frame import compose
from regard.sparse.metrics import mass_recall
from regard.sparse.prism import (
    PrismAttention,
    band_temperature,
    prism_attention,
    prism_block_mask,
    rope_pool_attenuation,
    split_band,
)
from regard.sparse.scoring import pool_blocks
from regard.sparse.selection import TopP

TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def inputs(
    q_len: int = 61, k_len: int | None = None, dim: int = 16, size: float = 1.5
) -> tuple[Tensor, Tensor, Tensor]:
    k_len = q_len if k_len is None else k_len
    query = size * torch.randn(2, 4, q_len, dim, dtype=torch.float64)
    return query, size * torch.randn(2, 2, k_len, dim, dtype=torch.float64), torch.randn(2, 2, k_len, 5).double()


@pytest.mark.paper("prism")
def test_attenuation_is_the_mean_of_rotations() -> None:
    for head_dim, block, base in ((128, 128, 10000.0), (64, 16, 10000.0), (32, 1, 500.0), (8, 37, 5e5)):
        expected = [
            abs(sum(cmath.exp(1j * n * base ** (-2 * i / head_dim)) for n in range(block)) / block)
            for i in range(head_dim // 2)
        ]
        found = rope_pool_attenuation(head_dim, block, base)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    usual = rope_pool_attenuation(128, 128)
    assert int((usual < 0.1).sum()) == 17 and int((usual > 0.9).sum()) == 33


@pytest.mark.paper("prism")
def test_attenuation_is_what_pooling_rotated_keys_does() -> None:
    """In the library's rotary layout, and wherever the block stands."""
    key = torch.randn(32, dtype=torch.float64)
    turned = apply_rotary(key.expand(64, 32), *rotary_angles(64, 32, dtype=torch.float64))
    before = torch.stack(key.chunk(2)).norm(dim=0)
    for mean in pool_blocks(turned[None, None], 16)[0, 0]:
        after = torch.stack(mean.chunk(2)).norm(dim=0)
        torch.testing.assert_close(after, before * rope_pool_attenuation(32, 16), **TIGHT)


def test_bands_are_the_fastest_and_the_slowest_pairs() -> None:
    x = torch.arange(16.0).view(1, 16)
    high, low = split_band(x, 4, 6)
    assert high.tolist() == [[0, 1, 8, 9]] and low.tolist() == [[5, 6, 7, 13, 14, 15]]
    assert [part.shape[-1] for part in split_band(torch.zeros(3, 128))] == [64, 96]
    whole = split_band(x, 16, 16)
    assert all(torch.equal(part, x) for part in whole)
    assert [part.shape[-1] for part in split_band(torch.zeros(3, 2))] == [2, 2]


@pytest.mark.paper("prism")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(64, 64), (61, 61), (23, 50)])
def test_p_of_one_is_full_attention(causal: bool, lengths: tuple[int, int]) -> None:
    query, key, value = inputs(*lengths)
    seen = Causal().dense(*lengths) if causal else None
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    out = prism_attention(query, key, value, causal=causal, block_size=8, p_high=1.0, p_low=1.0)
    torch.testing.assert_close(out, expected, **TIGHT)


@pytest.mark.paper("prism")
def test_p_of_one_keeps_what_softmax_rounds_to_zero() -> None:
    query, key, _ = (t.float() for t in inputs(size=30.0))
    mask = prism_block_mask(query, key, 8, p_high=1.0, p_low=1.0)
    assert torch.equal(mask, torch.ones(8, 8, dtype=torch.bool).tril().expand(2, 4, -1, -1))


@pytest.mark.paper("prism")
def test_whole_bands_are_plain_pooled_top_p() -> None:
    query, key, _ = inputs(64, size=3.0)
    q_means, k_means = pool_blocks(query, 8), pool_blocks(key, 8)
    for last in (None, torch.arange(8)):
        temperature = band_temperature(q_means, k_means, *(split_band(m, 16, 16)[0] for m in (q_means, k_means)), last)
        torch.testing.assert_close(temperature, torch.ones_like(temperature), **TIGHT)
    mask = prism_block_mask(query, key, 8, high=16, low=16, p_high=0.7, p_low=0.7, sink=False, recent=False)
    plain = compose("mean", TopP(0.7), sinks=0, local=0, block_q=8, block_k=8)
    assert torch.equal(mask, plain.select(query, key, plain.request(query, key, key, causal=True)).visit)
    assert not torch.equal(mask, prism_block_mask(query, key, 8, p_high=0.7, p_low=0.7, sink=False, recent=False))


def looped(query: Tensor, key: Tensor, high: int, low: int, p: float, causal: bool, calibrate: bool) -> list[set[int]]:
    """One head ``(length, dim)`` in blocks of 8, by the formulas."""
    dim, kept = query.shape[1], []
    q_means, k_means = ([b.mean(0) for b in x.split(8)] for x in (query, key))

    def rms(rows: list[Tensor], dims: list[int]) -> float:
        return float(torch.stack([r[dims] for r in rows]).square().mean().sqrt())

    for i, q in enumerate(q_means):
        stop = i + 1 if causal else len(k_means)
        chosen = {0, i}
        for pairs in (range(high // 2), range(dim // 2 - low // 2, dim // 2)):
            dims, whole = [d for d in pairs] + [d + dim // 2 for d in pairs], list(range(dim))
            t = (len(dims) / dim) ** 0.5
            for means in (q_means, k_means):
                known = means[:stop]
                t *= rms(known, dims) / rms(known, whole)
            t = t if calibrate else 1.0
            logits = torch.stack([q[dims] @ k[dims] for k in k_means[:stop]]) / (len(dims) ** 0.5 * t)
            shares, before = logits.softmax(-1).tolist(), 0.0
            for block in sorted(range(stop), key=lambda b: -shares[b]):
                if before >= p:
                    break
                chosen.add(block)
                before += shares[block]
        kept.append(chosen)
    return kept


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("calibrate", [False, True])
def test_choice_is_that_of_the_formulas(causal: bool, calibrate: bool) -> None:
    query, key, _ = inputs(61, size=3.0)
    options = {"high": 6, "low": 12, "p_high": 0.6, "p_low": 0.6, "calibrate": calibrate}
    mask = prism_block_mask(query, key, 8, causal, **options)
    for b in range(2):
        for h in range(4):
            expected = looped(query[b, h], key[b, h // 2], 6, 12, 0.6, causal, calibrate)
            assert [set(row.nonzero()[:, 0].tolist()) for row in mask[b, h]] == expected


@pytest.mark.paper("prism")
def test_calibration_does_not_know_scale() -> None:
    query, key, _ = inputs(64)
    q_means, k_means = pool_blocks(query, 8), pool_blocks(key, 8)
    last = torch.arange(8)

    def temperature(size: float) -> Tensor:
        q, k = q_means * size, k_means
        return band_temperature(q, k, split_band(q)[0], split_band(k)[0], last)

    for size in (7.3, 1e-200, 1e200):  # whose squares are no numbers
        torch.testing.assert_close(temperature(size), temperature(1.0), **TIGHT)
    # So logits scale as those of full attention: a larger query is a larger `scale`.
    options = {"p_high": 0.6, "p_low": 0.6, "block_size": 8}
    module = PrismAttention(**options)  # type: ignore[arg-type]
    larger = module.select(2.5 * query, key, module.request(query, key, key, causal=True))
    scaled = module.select(query, key, module.request(query, key, key, causal=True, scale=2.5 / 4))
    assert torch.equal(larger.visit, scaled.visit)


@pytest.mark.paper("prism")
@pytest.mark.parametrize("calibrate", [False, True])
def test_first_and_own_block_always_and_never_a_later_one(calibrate: bool) -> None:
    query, key, _ = inputs(64, size=4.0)
    mask = prism_block_mask(query, key, 8, p_high=0.3, p_low=0.3, calibrate=calibrate)
    assert mask.shape == (2, 4, 8, 8)
    assert bool(mask[..., 0].all()) and bool(mask.diagonal(dim1=2, dim2=3).all())
    assert not bool(mask.triu(1).any())
    neither = prism_block_mask(query, key, 8, p_high=0.3, p_low=0.3, sink=False, recent=False)
    assert not bool(neither[..., 0].all()) and not bool(neither.diagonal(dim1=2, dim2=3).all())
    # Queries that stand inside of a block of keys have two own blocks.
    crossing = prism_block_mask(query[:, :, :21], key, 8, p_high=0.3, p_low=0.3)
    assert bool(crossing[:, :, 0, 5:7].all()) and not bool(crossing[:, :, 0, 7:].any())


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_what_follows_a_block_does_not_move_its_choice(p: float) -> None:
    """The temperatures included."""
    query, key, _ = inputs(64, size=3.0)
    before = prism_block_mask(query, key, 8, p_high=p, p_low=p)
    other_q, other_k = query.clone(), key.clone()
    other_q[:, :, 40:], other_k[:, :, 40:] = 50 * torch.randn(2, 4, 24, 16).double(), torch.randn(2, 2, 24, 16).double()
    other_k[:, :, 40:, :4] *= 1000
    after = prism_block_mask(other_q, other_k, 8, p_high=p, p_low=p)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert p == 1.0 or not torch.equal(before, after)


@pytest.mark.paper("prism")
def test_recovers_a_slash_that_means_do_not_see() -> None:
    query, key = slash_and_topics(4096, seed=0)
    base = BlockLayout.of(Causal(), 4096, 4096, 128, 128)
    pooled = compose("mean", TopP(0.95), block_q=128, block_k=128)
    recalls, densities = [], []
    for layout in (
        base.only(prism_block_mask(query, key)),
        pooled.select(query, key, pooled.request(query, key, key, causal=True)),
    ):
        recalls.append(float(mass_recall(query, key, layout, causal=True, per_query=True)[..., 2048:].mean()))
        densities.append(float(layout.visit[..., 16:, :].double().mean()))
    assert recalls[0] > 0.65 and recalls[1] < 0.4
    assert densities[0] < 0.2


def test_hidden_keys_have_no_part_in_the_choice() -> None:
    query, key, value = inputs(40, size=3.0)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :20], valid[1, 33:] = False, False  # two whole blocks and a half at the start
    module = PrismAttention(8, p_high=0.4, p_low=0.4)
    layout = module.select(query, key, module.request(query, key, value, causal=True, mask=KeyPadding(valid)))
    assert not bool(layout.visit[0, :, :, :2].any())
    other = torch.where(valid[:, None, :, None], key, 1e6)
    again = module.select(query, other, module.request(query, other, value, causal=True, mask=KeyPadding(valid)))
    assert torch.equal(layout.visit, again.visit)


def test_empty_bands_and_zero_input() -> None:
    query, key, value = inputs(40)
    query[..., 0:4], query[..., 8:12] = 0, 0  # nothing in the fast pairs
    key[:, :, :16] = 0
    out = prism_attention(query, key, value, block_size=8)
    assert bool(out.isfinite().all())
    assert bool(prism_attention(0 * query, 0 * key, value, block_size=8).isfinite().all())


def test_a_single_query_attends_to_all_keys() -> None:
    query, key, value = inputs(1, 50, size=4.0)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    out = prism_attention(query, key, value, block_size=8, p_high=0.1, p_low=0.1)
    torch.testing.assert_close(out, expected, **TIGHT)


def test_cost_counts_both_bands() -> None:
    shape = regard.cost.AttentionShape(1024, 1024, 4, 128, causal=True)
    module = PrismAttention(128)
    assert module.scoring_flops(shape) == 2 * 4 * 8 * 8 * (64 + 96)


def test_errors() -> None:
    query, key, value = inputs(20)
    with pytest.raises(OptionError, match="even"):
        PrismAttention(high=7)
    with pytest.raises(OptionError, match="p_high"):
        PrismAttention(p_low=0.0)
    with pytest.raises(OptionError, match="head_dim, 16"):
        prism_attention(query, key, value, high=64)
    with pytest.raises(ShapeError, match="even head_dim"):
        split_band(torch.zeros(1, 7))
    with pytest.raises(OptionError, match="even head_dim"):
        rope_pool_attenuation(7, 8)
    with pytest.raises(OptionError, match="Block sizes"):
        PrismAttention(0)
