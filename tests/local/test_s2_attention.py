"""S2-Attention: its pattern against the rule block by block, its executor and cache against dense attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.kernels import merge_attentions
from regard.local.s2_attention import (
    BlockSparseAttention,
    S2Attention,
    coverage,
    flops,
    hybrid_schedule,
    is_kv_efficient,
    kv_cache_blocks,
    local_stride_pattern,
    merge_q,
)
from regard.masks import KeyPadding
from regard.models.sequence import SequenceModel

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def tensors(length: int, heads: int = 4, kv_heads: int = 4, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, heads, length, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 8))
    return tuple(torch.randn(shape, dtype=torch.float64).requires_grad_(grad) for shape in shapes)  # type: ignore[return-value]


def seen_by_rule(
    length: int,
    heads: int,
    kv_heads: int,
    block: int,
    local: int,
    stride: int,
    *,
    dense_heads: int = 0,
    step: int | None = None,
    offset: int = 0,
    homogeneous: bool = False,
    causal: bool = True,
) -> Tensor:
    """(heads, length, length), token by token from the paper's words."""
    step = max(1, stride // heads) if step is None else step
    seen = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        group = head * kv_heads // heads
        shift = offset if homogeneous else group * step + offset
        for row in range(length):
            for column in range(row + 1 if causal else length):
                i, j = row // block, column // block
                near = abs(i - j) < local
                stripe = (j + shift) % stride == 0 if causal else (abs(i - j) + shift) % stride == 0
                seen[head, row, column] = near or stripe or group >= kv_heads - dense_heads
    return seen


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


SETTINGS = {
    "plain": {},
    "one dense": {"dense_heads": 1},
    "moved": {"step": 2, "offset": 1},
    "homogeneous": {"homogeneous": True},
    "bidirectional": {"causal": False},
}


def options_of(setting: dict) -> dict:
    names = {"step": "head_step", "offset": "head_offset"}
    return {names.get(name, name): value for name, value in setting.items() if name != "causal"}


@pytest.mark.paper("s2_attention")
@pytest.mark.parametrize("local_blocks", [1, 12])
def test_stride_one_or_a_neighbourhood_over_everything_is_dense_attention(local_blocks: int) -> None:
    query, key, value = tensors(45, 4, 2)
    stride = 1 if local_blocks == 1 else 5
    out = S2Attention(4, 2, block_size=4, local_blocks=local_blocks, stride=stride)(query, key, value, causal=True)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected, **TIGHT)


@pytest.mark.paper("s2_attention")
def test_coverage_needs_as_many_heads_as_the_stride() -> None:
    assert coverage(local_stride_pattern(8, 32, 2, 8)) == 1
    assert coverage(local_stride_pattern(16, 32, 2, 8)) == 1
    assert coverage(local_stride_pattern(4, 32, 2, 8)) < 1
    assert coverage(local_stride_pattern(8, 32, 2, 8, homogeneous=True)) < 1
    assert coverage(local_stride_pattern(4, 32, 2, 8, dense_heads=1)) == 1
    # 8 query heads give step 1, but 2 patterns.
    assert coverage(local_stride_pattern(8, 32, 2, 8, kv_heads=2)) < 1
    seen, total = 0, 0
    for i in range(32):
        for j in range(i + 1):
            seen += i - j < 2 or any((j + h * 2) % 8 == 0 for h in range(4))
            total += 1
    assert coverage(local_stride_pattern(4, 32, 2, 8)) == seen / total


@pytest.mark.parametrize("setting", SETTINGS)
def test_pattern_is_the_rule(setting: str) -> None:
    given = SETTINGS[setting]
    for heads, kv_heads in ((4, 4), (4, 2), (2, 1)):
        expected = seen_by_rule(19, heads, kv_heads, 1, 3, 5, **given)
        causal = given.get("causal", True)
        pattern = local_stride_pattern(heads, 19, 3, 5, kv_heads, causal=causal, **options_of(given))
        assert torch.equal(pattern, expected)


def test_the_default_step_counts_query_heads() -> None:
    assert S2Attention(4, 2, stride=8).rule.step == 2
    assert S2Attention(16, 2, stride=8).rule.step == 1
    pattern = local_stride_pattern(4, 16, 1, 8, kv_heads=2)
    assert torch.equal(pattern[0], pattern[1]) and torch.equal(pattern[2], pattern[3])
    assert pattern[0, 15].nonzero().flatten().tolist() == [0, 8, 15]
    assert pattern[2, 15].nonzero().flatten().tolist() == [6, 14, 15]


@pytest.mark.paper("s2_attention")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("merge", [1, 3])
@pytest.mark.parametrize(("length", "kv_heads"), [(48, 4), (43, 2), (3, 1)])
def test_executor_is_dense_attention_under_the_mask(setting: str, merge: int, length: int, kv_heads: int) -> None:
    given = SETTINGS[setting]
    causal = given.get("causal", True)
    inputs = tensors(length, 4, kv_heads, grad=True)
    seen = seen_by_rule(length, 4, kv_heads, 4, 2, 3, **given)
    s2 = S2Attention(4, kv_heads, block_size=4, local_blocks=2, stride=3, merge=merge, **options_of(given))
    outs = s2(*inputs, causal=causal), dense(*inputs, seen)
    torch.testing.assert_close(*outs, **TIGHT)
    seed = torch.randn_like(outs[0])
    for own, expected in zip(*(torch.autograd.grad(out, inputs, seed) for out in outs), strict=True):
        torch.testing.assert_close(own, expected, **TIGHT)


@pytest.mark.parametrize("merge", [1, 2])
def test_padding_goes_with_the_pattern(merge: int) -> None:
    query, key, value = tensors(30)
    valid = torch.rand(2, 30) < 0.7
    valid[:, 0] = True
    seen = seen_by_rule(30, 4, 4, 4, 2, 3) & valid[:, None, None]
    s2 = S2Attention(4, block_size=4, local_blocks=2, stride=3, merge=merge)
    expected = dense(query, key, value, seen | ~seen.any(-1, keepdim=True)) * seen.any(-1)[..., None]
    torch.testing.assert_close(s2(query, key, value, causal=True, mask=KeyPadding(valid)), expected, **TIGHT)


@pytest.mark.parametrize("q_len", [1, 5, 8, 21])
def test_fewer_queries_than_keys_stand_at_the_end(q_len: int) -> None:
    query, key, value = tensors(30)
    s2 = S2Attention(4, block_size=4, local_blocks=2, stride=3)
    whole = s2(query, key, value, causal=True)
    torch.testing.assert_close(s2(query[:, :, -q_len:], key, value, causal=True), whole[:, :, -q_len:], **TIGHT)


@pytest.mark.paper("s2_attention")
def test_absolute_stripes_are_kv_efficient_and_relative_ones_are_not() -> None:
    absolute = local_stride_pattern(8, 32, 2, 8)
    assert is_kv_efficient(absolute)
    assert is_kv_efficient(local_stride_pattern(8, 32, 2, 8, kv_heads=4, dense_heads=1, head_offset=3))
    assert not is_kv_efficient(local_stride_pattern(8, 32, 2, 8, causal=False))
    live = torch.stack([kv_cache_blocks(absolute, t) for t in range(1, 33)])
    assert int(live.max()) == 6
    for t in range(1, 33):
        assert bool((live[t - 1] <= 2 + -(-t // 8)).all())
        for head in range(8):
            later = [j for j in range(t) if any(absolute[head, i, j] for i in range(max(t - 1, j), 32))]
            assert int(live[t - 1, head]) == len(later)
    assert kv_cache_blocks(torch.ones(1, 9, 9, dtype=torch.bool), 7).tolist() == [7]


@pytest.mark.paper("s2_attention")
@pytest.mark.parametrize("merge", [1, 2])
def test_no_token_sees_a_later_one(merge: int) -> None:
    query, key, value = tensors(30)
    s2 = S2Attention(4, block_size=4, local_blocks=2, stride=3, merge=merge)
    before = s2(query, key, value, causal=True)
    for cut in (1, 6, 12, 29):
        changed = [torch.cat((t[:, :, :cut], t[:, :, cut:] + 1), 2) for t in (query, key, value)]
        assert torch.equal(s2(*changed, causal=True)[:, :, :cut], before[:, :, :cut])


@pytest.mark.paper("s2_attention")
@pytest.mark.parametrize("setting", ["plain", "one dense", "moved", "homogeneous"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_from_live_blocks_is_the_whole_pass(setting: str, kv_heads: int) -> None:
    options = options_of(SETTINGS[setting])
    s2 = S2Attention(4, kv_heads, block_size=4, local_blocks=2, stride=5, **options)
    query, key, value = tensors(70, 4, kv_heads)
    expected = s2(query, key, value, causal=True)
    pattern = local_stride_pattern(4, 18, 2, 5, kv_heads, **options)[:: 4 // kv_heads]
    state, outs, start = s2.init_state(2, like=query), [], 0
    assert int(state.counts().sum()) == int(state.blocks(4).sum()) == 0
    for size in (*(1,) * 9, 17, 1, 1, 9, 1, 11, *(1,) * 21):
        now = slice(start, start + size)
        out, state = s2.step(query[:, :, now], key[:, :, now], value[:, :, now], state)
        outs.append(out)
        start += size
        assert state.seen == start
        # Nothing is kept but what the block of the next token sees.
        live = pattern[:, start // 4, : -(-start // 4)].sum(-1)
        kept = live[:1] if setting == "homogeneous" else live
        assert torch.equal(state.blocks(4).expand_as(kept), kept)
        kept_keys = state.read().key
        assert bool((state.counts()[0] <= 4 * kept).all()) and kept_keys.shape[2] == int(state.counts().max())
        for lane, row in enumerate(state.positions[0]):
            held = row >= 0
            torch.testing.assert_close(kept_keys[:, lane][:, held], key[:, lane, row[held]])
    torch.testing.assert_close(torch.cat(outs, 2), expected, **TIGHT)


@pytest.mark.paper("s2_attention")
def test_a_small_cache_at_any_time() -> None:
    """32 blocks, 2 local, stride 8: at most 6 live blocks a head at any time."""
    s2 = S2Attention(8, block_size=2, local_blocks=2, stride=8)
    query, key, value = tensors(64, 8, 8)
    state = s2.init_state(2, like=query)
    for at in range(64):
        _, state = s2.step(*(t[:, :, at : at + 1] for t in (query, key, value)), state)
        assert int(state.blocks(2).max()) <= 6


@pytest.mark.paper("s2_attention")
def test_density_and_cost_of_a_pattern() -> None:
    pattern = local_stride_pattern(8, 32, 2, 8)
    assert round(float(pattern.sum() / (8 * 32 * 33 / 2)), 4) == 0.2294
    assert flops(pattern, 16, 64) == int(pattern.sum()) * 2 * (16 * 16 * 64) * 2
    shape = AttentionShape(512, 512, 8, 64, causal=True)
    cost = S2Attention(8, block_size=16, local_blocks=2, stride=8).cost(shape)
    assert cost.flops == flops(pattern, 16, 64)
    assert cost.pairs == pytest.approx(int(pattern.sum()) / (8 * 32 * 32))
    live = float(pattern[:, -1].sum(-1).double().mean()) * 16
    assert cost.state_bytes == 8 * live * 128 * 4


def test_merged_query_blocks_visit_the_union() -> None:
    pattern = local_stride_pattern(4, 10, 2, 3)
    visited, shared = merge_q(pattern, 4)
    assert visited.shape == shared.shape == (4, 3, 10)
    for group, rows in enumerate((range(4), range(4, 8), range(8, 10))):
        assert torch.equal(visited[:, group], torch.stack([pattern[:, r] for r in rows]).any(0))
        assert torch.equal(shared[:, group], torch.stack([pattern[:, r] for r in rows]).all(0))
    assert all(torch.equal(part, pattern) for part in merge_q(pattern, 1))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("merge", [1, 3])
def test_any_pattern_of_a_users_own(heads: int, merge: int) -> None:
    pattern = torch.rand(heads, 9, 9) < 0.4
    pattern |= torch.eye(9, dtype=torch.bool)
    query, key, value = tensors(33, 4, 2)
    wide = pattern.repeat_interleave(4 // heads, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :33, :33]
    causal = wide & torch.ones(33, 33, dtype=torch.bool).tril()
    mechanism = BlockSparseAttention(4, pattern, merge)
    torch.testing.assert_close(mechanism(query, key, value), dense(query, key, value, wide), **TIGHT)
    expected = dense(query, key, value, causal)
    torch.testing.assert_close(mechanism(query, key, value, causal=True), expected, **TIGHT)
    of_blocks = BlockSparseAttention(4, lambda blocks: pattern[:, :blocks, :blocks], merge)
    torch.testing.assert_close(of_blocks(query, key, value, causal=True), expected, **TIGHT)
    state, outs = mechanism.init_state(2, like=query), []
    for now in (slice(0, 10), slice(10, 11), slice(11, 33)):
        out, state = mechanism.step(query[:, :, now], key[:, :, now], value[:, :, now], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected, **TIGHT)
    torch.testing.assert_close(copy.deepcopy(mechanism)(query, key, value, causal=True), expected, **TIGHT)


@pytest.mark.paper("s2_attention")
def test_parts_of_the_keys_merge_by_their_log_sum_exp() -> None:
    query, key, value = tensors(40, 4, 2)
    s2 = S2Attention(4, 2, block_size=4, local_blocks=2, stride=3)
    parts = []
    for start, stop in ((0, 13), (13, 14), (14, 40)):
        here = torch.zeros(2, 40, dtype=torch.bool)
        here[:, start:stop] = True
        parts.append(s2.with_lse(query, key, value, causal=True, mask=KeyPadding(here)))
    out, lse = merge_attentions(*zip(*parts, strict=True))
    torch.testing.assert_close(out, s2(query, key, value, causal=True), **TIGHT)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    seen = seen_by_rule(40, 4, 2, 4, 2, 3)
    torch.testing.assert_close(lse, scores.masked_fill(~seen, float("-inf")).logsumexp(-1), **TIGHT)


def test_layouts_are_kept_for_few_sizes_and_not_copied() -> None:
    s2 = S2Attention(4, block_size=4, local_blocks=2, stride=3)
    query, key, value = tensors(16)
    s2(query, key, value, causal=True)
    one = s2.layout(4, 16, 16, True, query.device)
    assert s2.layout(4, 16, 16, True, query.device) is one
    for length in range(1, 30):
        s2(*tensors(length), causal=True)
    assert len(s2._layouts) <= 8
    assert not pickle.loads(pickle.dumps(s2))._layouts


def test_hybrid_schedule_builds_a_model() -> None:
    assert hybrid_schedule(4) == ["s2_attention", "full", "s2_attention", "full"]
    assert hybrid_schedule(3, dense_every=3) == ["s2_attention", "s2_attention", "full"]
    names = hybrid_schedule(2)
    options = [{"block_size": 4, "local_blocks": 1, "stride": 2} if name == "s2_attention" else {} for name in names]
    model = SequenceModel(7, vocab_size=7, embed_dim=16, num_heads=4, num_kv_heads=2, mechanism=names, options=options)
    assert model(torch.randint(7, (2, 30))).shape == (2, 30, 7)


def test_mistakes_teach() -> None:
    for wrong in ({"local_blocks": 0}, {"stride": 0}, {"dense_heads": 5}):
        with pytest.raises(OptionError, match="local_blocks >= 1"):
            S2Attention(4, **wrong)
    with pytest.raises(OptionError, match="divide the heads"):
        S2Attention(4, 3)
    with pytest.raises(OptionError, match="block_size >= 1"):
        S2Attention(4, block_size=0)
    with pytest.raises(OptionError, match="boolean"):
        BlockSparseAttention(4, torch.ones(2, 3, 3))
    query, key, value = tensors(9)
    with pytest.raises(ShapeError, match="8 heads, got 4"):
        S2Attention(8)(query, key, value, causal=True)
    with pytest.raises(ShapeError, match="1 key heads, got 4"):
        s2 = S2Attention(4, 1)
        s2.step(query, key, value, s2.init_state(2, like=query))
    with pytest.raises(ShapeError, match="2 blocks of 4 tokens, but 3"):
        BlockSparseAttention(4, torch.ones(1, 2, 2, dtype=torch.bool))(query, key, value)
    with pytest.raises(ShapeError, match="3 heads does not divide"):
        BlockSparseAttention(4, torch.ones(3, 3, 3, dtype=torch.bool))(query, key, value)
    with pytest.raises(OptionError, match="t lies between"):
        kv_cache_blocks(local_stride_pattern(2, 4, 1, 2), 5)
    with pytest.raises(ShapeError, match="query blocks, key blocks"):
        coverage(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(OptionError, match="at least 1"):
        merge_q(local_stride_pattern(2, 4, 1, 2), 0)
    with pytest.raises(OptionError, match="dense_every"):
        hybrid_schedule(4, 0)
