"""TidalDecode: what is chosen is read by the layers after, nothing else is, and dense layers stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

import regard
from regard.decode.tidaldecode import (
    TidalAttention,
    TidalPolicy,
    TidalState,
    attend,
    best_reselect_layer,
    enable_tidal,
    kv_bytes_read,
    selection_overlap,
    tidal_decode_step,
    tidal_generate,
)
from regard.errors import OptionError, RetrofitError, ShapeError
from tests.retrofit.small_models import llama, t5

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
LAYERS = 6


def model(depth: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = llama().config
    config.num_hidden_layers = depth
    config.layer_types = None
    built = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return built


def ids(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(5, 61, (batch, length), generator=torch.Generator().manual_seed(0))


def qkv(length: int = 40, batch: int = 2, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, 1), (kv_heads, length), (kv_heads, length))
    return tuple(torch.randn(batch, h, n, 8, generator=generator, dtype=torch.float64) for h, n in shapes)


def full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def steps(net: LlamaForCausalLM, text: Tensor, prompt: int, policy: TidalPolicy | None, state: Any = None) -> Tensor:
    """Logits of the tokens after the prompt, decoded one by one."""
    with torch.no_grad():
        cache = net(input_ids=text[:, :prompt], use_cache=True).past_key_values
        found = []
        for place in range(prompt, text.shape[1]):
            token = text[:, place : place + 1]
            if policy is None:
                logits = net(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            else:
                logits, cache = tidal_decode_step(net, cache, token, policy, state)
            found.append(logits)
    return torch.stack(found, 1)


@pytest.mark.paper("tidaldecode")
@pytest.mark.parametrize("share", ["head", "max", "union"])
def test_as_many_as_there_are_gives_full_decoding(share: Any) -> None:
    net = model()
    exact = steps(net, ids(), 16, None)
    policy = TidalPolicy(LAYERS, top_k=24, start=1, reselect=(3,), share=share)
    torch.testing.assert_close(steps(net, ids(), 16, policy), exact, **TIGHT)
    few = TidalPolicy(LAYERS, top_k=4, start=1, reselect=(3,), share=share)
    assert not torch.allclose(steps(net, ids(), 16, few), exact, atol=1e-4), "few keys must make a difference"


@pytest.mark.paper("tidaldecode")
def test_a_choice_in_the_last_layer_changes_nothing() -> None:
    net = model()
    policy = TidalPolicy(LAYERS, top_k=2, start=LAYERS - 1)
    torch.testing.assert_close(steps(net, ids(), 16, policy), steps(net, ids(), 16, None), **TIGHT)


@pytest.mark.paper("tidaldecode")
def test_roles() -> None:
    policy = TidalPolicy(32, start=2)
    assert [policy.role(layer) for layer in (0, 1, 2, 3, 12, 13, 14, 31)] == [
        *["dense", "dense", "select", "reuse", "reuse", "select", "reuse", "reuse"]
    ]
    assert policy.choosing == (2, 13) and policy.dense_layers == 4
    assert TidalPolicy(12).choosing == (2,), "a small model has no layer 13"
    assert TidalPolicy(6, start=1, reselect=()).choosing == (1,)


@pytest.mark.paper("tidaldecode")
@pytest.mark.parametrize("layer", [0, 1, 2, 4])
def test_dense_and_choosing_layers_are_exact(layer: int) -> None:
    policy = TidalPolicy(LAYERS, top_k=3, start=2, reselect=(4,))
    inputs = qkv()
    torch.testing.assert_close(attend(layer, *inputs, TidalState(), policy), full(*inputs), **TIGHT)


@pytest.mark.paper("tidaldecode")
def test_what_is_chosen() -> None:
    """The largest logits of each query head, or of each key head by either rule."""
    query, key, value = qkv()
    logits = torch.einsum("bkgd,bknd->bkgn", query.view(2, 2, 2, 8), key)
    top = logits.topk(5, -1).indices
    for share, expected in (
        ("head", [set(row) for row in top.flatten(0, 2).tolist()]),
        ("max", [set(row) for row in logits.amax(2).topk(5, -1).indices.flatten(0, 1).tolist()]),
        ("union", [set(row) for row in top.flatten(2).flatten(0, 1).tolist()]),
    ):
        state = TidalState()
        attend(1, query, key, value, state, TidalPolicy(LAYERS, top_k=5, start=1, share=share))  # type: ignore[arg-type]
        assert state.indices is not None
        got = [[i for i in row if i >= 0] for row in state.indices.flatten(0, 1).tolist()]
        assert [set(row) for row in got] == expected
        assert all(len(row) == len(set(row)) for row in got), "a key must not count twice"
    policy = TidalPolicy(LAYERS, top_k=5, start=1, newest=True)
    attend(1, query, -100 * query[:, :2].expand(-1, -1, 40, -1), value, state, policy)
    assert state.indices is not None and bool((state.indices == 39).any(-1).all())


@pytest.mark.paper("tidaldecode")
@pytest.mark.parametrize("share", ["head", "max", "union"])
def test_later_layers_read_the_chosen_and_nothing_else(share: Any) -> None:
    policy = TidalPolicy(LAYERS, top_k=5, start=1, reselect=(4,), share=share)
    state = TidalState()
    attend(1, *qkv(), state, policy)
    chosen = state.indices
    assert chosen is not None
    for layer in (2, 3):
        query, key, value = qkv(seed=layer)
        seen = torch.zeros(2, chosen.shape[1], 41, dtype=torch.bool)
        seen.scatter_(-1, chosen.where(chosen >= 0, 40), True)
        seen = seen[..., :40]
        per_head = seen.repeat_interleave(4 // seen.shape[1], 1)
        out = attend(layer, query, key, value, state, policy)
        expected = F.scaled_dot_product_attention(query, key, value, per_head[:, :, None], enable_gqa=True)
        torch.testing.assert_close(out, expected, **TIGHT)
        assert state.indices is chosen, "a layer that reads chooses nothing"
        unread = ~per_head.view(2, 2, -1, 40).any(2)[..., None]
        changed = attend(layer, query, torch.where(unread, 99.0, key), torch.where(unread, -99.0, value), state, policy)
        assert torch.equal(changed, out)
    attend(4, *qkv(seed=4), state, policy)
    assert state.layer == 4 and not torch.equal(state.indices, chosen)
    attend(5, *qkv(seed=5), state, policy)


@pytest.mark.paper("tidaldecode")
def test_every_layer_of_a_model_reads_the_most_recent_choice() -> None:
    net, seen = model(), []
    policy = TidalPolicy(LAYERS, top_k=4, start=1, reselect=(3,))
    state = TidalState()
    with enable_tidal(net, policy, state) as handle, torch.no_grad():
        for index, mechanism in enumerate(handle.modules.values()):
            assert isinstance(mechanism, TidalAttention) and mechanism.state is state
            mechanism.register_forward_hook(
                lambda module, args, out, index=index: seen.append((index, state.layer, state.length))
            )
        cache = net(input_ids=ids(), use_cache=True).past_key_values
        seen.clear()
        for _ in range(2):
            net(input_ids=ids()[:, :1], past_key_values=cache, use_cache=True)
    by_layer = [(layer, chooser) for layer, chooser, _ in seen[1:LAYERS]]
    assert by_layer == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3)]
    assert [length for layer, _, length in seen if layer] == [25] * 5 + [26] * 5, "each step chooses anew"


@pytest.mark.paper("tidaldecode")
def test_bytes_read() -> None:
    found = kv_bytes_read(TidalPolicy(32, top_k=512), 100_000)
    assert found.ratio == pytest.approx((4 * 100_000 + 28 * 512) / (32 * 100_000))
    assert found.ratio == pytest.approx(0.13, abs=0.005)
    assert found.dense == 32 * 100_000 * 2 * 128 * 2
    grouped = kv_bytes_read(TidalPolicy(32, top_k=512), 100_000, num_kv_heads=8, num_heads=32)
    assert grouped.ratio == pytest.approx((4 * 100_000 + 28 * 4 * 512) / (32 * 100_000))
    shared = kv_bytes_read(TidalPolicy(32, top_k=512, share="max"), 100_000, num_kv_heads=8, num_heads=32)
    assert shared.ratio == pytest.approx(found.ratio)
    for start in range(4):
        for reselect in ((), (4,)):
            policy = TidalPolicy(LAYERS, top_k=3, start=start, reselect=reselect)
            dense = start + 1 + len(reselect)
            expected = (dense * 25 + (LAYERS - dense) * 3) / (LAYERS * 25)
            assert kv_bytes_read(policy, 25).ratio == pytest.approx(expected)


@pytest.mark.paper("tidaldecode")
@pytest.mark.parametrize("share", ["head", "max", "union"])
def test_bytes_read_are_counted_as_they_are_read(share: Any) -> None:
    policy, state = TidalPolicy(LAYERS, top_k=3, start=1, reselect=(4,), share=share), TidalState()
    steps(model(), ids(length=18), 17, policy, state)
    rows = [policy.rows(layer, 18, group=2) for layer in range(LAYERS)]
    if share == "union":
        assert all(3 <= state.rows[layer] <= rows[layer] for layer in range(LAYERS))
    else:
        assert [state.rows[layer] for layer in range(LAYERS)] == rows
    counted = kv_bytes_read(policy, 18, num_kv_heads=2, num_heads=4, head_dim=8, batch=2)
    assert counted.policy == sum(rows) * 2 * 2 * 2 * 8 * 2


@pytest.mark.paper("tidaldecode")
def test_overlap_of_choices() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 6, 8, 400, generator=generator, dtype=torch.float64)
    scores[3] = scores[1] * 2 + 1
    overlap = selection_overlap(scores, 40)
    assert torch.equal(overlap.diagonal(), torch.ones(4, dtype=torch.float64))
    assert float(overlap[1, 3]) == 1, "what does not change the order changes no choice"
    for a, b in ((0, 1), (0, 2), (2, 3)):
        assert float(overlap[a, b]) == pytest.approx(0.1, abs=0.02)
    by_hand = [[len({*x} & {*y}) / 2 for y in ([0, 1], [1, 2])] for x in ([0, 1], [1, 2])]
    small = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0]])
    assert selection_overlap(small, 2).tolist() == by_hand


@pytest.mark.paper("tidaldecode")
def test_the_best_layer_to_choose_again() -> None:
    """Where a new pattern begins, the choice made there serves the layers after it."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 200, generator=generator)
    pattern = [first] * 5 + [second] * 4
    noisy = [each + 0.3 * torch.randn(4, 200, generator=generator) for each in pattern]
    assert best_reselect_layer(noisy, 20, start=1) == 5
    with pytest.raises(OptionError, match="none after"):
        best_reselect_layer(noisy[:3], 20, start=1)


def test_prompts_and_generation_are_the_models_own_where_all_is_read() -> None:
    net, text = model(), ids()
    call: dict[str, Any] = {"attention_mask": torch.ones_like(text), "do_sample": False, "max_new_tokens": 10}
    before, logits = net.generate(text, **call), net(text).logits
    with enable_tidal(net, top_k=64, start=1, reselect=(3,)) as handle:
        torch.testing.assert_close(net(text).logits, logits, **TIGHT)
        assert torch.equal(net.generate(text, **call), before)
        assert torch.equal(net.generate(text, past_key_values=handle.cache(), **call), before)
    got = tidal_generate(net, text, TidalPolicy(LAYERS, top_k=64, start=1), 10)
    assert torch.equal(got, before[:, 24:])
    assert torch.equal(net(text).logits, logits)


def test_sparse_generation_is_one_whatever_the_way() -> None:
    net, text = model(), ids()
    policy = TidalPolicy(LAYERS, top_k=3, start=1, reselect=(3,))
    by_steps = tidal_generate(net, text, policy, 12)
    call: dict[str, Any] = {"attention_mask": torch.ones_like(text), "do_sample": False, "max_new_tokens": 12}
    with enable_tidal(net, policy) as handle:
        assert torch.equal(net.generate(text, **call)[:, 24:], by_steps)
        assert torch.equal(net.generate(text, past_key_values=handle.cache(), **call)[:, 24:], by_steps)
    with regard.retrofit(net, "tidaldecode", state=TidalState(), top_k=3, start=1, reselect=(3,)):
        assert torch.equal(net.generate(text, **call)[:, 24:], by_steps)


def test_padding_on_the_left_is_never_chosen() -> None:
    net, text = model(), ids(1, 20)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), text), 1)
    policy, call = TidalPolicy(LAYERS, top_k=4, start=1, reselect=(3,)), {"do_sample": False, "max_new_tokens": 8}
    with enable_tidal(net, policy):
        plain = net.generate(text, attention_mask=torch.ones_like(text), **call)
        shifted = net.generate(padded, attention_mask=(padded > 0).long(), **call)
    assert torch.equal(shifted[:, 5:], plain)


@pytest.mark.paper("tidaldecode")
def test_correction_gives_back_the_keys_of_the_full_model() -> None:
    """Right after a correction the cache is that of one full pass over the same tokens; before it, it is not."""
    net, text = model(), ids()
    policy, caches = TidalPolicy(LAYERS, top_k=2, start=0), []
    hook = net.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    found = tidal_generate(net, text, policy, 5, correct_every=4)
    hook.remove()
    with torch.no_grad():
        whole = net(torch.cat((text, found[:, :4]), 1), use_cache=True).past_key_values
        polluted = steps_cache(net, text, found[:, :4], policy)
    for own, exact in zip(caches[-1].layers, whole.layers, strict=True):
        torch.testing.assert_close(own.keys, exact.keys, **TIGHT)
        torch.testing.assert_close(own.values, exact.values, **TIGHT)
    assert not torch.allclose(polluted.layers[-1].keys, whole.layers[-1].keys, atol=1e-3)


def steps_cache(net: LlamaForCausalLM, text: Tensor, new: Tensor, policy: TidalPolicy) -> Any:
    cache = net(input_ids=text, use_cache=True).past_key_values
    for token in new.split(1, 1):
        _, cache = tidal_decode_step(net, cache, token, policy)
    return cache


def test_errors_teach() -> None:
    for wrong, words in (
        ({"top_k": 0}, "top_k"),
        ({"reselect": (2,)}, "choose again"),
        ({"reselect": (6,)}, "choose again"),
        ({"share": "all"}, "share"),
    ):
        with pytest.raises(OptionError, match=words):
            TidalPolicy(LAYERS, **wrong)  # type: ignore[arg-type]
    policy = TidalPolicy(LAYERS, top_k=2, start=0)
    with pytest.raises(ShapeError, match="one query"):
        attend(0, *(x.repeat(1, 1, 2, 1) for x in qkv()), TidalState(), policy)
    with pytest.raises(OptionError, match="share one TidalState"):
        attend(3, *qkv(), TidalState(), policy)
    with pytest.raises(OptionError, match="no layer 6"):
        policy.role(6)
    with pytest.raises(OptionError, match="has 6"):
        enable_tidal(model(), TidalPolicy(5))
    with pytest.raises(OptionError, match="given already"):
        enable_tidal(model(), policy, top_k=3)
    with pytest.raises(RetrofitError, match="several"):
        enable_tidal(t5())
    with pytest.raises(OptionError, match="correct_every"):
        tidal_generate(model(), ids(), policy, 4, correct_every=1)
    with pytest.raises(ShapeError, match="one token"):
        tidal_decode_step(model(), None, ids(), policy)
    with pytest.raises(OptionError, match="divides"):
        kv_bytes_read(policy, 10, num_kv_heads=3, num_heads=4)
    net = model()
    with regard.retrofit(net, "tidaldecode", top_k=2, start=0), pytest.raises(OptionError, match="state=TidalState"):
        net.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=3)
