"""Dynamic mask attention against a loop over queries, its streaming property and its bounded cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.layout import TokenLayout
from regard.masks import KeyPadding
from regard.sparse.dynamic_mask_attention import (
    DynamicMask,
    DynamicMaskAttention,
    dma_scores,
    majority_smooth,
    topk_prefix_indices,
    topk_prefix_mask,
)

EXECUTORS = ("blocks", "gathered", "masked")


def inputs(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, length, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, length, 8, generator=generator, dtype=torch.float64)
    return query, key, torch.randn(2, 2, length, 8, generator=generator, dtype=torch.float64)


def mechanism(keep: int = 6, a: tuple[float, float] = (0.7, -0.4), **options: object) -> DynamicMask:
    torch.manual_seed(0)
    built = DynamicMask(4, 8, 2, keep=keep, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        built.A.copy_(torch.tensor(a))
    return built


def kept_by_sorting(scores: Tensor, keep: int, query: int) -> set[int]:
    """One head's kept keys of one query: sort its candidates by score, later first where scores tie."""
    return set(sorted(range(query + 1), key=lambda j: (-float(scores[j]), -j))[:keep])


@pytest.mark.paper("dynamic_mask_attention")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("form", ["linear", "exp"])
def test_equals_the_formula(executor: str, form: str) -> None:
    query, key, value = inputs(33)
    module = mechanism(form=form, executor=executor)
    out = module(query, key, value, causal=True)
    for b in range(2):
        for h in range(4):
            joined = value[b].transpose(0, 1).flatten(1)
            exponent = module.A[h // 2] * F.softplus(joined @ module.dt.weight[h // 2])
            scores = exponent.exp() if form == "exp" else exponent
            for i in range(33):
                kept = sorted(kept_by_sorting(scores, 6, i))
                logits = key[b, h // 2, kept] @ query[b, h, i] / 8**0.5 + scores[kept]
                torch.testing.assert_close(out[b, h, i], logits.softmax(-1) @ value[b, h // 2, kept])


@pytest.mark.paper("dynamic_mask_attention")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_keeping_all_with_zero_a_is_causal_attention(executor: str) -> None:
    query, key, value = inputs(33)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for keep in (33, 500):
        out = mechanism(keep, (0.0, 0.0), executor=executor)(query, key, value, causal=True)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("dynamic_mask_attention")
@pytest.mark.parametrize("keep", [1, 6, 64])
def test_rows_have_exactly_as_many_keys_as_they_may(keep: int) -> None:
    scores = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    scores[:, 1] = scores[:, 1].round()  # many ties
    mask = topk_prefix_mask(scores, keep)
    assert torch.equal(mask.sum(-1), torch.arange(1, 51).clamp_max(keep).expand(2, 3, 50))
    for h in range(3):
        for i in (0, 5, 30, 49):
            assert set(mask[1, h, i].nonzero().flatten().tolist()) == kept_by_sorting(scores[1, h], keep, i)
    assert torch.equal(TokenLayout(topk_prefix_indices(scores, keep), 50).dense(), mask)


@pytest.mark.paper("dynamic_mask_attention")
def test_an_evicted_key_never_returns() -> None:
    scores = torch.randn(2, 3, 60, generator=torch.Generator().manual_seed(1)).mul(2).round()
    mask = topk_prefix_mask(scores, 7)
    new = torch.eye(60, dtype=torch.bool)
    assert not bool((mask[:, :, 1:] & ~(mask[:, :, :-1] | new[1:])).any())


@pytest.mark.paper("dynamic_mask_attention")
@pytest.mark.parametrize("pieces", [(1,) * 33, (9, 1, 1, 14, 1, 7)], ids=["tokens", "pieces"])
def test_bounded_cache_decodes_exactly(pieces: tuple[int, ...]) -> None:
    query, key, value = inputs(33)
    module = mechanism()
    state, outs = module.init_state(2, like=query), []
    for q, k, v in zip(*(x.split(pieces, 2) for x in (query, key, value)), strict=True):
        out, state = module.step(q, k, v, state)
        outs.append(out)
        assert state.read().key.shape[2] <= 6
    torch.testing.assert_close(torch.cat(outs, 2), module(query, key, value, causal=True), rtol=1e-9, atol=1e-9)


@pytest.mark.paper("dynamic_mask_attention")
def test_the_future_changes_neither_mask_nor_output() -> None:
    query, key, value = inputs(33)
    module = mechanism()
    out, kept = module(query, key, value, causal=True), module.kept(value)
    for i in (0, 7, 20):
        late = [torch.cat((x[:, :, : i + 1], 7 * torch.randn_like(x[:, :, i + 1 :])), 2) for x in (query, key, value)]
        assert torch.equal(module.kept(late[2])[:, :, : i + 1, : i + 1], kept[:, :, : i + 1, : i + 1])
        torch.testing.assert_close(module(*late, causal=True)[:, :, : i + 1], out[:, :, : i + 1])


@pytest.mark.paper("dynamic_mask_attention")
@pytest.mark.parametrize("executor", ["blocks", "gathered"])
def test_gathered_equals_masked_with_gradients(executor: str) -> None:
    results = []
    for run in (executor, "masked"):
        tensors = [t.requires_grad_() for t in inputs(70)]
        module = mechanism(20, executor=run)
        out = module(*tensors, causal=True)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), [*tensors, module.A, module.dt.weight])
        assert bool((grads[3] != 0).all()), "A learns though the choice is detached"
        results.append((out, *grads))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.paper("dynamic_mask_attention")
def test_heads_of_a_group_keep_the_same_keys() -> None:
    query, key, value = inputs(33)
    module = mechanism()
    weights = module.weights(query, key, value, causal=True)
    seen = weights > 0
    assert torch.equal(seen[:, 0], seen[:, 1]) and torch.equal(seen[:, 2], seen[:, 3])
    assert torch.equal(seen[:, ::2], module.kept(value))
    assert not torch.equal(seen[:, 0], seen[:, 2])
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), module(query, key, value, causal=True))


@pytest.mark.paper("dynamic_mask_attention")
def test_majority_smoothing() -> None:
    mask = topk_prefix_mask(torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(2)), 9)
    smooth = majority_smooth(mask, 4)
    for h in range(2):
        for i in range(30):
            for start in range(0, 30, 4):
                block = mask[0, h, i, start : start + 4]
                whole = int(block.sum()) * 2 > len(block)
                for j in range(start, min(start + 4, 30)):
                    assert bool(smooth[0, h, i, j]) == (j <= i and (whole or j == i))
    query, key, value = inputs(30)
    out = mechanism(9, smooth_block=4)(query, key, value, causal=True)
    assert bool(out.abs().sum(-1).gt(0).all()), "no row is empty"


@pytest.mark.paper("dynamic_mask_attention")
def test_layer_norms_rotates_and_decodes() -> None:
    torch.manual_seed(0)
    layer = DynamicMaskAttention(32, 4, 2, keep=6).double()
    with torch.no_grad():
        layer.mechanism.A.copy_(torch.tensor([0.7, -0.4]))
    x = torch.randn(2, 25, 32, dtype=torch.float64)
    query, key, _ = layer.project(x)
    torch.testing.assert_close(query.norm(dim=-1), torch.full((2, 4, 25), 8**0.5, dtype=x.dtype), rtol=1e-4, atol=1e-4)
    shifted, _, _ = layer.project(x, start=3)
    torch.testing.assert_close(shifted[:, :, :1] @ layer.project(x, start=3)[1][:, :, :1].repeat(1, 2, 1, 1).mT,
                               query[:, :, :1] @ key[:, :, :1].repeat(1, 2, 1, 1).mT)  # fmt: skip
    expected, cache, outs = layer(x), None, []
    for piece in x.split(1, 1):
        out, cache = layer.step(piece, cache)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-9, atol=1e-9)
    assert cache is not None and cache.read().key.shape[2] == 6
    with pytest.raises(UnsupportedPatternError):
        layer(x, causal=False)


@pytest.mark.paper("dynamic_mask_attention")
def test_flops_of_scoring_and_gathering() -> None:
    shape = AttentionShape(4096, 4096, 8, 64, num_kv_heads=2, causal=True)
    dense = 2 * 8 * 4096 * 4096 * 128
    cost = DynamicMask(8, 64, 2, keep=512).cost(shape)
    assert cost.flops / dense < 0.15
    assert cost.state_bytes < 0.13 * 2 * 4096 * 2 * 64 * 4


def test_ties_go_to_recent_keys() -> None:
    mask = topk_prefix_mask(torch.zeros(1, 1, 20), 5)[0, 0]
    index = torch.arange(20)
    assert torch.equal(mask, (index <= index[:, None]) & (index > index[:, None] - 5))


def test_padding_is_no_candidate() -> None:
    valid = torch.ones(2, 33, dtype=torch.bool)
    valid[1, 5:20] = False
    query, key, value = inputs(33)
    module = mechanism()
    kept = module.kept(value, mask=KeyPadding(valid))
    assert not bool(kept[1, :, :, 5:20].any())
    assert torch.equal(kept[1, :, 25].sum(-1), torch.tensor([6, 6]))
    dense = module(query, key, value, causal=True, mask=KeyPadding(valid).dense(33, 33))
    torch.testing.assert_close(module(query, key, value, causal=True, mask=KeyPadding(valid)), dense)


def test_errors_teach() -> None:
    query, key, value = inputs(9)
    with pytest.raises(OptionError):
        DynamicMask(4, 8, keep=0)
    with pytest.raises(ShapeError):
        DynamicMask(4, 16, 2)(query, key, value, causal=True)
    with pytest.raises(UnsupportedPatternError):
        mechanism()(query, key, value)
    with pytest.raises(UnsupportedPatternError):
        mechanism().weights(query, key, causal=True)
    with pytest.raises(UnsupportedPatternError):
        smooth = mechanism(smooth_block=4)
        smooth.step(query, key, value, smooth.init_state(2, like=query))


def test_scores_are_a_function_of_values_alone() -> None:
    value = torch.randn(1, 2, 5, 3)
    weight, a = torch.randn(2, 6), torch.tensor([0.5, -1.0])
    scores = dma_scores(value, weight, a)
    joined = torch.cat((value[0, 0, 4], value[0, 1, 4]))
    torch.testing.assert_close(scores[0, 1, 4], a[1] * torch.log1p((weight[1] @ joined).exp()))
