"""Flux Attention: the router reads the prompt's ends, decisions are hard, and each branch is what it says."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.layers.losses import SparsityLagrangian, warmed_target
from regard.masks import KeyPadding
from regard.models.sequence import SequenceModel
from regard.retrofit.flux_attention import FluxHandle, attach_flux
from regard.sparse.flux_attention import FluxAttention, LayerRouter, routing_table
from regard.sparse.frame import compose
from regard.sparse.scoring import antidiagonal_scores
from regard.sparse.selection import TopP

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SMALL: dict[str, Any] = {"pool": 3, "sink": 4, "local": 8, "block_size": 4}


def qkv(length: int = 37, batch: int = 3, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(
        torch.randn(batch, h, length, dim, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    )


def streaming_mask(length: int, sink: int = 4, local: int = 2, block: int = 4) -> Tensor:
    """The rule, pair by pair: ``sink`` tokens and ``local`` blocks."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            seen[i, j] = j < sink or i // block - j // block < local
    return seen


def masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def small(**options: Any) -> FluxAttention:
    torch.manual_seed(0)
    return FluxAttention(**{"head_dim": 8, **SMALL, **options}).double().eval()


def undecided(module: nn.Module, size: float = 1.0) -> None:
    """Give every router generic weights, so that decisions differ from sample to sample."""
    for router in module.modules():
        if isinstance(router, LayerRouter):
            last = router.choice[-1]
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight, std=size, generator=torch.Generator().manual_seed(3))
            nn.init.zeros_(last.bias)


def backbone(mechanism: str = "full", depth: int = 3) -> SequenceModel:
    torch.manual_seed(5)
    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=depth, num_heads=2, mechanism=mechanism)
    return model.double().eval()


def tokens(batch: int = 6, length: int = 29) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.paper("flux_attention")
def test_all_full_is_the_backbone_and_all_sparse_the_sparse_model() -> None:
    model, ids = backbone(), tokens()
    before = model(ids)
    sparse = backbone("block_select")
    sparse.load_state_dict(model.state_dict())
    with attach_flux(model, **SMALL) as handle:
        for training in (False, True):
            model.train(training)
            handle.set(mode="full")
            assert torch.equal(model(ids), before)
            assert torch.equal(handle.sparsity(), torch.zeros(6, dtype=torch.float64))
            handle.set(mode="sparse")
            everywhere = model(ids)
            assert torch.equal(handle.sparsity(), torch.ones(6, dtype=torch.float64))
    assert torch.equal(model.eval()(ids), before)
    # The same network, given the pattern as a mask.
    torch.testing.assert_close(everywhere, model(ids, mask=_as_mask(streaming_mask(29))), **TIGHT)
    assert not torch.allclose(everywhere, before, atol=1e-3)


def _as_mask(seen: Tensor) -> Any:
    from regard.masks import Boolean

    return Boolean(seen)


@pytest.mark.paper("flux_attention")
@pytest.mark.parametrize("sink, local", [(4, 36), (0, 37), (40, 1), (16, 24)])
def test_streaming_over_the_whole_length_is_full_causal_attention(sink: int, local: int) -> None:
    query, key, value = qkv()
    module = small(sink=sink, local=local)
    module.mode = "sparse"
    torch.testing.assert_close(module(query, key, value, causal=True), causal(query, key, value), **TIGHT)


@pytest.mark.paper("flux_attention")
def test_streaming_sees_the_sink_and_the_recent_blocks() -> None:
    query, key, value = qkv()
    module = small(sink=3, local=7)  # rounded up to one block and two
    module.mode = "sparse"
    out = module(query, key, value, causal=True)
    torch.testing.assert_close(out, masked(query, key, value, streaming_mask(37)), **TIGHT)
    later = module(query[:, :, -9:], key, value, causal=True)
    torch.testing.assert_close(later, out[:, :, -9:], **TIGHT)


@pytest.mark.paper("flux_attention")
@pytest.mark.parametrize("sparse", ["streaming", "triangle", "xattn", "topk"])
def test_the_mix_in_training_is_the_branch_chosen_at_inference(sparse: str) -> None:
    query, key, value = qkv(batch=8)
    module = small(sparse=sparse, full_bias=0.0, top_k=5, last=6, threshold=0.5, stride=2).train()
    module.generator = torch.Generator().manual_seed(0)
    mixed = module(query, key, value, causal=True)
    assert module.routing is not None
    hard = module.routing.hard.detach()
    assert set(hard.tolist()) == {0.0, 1.0}
    module.eval()
    outputs = {}
    for name in ("sparse", "full"):
        module.mode = name  # type: ignore[assignment]
        outputs[name] = module(query, key, value, causal=True)
    expected = torch.where(hard[:, None, None, None] > 0.5, outputs["full"], outputs["sparse"])
    torch.testing.assert_close(mixed, expected, **TIGHT)
    assert not torch.allclose(outputs["full"], outputs["sparse"], atol=1e-3)


@pytest.mark.paper("flux_attention")
def test_dispatch_gives_each_sample_its_branch() -> None:
    query, key, value = qkv(batch=12)
    module = small()
    undecided(module)
    valid = torch.ones(12, 37, dtype=torch.bool)
    valid[3:, :5] = False
    for mask, rule in ((None, torch.ones(12, 1, 1, 37, dtype=torch.bool)), (KeyPadding(valid), valid[:, None, None])):
        out = module(query, key, value, causal=True, mask=mask)
        assert module.routing is not None
        full = module.routing.hard > 0.5
        assert 0 < int(full.sum()) < 12
        for row in range(12):
            pattern = torch.ones(37, 37, dtype=torch.bool).tril() if full[row] else streaming_mask(37)
            expected = masked(query[row : row + 1], key[row : row + 1], value[row : row + 1], pattern & rule[row])
            torch.testing.assert_close(out[row : row + 1], expected.nan_to_num(0), **TIGHT)
    weights = module.weights(query, key, causal=True)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), module(query, key, value, causal=True), **TIGHT)


@pytest.mark.paper("flux_attention")
def test_at_first_every_layer_is_full() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        router = LayerRouter(8, pool=4).eval()
        routing = router(100 * torch.randn(20, 2, 30, 8))
        assert routing.hard.tolist() == [1.0] * 20
        torch.testing.assert_close(routing.soft, torch.full((20,), 1 / (1 + math.exp(-4.5))))
    model = backbone()
    with attach_flux(model, **SMALL) as handle:
        model(tokens())
        assert handle.decisions().shape == (6, 3)
        assert bool((handle.decisions() == 1).all())


@pytest.mark.paper("flux_attention")
def test_the_router_reads_the_first_and_last_tokens_of_the_span_alone() -> None:
    query = qkv(40)[0]
    router = LayerRouter(8, pool=5).double().eval()
    undecided(router)
    before = router(query).logits
    middle = query.clone()
    middle[:, :, 5:35] += 10 * torch.randn(3, 4, 30, 8, dtype=torch.float64)
    assert torch.equal(router(middle).logits, before)
    for place in (4, 35):
        moved = query.clone()
        moved[:, :, place] += 1
        assert not torch.allclose(router(moved).logits, before)
    span = torch.tensor([[0, 40], [3, 17], [10, 16]])
    for row, (start, stop) in enumerate(span.tolist()):
        both = [*range(start, min(start + 5, stop)), *range(max(stop - 5, start), stop)]
        mean = sum(query[row, :, t] for t in both).mean(0) / len(both)  # type: ignore[union-attr]
        torch.testing.assert_close(router.pooled(query, span)[row], mean, **TIGHT)
    assert torch.equal(router(query, (0, 40)).logits, before)
    with pytest.raises(ShapeError, match="40 tokens"):
        router(query, (0, 41))


@pytest.mark.paper("flux_attention")
def test_the_first_layers_decision_does_not_see_the_middle_of_a_prompt() -> None:
    model, ids = backbone(), tokens()
    other = ids.clone()
    other[:, 3:26] = (other[:, 3:26] + 5) % 11
    with attach_flux(model, **SMALL) as handle:
        undecided(nn.ModuleList(handle.layers), 3.0)
        found = []
        for batch in (ids, other):
            model(batch)
            found.append([layer.routing.logits for layer in handle.layers if layer.routing is not None])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


@pytest.mark.paper("flux_attention")
def test_padding_is_no_part_of_the_prompt() -> None:
    query, key, value = qkv(20, batch=2)
    module = small()
    undecided(module)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :6] = False
    module(query, key, value, causal=True, mask=KeyPadding(valid))
    assert module.routing is not None
    alone = module.router(query[1:, :, 6:])
    torch.testing.assert_close(module.routing.logits[1:], alone.logits, **TIGHT)


@pytest.mark.paper("flux_attention")
def test_multipliers_climb_along_the_gap_and_its_square() -> None:
    torch.manual_seed(0)
    constraint = SparsityLagrangian(["qa", "code", "chat"]).double()
    assert all(bool(((p >= 0) & (p <= 0.5)).all()) for p in constraint.parameters())
    sparsity = torch.tensor([0.2, 0.1, 0.6], dtype=torch.float64)
    optimizer = torch.optim.SGD(constraint.parameters(), lr=0.1, maximize=True)
    history = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = constraint.loss(sparsity, torch.tensor([0.5, 0.5, 0.9]), ["qa", "qa", "code"])
        gaps = torch.tensor([[0.3, 0.4], [0.3, 0.3]], dtype=torch.float64)
        first, second = constraint.lambda1.detach(), constraint.lambda2.detach()
        by_task = [float((first[t] * gaps[t] + second[t] * gaps[t] ** 2).mean()) for t in range(2)]
        assert float(loss.detach()) == pytest.approx(sum(by_task) / 2, abs=1e-7)
        loss.backward()
        wanted = torch.tensor([0.35, 0.3, 0.0], dtype=torch.float64) / 2
        torch.testing.assert_close(constraint.lambda1.grad, wanted, atol=1e-7, rtol=0)
        wanted = torch.tensor([0.125, 0.09, 0.0], dtype=torch.float64) / 2
        torch.testing.assert_close(constraint.lambda2.grad, wanted, atol=1e-7, rtol=0)
        history.append((first[:2].clone(), second[:2].clone()))
        optimizer.step()
    for before, after in itertools.pairwise(history):
        assert all(bool((b > a).all()) for a, b in zip(before, after, strict=True))
    with pytest.raises(OptionError, match="no task 'poem'"):
        constraint.loss(sparsity, 0.5, ["qa", "qa", "poem"])
    with pytest.raises(ShapeError):
        constraint.loss(sparsity, 0.5, torch.tensor([0, 1]))
    assert [warmed_target(step, 4, 0.0, 0.4) for step in (0, 1, 4, 9)] == pytest.approx([0, 0.1, 0.4, 0.4])


@pytest.mark.paper("flux_attention")
def test_training_moves_the_routers_to_the_target_and_leaves_the_backbone() -> None:
    model, ids = backbone(depth=4).float(), tokens()
    before = copy.deepcopy(model.state_dict())
    with attach_flux(model, **SMALL) as handle:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        torch.manual_seed(0)
        constraint = SparsityLagrangian(1)
        optimizer = handle.optimizer(constraint, lr=2e-2, multiplier_lr=2e-2)
        start = constraint.lambda1.detach().clone()
        model.train()
        shares = []
        for step in range(80):
            assert 1 <= handle.anneal(step, 80) <= 1.5
            model(ids)
            loss = constraint.loss(handle.sparsity(), 0.75, torch.zeros(6, dtype=torch.int64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shares.append(float(handle.sparsity().detach().mean()))
        assert sum(shares[:10]) / 10 < 0.2
        assert sum(shares[-20:]) / 20 == pytest.approx(0.75, abs=0.1)
        assert bool((constraint.lambda1 > start).all())
        parameters = list(handle.parameters())
        assert len(parameters) == 4 * 10
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.paper("flux_attention")
@pytest.mark.parametrize("mode", ["route", "full", "sparse"])
def test_decoding_keeps_the_decision_and_little_of_sparse_layers(mode: str) -> None:
    query, key, value = qkv(45, batch=12)
    prompt = 22
    module = small()
    undecided(module)
    module.mode = mode  # type: ignore[assignment]
    out, state = module.prefill(*(t[:, :, :prompt] for t in (query, key, value)))
    full = state.full.clone()
    if mode == "route":
        assert 0 < int(full.sum()) < 12
    outs, start = [out], prompt
    for size in (1, 1, 5, 1, 9, 1, 1, 1, 3):
        part = slice(start, start + size)
        out, state = module.decode(query[:, :, part], key[:, :, part], value[:, :, part], state)
        outs.append(out)
        start += size
        if not bool(full.all()):
            assert int(state.recent.counts().max()) <= 4 + 8
        if bool(full.any()):
            assert state.whole.seen == start
    assert start == 45
    both = (
        masked(query, key, value, torch.ones(45, 45, dtype=torch.bool).tril()),
        masked(query, key, value, streaming_mask(45)),
    )
    torch.testing.assert_close(torch.cat(outs, 2), torch.where(full[:, None, None, None], *both), **TIGHT)
    with pytest.raises(ShapeError, match="12 samples"):
        module.decode(query[:3, :, :1], key[:3, :, :1], value[:3, :, :1], state)


def _llama() -> Any:
    from tests.retrofit.small_models import llama

    return llama()


def _qwen3() -> Any:
    """A model that normalises queries head by head before their rotary positions."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=61, max_position_embeddings=64, **sizes, **heads))


@pytest.mark.paper("flux_attention")
@pytest.mark.parametrize("build, source", [(_llama, "q_proj"), (_qwen3, "q_norm")])
def test_on_transformers_routers_read_queries_before_rotary_positions(build: Any, source: str) -> None:
    pytest.importorskip("transformers")
    model = build().eval()
    ids = torch.randint(3, 61, (3, 30), generator=torch.Generator().manual_seed(2))
    hidden: list[Tensor] = []
    module = getattr(model.model.layers[1].self_attn, source)
    watch = module.register_forward_hook(lambda m, a, out: hidden.append(out))
    with attach_flux(model, **SMALL) as handle:
        undecided(nn.ModuleList(handle.layers))
        model(ids)
        layer = handle.layers[1]
        assert layer.routing is not None
        query = hidden[0].view(3, 30, 4, 8).transpose(1, 2)
        torch.testing.assert_close(layer.routing.logits, layer.router(query).logits)
    watch.remove()


@pytest.mark.paper("flux_attention")
def test_generation_keeps_the_decision_of_the_prompt() -> None:
    pytest.importorskip("transformers")
    model = _llama().eval()
    ids = torch.randint(3, 61, (5, 20), generator=torch.Generator().manual_seed(2))
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    with attach_flux(model, **SMALL) as handle:
        handle.set(mode="full")
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)
        handle.set(mode="route")
        undecided(nn.ModuleList(handle.layers), 3.0)
        model(ids)
        wanted = handle.decisions()
        assert 0 < float(wanted.mean()) < 1
        made = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(handle.decisions(), wanted)
        # Each token is what a pass over the whole text gives, decided by the prompt alone.
        handle.set(span=(0, 20))
        logits = model(made).logits
        assert torch.equal(logits[:, 19:-1].argmax(-1), made[:, 20:])
        with pytest.raises(ShapeError, match="5 samples"):
            cache = model(ids).past_key_values
            handle.layers[0].routing = handle.layers[1].routing
            cache.batch_select_indices(torch.tensor([0, 1]))
            model(ids[:2, :1], past_key_values=cache)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)


@pytest.mark.paper("flux_attention")
def test_antidiagonal_scores_by_hand() -> None:
    query, key, value = qkv(29, batch=2)
    module = compose("antidiagonal", block_q=8, block_k=4)
    valid = torch.ones(2, 29, dtype=torch.bool)
    valid[0, 6:13] = False
    request = module.request(query, key, value, causal=True, mask=KeyPadding(valid))
    scores = antidiagonal_scores(query, key, module.view(query, key, request), stride=4).exp()
    wide = key.repeat_interleave(2, 1)
    for b in range(2):
        shares = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
        for h in range(4):
            for i in range(8):
                logits = torch.full((8,), -math.inf, dtype=torch.float64)
                for j in range(8):
                    keys = range(4 * j, min(4 * j + 4, 29))
                    if j > i or not any(valid[b, t] for t in keys):
                        continue
                    logits[j] = sum(
                        float(query[b, h, 4 * i + 3 - s] @ wide[b, h, 4 * j + s])
                        for s in range(4)
                        if 4 * i + 3 - s < 29 and 4 * j + s < 29 and valid[b, 4 * j + s]
                    ) / (4 * 8**0.5)
                shares[b, h, i] = logits.softmax(-1)
        expected = shares[b].unflatten(1, (4, 2)).sum(2)
        torch.testing.assert_close(scores[b], expected, **TIGHT)


@pytest.mark.paper("flux_attention")
def test_antidiagonals_meet_verticals_and_slashes_of_odd_lag() -> None:
    found = {}
    for lag in (None, 21, 20):
        # One key that all queries look at, or one lag: both leave the blocks that the queries stand in.
        pairs = [(i, 21 if lag is None else i - lag) for i in range(32, 64)]
        query, key = torch.zeros(2, 1, 1, 64, 64, dtype=torch.float64)
        for i, j in pairs:
            key[0, 0, j, j] = 1
            query[0, 0, i, j] = 4000.0
        module = compose("antidiagonal", TopP(0.9), sinks=0, local=1, block_q=16, block_k=16)
        layout = module.select(query, key, module.request(query, key, key, causal=True))
        held = all(bool(layout.visit[0, 0, i // 16, j // 16]) for i, j in pairs)
        found[lag] = held and int(layout.visit[0, 0, 2:].sum()) <= 6  # own blocks, and two for a slash
    # Along an anti-diagonal of even length query and key are an odd number of tokens apart.
    assert found == {None: True, 21: True, 20: False}


@pytest.mark.paper("flux_attention")
def test_the_other_branches() -> None:
    query, key, value = qkv()
    chosen = small(sparse="topk", top_k=5)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    logits = logits.masked_fill(~torch.ones(37, 37, dtype=torch.bool).tril(), -math.inf)
    best = logits >= logits.topk(5, -1).values[..., -1:].clamp_min(-1e9)
    triangle = small(sparse="triangle", last=6)
    late = streaming_mask(37)
    late[-6:] = torch.ones(37, 37, dtype=torch.bool).tril()[-6:]
    everything = small(sparse="xattn", threshold=1.0)
    for module, pattern in ((chosen, best), (triangle, late), (everything, torch.ones(37, 37).tril().bool())):
        module.mode = "sparse"
        out = module(query, key, value, causal=True)
        torch.testing.assert_close(out, masked(query, key, value, pattern), **TIGHT)
    own = small(sparse=compose("mean", TopP(1.0)), full=compose("max", TopP(1.0)))
    for mode in ("full", "sparse"):
        own.mode = mode  # type: ignore[assignment]
        torch.testing.assert_close(own(query, key, value, causal=True), causal(query, key, value), **TIGHT)


@pytest.mark.paper("flux_attention")
def test_the_table_of_decisions() -> None:
    decisions = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0.0]])
    table = routing_table(decisions, ["qa", "qa", "code"])
    assert table.tasks == ("qa", "code")
    assert table.shares.tolist() == [[0, 0.5, 1], [1, 1, 1]]
    assert table.sparsity == {"qa": 0.5, "code": 1.0}
    assert "code  1.00 1.00 1.00  1.00" in str(table)
    assert routing_table(decisions, torch.tensor([2, 0, 2])).tasks == (2, 0)
    with pytest.raises(ShapeError, match="one task for each sample"):
        routing_table(decisions, ["qa"])


@pytest.mark.paper("flux_attention")
def test_pairs_are_those_of_the_branches_chosen() -> None:
    query, key, _ = qkv(40, batch=12)
    module = small()
    undecided(module)
    share = module.pairs(query, key, causal=True)
    full = float(module.router(query).hard.mean())
    module.mode = "sparse"
    sparse = module.pairs(query, key, causal=True)
    assert 0 < full < 1 and sparse is not None
    assert share == pytest.approx(full * (41 / 80) + (1 - full) * sparse)


def test_bad_settings_are_refused_and_retrofits_are_undone() -> None:
    for options in ({"sparse": "dense"}, {"local": 0}, {"sink": -1}, {"pool": 0}, {"head_dim": 0}):
        with pytest.raises(OptionError):
            FluxAttention(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        SparsityLagrangian(0)
    model = backbone()
    model.head.weight.requires_grad_(False)
    handle = attach_flux(model, layers=[1], **SMALL)
    assert isinstance(handle, FluxHandle) and len(handle.layers) == 1
    with pytest.raises(RetrofitError, match="run the model first"):
        handle.decisions()
    handle.restore()
    assert not model.head.weight.requires_grad and model.head.bias.requires_grad
    assert not any(module._forward_hooks for module in model.modules())
    with attach_flux(model, freeze=False, **SMALL):
        assert model.head.bias.requires_grad
