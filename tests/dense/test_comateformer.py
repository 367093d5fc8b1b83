"""Combined attention against its formula pair by pair, its limits, and the models for sentence pairs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from regard.bench.sentence_pairs import MinimalEditPairs, TokenDifference, minimal_edit_pairs
from regard.dense.comateformer import CombinedAttention, dual_affinity
from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.kernels import scored, use_backend
from regard.masks import KeyPadding
from regard.models.comateformer import ComateAdapter, ComateEncoderLayer, ComateMatcher


def tensors(q_len: int = 9, k_len: int = 9, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(q_len + k_len)
    shapes = ((2, 2, q_len, dim), (2, 2, k_len, dim), (2, 2, k_len, 3))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query, key, value


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.paper("comateformer")
@pytest.mark.parametrize("centre", ["none", "mean", "scale2"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_formula_pair_by_pair(centre: str, causal: bool) -> None:
    query, key, value = tensors(5, 7)
    alpha, beta, dim = 1.3, 0.7, 4
    out = torch.zeros(2, 2, 5, 3, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for i in range(5):
                seen = range(i + 3) if causal else range(7)
                q, keys = query[b, h, i].tolist(), key[b, h].tolist()
                far = [-beta * sum(abs(x - y) for x, y in zip(q, keys[j], strict=True)) / dim for j in seen]
                mean = sum(far) / len(far) if centre == "mean" else 0.0
                for j, n in zip(seen, far, strict=True):
                    e = alpha * sum(x * y for x, y in zip(q, keys[j], strict=True)) / math.sqrt(dim)
                    gate = logistic(n - mean) * (2 if centre == "scale2" else 1)
                    out[b, h, i] += math.tanh(e) * gate * value[b, h, j]
    mechanism = CombinedAttention(alpha, beta, centre)  # type: ignore[arg-type]
    torch.testing.assert_close(mechanism(query, key, value, causal=causal), out)


@pytest.mark.paper("comateformer")
def test_without_distance_the_gate_is_constant() -> None:
    query, key, _ = tensors()
    similarity = torch.tanh(query @ key.transpose(-1, -2) / 2)
    torch.testing.assert_close(CombinedAttention(beta=0, centre="none").weights(query, key), similarity / 2)
    torch.testing.assert_close(CombinedAttention(beta=0, centre="scale2").weights(query, key), similarity)


@pytest.mark.paper("comateformer")
def test_the_gate_is_one_for_equal_vectors_and_falls_with_distance() -> None:
    query = torch.full((1, 1, 1, 4), 0.5, dtype=torch.float64)
    steps = torch.arange(6, dtype=torch.float64)
    # Keys move where the dot product does not see it.
    key = query + steps[None, None, :, None] * torch.tensor([1.0, -1, 2, -2]).double()
    maps = CombinedAttention().maps(query, key)
    torch.testing.assert_close(maps.similarity, maps.similarity[..., :1].expand_as(maps.similarity))
    gate = (maps.weights / torch.tanh(maps.similarity))[0, 0, 0]
    assert float(gate[0]) == pytest.approx(1)
    assert bool((gate.diff() < 0).all())
    torch.testing.assert_close(maps.dissimilarity[0, 0, 0], -steps * 6 / 4)


@pytest.mark.paper("comateformer")
def test_weights_may_be_negative() -> None:
    query, key, value = tensors()
    plain = CombinedAttention(beta=0)
    torch.testing.assert_close(plain(-query, key, value), -plain(query, key, value))
    weights = CombinedAttention().weights(query, key)
    assert float(weights.min()) < -0.05 < 0.05 < float(weights.max())
    assert float((CombinedAttention()(-query, key, value) + CombinedAttention()(query, key, value)).abs().max()) > 0.01


@pytest.mark.paper("comateformer")
@pytest.mark.parametrize("centre", ["mean", "scale2"])
def test_hidden_keys_have_no_influence(centre: str) -> None:
    query, key, value = tensors()
    mask = KeyPadding((torch.arange(9) < 6)[None].expand(2, -1))
    mechanism = CombinedAttention(centre=centre)  # type: ignore[arg-type]
    short = mechanism(query, key[:, :, :6], value[:, :, :6])
    torch.testing.assert_close(mechanism(query, key, value, mask=mask), short)
    assert not bool(mechanism.weights(query, key, mask=mask)[..., 6:].any())
    assert not bool(mechanism.weights(query, key, causal=True).triu(1).any())


class _Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.paper("comateformer")
def test_distances_in_tiles_equal_all_differences_at_once() -> None:
    query, key, value = tensors(40, 50)
    differences = (query[:, :, :, None] - key[:, :, None]).abs().sum(-1)
    torch.testing.assert_close(differences, torch.cdist(query, key, p=1))
    torch.testing.assert_close(dual_affinity(query, key, norm=False)[1], -differences)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    results = []
    for form in ("whole", "tiled"):
        with use_backend(form):
            out = CombinedAttention(centre="mean")(*leaves, causal=True)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.paper("comateformer")
def test_memory_is_linear_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored, "_TILE", 1 << 18)

    def largest(length: int) -> int:
        query, key, value = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))
        with _Largest() as made:
            CombinedAttention()(query, key, value).sum().backward()
        return made.numbers

    # Two affinities of one tile, never of all pairs.
    assert largest(800) <= 1.2 * largest(400) < 800 * 800 / 4


@pytest.mark.paper("comateformer")
def test_functions_can_be_exchanged() -> None:
    query, key, _ = tensors()
    functions = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "arctan": torch.arctan}
    similarity, dissimilarity = dual_affinity(query, key)
    for first, f in functions.items():
        for second, g in functions.items():
            weights = CombinedAttention(centre="none", similarity=first, gate=second).weights(query, key)
            torch.testing.assert_close(weights, f(similarity) * g(dissimilarity))


@pytest.mark.paper("comateformer")
def test_distances_may_have_projections_of_their_own() -> None:
    query, key, value = tensors()
    plain, own = CombinedAttention(), CombinedAttention(distance_projections=True, head_dim=4).double()
    torch.testing.assert_close(own(query, key, value), plain(query, key, value))
    assert own.distance_query is not None
    assert own.distance_key is not None
    with torch.no_grad():
        own.distance_query.weight.zero_()
        own.distance_key.weight.zero_()
    torch.testing.assert_close(own(query, key, value), CombinedAttention(beta=0)(query, key, value))


@pytest.mark.paper("comateformer")
def test_one_head_is_the_difference_of_two_tokens() -> None:
    """Queries and keys that know which token is which: the other token's value is taken off."""
    sign = torch.tensor([[1.0], [-1.0]]).double().expand(1, 1, 2, 1) * 8
    value = tensors(2, 2)[2][:1, :1]
    out = CombinedAttention(beta=0)(sign, sign, value)
    torch.testing.assert_close(out[0, 0, 0], value[0, 0, 0] - value[0, 0, 1], rtol=0, atol=1e-9)


@pytest.mark.paper("comateformer")
def test_a_layer_norms_after_its_residuals_and_attends_across() -> None:
    torch.manual_seed(0)
    layer = ComateEncoderLayer(8, 2).double()
    x, context = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    hidden = layer.attention_norm(x + layer.attention(x, context))
    torch.testing.assert_close(layer(x, context), layer.mlp_norm(hidden + layer.mlp(hidden)))
    long = layer(torch.randn(1, 400, 8, dtype=torch.float64))
    torch.testing.assert_close(long.mean(-1), torch.zeros_like(long[..., 0]), rtol=0, atol=1e-9)
    assert not torch.allclose(layer(x), layer(x, context))


@pytest.mark.paper("comateformer")
def test_the_matcher_reads_both_sentences_and_no_padding() -> None:
    torch.manual_seed(0)
    matcher = ComateMatcher(12, 10, padding=11, embed_dim=8, num_heads=2).double()
    first, second = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8], [9, 1]])
    pair = matcher.join(first, second)
    assert pair.tolist() == [[1, 2, 3, 10, 7, 8], [4, 5, 6, 10, 9, 1]]
    out = matcher(pair)
    assert out.shape == (2, 2)
    padded = torch.cat((pair, torch.full((2, 3), 11)), 1)
    torch.testing.assert_close(matcher(padded), out)
    with torch.no_grad():
        matcher.tokens.weight[11] = 5.0
    torch.testing.assert_close(matcher(padded), out)
    assert not torch.allclose(matcher(matcher.join(second, first)), out)
    with torch.no_grad():
        matcher.sentences.weight[1] += torch.randn(8)
    assert not torch.allclose(matcher(pair), out)
    with pytest.raises(ShapeError):
        matcher(torch.zeros(1, 600, dtype=torch.int64))
    with pytest.raises(OptionError):
        ComateMatcher(12, 12)


@pytest.mark.paper("comateformer")
def test_the_adapter_trains_what_is_on_top() -> None:
    torch.manual_seed(0)
    encoder = nn.Embedding(10, 8)
    adapter = ComateAdapter(encoder, 8, 2, depth=2)
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    real = ids != 0
    adapter(ids, key_padding=real).sum().backward()
    assert encoder.weight.grad is None
    assert all(p.grad is not None for layer in adapter.layers for p in layer.parameters())
    out = adapter(ids, key_padding=real)
    with torch.no_grad():
        encoder.weight[0] = 3.0
    torch.testing.assert_close(adapter(ids, key_padding=real), out)

    class Wrapped(nn.Module):
        def forward(self, ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=encoder(ids))

    other = ComateAdapter(Wrapped(), 8, 2, depth=2)
    other.load_state_dict(adapter.state_dict(), strict=False)
    torch.testing.assert_close(other(ids, key_padding=real), out)
    assert ComateAdapter(nn.Embedding(10, 8), 8, 2, train_encoder=True).encoder.weight.requires_grad


@pytest.mark.paper("comateformer")
def test_pairs_differ_in_one_token() -> None:
    task = minimal_edit_pairs(length=12, words=48, pairs=300)
    pairs, labels = task.train
    first, second = pairs[:, :12], pairs[:, 13:]
    changed = first != second
    assert bool((changed.sum(1) == 1).all())
    assert bool((pairs[:, 12] == task.separator).all())
    before, after = first[changed], second[changed]
    kind = before ^ after
    assert bool((kind[labels == 1] == 1).all())
    assert bool(((kind == 2) | (before // 4 != after // 4))[labels == 0].all())
    negated = (kind == 2)[labels == 0].float().mean()
    assert 0.35 < float(negated) < 0.65
    assert 0.4 < float(labels.float().mean()) < 0.6
    drawn, _ = task.batch(50, torch.Generator().manual_seed(1))
    known = {tuple(row) for row in pairs.tolist()}
    assert all(tuple(row) in known for row in drawn.tolist())
    fresh, _ = task.batch(50, torch.Generator().manual_seed(1), "test")
    assert not any(tuple(row) in known for row in fresh.tolist())
    inputs, target = TokenDifference(4).batch(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(target, inputs[:, 0, :4] - inputs[:, 1, :4])


def test_bad_options_are_refused() -> None:
    for options in ({"centre": "median"}, {"beta": -1.0}, {"dissimilarity": "l2"}):
        with pytest.raises(OptionError):
            CombinedAttention(**options)  # type: ignore[arg-type]
    for options in ({"gate": "relu"}, {"similarity": "softmax"}):
        with pytest.raises(UnknownNameError):
            CombinedAttention(**options)
    with pytest.raises(OptionError):
        MinimalEditPairs(words=10)
