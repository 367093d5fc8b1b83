"""Neural attention against its formula pair by pair, additive attention and rank counts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.cost import AttentionShape
from regard.dense import compose
from regard.dense.neural_attention import (
    MLPScorer,
    NeuralAttention,
    attention_with_scorer,
    layer_schedule,
    score_memory,
)
from regard.errors import OptionError, ShapeError
from regard.layers.scorers import AdditiveScore, BilinearScore
from regard.masks import Causal, KeyPadding
from regard.models.sequence import SequenceModel
from regard.nn import MultiHeadAttention
from tests.test_cost import counted

DIM, HEADS = 8, 3


def tokens(q_len: int = 6, k_len: int = 9, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, heads, q_len, DIM, dtype=torch.float64)
    key, value = (torch.randn(2, heads, k_len, DIM, dtype=torch.float64) for _ in range(2))
    return query, key, value


def concatenated(scorer: MLPScorer, q: Tensor, k: Tensor, network: int = 0) -> Tensor:
    """The score of one query and one key, by the paper's formula."""
    parts = [linear.weight[network] @ x + linear.bias[network] for linear, x in ((scorer.query, q), (scorer.key, k))]
    x = torch.cat(parts)
    for index, layer in enumerate(scorer.layers):
        x = layer.weight[network] @ x + layer.bias[network]  # type: ignore[index, operator]
        if index < len(scorer.layers) - 1:
            x = F.relu(x) if scorer.activation == "relu" else x.tanh()
    return x[0]


@contextmanager
def largest() -> Iterator[list[int]]:
    """The number of elements of the largest tensor that any operation gives."""
    found = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    found[0] = max(found[0], tensor.numel())
            return out

    with Watch():
        yield found


@pytest.mark.paper("neural_attention")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("hidden", [None, (5,), (7, 4, 2)])
def test_scores_are_the_concatenated_form(hidden: tuple[int, ...] | None, shared: bool) -> None:
    """The released code's two layers of d' and d'/2, the paper's one layer, and three."""
    scorer = MLPScorer(DIM, 4, hidden, shared_over_heads=shared, num_heads=HEADS).double()
    assert scorer.hidden == ((4, 2) if hidden is None else hidden)
    query, key, _ = tokens()
    found = scorer(query, key)
    for b, h, i, j in itertools.product(range(2), range(HEADS), range(6), range(9)):
        expected = concatenated(scorer, query[b, h, i], key[b, h, j], 0 if shared else h)
        torch.testing.assert_close(found[b, h, i, j], expected)


@pytest.mark.paper("neural_attention")
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_over_keys_without_a_scale(causal: bool) -> None:
    module = NeuralAttention(4, (6, 3), head_dim=DIM).double()
    query, key, value = tokens(7, 9)
    scorer = module.scorer
    assert isinstance(scorer, MLPScorer)
    expected = torch.zeros_like(query)
    for b, h, i in itertools.product(range(2), range(HEADS), range(7)):
        seen = i + 3 if causal else 9
        scores = torch.stack([concatenated(scorer, query[b, h, i], key[b, h, j]) for j in range(seen)])
        weights = scores.exp() / scores.exp().sum()
        expected[b, h, i] = weights @ value[b, h, :seen]
    torch.testing.assert_close(module(query, key, value, causal=causal), expected)


@pytest.mark.paper("neural_attention")
def test_queries_in_tiles_are_all_queries_at_once() -> None:
    """Forward, and gradients of inputs and network, under a mask and causality."""
    whole = NeuralAttention(4, head_dim=DIM, num_heads=HEADS).double()
    leaves = [t.requires_grad_() for t in tokens(11, 13)]
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, 9:] = False
    wanted = [*leaves, *whole.parameters()]
    out = whole(*leaves, causal=True, mask=KeyPadding(valid))
    grads = torch.autograd.grad(out.square().sum(), wanted)
    for block_q in (1, 4, 10):
        tiled = NeuralAttention(scorer=whole.scorer, block_q=block_q)
        other = tiled(*leaves, causal=True, mask=KeyPadding(valid))
        torch.testing.assert_close(other, out)
        for a, b in zip(torch.autograd.grad(other.square().sum(), wanted), grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.paper("neural_attention")
def test_one_hidden_layer_of_tanh_is_additive_attention() -> None:
    """Bahdanau's ``w . tanh(A q + C k + b)``; the output's bias is the same for all keys."""
    scorer = MLPScorer(DIM, DIM, (5,), activation="tanh").double()
    additive = AdditiveScore(DIM, 5).double()
    left, right = scorer.layers[0].weight[0].split(DIM, -1)  # type: ignore[index, operator]
    with torch.no_grad():
        additive.query.weight.copy_(left @ scorer.query.weight[0])
        additive.key.weight.copy_(right @ scorer.key.weight[0])
        added = left @ scorer.query.bias[0] + right @ scorer.key.bias[0]
        additive.query.bias.copy_(added + scorer.layers[0].bias[0])  # type: ignore[index, operator]
        additive.out.weight.copy_(scorer.layers[1].weight[0])  # type: ignore[index, arg-type]
    query, key, value = tokens()
    torch.testing.assert_close(attention_with_scorer(query, key, value, scorer), compose(additive)(query, key, value))


@pytest.mark.paper("neural_attention")
def test_the_core_takes_every_scorer() -> None:
    """A bilinear one is the dot product of projected queries and keys, torch's own."""
    query, key, value = tokens(9, 9)
    scorer = BilinearScore(DIM, 5).double()
    expected = F.scaled_dot_product_attention(scorer.query(query), scorer.key(key), value, is_causal=True)
    torch.testing.assert_close(attention_with_scorer(query, key, value, scorer, causal=True, block_q=2), expected)
    torch.testing.assert_close(attention_with_scorer(query, key, value, scorer, mask=Causal()), expected)
    network = MLPScorer(DIM, 4).double()
    torch.testing.assert_close(compose(network)(query, key, value), attention_with_scorer(query, key, value, network))
    for half in (network, scorer, AdditiveScore(DIM)):
        low = attention_with_scorer(*(t.bfloat16() for t in (query, key, value)), half.bfloat16())  # type: ignore[arg-type]
        assert low.dtype == torch.bfloat16 and bool(low.isfinite().all())


@pytest.mark.paper("neural_attention")
@pytest.mark.parametrize("proj_dim", [1, 2])
def test_rank_of_scores(proj_dim: int) -> None:
    """More than the channels that queries and keys are brought down to, and than head_dim; a dot product never."""
    query, key, _ = tokens(40, 40)
    scores = MLPScorer(DIM, proj_dim, (16, 8)).double()(3 * query, 3 * key)
    assert int(torch.linalg.matrix_rank(query @ key.mT).max()) <= DIM
    assert int(torch.linalg.matrix_rank(scores, rtol=1e-6).min()) > DIM > proj_dim
    bilinear = BilinearScore(DIM, proj_dim).double()(query, key)
    assert int(torch.linalg.matrix_rank(bilinear, rtol=1e-6).max()) <= proj_dim


@pytest.mark.paper("neural_attention")
def test_the_past_does_not_know_the_future_and_order_does_not_matter() -> None:
    host = MultiHeadAttention(24, HEADS, "neural_attention", proj_dim=4).double()
    x = torch.randn(2, 10, 24, dtype=torch.float64)
    changed = torch.cat((x[:, :6], torch.randn(2, 4, 24, dtype=torch.float64)), 1)
    torch.testing.assert_close(host(changed, causal=True)[:, :6], host(x, causal=True)[:, :6])
    assert not torch.allclose(host(changed)[:, :6], host(x)[:, :6])
    order = torch.randperm(10)
    torch.testing.assert_close(host(x[:, order]), host(x)[:, order])


@pytest.mark.paper("neural_attention")
@pytest.mark.parametrize(("dim", "proj"), [(64, 2), (64, 1), (128, 4), (32, 5), (16, 1)])
def test_parameters(dim: int, proj: int) -> None:
    half = max(proj // 2, 1)
    expected = 2 * (dim * proj + proj) + (2 * proj**2 + proj) + (proj * half + half) + (half + 1)
    for heads in (1, 4):
        module = NeuralAttention(proj, num_heads=heads, head_dim=dim)
        assert sum(p.numel() for p in module.parameters()) == expected
    per_head = NeuralAttention(proj, shared_over_heads=False, num_heads=4, head_dim=dim)
    assert sum(p.numel() for p in per_head.parameters()) == 4 * expected
    default = NeuralAttention(head_dim=64).scorer
    assert isinstance(default, MLPScorer) and (default.proj_dim, default.hidden) == (2, (2, 1))


@pytest.mark.paper("neural_attention")
def test_memory_is_that_of_a_tile() -> None:
    query, key, value = (torch.randn(2, 4, 96, 16) for _ in range(3))
    for block_q in (None, 8):
        module = NeuralAttention(16, block_q=block_q, head_dim=16)
        leaf = query.clone().requires_grad_()
        with largest() as found:
            module(leaf, key, value).sum().backward()
        assert 4 * found[0] == score_memory(2, 4, 96, 16, block_q=block_q)
    # By itself it tiles long inputs: sixteen times the length, not sixteen squared times the memory.
    sizes = {}
    for length in (1024, 16384):
        long = torch.randn(1, 1, length, 16)
        with torch.no_grad(), largest() as found:
            NeuralAttention(2, head_dim=16)(long[:, :, -256:], long, long)
        sizes[length] = found[0]
    assert sizes[16384] <= 16 * sizes[1024] and sizes[16384] < 256 * 16384 * 2
    assert score_memory(1, 8, 1024, 2, concatenated=True) == 2 * score_memory(1, 8, 1024, 2) == 4 * 8 * 1024**2 * 4


@pytest.mark.paper("neural_attention")
def test_flops_are_those_that_torch_counts() -> None:
    query, key, value = (t.float() for t in tokens(6, 9))
    module = NeuralAttention(4, (6, 5), head_dim=DIM)
    shape = AttentionShape(6, 9, HEADS, DIM, batch=2)
    assert module.cost(shape).flops == counted(lambda: module(query, key, value))
    other = NeuralAttention(scorer=BilinearScore(DIM))
    assert other.cost(shape).flops == counted(lambda: other(query, key, value))


@pytest.mark.paper("neural_attention")
def test_the_first_block_alone() -> None:
    assert layer_schedule(3) == ["neural_attention", "full", "full"]
    assert layer_schedule(2, neural=(0, 1)) == ["neural_attention"] * 2
    model = SequenceModel(5, vocab_size=7, embed_dim=16, depth=2, mechanism=layer_schedule(2))
    kinds = [type(block.get_submodule("attention.mechanism")).__name__ for block in model.blocks]
    assert kinds == ["NeuralAttention", "FullAttention"]
    assert model(torch.randint(7, (2, 6))).shape == (2, 6, 5)


def test_refusals() -> None:
    for options in ({"hidden": ()}, {"hidden": (3, 0)}, {"proj_dim": 0}, {"activation": "gelu"}):
        with pytest.raises(OptionError):
            NeuralAttention(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="block_q"):
        NeuralAttention(block_q=0)
    with pytest.raises(OptionError, match="leave them out"):
        NeuralAttention(proj_dim=2, scorer=BilinearScore(DIM))
    with pytest.raises(OptionError, match="numbered"):
        layer_schedule(2, neural=(2,))
    per_head = NeuralAttention(4, shared_over_heads=False, num_heads=2, head_dim=DIM).double()
    with pytest.raises(ShapeError, match="networks"):
        per_head(*tokens())
