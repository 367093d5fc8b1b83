"""The frame of dense attention: scores and normalisers against formulas pair by pair and library results, tiles against
whole maps, memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.dense import compose
from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.kernels import scored, use_backend
from regard.layers.normalizers import NORMALIZERS, entmax, length_scaled_softmax, sparsemax, tempered_softmax
from regard.layers.scorers import (
    SCORERS,
    AdditiveScore,
    BilinearScore,
    DistanceScore,
    GaussianScore,
    MLPScorer,
    RelationalScore,
    scorer,
)
from regard.masks import Boolean, Causal

DIM = 6


def tokens(q_len: int = 7, k_len: int = 9, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, 2, q_len, DIM, dtype=torch.float64)
    key, value = (torch.randn(2, kv_heads, k_len, DIM, dtype=torch.float64) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "filtered"])  # which reads places besides
def test_scores_pair_by_pair(name: str) -> None:
    module = scorer(name, DIM).double()
    query, key, _ = tokens()
    found = module(query, key)
    for b, h, i, j in itertools.product(range(2), range(2), range(7), range(9)):
        q, k = query[b, h, i], key[b, h, j]
        if isinstance(module, BilinearScore):
            expected = (module.query.weight @ q) @ (module.key.weight @ k) / math.sqrt(len(module.query.weight))
        elif isinstance(module, AdditiveScore):
            inner = module.query.weight @ q + module.query.bias + module.key.weight @ k
            expected = module.out.weight[0] @ inner.tanh()
        elif isinstance(module, DistanceScore | GaussianScore):
            expected = -(q - k).square().sum() / (2 * math.sqrt(DIM))
        elif isinstance(module, RelationalScore):
            expected = q.new_zeros(())
            for r, weight in enumerate(module.out.weight[0]):
                width = len(module.query.weight) // module.num_relations
                part = slice(r * width, (r + 1) * width)
                related = (module.query.weight[part] @ q) @ (module.key.weight[part] @ k) / math.sqrt(width)
                expected = expected + weight * related.relu()
        elif isinstance(module, MLPScorer):
            inner = torch.cat([p.weight[0] @ x + p.bias[0] for p, x in ((module.query, q), (module.key, k))])
            for layer in module.layers[:-1]:
                inner = (layer.weight[0] @ inner + layer.bias[0]).relu()
            expected = (module.layers[-1].weight[0] @ inner + module.layers[-1].bias[0])[0]
        else:
            expected = q @ k / math.sqrt(DIM)
        torch.testing.assert_close(found[b, h, i, j], expected)


def test_absolute_distance_is_its_sum() -> None:
    query, key, _ = tokens()
    expected = -(query[..., :, None, :] - key[..., None, :, :]).abs().sum(-1) / DIM
    torch.testing.assert_close(DistanceScore(DIM, p=1)(query, key), expected)


def test_distance_of_equal_keys_is_the_dot_product() -> None:
    """Squares of queries are constant along a row, and so are those of keys of one length: softmax sees neither."""
    query, key, value = tokens()
    key = F.normalize(key, dim=-1)
    torch.testing.assert_close(
        compose("distance", head_dim=DIM)(query, key, value), F.scaled_dot_product_attention(query, key, value)
    )


def test_gaussian_precisions_are_those_of_channels() -> None:
    module = GaussianScore(DIM, 0.3).double()
    torch.testing.assert_close(module.log_precision.exp(), torch.full((DIM,), 0.3, dtype=torch.float64))
    with torch.no_grad():
        module.log_precision.copy_(torch.randn(DIM))
    query, key, _ = tokens()
    gaps = (query[..., :, None, :] - key[..., None, :, :]).square()
    torch.testing.assert_close(module(query, key), -(gaps * module.log_precision.exp()).sum(-1) / 2)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalisers_hide_and_survive_empty_rows(name: str) -> None:
    scores = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    visible = torch.rand(2, 1, 5, 8) < 0.6
    visible[0, 0, 0] = False
    weights = NORMALIZERS[name](scores, visible)
    assert not bool(weights[~visible.expand_as(weights)].any()) and not bool(weights[0, :, 0].any())
    (grad,) = torch.autograd.grad(weights.square().sum(), scores)
    assert bool(grad.isfinite().all()) and not bool(grad[~visible.expand_as(grad)].any())
    # What is hidden has no say: the same as leaving it out.
    row = visible[1, 0, 3]
    alone = NORMALIZERS[name](scores[1:, :, 3:4, row], None)
    torch.testing.assert_close(weights[1:, :, 3:4, row], alone)


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    """By the sorted closed form; and among random points of the simplex none is nearer."""
    scores = torch.randn(50, 7, dtype=torch.float64)
    found = sparsemax(scores, None)
    ordered = scores.sort(-1, descending=True).values
    sums, count = ordered.cumsum(-1), torch.arange(1, 8)
    support = (1 + count * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    torch.testing.assert_close(found, (scores - threshold).clamp_min(0))
    others = torch.distributions.Dirichlet(torch.ones(7, dtype=torch.float64)).sample((200, 50))
    assert bool(((others - scores).norm(dim=-1) >= (found - scores).norm(dim=-1) - 1e-12).all())


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0])
def test_entmax_solves_its_problem(alpha: float) -> None:
    """Weights are ``[(alpha - 1) s - tau]_+^(1 / (alpha - 1))`` for one tau a row and sum to one; with the gradient."""
    scores = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    weights = entmax(scores, None, alpha)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.float64))
    tau = (alpha - 1) * scores - weights.pow(alpha - 1)
    kept = weights > 0
    for row, on, all_scores in zip(tau, kept, scores, strict=True):
        torch.testing.assert_close(row[on], row[on][:1].expand(int(on.sum())))
        assert bool(((alpha - 1) * all_scores[~on] <= row[on][0] + 1e-9).all())
    assert torch.autograd.gradcheck(lambda s: entmax(s, None, alpha), scores, atol=1e-5)


def test_entmax_tends_to_softmax() -> None:
    scores = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(entmax(scores, None, 1 + 1e-5), scores.softmax(-1), rtol=1e-3, atol=1e-4)


def test_temperatures_and_lengths() -> None:
    scores = torch.randn(3, 9, dtype=torch.float64)
    torch.testing.assert_close(tempered_softmax(scores, None, 0.5), (2 * scores).softmax(-1))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()[:3]
    expected = torch.zeros(3, 9, dtype=torch.float64)
    for row, count in enumerate((1, 2, 3)):
        expected[row, :count] = (0.43 * math.log(count) * scores[row, :count]).softmax(-1)
    torch.testing.assert_close(length_scaled_softmax(scores, visible), expected)


@pytest.mark.parametrize("heads", [None, "pre", "post"])
@pytest.mark.parametrize("normalizer", ["softmax", "entmax", "relu"])
@pytest.mark.parametrize("score", ["dot", "additive", "distance"])
def test_tiles_are_the_whole_map(
    score: str, normalizer: str, heads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, and gradients of inputs and parameters, under a mask and causality."""
    module = compose(score, normalizer=normalizer, heads=heads, num_heads=2, head_dim=DIM).double()  # type: ignore[arg-type]
    leaves = [t.requires_grad_() for t in tokens(11, 13, kv_heads=1)]
    mask = Boolean(torch.rand(2, 1, 11, 13) < 0.8)
    out = {}
    for form in ("whole", "tiled"):
        monkeypatch.setattr(scored, "_TILE", 150)
        with use_backend(form):
            out[form] = module(*leaves, mask=mask)
    torch.testing.assert_close(out["tiled"], out["whole"])
    wanted = [*leaves, *module.parameters()]
    seed = torch.randn_like(out["whole"])
    for a, b in zip(*(torch.autograd.grad(o, wanted, seed) for o in out.values()), strict=True):
        torch.testing.assert_close(a, b)


def test_talking_heads_are_a_product_with_their_matrix() -> None:
    query, key, value = tokens()
    scores = query @ key.transpose(-1, -2) / math.sqrt(DIM)
    for place in ("pre", "post"):
        module = compose(heads=place, num_heads=2, head_dim=DIM).double()  # type: ignore[arg-type]
        torch.testing.assert_close(module(query, key, value), F.scaled_dot_product_attention(query, key, value))
        matrix = torch.randn(2, 2, dtype=torch.float64)
        with torch.no_grad():
            (*module.before, *module.after)[0].kernel.copy_(matrix[None])
        mixed = [
            sum(matrix[g, h] * (scores if place == "pre" else scores.softmax(-1))[:, h] for h in range(2))
            for g in range(2)
        ]
        weights = torch.stack(mixed, 1)
        weights = weights.softmax(-1) if place == "pre" else weights
        torch.testing.assert_close(module(query, key, value), weights @ value)


def test_the_executor_is_told_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compose().executor(100_000, 100_000) == "fused"
    far = compose("distance", head_dim=DIM)
    assert far.executor(64, 64) == "whole" and far.executor(100_000, 100_000) == "tiled"
    assert compose("additive", head_dim=DIM).executor(1500, 1500) == "tiled"  # six numbers a pair
    seen: list[int] = []
    inner = far.scorer.forward
    monkeypatch.setattr(far.scorer, "forward", lambda q, k: (seen.append(q.shape[2]), inner(q, k))[1])
    query, key, value = (torch.randn(1, 1, 3000, DIM) for _ in range(3))
    far(query, key, value, causal=True)
    assert max(seen) <= scored.tile_rows(1, 3000) < 3000 and sum(seen) == 3000


def test_causal_rows_of_a_tile_stand_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer queries than keys the last query is the last key."""
    query, key, value = tokens(5, 12)
    monkeypatch.setattr(scored, "_TILE", 100)
    with use_backend("tiled"):
        out = compose("distance", head_dim=DIM)(query, key, value, mask=Causal())
    scores = DistanceScore(DIM)(query, key).masked_fill(~torch.ones(5, 12, dtype=torch.bool).tril(7), -math.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ value)


def test_errors_teach() -> None:
    with pytest.raises(UnknownNameError, match="normaliser named 'softmin'"):
        compose(normalizer="softmin")
    with pytest.raises(UnknownNameError, match="score named 'dott'"):
        compose("dott")
    with pytest.raises(UnknownNameError, match="head allocation named 'both'"):
        compose(heads="both")
    with pytest.raises(OptionError, match="p is 1 or 2"):
        compose("distance", p=3)
    with pytest.raises(ShapeError, match="mixes 3 heads"):
        compose(heads="pre", num_heads=3)(*tokens())
