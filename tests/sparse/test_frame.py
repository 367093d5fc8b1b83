"""The frame of block selectors: scores, selections, corrections, and mechanisms that no paper made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.errors import OptionError, UnknownNameError
from regard.masks import Causal, KeyPadding
from regard.sparse import compose
from regard.sparse.compensation import pooled_attention
from regard.sparse.frame import ComposedSelector
from regard.sparse.scoring import SCORES, BlockView
from regard.sparse.selection import Threshold, TopK, TopP, top_k_mask

TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def qkv(length: int = 37, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, h, length, 8, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))  # type: ignore


def view_of(module: ComposedSelector, query: Tensor, key: Tensor, **call: object) -> BlockView:
    return module.view(query, key, module.request(query, key, key, **call))  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_keeping_everything_is_full_attention(score: str, causal: bool) -> None:
    query, key, value = qkv()
    out = compose(score, TopP(1.0), block_q=8, block_k=4)(query, key, value, causal=causal)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, wanted, **TIGHT)


def test_scores_are_means_and_maxima_of_visible_logits() -> None:
    query, key, _ = qkv(21)
    module = compose(block_q=8, block_k=4)
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[0, 5:7] = False
    view = view_of(module, query, key, causal=True, mask=KeyPadding(valid))
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    seen = (Causal() & KeyPadding(valid)).dense(21, 21)
    largest, means = SCORES["max"](query, key, view), SCORES["mean"](query, key, view)
    for i in range(3):
        for j in range(6):
            rows, columns = slice(8 * i, min(8 * i + 8, 21)), slice(4 * j, min(4 * j + 4, 21))
            part = logits[:, :, rows, columns]
            shown = part.masked_fill(~seen[:, :, rows, columns], float("-inf")).flatten(2).amax(-1)
            torch.testing.assert_close(largest[:, :, i, j], shown, **TIGHT)
            for b in range(2):
                of_keys = part[b][..., valid[b, columns]]
                torch.testing.assert_close(means[b, :, i, j], of_keys.mean((1, 2)), **TIGHT)


def test_samples_are_some_of_the_tokens() -> None:
    query, key, _ = qkv(40)
    module = compose(block_q=8, block_k=4)
    view = view_of(module, query, key)
    everything = SCORES["max"](query, key, view)
    some = SCORES["sampled"](query, key, view)
    assert bool((some <= everything + 1e-12).all()) and bool((some < everything).any())


def test_selections_combine() -> None:
    scores = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    scores[..., 12:] = float("-inf")
    for count in (1, 4, 20):
        kept = TopK(count)(scores)
        assert bool((kept.sum(-1) == min(count, 12)).all())
    assert int(TopK(4, scope="head")(scores).sum()) == 2 * 3 * 5 * 4
    assert bool((TopK(4, scope="head")(scores).sum((-1, -2)) == 20).all())
    assert bool((TopK(2, scope="all")(scores).sum((1, 2, 3)) == 30).all())
    both, either = TopP(0.7) & TopK(3), TopP(0.7) | TopK(3)
    counts = TopP(0.7)(scores).sum(-1)
    torch.testing.assert_close(both(scores).sum(-1), counts.clamp_max(3))
    torch.testing.assert_close(either(scores).sum(-1), counts.clamp_min(3))
    assert both.most(16) == 3 and either.most(16) == 16
    # What is kept carries the share, and without its smallest member it would not.
    shares = scores.softmax(-1)
    kept = TopP(0.7)(scores)
    carried = (shares * kept).sum(-1)
    least = torch.where(kept, shares, 2.0).amin(-1)
    assert bool((carried >= 0.7).all()) and bool((carried - least < 0.7).all())
    relative = Threshold(0.5)(scores)
    assert torch.equal(relative, shares >= 0.5 * shares.amax(-1, keepdim=True))
    assert torch.equal(Threshold(0.1, relative=False)(scores), scores >= 0.1)


def test_rows_may_keep_numbers_of_their_own() -> None:
    scores = torch.randn(2, 3, 7, dtype=torch.float64)
    scores[0, 1, 2:] = float("-inf")
    numbers = torch.tensor([0, 4, 9])[:, None]
    kept = top_k_mask(scores, numbers)
    for row, number in enumerate((0, 4, 9)):
        assert torch.equal(kept[:, row], top_k_mask(scores[:, row], number))
    assert kept.sum(-1).tolist() == [[0, 2, 7], [0, 4, 7]]


def test_sinks_and_neighbours_are_always_kept() -> None:
    query, key, _ = qkv(64)
    module = compose(select=TopK(1), sinks=2, local=3, block_q=8, block_k=4)
    layout = module.select(query, key, module.request(query, key, key, causal=True))
    for i in range(8):
        wanted = {0, 1} | set(range(max(2 * i - 2, 0), 2 * i + 2))
        assert wanted <= set(layout.visit[0, 0, i].nonzero()[:, 0].tolist())
        assert int(layout.visit[:, :, i].sum(-1).max()) <= len(wanted) + 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block_q", "block_k", "local"), [(16, 4, 1), (8, 8, 2), (4, 8, 3), (12, 8, 2), (8, 4, 0)])
def test_no_row_visits_more_blocks_than_the_cost_allows(block_q: int, block_k: int, local: int, causal: bool) -> None:
    query, key, _ = qkv(96)
    module = compose(select=TopK(1), sinks=1, local=local, block_q=block_q, block_k=block_k)
    for q in (query, query[:, :, -31:]):
        layout = module.select(q, key, module.request(q, key, key, causal=causal))
        count = layout.visit.shape[-1]
        assert int(layout.visit.sum(-1).max()) <= module.most_blocks(count) <= count


def test_a_users_own_steps() -> None:
    query, key, value = qkv(32)
    stripes = compose(
        lambda q, k, view: torch.zeros(1, 1, *view.layout.visit.shape[-2:], dtype=q.dtype),
        lambda scores: torch.arange(scores.shape[-1]) % 2 == 0,
        sinks=0,
        local=0,
        block_q=4,
        block_k=4,
    )
    seen = (torch.arange(32) // 4 % 2 == 0).expand(32, 32)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(stripes(query, key, value), wanted, **TIGHT)


@pytest.mark.parametrize("causal", [False, True])
def test_means_of_equal_keys_are_exact(causal: bool) -> None:
    """What is left out stands for itself, if its keys are alike."""
    query, key, value = qkv(36)
    key = key[:, :, ::4].repeat_interleave(4, 2)
    pooled = compose(select=TopK(1), correct="pooled", block_q=8, block_k=4)
    plain = compose(select=TopK(1), block_q=8, block_k=4)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(pooled(query, key, value, causal=causal), wanted, **TIGHT)
    assert float((plain(query, key, value, causal=causal) - wanted).abs().max()) > 0.1


def test_pooled_attention_counts_the_tokens_that_there_are() -> None:
    query, key, value = qkv(10, 2, 2)
    valid = torch.ones(2, 1, 10, dtype=torch.bool)
    valid[:, :, 5:7] = False
    visit = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    out, lse = pooled_attention(query, key, value, visit, 4, 4, keys=valid, scale=0.3)
    groups = [[0, 1, 2, 3], [4, 7], [8, 9]]
    means = torch.stack([key[:, :, g].mean(2) for g in groups], 2)
    values = torch.stack([value[:, :, g].mean(2) for g in groups], 2)
    logits = query @ means.transpose(-1, -2) * 0.3 + torch.tensor([4.0, 2.0, 2.0]).double().log()
    torch.testing.assert_close(out, logits.softmax(-1) @ values, **TIGHT)
    torch.testing.assert_close(lse, logits.logsumexp(-1), **TIGHT)


def test_gradients_flow_through_what_is_kept_and_what_stands_for_the_rest() -> None:
    leaves = [t.requires_grad_() for t in qkv(20, 2, 2)]
    module = compose(select=TopK(1), correct="pooled", block_q=4, block_k=4)
    assert torch.autograd.gradcheck(lambda q, k, v: module(q, k, v, causal=True), leaves, fast_mode=True)


def test_by_name_and_errors() -> None:
    query, key, value = qkv()
    built = regard.create("block_select", top_p=None, ratio=1.0, block_q=4, block_k=4)
    wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(built(query, key, value), wanted, **TIGHT)
    with pytest.raises(UnknownNameError, match="mean"):
        compose("means")
    with pytest.raises(OptionError, match="how many blocks"):
        ComposedSelector(top_p=None)
    with pytest.raises(OptionError, match="top_p"):
        TopP(0.0)
    with pytest.raises(OptionError, match="one of"):
        TopK()
    with pytest.raises(OptionError, match="select"):
        compose(select=0.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="correct"):
        compose(correct="mean")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="sinks"):
        compose(sinks=-1)
