"""HiP against its search written as a loop, against exact top-k where that must come out, and against its limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention
from regard.masks import KeyPadding, Mask
from regard.sparse.hip_attention import (
    HiPAttention,
    count_score_evaluations,
    hip_attention,
    hip_topk,
    locality_theorem,
    smooth_scores,
)
from regard.sparse.metrics import topk_recall

REPRESENTATIVES = ("first", "center", "random")


def inputs(length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64)
    key = torch.randn(2, kv_heads, length, dim, generator=generator, dtype=torch.float64)
    return query, key, torch.randn(2, kv_heads, length, dim, generator=generator, dtype=torch.float64)


def on_scores(scores: Tensor, kept: int, representative: str = "first", **options: object) -> Tensor:
    """The search of one query on given scores ``(count, keys)``: kept keys ``(count, kept)``."""
    query = torch.ones(len(scores), 1, 1, 1, dtype=scores.dtype)
    found = hip_topk(query, scores[:, None, :, None], kept, 1, 1, representative, 1, 0, False, **options)  # type: ignore[arg-type]
    return found if isinstance(found, tuple) else found[:, 0, 0]


def search_by_the_formula(
    query: Tensor, key: Tensor, end: int, mask_k: int, block_k: int, window: int, center: bool
) -> list[int]:
    """One head, one block of queries ``(rows, dim)`` that sees ``end`` keys: node by node."""
    count, kept = math.ceil(max(end - window, 0) / block_k), mask_k // block_k
    if count <= kept:
        return list(range(count))
    rows = query if len(query) == 1 else query[1::2]
    nodes = [(i * count // kept, (i + 1) * count // kept) for i in range(kept)]
    while any(stop - start > 1 for start, stop in nodes):
        scored = []
        for start, stop in nodes:
            middle = start + (stop - start) // 2
            for child in ((start, middle), (middle, stop)):
                if child[0] < child[1]:
                    at = (child[0] + (child[1] - child[0]) // 2) if center else child[0]
                    block = key[at * block_k : min((at + 1) * block_k, end)]
                    scored.append((float((rows @ block.T).max()), child))
        nodes = [child for _, child in sorted(scored, key=lambda pair: -pair[0])[:kept]]
    return sorted(start for start, _ in nodes)


@pytest.mark.paper("hip_attention")
@pytest.mark.parametrize("representative", ["first", "center"])
@pytest.mark.parametrize(("length", "block_q", "block_k", "sinks"), [(97, 4, 2, 5), (60, 1, 1, 0), (75, 6, 3, 2)])
def test_the_search_is_the_formula(representative: str, length: int, block_q: int, block_k: int, sinks: int) -> None:
    query, key, _ = inputs(length)
    mask_k, window = 6 * block_k, 5
    found = hip_topk(query, key, mask_k, block_q, block_k, representative, window, sinks)  # type: ignore[arg-type]
    skipped = sinks // block_k
    for b in range(2):
        for h in range(4):
            for block in range(found.shape[2]):
                rows = query[b, h, block * block_q : (block + 1) * block_q]
                # A last, short block repeats its last query, as if it were whole.
                rows = torch.cat((rows, rows[-1:].expand(block_q - len(rows), -1)))
                end = min((block + 1) * block_q, length)
                searched = key[b, h // 2, skipped * block_k :]
                wanted = search_by_the_formula(
                    rows, searched, end - skipped * block_k, mask_k, block_k, window, representative == "center"
                )
                assert [x - skipped for x in found[b, h, block].tolist() if x >= 0] == wanted


@pytest.mark.paper("hip_attention")
def test_keeping_all_is_causal_attention() -> None:
    query, key, value = inputs(101)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    out = hip_attention(query, key, value, mask_k=102, block_q=4, window=5)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    found = hip_topk(query, key, 102, 4, 2, window=5)
    for block in range(found.shape[2]):
        end = min(4 * block + 4, 101)
        assert found[0, 0, block].tolist()[-math.ceil(max(end - 5, 0) / 2) or 51 :] == list(
            range(math.ceil(max(end - 5, 0) / 2))
        )


@pytest.mark.paper("hip_attention")
@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_scores_constant_in_nodes_give_the_true_top(representative: str) -> None:
    """16 nodes of 16 keys are searched for 16 keys: they are the node of largest score, and all of it."""
    values = torch.rand(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = values.repeat_interleave(16, 1)
    found = on_scores(scores, 16, representative)
    assert torch.equal(found, values.argmax(-1)[:, None] * 16 + torch.arange(16))
    assert torch.equal(topk_recall(found, scores + 1e-9 * torch.rand(256), 16), torch.ones(8, dtype=torch.float64))


@pytest.mark.paper("hip_attention")
@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_score_evaluations(representative: str) -> None:
    for length, kept in ((4096, 256), (1000, 48), (700, 512)):
        _, trace = on_scores(smooth_scores(2, length, 3), kept, representative, return_trace=True)
        bound = 2 * kept * math.ceil(math.log2(length / kept))
        assert int(trace.scored.max()) <= count_score_evaluations(length, kept, representative) <= bound  # type: ignore[arg-type]
        assert count_score_evaluations(length, kept) == bound
        assert len(trace.sizes) == math.ceil(math.log2(length / kept)) + 1
        assert int(trace.sizes[-1].max()) == 1
        assert torch.equal(trace.sizes[0].sum(-1).flatten(), torch.tensor([length, length]))
        if length == 4096:
            assert trace.scored.unique().tolist() == [256 * 5 if representative == "first" else 2048]
    assert count_score_evaluations(100, 100) == 0


@pytest.mark.paper("hip_attention")
@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_recall_is_above_chance_on_noise_and_whole_on_smooth_scores(representative: str) -> None:
    """4096 keys of which 256 are kept: chance is 0.0625."""
    for correlation, low, high in ((0.0, 0.2, 0.4), (4.0, 0.85, 1.0), (16.0, 0.99, 1.0), (64.0, 0.99, 1.0)):
        scores = smooth_scores(8, 4096, correlation, seed=1)
        recall = float(topk_recall(on_scores(scores, 256, representative), scores, 256).mean())
        assert low < recall <= high


@pytest.mark.paper("hip_attention")
def test_locality_beats_coin_tosses() -> None:
    """Of two halves, the one with the better centre holds the best key more often than not, the more so the smoother
    the scores; for white noise only as often as the centre itself is that key."""
    noise, smooth = locality_theorem(256, 0.0), locality_theorem(256, 16.0)
    assert all(level > 0.52 for level in smooth.levels)
    assert smooth.found > 20 * smooth.chance
    assert abs(noise.levels[0] - (0.5 + 0.5 / 128)) < 0.03  # four standard errors of 4096 draws
    assert noise.levels[-1] == smooth.levels[-1] == 1.0
    assert smooth.found > noise.found > noise.chance
    drift = smooth_scores(4096, 64, 3.0)
    near = (drift[:, :-2] * drift[:, 2:]).mean()
    assert abs(float(near) - math.exp(-4 / (2 * 9))) < 0.01


@pytest.mark.paper("hip_attention")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", ["none", "padding", "random"])
def test_equals_dense_attention_over_what_is_kept(causal: bool, masked: str) -> None:
    """The pairs are written out one by one: kept blocks, window and sinks, causal per token."""
    query, key, value = inputs(77)
    generator = torch.Generator().manual_seed(3)
    masks: dict[str, Mask | Tensor | None] = {
        "none": None,
        "padding": KeyPadding(torch.rand(2, 77, generator=generator) < 0.8),
        "random": torch.rand(2, 4, 77, 77, generator=generator) < 0.7,
    }
    mask = masks[masked]
    rule = None if mask is None else mask if isinstance(mask, Mask) else None
    module = HiPAttention(12, 4, 2, window=5, sinks=3)
    request = module.request(query, key, value, causal, mask)
    found = hip_topk(query, key, 12, 4, 2, "first", 5, 3, causal, mask=request.mask)
    index = torch.arange(77)
    seen = torch.zeros(2, 4, 77, 77, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            for i in range(77):
                for block in found[b, h, i // 4].tolist():
                    if block >= 0:
                        seen[b, h, i, 2 * block : 2 * block + 2] = True
    distance = index[:, None] - index
    seen = seen | (distance.abs() < 5) | (index < 3)
    if causal:
        seen = seen & (distance >= 0)
    if mask is not None:
        seen = seen & (rule.dense(77, 77) if rule is not None else mask)  # type: ignore[operator]
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
    expected = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(module(query, key, value, causal=causal, mask=mask), expected, rtol=1e-9, atol=1e-9)
    layout = module.select(query, key, request)
    assert torch.equal(layout.dense(), seen)
    out = block_sparse_attention(query, key, value, layout, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("hip_attention")
def test_window_is_always_seen_and_nothing_behind_the_block_is_kept() -> None:
    query, key, _ = inputs(101)
    found = hip_topk(query, key, 8, 8, 2, window=6)
    last = torch.arange(8, 101 + 8, 8).clamp_max(101) - 1
    assert bool((found <= (last // 2)[:, None]).all())
    weights = HiPAttention(8, 8, 2, window=6, sinks=2).weights(query, key, causal=True)
    index = torch.arange(101)
    distance = index[:, None] - index
    assert bool((weights[..., (distance >= 0) & (distance < 6)] > 0).all()), "the window is seen"
    assert bool((weights[..., (distance >= 0) & (index < 2)] > 0).all()), "the sinks are seen"
    assert not bool(weights[..., distance < 0].any()), "causal per token"
    assert int((weights > 0).sum(-1).max()) <= 8 + 6 + 2


@pytest.mark.paper("hip_attention")
def test_causal_at_the_granularity_of_query_blocks() -> None:
    """What comes behind a block of queries reaches neither its choice nor its output."""
    query, key, value = inputs(64)
    for block_q in (8, 1):
        options = {"mask_k": 8, "block_q": block_q, "window": 6, "sinks": 0}
        out, found = hip_attention(query, key, value, **options), hip_topk(query, key, 8, block_q, 2, window=6)
        for cut in (24, 40):
            other = [torch.cat((x[:, :, :cut], 5 * torch.randn_like(x[:, :, cut:])), 2) for x in (query, key, value)]
            changed = hip_topk(other[0], other[1], 8, block_q, 2, window=6)
            assert torch.equal(changed[:, :, : cut // block_q], found[:, :, : cut // block_q])
            torch.testing.assert_close(hip_attention(*other, **options)[:, :, :cut], out[:, :, :cut])
    assert HiPAttention(8, 1).strictly_causal and not HiPAttention(8, 8).strictly_causal


@pytest.mark.paper("hip_attention")
def test_a_single_query_counts() -> None:
    """With every other query from the second on, a block of one query would have none: its choice would be empty, or
    that of its neighbours. Here it finds its own best key."""
    query, key, _ = inputs(64)
    key[:, :, 20] = 0
    query[:, :, 50], query[:, :, 51] = 0, 0
    query[:, :, 50, 0], key[:, :, 20, 0] = 1.0, 50.0
    query[:, :, 51, 0] = -1.0
    found = hip_topk(query, key, 16, 1, 1, "first", 4)
    starts = [47 * i // 16 for i in range(16)]
    assert 20 in starts, "the key is a representative of the first level"
    assert bool((found[:, :, 50] == 20).any(-1).all()) and not bool((found[:, :, 51] == 20).any(-1).all())


@pytest.mark.paper("hip_attention")
def test_decoding_is_prefill_of_single_queries() -> None:
    query, key, value = inputs(90)
    module = HiPAttention(12, 1, 2, "center", window=5, sinks=3)
    state, outs = module.init_state(2, like=query), []
    for t in range(90):
        out, state = module.step(query[:, :, t : t + 1], key[:, :, t : t + 1], value[:, :, t : t + 1], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), module(query, key, value, causal=True), rtol=1e-10, atol=1e-10)
    assert state.cache.seen == 90


@pytest.mark.paper("hip_attention")
def test_refreshing_every_few_steps() -> None:
    """Between searches the kept keys stay and every key since the last search is seen: dense attention over that."""
    query, key, value = inputs(60)
    module = HiPAttention(8, 1, 2, window=5, sinks=2, refresh=4)
    state = module.init_state(2, like=query)
    out, state = module.step(query[:, :, :40], key[:, :, :40], value[:, :, :40], state)
    kept = torch.empty(0)
    for t in range(40, 60):
        out, state = module.step(*(x[:, :, t : t + 1] for x in (query, key, value)), state)
        if (t - 40) % 4 == 0:
            kept, region = (
                hip_topk(query[:, :, t : t + 1], key[:, :, : t + 1], 8, 1, 2, window=5, sinks=2)[:, :, 0],
                t - 4,
            )
        seen = torch.zeros(2, 4, 1, t + 1, dtype=torch.bool)
        for b in range(2):
            for h in range(4):
                for block in kept[b, h].tolist():
                    seen[b, h, 0, 2 * block : 2 * block + 2] = True
        seen = seen | (torch.arange(t + 1) >= region) | (torch.arange(t + 1) < 2)
        expected = F.scaled_dot_product_attention(
            query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1], attn_mask=seen, enable_gqa=True
        )
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("hip_attention")
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool) -> None:
    """Against automatic differentiation of dense attention over the same pairs."""
    tensors = [x.requires_grad_() for x in inputs(45)]
    mask = KeyPadding(torch.arange(45) < torch.tensor([[45], [38]])) if masked else None
    module = HiPAttention(8, 4, 2, window=5, sinks=2)
    layout = module.select(tensors[0], tensors[1], module.request(*tensors, True, mask))
    weight = torch.randn(2, 4, 45, 8, dtype=torch.float64)
    found = [
        torch.autograd.grad((out * weight).sum(), tensors)
        for out in (
            module(*tensors, causal=True, mask=mask),
            block_sparse_attention(*tensors, layout, backend="reference"),
        )
    ]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("hip_attention")
def test_first_layers_are_dense_and_cost_grows_slowly() -> None:
    query, key, value = inputs(64)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    first, later = (HiPAttention(8, 8, window=6, dense_layers=3, layer_index=index) for index in (2, 3))
    torch.testing.assert_close(first(query, key, value, causal=True), expected)
    assert float((later(query, key, value, causal=True) - expected).abs().max()) > 1e-3
    flops = [HiPAttention().cost(AttentionShape(n, n, 1, 64, causal=True)).flops for n in (4096, 32768)]
    assert flops[1] / flops[0] < 8 * 15 / 12 * 1.5, "N log N, where dense attention grows 64-fold"


@pytest.mark.paper("hip_attention")
def test_recall_counts_the_true_top() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    selected = torch.tensor([[0, 2, -1], [3, 2, 1]])
    assert topk_recall(selected, scores, 2).tolist() == [0.5, 1.0]
    assert topk_recall(selected, scores, 3).tolist() == [2 / 3, 1.0]


@pytest.mark.paper("hip_attention")
def test_bad_input() -> None:
    query, key, value = inputs(16)
    for options in ({"mask_k": 7}, {"block_q": 0}, {"window": 0}, {"representative": "last"}, {"sinks": -1}):
        with pytest.raises(OptionError):
            hip_attention(query, key, value, **options)
    with pytest.raises(OptionError):
        hip_topk(query, key, 1)
    with pytest.raises(OptionError):
        locality_theorem(48, 1.0)
    with pytest.raises(ShapeError):
        topk_recall(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 5), 6)
