"""Rectified SpaAttn: the implicit attention, the gain test and the rectified output against plain loops, and limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention
from regard.layout import BlockLayout
from regard.masks import Boolean, Causal, KeyPadding, Sinks, SlidingWindow
from regard.sparse.compensation import pooled_attention
from regard.sparse.rectified_spaattn import (
    RectifiedSpaAttention,
    implicit_block_attention,
    pooling_gain_mask,
    rectification_report,
    rectified_block_attention,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
BLOCK = 8


def qkv(q_len: int = 40, k_len: int | None = None, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks with means of their own, so that some pass the gain test and some do not."""
    k_len = q_len if k_len is None else k_len

    def tokens(heads: int, length: int) -> Tensor:
        blocks = 1.5 * torch.randn(2, heads, -(-length // BLOCK), 6, dtype=torch.float64)
        noise = 0.8 * torch.rand(2, heads, length, 1) * torch.randn(2, heads, length, 6, dtype=torch.float64)
        return blocks.repeat_interleave(BLOCK, 2)[:, :, :length] + noise

    return tokens(4, q_len), tokens(kv_heads, k_len), torch.randn(2, kv_heads, k_len, 5, dtype=torch.float64)


def constant_in_blocks(x: Tensor, length: int) -> Tensor:
    """The first ``length`` tokens repeat the first of their block."""
    head = x[:, :, :length:BLOCK].repeat_interleave(BLOCK, 2)[:, :, :length]
    return torch.cat((head, x[:, :, length:]), 2)


def full(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def by_loops(
    query: Tensor, key: Tensor, value: Tensor, top_p: float, min_blocks: int, text: int = 0, gain_aware: bool = True
) -> Tensor:
    """One head of one sequence, step by step as the formulas stand; only whole blocks before the text."""
    n_q, n_k, dim = len(query), len(key), query.shape[1]
    visual = n_k - text
    blocks = [range(s, min(s + BLOCK, visual)) for s in range(0, visual, BLOCK)]
    q_blocks = [range(s, min(s + BLOCK, n_q - text)) for s in range(0, n_q - text, BLOCK)]
    out = torch.zeros(n_q, value.shape[1], dtype=torch.float64)

    def softmax_over(row: int, tokens: list[int]) -> Tensor:
        return (key[tokens] @ query[row] / dim**0.5).softmax(0) @ value[tokens]

    for rows in q_blocks:
        q_mean = query[list(rows)].mean(0)
        q_dev = (query[list(rows)] - q_mean).abs().mean(0)
        k_mean = [key[list(b)].mean(0) for b in blocks]
        k_dev = [(key[list(b)] - m).abs().mean(0) for b, m in zip(blocks, k_mean, strict=True)]
        # The share of each block among pooled logits, then its true multiplicity.
        logits = [float(q_mean @ m) / dim**0.5 for m in k_mean]
        of_text = [float(q_mean @ key[j]) / dim**0.5 for j in range(visual, n_k)]
        total = sum(len(b) * math.exp(x) for b, x in zip(blocks, logits, strict=True)) + sum(map(math.exp, of_text))
        share = [len(b) * math.exp(x) / total for b, x in zip(blocks, logits, strict=True)]
        kept, carried = [], sum(map(math.exp, of_text)) / total
        for b in sorted(range(len(blocks)), key=lambda b: -share[b]):
            if carried < top_p or len(kept) < min_blocks:
                kept.append(b)
            carried += share[b]
        rest = torch.zeros(value.shape[1], dtype=torch.float64)
        r = 1.0
        for b in set(range(len(blocks))) - set(kept):
            gain = abs(float(q_mean @ k_mean[b]))
            error = abs(float(q_dev @ k_mean[b])) + abs(float(q_mean @ k_dev[b]))
            if gain > error or not gain_aware:
                rest += share[b] * value[list(blocks[b])].mean(0)
                r -= share[b]
        tokens = sorted(j for b in kept for j in blocks[b]) + list(range(visual, n_k))
        for row in rows:
            out[row] = r * softmax_over(row, tokens) + rest
    for row in range(n_q - text, n_q):
        out[row] = softmax_over(row, list(range(n_k)))
    return out


@pytest.mark.paper("rectified_spaattn")
@pytest.mark.parametrize("gain_aware", [True, False])
@pytest.mark.parametrize(("lengths", "text"), [((40, 40), 0), ((37, 37), 0), ((20, 45), 0), ((45, 45), 5)])
def test_output_is_that_of_the_formulas(lengths: tuple[int, int], text: int, gain_aware: bool) -> None:
    query, key, value = qkv(*lengths)
    out = rectified_block_attention(query, key, value, 0.6, 2, text=text, gain_aware=gain_aware, block_size=BLOCK)
    for b in range(2):
        for h in range(4):
            wanted = by_loops(query[b, h], key[b, h // 2], value[b, h // 2], 0.6, 2, text, gain_aware)
            torch.testing.assert_close(out[b, h], wanted, **TIGHT)


@pytest.mark.paper("rectified_spaattn")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "text"), [((40, 40), 0), ((37, 37), 0), ((41, 41), 5), ((9, 9), 5)])
def test_all_critical_is_full_attention(causal: bool, lengths: tuple[int, int], text: int) -> None:
    query, key, value = qkv(*lengths)
    module = RectifiedSpaAttention(BLOCK, top_p=1.0, text=text)
    torch.testing.assert_close(module(query, key, value, causal=causal), full(query, key, value, causal), **TIGHT)
    assert module.pairs(query, key, causal=False) == 1.0
    module = RectifiedSpaAttention(BLOCK, top_p=0.0, min_blocks=6, text=text)
    torch.testing.assert_close(module(query, key, value), full(query, key, value), **TIGHT)


@pytest.mark.paper("rectified_spaattn")
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("length", [48, 45])
def test_constant_blocks_are_exact_at_any_sparsity(top_p: float, length: int) -> None:
    """Both as all means are added and as the gain test says (a logit that is not zero always passes)."""
    query, key, value = qkv(length)
    query, key = constant_in_blocks(query, length), constant_in_blocks(key, length)
    for gain_aware in (True, False):
        module = RectifiedSpaAttention(BLOCK, top_p, gain_aware=gain_aware)
        assert module.pairs(query, key) < 1
        torch.testing.assert_close(module(query, key, value), full(query, key, value), **TIGHT)


@pytest.mark.paper("rectified_spaattn")
def test_text_is_exact_because_a_block_counts_as_often_as_it_has_tokens() -> None:
    query, key, value = qkv(53)
    query, key = constant_in_blocks(query, 48), constant_in_blocks(key, 48)
    module = RectifiedSpaAttention(BLOCK, 0.2, text=5)
    assert module.pairs(query, key) < 1
    torch.testing.assert_close(module(query, key, value), full(query, key, value), **TIGHT)
    shares = implicit_block_attention(query, key, BLOCK, 5)
    keys = key.repeat_interleave(2, 1)
    logits = query @ keys.transpose(-1, -2) / 6**0.5
    exact = logits.softmax(-1)[:, :, :48:BLOCK]
    wanted = torch.cat((exact[..., :48].unflatten(-1, (6, BLOCK)).sum(-1), exact[..., 48:].sum(-1, keepdim=True)), -1)
    torch.testing.assert_close(shares, wanted, **TIGHT)
    # Left out, a block weighs as one token: the text gets too much.
    once = torch.cat((logits[:, :, :48:BLOCK, :48:BLOCK], logits[:, :, :48:BLOCK, 48:]), -1).softmax(-1)
    assert float((once[..., 6:].sum(-1) - wanted[..., 6]).min()) > 1e-4


@pytest.mark.paper("rectified_spaattn")
@pytest.mark.parametrize("text", [0, 5])
def test_weights_sum_to_one(text: int) -> None:
    query, key, _ = qkv(53)
    valid = torch.ones(2, 53, dtype=torch.bool)
    valid[1, 2:19] = False
    for gain_aware in (True, False):
        module = RectifiedSpaAttention(BLOCK, 0.4, text=text, gain_aware=gain_aware)
        for causal, mask in ((False, None), (True, None), (True, KeyPadding(valid)), (False, SlidingWindow(20))):
            if mask is not None and causal:
                valid[1, 0] = True  # every query sees a key
            weights = module.weights(query, key, causal=causal, mask=mask)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 53, dtype=torch.float64), **TIGHT)
    shares = implicit_block_attention(query, key, BLOCK, text)
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]), **TIGHT)


@pytest.mark.paper("rectified_spaattn")
def test_without_the_gain_test_it_is_pooled_compensation() -> None:
    """The means that the library's pooled attention takes, at queries that are one within a block; the implicit
    attention says how much they weigh."""
    query, key, value = qkv(48)
    query = constant_in_blocks(query, 48)
    module = RectifiedSpaAttention(BLOCK, 0.5, gain_aware=False)
    visit = module.select(query, key, module.request(query, key, value)).visit
    exact = block_sparse_attention(query, key, value, BlockLayout.of(None, 48, 48, BLOCK, BLOCK).only(visit))
    rest, rest_lse = pooled_attention(query, key, value, ~visit, BLOCK, BLOCK, scale=6**-0.5)
    _, all_lse = pooled_attention(query, key, value, torch.ones_like(visit), BLOCK, BLOCK, scale=6**-0.5)
    share = (rest_lse - all_lse).exp()[..., None]
    torch.testing.assert_close(module(query, key, value), (1 - share) * exact + share * rest, **TIGHT)
    assert 0.05 < float(share.mean()) < 0.95


@pytest.mark.paper("rectified_spaattn")
def test_where_no_mean_is_trusted_it_is_ordinary_sparse_attention() -> None:
    """Means of exactly zero have no gain: r = 1 and nothing is added."""
    query, key, value = qkv(48)
    query = query - query.unflatten(2, (-1, BLOCK)).mean(3).repeat_interleave(BLOCK, 2)
    assert not bool(pooling_gain_mask(query, key, BLOCK).any())
    module = RectifiedSpaAttention(BLOCK, 0.0, min_blocks=2)
    layout = module.select(query, key, module.request(query, key, value))
    assert layout.density() == pytest.approx(2 / 6)
    plain = block_sparse_attention(query, key, value, layout)
    torch.testing.assert_close(module(query, key, value), plain, **TIGHT)
    none = RectifiedSpaAttention(BLOCK, 0.0, min_blocks=2, rectify=(), gain_aware=False)
    torch.testing.assert_close(none(query, key, value), plain, **TIGHT)


@pytest.mark.paper("rectified_spaattn")
def test_gain_against_error() -> None:
    query, key, _ = qkv(37, 45)
    found = pooling_gain_mask(query, key, BLOCK)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                for j in range(6):
                    q, k = query[b, h, 8 * i : 8 * i + 8], key[b, h // 2, 8 * j : 8 * j + 8]
                    q_mean, k_mean = q.mean(0), k.mean(0)
                    error = abs((q - q_mean).abs().mean(0) @ k_mean) + abs(q_mean @ (k - k_mean).abs().mean(0))
                    assert bool(found[b, h, i, j]) == bool(abs(q_mean @ k_mean) > error)
    assert 0.1 < float(found.double().mean()) < 0.9


def test_parts_of_the_rectification_add_up() -> None:
    query, key, value = qkv(48)

    def out(*rectify: str) -> Tensor:
        return rectified_block_attention(
            query,
            key,
            value,
            0.5,
            rectify=rectify,
            gain_aware=False,
            block_size=BLOCK,  # type: ignore[arg-type]
        )

    torch.testing.assert_close(out("critical") + out("noncritical") - out(), out("critical", "noncritical"), **TIGHT)
    assert float((out("critical") - out()).abs().max()) > 1e-3


def test_causal_and_masks() -> None:
    """Blocks that a block of queries sees in part are computed; values of unseen keys never matter."""
    query, key, value = qkv(61)
    valid = torch.ones(2, 61, dtype=torch.bool)
    valid[0, 50:] = False
    module = RectifiedSpaAttention(BLOCK, 0.2, gain_aware=False)
    for causal, mask in ((True, None), (True, KeyPadding(valid)), (False, SlidingWindow(13) | Sinks(3))):
        visit = module.select(query, key, module.request(query, key, value, causal, mask)).visit
        rule = Causal() if mask is None else mask & Causal() if causal else mask
        partial = BlockLayout.of(Boolean(rule.dense(61, 61)), 61, 61, BLOCK, BLOCK).partial
        assert bool((visit | ~partial).all())
        seen = rule.dense(61, 61)
        weights = module.weights(query, key, causal=causal, mask=mask)
        assert not bool(weights[~seen.expand_as(weights)].any())
        some = seen.any(-1).expand(2, 4, -1)
        torch.testing.assert_close(weights.sum(-1), some.double(), **TIGHT)


@pytest.mark.parametrize("length", [48, 53])
@pytest.mark.parametrize("causal", [False, True])
def test_text_under_masks(length: int, causal: bool) -> None:
    """Text sees all it may; hidden text takes no share."""
    query, key, value = qkv(length)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, -3:] = False
    module = RectifiedSpaAttention(BLOCK, 0.3, text=5, gain_aware=False)
    out = module(query, key, value, causal=causal, mask=KeyPadding(valid))
    seen = (KeyPadding(valid) & Causal() if causal else KeyPadding(valid)).dense(length, length)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out[:, :, -5:], wanted[:, :, -5:], **TIGHT)
    cut = RectifiedSpaAttention(BLOCK, 0.3, text=2, gain_aware=False)
    if not causal:
        short = cut(query[1:, :, :-3], key[1:, :, :-3], value[1:, :, :-3])
        torch.testing.assert_close(out[1:, :, : (length - 5) // 8 * 8], short[:, :, : (length - 5) // 8 * 8], **TIGHT)


def test_neighbours_are_always_computed() -> None:
    query, key, value = qkv(64)
    module = RectifiedSpaAttention(BLOCK, 0.0, neighbours=SlidingWindow(5) | Sinks(10))
    visit = module.select(query, key, module.request(query, key, value)).visit
    row, column = torch.arange(8)[:, None], torch.arange(8)
    assert bool(visit[..., ((row - column).abs() <= 1) | (column < 2)].all())
    assert float(visit.double().mean()) < 0.8


def test_gradients_reach_weights_and_means() -> None:
    leaves = [t[:1].requires_grad_() for t in qkv(21)]
    for text in (0, 3):
        module = RectifiedSpaAttention(BLOCK, 0.3, text=text, gain_aware=False)
        assert torch.autograd.gradcheck(lambda q, k, v, m=module: m(q, k, v), leaves, fast_mode=True)


def test_first_layers_may_stay_dense() -> None:
    query, key, value = qkv(48)
    options = {"block_size": BLOCK, "top_p": 0.1, "dense_layers": 2}
    for layer, exact in ((0, True), (1, True), (2, False)):
        module = RectifiedSpaAttention(layer_index=layer, **options)
        error = (module(query, key, value) - full(query, key, value)).abs().max()
        assert (float(error) < 1e-9) == exact
        assert (module.pairs(query, key) == 1.0) == exact


def test_report_and_names() -> None:
    query, key, value = qkv(64)
    found = rectification_report(query, key, value, block_size=BLOCK, top_p=0.0, min_blocks=3)
    assert found.density == pytest.approx(3 / 8) and 0 < found.trusted < 1
    exact = full(query, key, value)
    out = rectified_block_attention(query, key, value, 0.0, 3, block_size=BLOCK)
    assert found.rectified == pytest.approx(float((out - exact).abs().sum() / exact.abs().sum()))
    query, key = constant_in_blocks(query, 64), constant_in_blocks(key, 64)
    found = rectification_report(query, key, value, block_size=BLOCK, top_p=0.3)
    assert max(found.pooled, found.rectified) < 1e-9 < 0.1 < min(found.sparse, found.scaled)
    assert isinstance(regard.create("rectified_spaattn"), RectifiedSpaAttention)


def test_errors() -> None:
    with pytest.raises(OptionError, match="top_p"):
        RectifiedSpaAttention(top_p=1.5)
    with pytest.raises(OptionError, match="min_blocks"):
        RectifiedSpaAttention(min_blocks=0)
    with pytest.raises(OptionError, match="rectify"):
        RectifiedSpaAttention(rectify="critical")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="neighbours"):
        RectifiedSpaAttention(neighbours=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="layer_index"):
        RectifiedSpaAttention(dense_layers=2)
    with pytest.raises(ShapeError, match="smaller block_size"):
        implicit_block_attention(*qkv(9)[:2], BLOCK, text=5)
