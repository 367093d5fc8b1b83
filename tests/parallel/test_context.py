"""Context parallelism of simulated ranks: one process' attention in value and gradient, and the formula's messages."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from tests.parallel.cases import HEADS, OTHERS, PACKED, SHARED, UNEVEN, Case, check, run
from torch import Tensor, nn

import regard
from regard.errors import (
    CommunicationError,
    OptionError,
    RetrofitError,
    ShapeError,
    UnsupportedMaskError,
    UnsupportedPatternError,
)
from regard.nn import MultiHeadAttention
from regard.parallel import ContextParallel, Mesh, Sharding, context_parallel, context_parallel_attention, ring, traffic
from regard.parallel.group import Group, Traffic, simulate

MESHES = [
    Case(strategy="mesh", ulysses_size=size, deal=deal, length=length, heads=heads, documents=documents)  # type: ignore[arg-type]
    for size in (1, 2, 4)
    for deal, length, heads, documents in (
        ("contiguous", 40, (4, 2), None),
        ("zigzag", 37, (4, 1), None),
        ("striped", 41, (6, 3), (5, 1, 20, 15)),
    )
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", SHARED + UNEVEN + PACKED + HEADS + OTHERS, ids=str)
def test_ranks_together_compute_the_attention_of_one_process(case: Case, ranks: int) -> None:
    check(case, ranks, simulate(ranks, run, case).results)


@pytest.mark.parametrize("case", MESHES, ids=str)
def test_a_mesh_of_ulysses_teams_on_a_ring(case: Case) -> None:
    check(case, 4, simulate(4, run, case).results)


@pytest.mark.parametrize(
    "case", [Case(), Case(strategy="ulysses"), Case(deal="striped", documents=(5, 20, 15))], ids=str
)
def test_three_ranks(case: Case) -> None:
    check(case, 3, simulate(3, run, case).results)


def test_six_ranks_in_two_teams_of_three() -> None:
    case = Case(strategy="mesh", ulysses_size=3, heads=(6, 2), length=50)
    check(case, 6, simulate(6, run, case).results)


def test_traffic_is_that_of_the_papers() -> None:
    """Equal shards in which everybody sees everybody: the closed forms, in bytes."""
    ranks, batch, heads, kv_heads, length, dim, size = 4, 2, 8, 4, 64, 16, 4
    token = batch * length // ranks * dim * size
    known: dict[str, Any] = {"batch": batch, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    sharding = Sharding.zigzag(length, ranks)
    for rank in range(ranks):
        ring = traffic("ring", sharding, rank, causal=True, **known)
        sent = (ranks - 1) * 2 * kv_heads * token
        assert ring.forward == Traffic(ranks - 1, ranks - 1, sent, sent)
        assert ring.backward == Traffic(2 * (ranks - 1), 2 * (ranks - 1), 2 * sent, 2 * sent)
        ulysses = traffic("ulysses", sharding, rank, causal=True, **known)
        sent = (2 * heads + 2 * kv_heads) * token * (ranks - 1) // ranks
        assert ulysses.forward == ulysses.backward == Traffic(2 * (ranks - 1), 2 * (ranks - 1), sent, sent)
        mesh = traffic("mesh", sharding, rank, causal=True, ulysses_size=2, **known)
        sent = (2 * heads + 2 * kv_heads) * token // 2 + kv_heads // 2 * 2 * 2 * token
        assert mesh.forward == Traffic(3, 3, sent, sent)
    half = traffic("ring", sharding, 0, causal=True, dtype=torch.bfloat16, **known)
    assert half.backward.bytes_sent == 3 * half.forward.bytes_sent  # gradients are summed in float32


def test_blocks_travel_no_further_than_they_are_seen() -> None:
    """A causal sequence in contiguous shards: nothing goes round the end. Documents of one rank: nothing moves."""
    causal = Case(deal="contiguous")
    assert causal.sharding(4).hops(True) == [(1, 3), (1, 2), (1, 1), (0, 0)]
    _, counted = zip(*simulate(4, run, causal).results, strict=True)
    assert [passes.forward.messages_sent for passes in counted] == [1, 2, 3, 0]
    alone = Case(deal="contiguous", documents=(10, 10, 10, 10))
    assert all(not t.messages_sent for t in simulate(4, run, alone).traffic)


def test_half_precision_stays_close(dtype: torch.dtype = torch.bfloat16) -> None:
    case = Case(length=128)

    def low(group: Group) -> Tensor:
        sharding = case.sharding(group.size)
        tensors = [sharding.shard(t, group.rank, 2).to(dtype) for t in case.tensors()]
        *inputs, grad = tensors
        inputs = [t.requires_grad_() for t in inputs]
        out = context_parallel_attention(*inputs, group=group, sharding=sharding, causal=True, scale=0.4)
        grads = torch.autograd.grad(out, inputs, grad)
        assert all(t.dtype is dtype for t in (out, *grads))
        return torch.cat([t.detach().flatten(1) for t in (out, *grads)], 1)

    results = simulate(4, low).results
    whole = case.expected()
    sharding = case.sharding(4)
    for rank, found in enumerate(results):
        exact = torch.cat([sharding.shard(t, rank, 2).flatten(1) for t in whole], 1)
        assert float((found.double() - exact).norm() / exact.norm()) < 0.01


def test_a_rank_that_fails_ends_the_others_with_its_reason() -> None:
    def work(group: Group) -> None:
        if group.rank == 2:
            raise ArithmeticError("the disk is full")
        run(group, Case())

    with pytest.raises(ArithmeticError, match="the disk is full"):
        simulate(4, work, timeout=20)

    def leave(group: Group) -> None:
        if group.rank != 2:
            run(group, Case())

    with pytest.raises(CommunicationError, match=r"rank 2 .*returned already"):
        simulate(4, leave, timeout=20)


def alone(sharding: Sharding, function: Any) -> Any:
    return simulate(1, lambda group: function(ContextParallel(group, sharding), group)).results[0]


def test_what_cannot_be_is_refused() -> None:
    x = torch.randn(2, 4, 6, 8)
    sharding = Sharding.contiguous(6, 1)

    def refused(call: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            alone(sharding, call)

    refused(lambda c, g: c(x, x, x, mask=torch.ones(6, 6, dtype=torch.bool)), UnsupportedMaskError, "documents")
    refused(lambda c, g: c(x, x[:, :, :5], x[:, :, :5]), ShapeError, "holds 6 of 6")
    refused(lambda c, g: c(x[:, :, :5], x[:, :, :5], x[:, :, :5]), ShapeError, "sharding of its own")
    refused(lambda c, g: c.weights(x, x), UnsupportedPatternError, "single process")
    refused(lambda c, g: ContextParallel(g, Sharding.contiguous(6, 2)), OptionError, "does not fit a group of 1")
    refused(lambda c, g: ContextParallel(g, sharding, "mesh"), OptionError, "Mesh.split")
    refused(lambda c, g: ContextParallel(Mesh(g, None), sharding, "ring"), OptionError, "Mesh.split")
    refused(lambda c, g: ContextParallel(g, sharding, "star"), OptionError, "strategies are")
    refused(lambda c, g: ContextParallel("world", sharding), OptionError, "DistributedGroup")
    refused(lambda c, g: Mesh.split(g, 2), OptionError, "take a divisor")
    packed = Sharding.contiguous(6, 1, documents=torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(ShapeError, match="documents for 3 sequences"):
        alone(packed, lambda c, g: c(x, x, x))
    with pytest.raises(OptionError, match="too few for 6 ranks"):
        traffic("ulysses", Sharding.contiguous(6, 6), 0, batch=1, num_heads=4, head_dim=8)
    with pytest.raises(OptionError, match="belongs to strategy='mesh'"):
        traffic("mesh", sharding, 0, batch=1, num_heads=4, head_dim=8)


def parts_of(model: nn.Module, x: Tensor, sharding: Sharding, forward: Any, strategy: Any = None) -> tuple[Tensor, Any]:
    """The whole output of a model whose copies work on one shard each, and the sum of their gradients."""
    copies = [copy.deepcopy(model) for _ in range(sharding.ranks)]

    def work(group: Group) -> Tensor:
        mine = copies[group.rank]
        with context_parallel(mine, group, sharding, strategy):
            out = forward(mine, sharding.shard(x, group.rank, 1))
            out.square().sum().backward()
        return out.detach()

    out = sharding.gather(simulate(sharding.ranks, work).results, 1)
    grads = {}
    for name, _ in model.named_parameters():
        found = [each.get_parameter(name).grad for each in copies]
        if found[0] is not None:
            grads[name] = torch.stack(found).sum(0)  # type: ignore[arg-type]
    return out, grads


def assert_same_model(model: nn.Module, x: Tensor, sharding: Sharding, forward: Any, strategy: Any = None) -> None:
    out, grads = parts_of(model, x, sharding, forward, strategy)
    whole = forward(model, x)
    whole.square().sum().backward()
    torch.testing.assert_close(out, whole.detach())
    assert grads
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize("deal", ["contiguous", "zigzag", "striped"])
def test_a_model_of_regard_with_rotary_positions(deal: Any, strategy: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                MultiHeadAttention(32, 4, num_kv_heads=2, rotary=True).double() for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x, causal=True)
            return x

    x = torch.randn(2, 19, 32, dtype=torch.float64)
    assert_same_model(Two(), x, Sharding.of(deal, 19, 2), lambda model, part: model(part), strategy)


def test_the_mechanism_itself_tells_its_host_where_tokens_stand() -> None:
    host = MultiHeadAttention(32, 4, rotary=True).double()
    x, sharding = torch.randn(1, 13, 32, dtype=torch.float64), Sharding.zigzag(13, 2)

    def work(group: Group) -> Tensor:
        mine = copy.deepcopy(host)
        mine.mechanism = ContextParallel(group, sharding)
        return mine(sharding.shard(x, group.rank, 1), causal=True)

    torch.testing.assert_close(sharding.gather(simulate(2, work).results, 1), host(x, causal=True))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("deal", ["contiguous", "zigzag", "striped"])
def test_a_model_of_transformers(deal: Any, use_cache: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).double()
    tokens = torch.randint(0, 50, (2, 21))
    assert_same_model(model, tokens, Sharding.of(deal, 21, 2), lambda m, ids: m(ids, use_cache=use_cache).logits)


@pytest.mark.parametrize("window", [4, 15, 40])
@pytest.mark.parametrize("deal", ["contiguous", "zigzag"])
def test_transformers_with_sliding_windows(deal: Any, window: int) -> None:
    """Windows shorter than a shard, longer than a shard, longer than the sequence; in all layers, and in some."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": window,
        "attn_implementation": "sdpa",
    }
    tokens, sharding = torch.randint(0, 50, (1, 25)), Sharding.of(deal, 25, 2)
    everywhere = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).double()
    assert_same_model(everywhere, tokens, sharding, lambda m, ids: m(ids).logits)
    kinds = ["sliding_attention", "full_attention"]
    some = transformers.Qwen2Config(**sizes, use_sliding_window=True, layer_types=kinds)
    assert some.sliding_window == window
    assert_same_model(transformers.Qwen2ForCausalLM(some).double(), tokens, sharding, lambda m, ids: m(ids).logits)


def test_padding_of_a_model_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=3,
    )
    model, tokens = transformers.MistralForCausalLM(config), torch.randint(0, 50, (1, 8))

    def work(group: Group) -> None:
        with context_parallel(model, group, Sharding.contiguous(8, 1)):
            model(tokens, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]))

    with pytest.raises(UnsupportedMaskError, match="document of its own"):
        simulate(1, work)


def test_a_model_of_another_attention_is_refused() -> None:
    def work(group: Group) -> None:
        with context_parallel(MultiHeadAttention(32, 4, "moba"), group, Sharding.contiguous(8, 1)):
            pass

    with pytest.raises(RetrofitError, match="takes the place of 'full' alone"):
        simulate(1, work)


def test_the_next_sequence_has_another_length() -> None:
    host = MultiHeadAttention(32, 4, rotary=True).double()
    first, second = (torch.randn(1, length, 32, dtype=torch.float64) for length in (13, 22))

    def work(group: Group) -> list[Tensor]:
        mine = copy.deepcopy(host)
        with context_parallel(mine, group, Sharding.zigzag(13, 2)) as attention:
            outs = [mine(attention.sharding.shard(first, group.rank, 1), causal=True)]
            attention.sharding = Sharding.striped(22, 2)
            outs.append(mine(attention.sharding.shard(second, group.rank, 1), causal=True))
        return outs

    results = simulate(2, work).results
    for number, (x, sharding) in enumerate([(first, Sharding.zigzag(13, 2)), (second, Sharding.striped(22, 2))]):
        torch.testing.assert_close(sharding.gather([outs[number] for outs in results], 1), host(x, causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_of_torch(causal: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2).double()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if causal else None
        return model(x, mask=mask)

    x = torch.randn(2, 21, 32, dtype=torch.float64)
    assert_same_model(model, x, Sharding.zigzag(21, 2), forward)


def test_a_model_that_cannot_be_told_positions_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = transformers.ViTModel(config)

    def work(group: Group) -> None:
        with context_parallel(model, group, Sharding.contiguous(8, 1)):
            pass

    with pytest.raises(RetrofitError, match="takes no position_ids"):
        simulate(1, work)


def test_the_next_block_is_under_way_before_the_present_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, list[int]] = {"forward": [], "backward": []}
    for name, function in (("forward", "partial_attention"), ("backward", "partial_attention_backward")):
        exact = getattr(ring, function)

        def watched(*args: Any, name: str = name, exact: Any = exact, **options: Any) -> Any:
            begun[name].append(traffic_of[threading.current_thread().name].messages_sent)
            return exact(*args, **options)

        monkeypatch.setattr(ring, function, watched)
    traffic_of: dict[str, Traffic] = {}

    def work(group: Group) -> None:
        traffic_of[threading.current_thread().name] = group.traffic
        run(group, Case(causal=False))

    simulate(4, work)
    # Each rank: messages sent when it computes its own block, then the first, second and third to arrive.
    assert sorted(begun["forward"]) == sorted([1, 2, 3, 3] * 4)
    # Three of the forward pass, and gradients follow the keys by one step.
    assert sorted(begun["backward"]) == sorted([4, 5, 7, 8] * 4)


def test_nothing_of_a_shard_is_kept_but_the_local_tensors() -> None:
    """What autograd saves in a ring does not grow with the number of ranks' tokens."""
    case = Case(length=64)

    def work(group: Group) -> int:
        sharding = case.sharding(group.size)
        query, key, value, _ = (sharding.shard(t, group.rank, 2) for t in case.tensors())
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            context_parallel_attention(query.requires_grad_(), key, value, group=group, sharding=sharding, causal=True)
        return sum(t.numel() for t in kept)

    local = 64 // 4
    assert simulate(4, work).results == [2 * local * (2 * 4 * 8 + 2 * 2 * 8 + 4)] * 4


def test_regard_leads_here() -> None:
    assert regard.parallel.context_parallel_attention is context_parallel_attention
