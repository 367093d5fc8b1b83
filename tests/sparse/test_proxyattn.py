"""ProxyAttn: scores and budgets against loops over dense attention, what grouping promises, and what it costs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import OptionError, ShapeError
from regard.layout import BlockLayout
from regard.masks import Boolean, Causal, KeyPadding
from regard.sparse import proxyattn
from regard.sparse.frame import compose
from regard.sparse.metrics import head_agreement
from regard.sparse.proxyattn import (
    ProxyAttention,
    head_budgets,
    proxy_attention,
    proxy_block_mask,
    proxy_block_scores,
    proxy_heads,
)
from regard.sparse.scoring import SCORES, BlockView
from regard.sparse.selection import TopK

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SMALL = {"block_size": 8, "stride": 2, "gamma": 0.6, "min_tokens": 0}


def inputs(
    q_len: int = 61, k_len: int | None = None, heads: int = 4, kv_heads: int = 2, size: float = 1.5
) -> tuple[Tensor, Tensor, Tensor]:
    k_len = q_len if k_len is None else k_len
    query, key = size * torch.randn(2, heads, q_len, 8), size * torch.randn(2, kv_heads, k_len, 8)
    return query.double(), key.double(), torch.randn(2, kv_heads, k_len, 5).double()


def probabilities(query: Tensor, key: Tensor, seen: Tensor, scale: float = 8**-0.5) -> Tensor:
    """Attention of heads with keys of their own; zeros where a row sees nothing."""
    return (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)


def blockwise(weights: Tensor, block: int) -> list[tuple[int, int, Tensor]]:
    """``(i, j, part)`` of every pair of blocks."""
    rows, columns = weights.split(block, -2), weights.split(block, -1)
    return [(i, j, row.split(block, -1)[j]) for i, row in enumerate(rows) for j in range(len(columns))]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_proxies_are_means_over_neighbouring_heads(groups: int, kv_heads: int) -> None:
    query, key, _ = inputs(kv_heads=kv_heads)
    queries, keys = proxy_heads(query, key, groups)
    each = key.repeat_interleave(4 // kv_heads, 1)
    for g, heads in enumerate(torch.arange(4).chunk(groups)):
        torch.testing.assert_close(queries[:, g], query[:, heads].mean(1), **TIGHT)
        torch.testing.assert_close(keys[:, g], each[:, heads].mean(1), **TIGHT)
    # A key counts for the heads that may see it.
    valid = torch.rand(2, 4, 61) < 0.6
    _, keys = proxy_heads(query, key, groups, valid)
    for g, heads in enumerate(torch.arange(4).chunk(groups)):
        shown = valid[:, heads, :, None]
        mean = (each[:, heads] * shown).sum(1) / shown.sum(1).clamp_min(1)
        torch.testing.assert_close(keys[:, g], mean, **TIGHT)


def test_three_heads_a_key_in_groups_of_two() -> None:
    query, key, _ = inputs(heads=6, kv_heads=2)
    _, keys = proxy_heads(query, key, 3)
    torch.testing.assert_close(keys[:, 1], key.mean(1), **TIGHT)  # heads 2 and 3 have different keys
    torch.testing.assert_close(keys[:, 2], key[:, 1], **TIGHT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(61, 61), (30, 53), (53, 30)])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("area", [1, 1 << 24])
def test_scores_are_the_largest_probabilities(
    causal: bool, lengths: tuple[int, int], stride: int, area: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxyattn, "_AREA", area)
    query, key, _ = inputs(*lengths)
    seen = Causal().dense(*lengths)[0, 0] if causal else torch.ones(lengths, dtype=torch.bool)
    weights = probabilities(*proxy_heads(query, key, 2), seen)
    found = proxy_block_scores(query, key, 8, 2, stride, causal)
    for i, j, part in blockwise(weights, 8):
        torch.testing.assert_close(found[:, :, i, j].exp(), part[:, :, ::stride].amax((2, 3)), **TIGHT)


@pytest.mark.paper("proxyattn")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(64, 64), (61, 61), (23, 50)])
def test_gamma_of_one_is_full_attention(causal: bool, lengths: tuple[int, int]) -> None:
    query, key, value = inputs(*lengths)
    seen = Causal().dense(*lengths) if causal else None
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    out = proxy_attention(query, key, value, causal=causal, block_size=8, gamma=1.0, min_tokens=0)
    torch.testing.assert_close(out, expected, **TIGHT)
    budgets = head_budgets(query, key, 8, 1.0, causal=causal)
    visible = BlockLayout.of(Causal() if causal else None, *lengths, 8, 8).visit.sum(-1)
    assert torch.equal(budgets, visible.expand_as(budgets))
    mask = proxy_block_mask(proxy_block_scores(query, key, 8, 2, causal=causal), budgets, sinks=0, local=0)
    assert not causal or lengths[0] != lengths[1] or torch.equal(mask, torch.ones_like(mask).tril())


@pytest.mark.paper("proxyattn")
def test_equal_heads_are_their_own_proxies() -> None:
    """Their block scores are each head's own at the level of tokens, and masks are nested by budget."""
    query, key, _ = inputs(61, heads=4, kv_heads=4)
    query, key = (x[:, ::2].repeat_interleave(2, 1) for x in (query, key))
    scores = proxy_block_scores(query, key, 8, groups=2)
    own = probabilities(query, key, torch.ones(61, 61, dtype=torch.bool).tril())
    for i, j, part in blockwise(own, 8):
        each = part.amax((2, 3))
        torch.testing.assert_close(scores[:, :, i, j].exp().repeat_interleave(2, 1), each, **TIGHT)
    masks = [proxy_block_mask(scores, torch.full((2, 4, 8), n), sinks=0, local=0) for n in range(1, 9)]
    for n, (smaller, larger) in enumerate(itertools.pairwise(masks), start=1):
        assert bool((smaller <= larger).all())
        assert bool((smaller.sum(-1) == (torch.arange(8) + 1).clamp_max(n)).all())


@pytest.mark.paper("proxyattn")
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_of_a_group_select_nested_sets(groups: int) -> None:
    query, key, value = inputs(120, size=2.0)
    query = query * torch.tensor([0.3, 1.0, 2.0, 4.0]).double().view(1, 4, 1, 1)
    module = ProxyAttention(groups=groups, **SMALL)  # type: ignore[arg-type]
    visit = module.select(query, key, module.request(query, key, value, causal=True)).visit
    counts = visit.sum(-1)
    assert len(counts[0, :, -1].unique()) > 1, "heads differ in what they need"
    for g, heads in enumerate(torch.arange(4).chunk(groups)):
        for one in heads.tolist():
            for other in heads.tolist():
                smaller = counts[:, one] <= counts[:, other]
                assert bool((visit[:, one] <= visit[:, other])[smaller].all()), g


def test_budgets_are_shares_of_the_last_block() -> None:
    query, key, _ = inputs(61, size=2.0)
    found = head_budgets(query, key, 8, 0.7, min_blocks=2)
    own = probabilities(query, key.repeat_interleave(2, 1), torch.ones(61, 61, dtype=torch.bool).tril())
    for b in range(2):
        for h in range(4):
            last = own[b, h, 56:].mean(0)
            mass = sorted((float(part.sum()) for part in last.split(8)), reverse=True)
            needed, carried = 0, 0.0
            while carried < 0.7:
                carried += mass[needed]
                needed += 1
            expected = [max(math.ceil(needed * (i + 1) / 8 - 1e-12), 2) for i in range(8)]
            assert found[b, h].tolist() == expected
    assert bool((head_budgets(query, key, 8, 0.7, min_blocks=5) >= 5).all())


def test_budgets_in_stretches_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = inputs(50, size=2.0)
    whole = head_budgets(query, key, 8, 0.7)
    monkeypatch.setattr(proxyattn, "_AREA", 1)
    assert torch.equal(head_budgets(query, key, 8, 0.7), whole)


def test_sharper_heads_need_fewer_blocks() -> None:
    query, key, _ = inputs(512, kv_heads=4, size=1.0)
    query[:] = query[:, :1] * torch.tensor([0.2, 1.0, 3.0, 9.0]).double().view(1, 4, 1, 1)
    key[:] = key[:, :1]
    budgets = head_budgets(query, key, 8, 0.9)[:, :, -1]
    assert bool((budgets[:, :-1] > budgets[:, 1:]).all())


@pytest.mark.paper("proxyattn")
def test_a_single_large_pair_is_found_where_means_miss_it() -> None:
    """In a block that is flat otherwise; block 5 has the largest mean, block 2 the pair."""
    length, block = 128, 16
    query, key = torch.zeros(1, 2, length, 8).double(), torch.zeros(1, 2, length, 8).double()
    query[..., 0] = 1.0
    key[:, :, 80:96, 0] = 0.5
    query[:, :, 117, 1], key[:, :, 40, 1] = 6.0, 6.0
    scores = proxy_block_scores(query, key, block)
    one = torch.ones(1, 2, 8, dtype=torch.long)
    mask = proxy_block_mask(scores, one, sinks=0, local=0)
    assert mask[0, :, 7].nonzero()[:, 1].tolist() == [2, 2]
    pooled = compose("mean", TopK(1), sinks=0, local=0, block_q=block, block_k=block)
    view = pooled.view(query, key, pooled.request(query, key, key, causal=True))
    means = SCORES["mean"](query, key, view).masked_fill(~view.seen, -math.inf)
    missed = proxy_block_mask(means, one, sinks=0, local=0)
    assert missed[0, :, 7].nonzero()[:, 1].tolist() == [5, 5]
    # With the pair in a row that the stride passes over, scores do not see it.
    strided = proxy_block_mask(proxy_block_scores(query, key, block, stride=4), one, sinks=0, local=0)
    assert not bool(strided[0, :, 7, 2].any())


@pytest.mark.paper("proxyattn")
def test_causality() -> None:
    """No block above the diagonal; once the mask is fixed, later tokens change no earlier output; scores of earlier
    rows know nothing of later blocks, budgets do."""
    query, key, value = inputs(64, size=2.0)
    module = ProxyAttention(**SMALL)  # type: ignore[arg-type]
    layout = module.select(query, key, module.request(query, key, value, causal=True))
    assert not bool(layout.visit.triu(1).any())
    assert bool(layout.visit[..., 0].all()) and bool(layout.visit.diagonal(dim1=2, dim2=3).all())
    assert float(layout.visit.double().mean()) < 0.5
    later = [x.clone() for x in (query, key, value)]
    for x in later:
        x[:, :, 43:] = torch.randn_like(x[:, :, 43:]) * 3
    fixed = [regard.kernels.block_sparse_attention(*x, layout) for x in ((query, key, value), later)]
    torch.testing.assert_close(fixed[0][:, :, :43], fixed[1][:, :, :43], **TIGHT)
    torch.testing.assert_close(fixed[0], module(query, key, value, causal=True), **TIGHT)
    before, after = (proxy_block_scores(q, k, 8) for q, k in ((query, key), (later[0], later[1])))
    torch.testing.assert_close(before[:, :, :5], after[:, :, :5], **TIGHT)
    assert not module.strictly_causal


@pytest.mark.paper("proxyattn")
def test_estimation_costs_its_share_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = (x.float() for x in inputs(512, heads=8, kv_heads=4))

    def counted(groups: int, stride: int, causal: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            proxy_block_scores(query, key, 32, groups, stride, causal)
        return counter.get_total_flops()

    dense = 2 * 2 * 8 * 512 * 512 * 8
    for groups in (1, 2, 8):
        assert counted(groups, 1, False) == pytest.approx(dense * groups / 8, rel=0.05)
        assert counted(groups, 4, False) == pytest.approx(dense * groups / 8 / 4, rel=0.05)
    # Under causality no key beyond the last row of a stretch is touched.
    monkeypatch.setattr(proxyattn, "_AREA", 2 * 32 * 512)
    assert counted(1, 1, True) == pytest.approx(dense / 8 / 2, rel=0.1)
    shape = regard.cost.AttentionShape(512, 512, 8, 8, batch=2)
    last = 2 * 2 * 8 * 32 * 512 * 8
    assert ProxyAttention(32, groups=2, stride=1).scoring_flops(shape) == dense * 2 / 8 + last
    assert ProxyAttention(32, groups=2, stride=4).scoring_flops(shape) == dense * 2 / 8 / 4 + last


@pytest.mark.paper("proxyattn")
def test_heads_that_share_a_pattern_agree() -> None:
    base = torch.randn(1, 1, 200, 8, dtype=torch.float64) * 2
    noise = torch.randn(2, 1, 4, 200, 8, dtype=torch.float64)
    seen = torch.ones(200, 200, dtype=torch.bool).tril()
    shared = head_agreement(probabilities(base + 0.2 * noise[0], base + 0.2 * noise[1], seen), 10)
    apart = head_agreement(probabilities(2 * noise[0], 2 * noise[1], seen), 10)
    off = ~torch.eye(4, dtype=torch.bool)
    assert float(shared[0][off].min()) > 0.6 > 0.3 > float(apart[0][off].max())


def test_every_row_gets_the_least_number_of_tokens() -> None:
    query, key, value = inputs(128, size=4.0)
    for tokens, blocks in ((0, 2), (30, 4), (1000, 16)):
        module = ProxyAttention(8, min_tokens=tokens, gamma=0.1)
        assert module.min_blocks == max(blocks, -(-tokens // 8))
        visit = module.select(query, key, module.request(query, key, value, causal=True)).visit
        assert bool((visit.sum(-1) >= (torch.arange(16) + 1).clamp_max(blocks)).all())
        assert bool(visit.all(-1)[:, :, -1].all()) == (blocks == 16)


def test_masks_count_in_scores_and_budgets() -> None:
    query, key, value = inputs(40, size=2.0)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :11] = False
    module = ProxyAttention(**SMALL)  # type: ignore[arg-type]
    masks = (KeyPadding(valid), Boolean(torch.rand(2, 4, 40, 40) < 0.6))
    for mask in masks:
        request = module.request(query, key, value, causal=True, mask=mask)
        view = module.view(query, key, request)
        seen = (mask & Causal()).dense(40, 40)
        own = probabilities(query, key.repeat_interleave(2, 1), seen.expand(2, 4, -1, -1))
        last = own[:, :, 32:].sum(2)
        rows = seen[:, :, 32:].any(-1).sum(-1).clamp_min(1)
        shares = torch.stack([part.sum(-1) for part in last.split(8, -1)], -1) / rows[..., None]
        ordered = shares.sort(-1, descending=True).values
        needed = (ordered.cumsum(-1) - ordered < 0.6).sum(-1)
        budgets = head_budgets(query, key, gamma=0.6, view=view)
        assert torch.equal(budgets[..., -1], needed)
        together = seen if seen.shape[1] == 1 else seen.any(1, keepdim=True)
        weights = probabilities(*proxy_heads(query, key, 1, view.keys), together)
        found = proxy_block_scores(query, key, view=view)
        for i, j, part in blockwise(weights, 8):
            torch.testing.assert_close(found[:, :, i, j].exp(), part.amax((2, 3)), **TIGHT)
        layout = module.select(query, key, request)
        assert bool((layout.visit <= view.seen).all())


def test_last_queries_that_see_nothing_take_all_blocks() -> None:
    query, key, _ = inputs(40)
    seen = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    seen[:, :, 32:] = False
    module = ProxyAttention(**SMALL)  # type: ignore[arg-type]
    view = module.view(query, key, module.request(query, key, key, causal=True, mask=seen))
    assert head_budgets(query, key, gamma=0.5, min_blocks=0, view=view)[0, 0].tolist() == [1, 2, 3, 4, 0]


def test_a_single_query_attends_to_all_keys() -> None:
    query, key, value = inputs(1, 50, size=4.0)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(proxy_attention(query, key, value, **SMALL), expected, **TIGHT)


def test_where_blocks_stand_can_be_given() -> None:
    """Queries that start inside of a block of keys have two own blocks."""
    scores, budgets = torch.zeros(1, 1, 3, 8), torch.zeros(1, 2, 3, dtype=torch.long)
    layout = BlockLayout.of(Causal(), 21, 64, 8, 8)
    mask = proxy_block_mask(scores, budgets, 1, 1, view=BlockView(layout, None, True, 1.0))
    assert [row.nonzero()[:, 0].tolist() for row in mask[0, 1]] == [[0, 5, 6], [0, 6, 7], [0, 7]]


def test_errors() -> None:
    query, key, value = inputs(20)
    with pytest.raises(ShapeError, match="1, 2, 4"):
        proxy_attention(query, key, value, groups=3, block_size=8)
    with pytest.raises(ShapeError, match="multiple of groups"):
        proxy_block_mask(torch.zeros(1, 3, 2, 2), torch.ones(1, 4, 2, dtype=torch.long))
    with pytest.raises(OptionError, match="stride"):
        ProxyAttention(8, stride=9)
    with pytest.raises(OptionError, match="groups"):
        ProxyAttention(groups=0)
    with pytest.raises(OptionError, match="gamma"):
        ProxyAttention(gamma=0.0)
    with pytest.raises(OptionError, match="negative"):
        ProxyAttention(sinks=-1)
