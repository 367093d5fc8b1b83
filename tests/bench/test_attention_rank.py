"""Rank against heads: the task against its definition, constructions against the theory, formulas against drawings."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.attention_rank import (
    FreeRankAttention,
    LowRankEncoder,
    equally_spaced_2d,
    full_rank_solution,
    head_kernel,
    majority_vote,
    nearest_point_task,
    optimal_weights,
    optimally_weighted_rank1,
    random_tied_heads,
    rank_head_tradeoff,
    squared_error,
    target_correlation,
    tied_head_probability,
)
from regard.bench.training import evaluate, fit
from regard.errors import OptionError, ShapeError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sphere(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator(seed), dtype=torch.float64), dim=-1)


@pytest.mark.paper("attention_rank")
@pytest.mark.parametrize("variant", ["uniform", "orthogonal", "doubled"])
def test_the_label_is_the_nearest_point(variant: str) -> None:
    points, queries, labels = nearest_point_task(6, 4, 3, variant).draw(50, generator())  # type: ignore[arg-type]
    assert points.shape == (50, 8 if variant == "doubled" else 4, 6) and queries.shape == labels.shape == (50, 3, 6)
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(points.shape[:2]))
    for row in range(50):
        for asked in range(3):
            away = [float((point - queries[row, asked]).norm()) for point in points[row]]
            assert torch.equal(labels[row, asked], points[row, away.index(min(away))])
    gram = points @ points.transpose(1, 2)
    if variant == "orthogonal":
        torch.testing.assert_close(gram, torch.eye(4).expand(50, -1, -1), atol=1e-5, rtol=0)
    if variant == "doubled":
        assert torch.equal(points[:, :4], -points[:, 4:])


@pytest.mark.paper("attention_rank")
def test_points_that_ask_themselves_want_the_farthest() -> None:
    task = nearest_point_task(5, 6)
    points, queries, labels = task.draw(40, generator())
    assert torch.equal(points, queries)
    away = torch.cdist(points, points)
    torch.testing.assert_close((labels - points).norm(dim=-1), away.amax(-1), atol=1e-5, rtol=1e-5)
    inputs, targets = task.batch(40, generator())
    assert torch.equal(inputs, points) and torch.equal(targets, labels)


@pytest.mark.paper("attention_rank")
@pytest.mark.parametrize("num_points", [2, 16, 256])
def test_one_head_of_full_rank_solves_it(num_points: int) -> None:
    """Hard: exactly, for any number of points. Soft: the better the sharper."""
    points, queries, labels = nearest_point_task(8, num_points, 4).draw(64, generator())
    with torch.no_grad():
        assert float(squared_error(full_rank_solution(8, hard=True)(points, queries), labels)) < 1e-10
        errors = [float(squared_error(full_rank_solution(8, t)(points, queries), labels)) for t in (1, 10, 100, 10000)]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 2e-3 < errors[0]
        expected = (10 * queries @ points.transpose(1, 2)).softmax(-1) @ points
        torch.testing.assert_close(full_rank_solution(8, 10.0)(points, queries), expected)
        points, _, labels = nearest_point_task(8, num_points).draw(16, generator())
        assert float(squared_error(full_rank_solution(8, hard=True, farthest=True)(points), labels)) < 1e-10


def chance(dim: int, cosine: float, tied: bool) -> float:
    """Of 400000 random heads, how many pick the right one of two points at that angle."""
    points = torch.zeros(1, 2, dim)
    points[0, 0, 0], points[0, 1, 0] = 1, -1
    query = torch.zeros(1, 1, dim)
    query[0, 0, 0], query[0, 0, 1] = cosine, math.sqrt(1 - cosine**2)
    right, count = 0.0, 2000
    module = random_tied_heads(dim, 1, count)
    for seed in range(200):
        rows = sphere(count, 1, dim, seed=seed).float()
        with torch.no_grad():
            module.query.copy_(rows)
            module.key.copy_(rows if tied else sphere(count, 1, dim, seed=seed + 1000).float())
            right += float((module.scores(points, query).argmax(-1) == 0).double().mean()) / 200
    return right


@pytest.mark.paper("attention_rank")
@pytest.mark.parametrize("dim", [4, 32])
def test_a_tied_random_head_is_right_as_often_as_the_formula_says(dim: int) -> None:
    for cosine in (0.15, 0.8):
        expected = float(tied_head_probability(torch.tensor(cosine)))
        assert expected == pytest.approx(1 - math.acos(cosine) / math.pi)
        assert chance(dim, cosine, tied=True) == pytest.approx(expected, abs=0.003)
    assert chance(dim, 0.8, tied=False) == pytest.approx(0.5, abs=0.003)


def agreement(query: Tensor, key: Tensor, drawings: int = 200_000) -> tuple[Tensor, Tensor]:
    """How often each two heads agree, and each with the target, on drawn pairs of points and queries."""
    dim = query.shape[-1]
    points, asked = sphere(drawings, 2, dim, seed=5), sphere(drawings, dim, seed=6)
    difference = points[:, 0] - points[:, 1]
    picks = ((asked @ query.T) * (difference @ key.T)).sign()
    right = (asked * difference).sum(-1).sign()
    return 0.5 + (picks.T @ picks) / (2 * drawings), 0.5 + (right @ picks) / (2 * drawings)


@pytest.mark.paper("attention_rank")
@pytest.mark.parametrize("dim", [2, 3, 8])
def test_kernel_and_target_against_drawings(dim: int) -> None:
    query, key = sphere(12, dim, seed=1), sphere(12, dim, seed=2)
    key[0], key[1], key[2] = query[0], query[1], -query[2]
    kernel, target = agreement(query, key)
    torch.testing.assert_close(head_kernel(query, key), kernel, atol=0.006, rtol=0)
    torch.testing.assert_close(target_correlation(query, key), target, atol=0.006, rtol=0)


@pytest.mark.paper("attention_rank")
def test_target_in_two_dimensions_has_a_closed_form() -> None:
    angle = torch.linspace(0, math.pi, 9, dtype=torch.float64)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(9, -1)
    key = torch.stack((angle.cos(), angle.sin()), -1)
    folded = torch.minimum(angle, math.pi - angle)
    expected = 0.5 + (math.pi / 2 - angle).sign() * (0.25 - (folded / math.pi).square())
    torch.testing.assert_close(target_correlation(query, key), expected, atol=2e-4, rtol=0)


@pytest.mark.paper("attention_rank")
@pytest.mark.parametrize("pairs", ["independent", "tied", "spread"])
def test_optimal_weights_leave_the_error_that_is_measured(pairs: str) -> None:
    module = optimally_weighted_rank1(4, 48, pairs=pairs)  # type: ignore[arg-type]
    weights, error = optimal_weights(module.query[:, 0].detach(), module.key[:, 0].detach())
    kernel = head_kernel(module.query[:, 0].double(), module.key[:, 0].double()).detach()
    target = target_correlation(module.query[:, 0].double(), module.key[:, 0].double()).detach()

    def quadratic(a: Tensor) -> float:
        return float(1 - 2 * target @ a + a @ kernel @ a)

    assert error == pytest.approx(quadratic(weights), abs=1e-9)
    for shift in torch.randn(5, 48, dtype=torch.float64):
        assert quadratic(weights + 0.01 * shift) > error
    for variant in ("uniform", "orthogonal"):
        points, queries, labels = nearest_point_task(4, 2, 1, variant).draw(20_000, generator())  # type: ignore[arg-type]
        with torch.no_grad():
            measured = float(squared_error(module(points, queries), labels))
        assert measured == pytest.approx(error, abs=0.015)
    even = quadratic(torch.full((48,), float(target.sum() / kernel.sum()), dtype=torch.float64))
    assert error < even


@pytest.mark.paper("attention_rank")
def test_equally_spaced_heads_in_the_plane_do_better_than_random_ones() -> None:
    module = equally_spaced_2d(8)
    angles = torch.atan2(module.query[:, 0, 1], module.query[:, 0, 0]).detach()
    torch.testing.assert_close(angles, torch.arange(8) * math.pi / 8)
    points, queries, labels = nearest_point_task(2, 2, 1).draw(4096, generator())
    with torch.no_grad():
        spaced = float(squared_error(module(points, queries), labels))
        drawn = [
            float(squared_error(random_tied_heads(2, 1, 8, seed=seed)(points, queries), labels)) for seed in range(8)
        ]
    assert spaced < sum(drawn) / len(drawn)


@pytest.mark.paper("attention_rank")
def test_the_usual_parameterisation_is_a_setting() -> None:
    """rank = dim / heads gives what torch's own multi-head attention gives, without biases."""
    theirs = nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    ours = FreeRankAttention(12, 4, 3).double()
    query, key, value = theirs.in_proj_weight.view(3, 3, 4, 12)
    with torch.no_grad():
        ours.query.copy_(query)
        ours.key.copy_(key)
        ours.value.copy_(torch.einsum("hrd,ehr->hde", value, theirs.out_proj.weight.view(12, 3, 4)))
    points, queries = torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(points, queries), theirs(queries, points, points, need_weights=False)[0])
    torch.testing.assert_close(ours(points), theirs(points, points, points, need_weights=False)[0])


@pytest.mark.paper("attention_rank")
def test_initialisation_and_tied_rows() -> None:
    module = FreeRankAttention(16, 4, 8)
    for parameter, bound in ((module.query, 6 / 20), (module.key, 6 / 20), (module.value, 6 / (9 * 16))):
        assert float(parameter.detach().abs().max()) == pytest.approx(math.sqrt(bound), rel=0.05)
        assert float(parameter.detach().var()) == pytest.approx(bound / 3, rel=0.15)
    tied = random_tied_heads(16, 4, 8, hard=False)
    torch.testing.assert_close(tied.key @ tied.key.transpose(1, 2), torch.eye(4).expand(8, -1, -1))
    points, queries = torch.randn(2, 3, 16), torch.randn(2, 2, 16)
    expected = sum((queries @ row.T @ row @ points.transpose(1, 2)).softmax(-1) @ points / 8 for row in tied.key)
    torch.testing.assert_close(tied(points, queries), expected)


@pytest.mark.paper("attention_rank")
def test_the_best_average_of_low_rank_heads_gets_worse_with_the_dimension() -> None:
    """Measured at 8 d heads; and by the theory for endlessly many, ``1 - b^2 / E C``."""
    measured = [rank_head_tradeoff([d], [1], [8 * d], samples=4096)[0].average for d in (4, 8, 16, 32)]
    assert measured == sorted(measured) and measured[0] < 0.3 and measured[-1] > 0.4
    limits = []
    for dim in (4, 8, 16, 32):
        rows = sphere(1500, dim)
        same = target_correlation(rows[:1], rows[:1])
        limits.append(float(1 - same[0] ** 2 / head_kernel(rows, rows).mean()))
    for found, limit in zip(measured, limits, strict=True):
        assert limit - 0.02 < found < limit + 0.05


@pytest.mark.paper("attention_rank")
def test_more_rank_helps_and_full_rank_is_exact() -> None:
    rows = rank_head_tradeoff([8], [1, 4, 8, 16], [16], readout=True, samples=1024)
    assert [row.rank for row in rows] == [1, 4, 8], "no head has more rank than there are dimensions"
    errors = [row.average for row in rows]
    assert errors[0] > errors[1] + 0.05 and errors[2] < 1e-9
    assert all(row.readout is not None and row.readout < row.average + 0.01 for row in rows)


@pytest.mark.paper("attention_rank")
def test_a_majority_needs_a_second_layer_and_then_few_points_are_easy() -> None:
    """Votes of one more layer beat any scaled average of the same heads; with many points they hardly do."""
    two, many = (rank_head_tradeoff([8], [1], [512], num_points=n, samples=1024)[0] for n in (2, 16))
    assert two.vote < 0.5 * two.average
    assert many.vote > 0.5 * many.average
    heads = random_tied_heads(5, 2, 9)
    points, queries, _ = nearest_point_task(5, 3, 2).draw(20, generator())
    picks = heads.scores(points, queries).argmax(-1)
    voted = majority_vote(heads, points, queries)
    for row in range(20):
        for asked in range(2):
            counts = [int((picks[row, :, asked] == which).sum()) for which in range(3)]
            assert torch.equal(voted[row, asked], points[row, counts.index(max(counts))])


@pytest.mark.paper("attention_rank")
def test_both_models_learn_by_the_small_trainer() -> None:
    task = nearest_point_task(4, 3)
    for module in (FreeRankAttention(4, 4, 1), LowRankEncoder(4, 1, 4, hidden=16)):
        before = evaluate(module, task, batches=2)[1]
        fit(module, task, steps=60, lr=1e-2, weight_decay=0, betas=(0.9, 0.95), warmup=5)
        assert evaluate(module, task, batches=2)[1] < 0.8 * before
    assert module.mlp[0][0].out_features == 16 and LowRankEncoder(4, 1, 4).mlp[0][0].out_features == 2048  # type: ignore[index]


def wrong() -> Iterator[tuple[str, object]]:
    yield "variant", lambda: nearest_point_task(4, 2, 1, "round")  # type: ignore[arg-type]
    yield "orthogonal", lambda: nearest_point_task(4, 5, 1, "orthogonal")
    yield "at least 1", lambda: nearest_point_task(4, 0)
    yield "draw", lambda: nearest_point_task(4, 2, 1).batch(3, generator())
    yield "at least 1", lambda: FreeRankAttention(4, 0, 1)
    yield "orthonormal", lambda: random_tied_heads(4, 5, 1)
    yield "pairs", lambda: optimally_weighted_rank1(4, 2, pairs="none")  # type: ignore[arg-type]
    yield "line", lambda: target_correlation(torch.ones(1, 1), torch.ones(1, 1))


@pytest.mark.parametrize(("words", "call"), list(wrong()))
def test_wrong_input_is_told(words: str, call: object) -> None:
    with pytest.raises(OptionError, match=words):
        call()  # type: ignore[operator]


def test_wrong_shapes_are_told() -> None:
    with pytest.raises(ShapeError, match=r"points are \(batch, count, 4\)"):
        FreeRankAttention(4, 2, 1)(torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="queries"):
        FreeRankAttention(4, 2, 1)(torch.zeros(1, 3, 4), torch.zeros(1, 3, 5))
