"""Saliency and its agreement: linear models, known games, and correlations by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.inspect.saliency import (
    attention_saliency,
    auroc,
    deletion_curve,
    explanation_agreement,
    gradient_saliency,
    input_gradient,
    lime,
    lime_kernel,
    mask_saliency,
    occlusion,
    pearson,
    presence,
    rank_correlation,
    top_k_overlap,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_gradients_of_a_linear_score_are_its_weights() -> None:
    weight, inputs = normal(5, 3), normal(2, 5, 3)

    def score(x: Tensor) -> Tensor:
        return (x * weight).sum((1, 2))

    torch.testing.assert_close(input_gradient(score, inputs), weight.expand(2, 5, 3))
    torch.testing.assert_close(gradient_saliency(score, inputs, "xinput"), (weight * inputs).sum(-1))
    torch.testing.assert_close(gradient_saliency(score, inputs, "l1"), weight.abs().sum(-1).expand(2, 5))
    torch.testing.assert_close(gradient_saliency(score, inputs, "l2"), weight.square().sum(-1).sqrt().expand(2, 5))
    torch.testing.assert_close(gradient_saliency(score, inputs, "mean"), weight.mean(-1).expand(2, 5))


def test_gradients_work_where_none_are_kept_and_leave_none() -> None:
    layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        found = input_gradient(lambda x: layer(x)[:, 0, 0], torch.randn(2, 1, 3))
    torch.testing.assert_close(found, layer.weight.detach().expand(2, 1, 3))
    assert layer.weight.grad is None


def test_presence_replaces_tokens_positions_and_regions() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1).double().sum(-1)

    presence(model, torch.tensor([7, 8, 9]), 1)(torch.tensor([[True, False, True]]))
    assert seen.pop().tolist() == [[7, 1, 9]]
    presence(model, torch.ones(2, 2), 0.0)(torch.tensor([[False, True]]))
    assert seen.pop().tolist() == [[[0, 0], [1, 1]]]
    regions = torch.tensor([[0, 1], [1, -1]])
    presence(model, torch.ones(2, 2), 0.0, regions)(torch.tensor([[False, True], [False, False]]))
    assert seen.pop().tolist() == [[[0, 1], [1, 1]], [[0, 0], [0, 1]]]


def test_every_perturbation_finds_the_terms_of_an_additive_score() -> None:
    terms = normal(6)

    def present(kept: Tensor) -> Tensor:
        return torch.stack((kept.double() @ terms, -2 * (kept.double() @ terms)), -1)

    torch.testing.assert_close(occlusion(present, 6), torch.stack((terms, -2 * terms)))
    # Ridge goes to zero, so the fit is exact whatever the weights of the samples.
    for width in (0.25, None):
        found = lime(present, 6, 200, kernel_width=width, ridge=1e-9)
        torch.testing.assert_close(found, torch.stack((terms, -2 * terms)), atol=1e-8, rtol=0)
    every = torch.tensor([[bool(n >> bit & 1) for bit in range(6)] for n in range(64)])
    change = present(torch.ones(1, 6, dtype=torch.bool)) - present(every)
    torch.testing.assert_close(mask_saliency(change, every), torch.stack((terms, -2 * terms)))


def test_lime_is_weighted_ridge_regression() -> None:
    """Against the normal equations with an explicit column of ones."""
    drawn: list[Tensor] = []
    values = normal(300)

    def present(kept: Tensor) -> Tensor:
        drawn.append(kept)
        return values

    found = lime(present, 4, 300, ridge=3.0)
    kept = drawn[0].double()
    assert bool(drawn[0][0].all()) and not bool(drawn[0][1:].all(-1).any())
    # Of four features, one to four are left out, each as often.
    counts = torch.bincount((4 - kept[1:].sum(-1)).long(), minlength=5)
    assert counts[0] == 0 and bool((counts[1:] > 50).all())
    design = torch.cat((kept, torch.ones(300, 1, dtype=torch.float64)), 1)
    cosine = kept.sum(-1) / (kept.norm(dim=-1) * 2).clamp_min(1e-12)
    weights = (-(((1 - cosine) * 100) ** 2) / 25**2).exp().sqrt()
    penalty = torch.diag(torch.tensor([3.0, 3, 3, 3, 0], dtype=torch.float64))
    expected = torch.linalg.solve(design.T @ (weights[:, None] * design) + penalty, design.T @ (weights * values))
    torch.testing.assert_close(found, expected[:4])


def test_lime_kernel_by_hand() -> None:
    assert float(lime_kernel(torch.tensor(1.0))) == 1
    assert float(lime_kernel(torch.tensor(0.25))) == pytest.approx(math.exp(-0.5 * (0.5 / 0.25) ** 2))
    assert lime_kernel(torch.tensor([0.1, 1.0]), None).tolist() == [1, 1]


def test_deletion_curve_by_hand() -> None:
    terms = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)

    def present(kept: Tensor) -> Tensor:
        return kept.double() @ terms

    most, least = deletion_curve(present, terms), deletion_curve(present, terms, first="least")
    assert most.scores.tolist() == [7, 3, 1, 0] and least.scores.tolist() == [7, 6, 4, 0]
    assert most.shares.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert float(most.auc) == pytest.approx((7 + 3 + 3 + 1 + 1 + 0) / 6)
    assert most.auc < least.auc
    assert deletion_curve(present, terms, steps=1).scores.tolist() == [7, 0]


def test_correlations_against_their_definitions() -> None:
    a, b = normal(3, 8), normal(3, 8)
    for x, y, found in zip(a, b, pearson(a, b), strict=True):
        torch.testing.assert_close(found, torch.corrcoef(torch.stack((x, y)))[0, 1])
    torch.testing.assert_close(pearson(a, 3e-200 * a + 1e-200), torch.ones(3, dtype=torch.float64))
    assert pearson(a, torch.ones_like(a)).tolist() == [0, 0, 0]
    # A monotone change keeps the ranks; without ties rho is 1 - 6 sum d^2 / (n (n^2 - 1)).
    torch.testing.assert_close(rank_correlation(a, a.exp()), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(rank_correlation(a, -a), -torch.ones(3, dtype=torch.float64))
    distance = (a.argsort(-1).argsort(-1) - b.argsort(-1).argsort(-1)).double().square().sum(-1)
    torch.testing.assert_close(rank_correlation(a, b), 1 - 6 * distance / (8 * 63))
    # Ties share the mean of their ranks: 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    tied = rank_correlation(torch.tensor([0.0, 5, 5, 9]), torch.tensor([0.0, 1, 2, 3]))
    assert float(tied) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_overlap_and_agreement() -> None:
    a, b = torch.tensor([4.0, 3, 2, 1, 0]), torch.tensor([4.0, 0, 3, 1, 2])
    assert float(top_k_overlap(a, b, 2)) == 0.5 and float(top_k_overlap(a, b, 5)) == 1
    both = explanation_agreement(a, b, 3)
    assert float(both.overlap) == pytest.approx(2 / 3)
    torch.testing.assert_close(both.rank_correlation, rank_correlation(a, b))


def test_auroc_counts_pairs() -> None:
    scores, positive = normal(40).round(decimals=1), torch.rand(40) < 0.4
    pairs = scores[positive][:, None] - scores[~positive]
    assert auroc(scores, positive) == pytest.approx(float((pairs.sign() / 2 + 0.5).mean()))


def test_attention_saliency_reads_one_row() -> None:
    weights = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(attention_saliency(weights, "max", 2), weights[:, :, 2].max(1).values)
    torch.testing.assert_close(attention_saliency(weights), weights[:, :, 0].mean(1))


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ShapeError, match="one number for each"):
        input_gradient(lambda x: x, torch.ones(2, 3))
    with pytest.raises(OptionError, match="xinput"):
        gradient_saliency(lambda x: x.sum((1, 2)), torch.ones(2, 3, 1), "max")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="more masks"):
        mask_saliency(torch.ones(3), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(OptionError, match="between 1 and"):
        top_k_overlap(torch.ones(3), torch.ones(3), 4)
    with pytest.raises(ShapeError, match="same two or more"):
        pearson(torch.ones(3), torch.ones(4))
    with pytest.raises(ShapeError, match="column a feature"):
        presence(lambda x: x, torch.ones(4))(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="integer"):
        presence(lambda x: x, torch.ones(4), 0.0, torch.ones(4))
    with pytest.raises(OptionError, match="ridge"):
        lime(lambda k: k.sum(-1).float(), 3, ridge=-1.0)
    with pytest.raises(OptionError, match="least"):
        deletion_curve(lambda k: k.sum(-1).float(), torch.ones(3), first="all")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="boolean for each"):
        auroc(torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(OptionError, match="over the heads"):
        attention_saliency(torch.ones(1, 1, 1, 1), "sum")  # type: ignore[arg-type]
