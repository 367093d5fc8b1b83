"""Linear functions in the sequence, that stay or drift."""

from __future__ import annotations

import math

import pytest
import torch

from regard.bench.regression_tasks import DriftingRegression, InContextRegression
from regard.errors import OptionError


def test_questions_come_before_their_answers() -> None:
    task = InContextRegression(16, dim=3, noise=0.0)
    inputs, targets = task.batch(40, torch.Generator().manual_seed(0))
    assert inputs.shape == (40, 16, 5) and targets.shape == (40, 16)
    questions, shown = inputs[:, ::2], inputs[:, 1::2]
    assert torch.equal(questions[..., :3], shown[..., :3])
    assert bool((questions[..., 3] == 0).all()) and bool((questions[..., 4] == 1).all())
    assert torch.equal(targets[:, ::2], shown[..., 3]) and bool((shown[..., 4] == 0).all())
    assert bool(targets[:, 1::2].isnan().all())
    # One function a sequence: three pairs settle it, and the others follow.
    w = torch.linalg.solve(shown[:, :3, :3].double(), shown[:, :3, 3].double())
    assert torch.allclose((shown[..., :3].double() @ w[..., None])[..., 0], shown[..., 3].double(), atol=1e-2)


def test_the_scale_is_that_of_telling_the_mean() -> None:
    task = DriftingRegression(32, noise=0.5)
    _, targets = task.batch(8192, torch.Generator().manual_seed(0))
    answers = targets[:, ::2]
    assert abs(float(answers.var()) - 1.25) < 0.05 and abs(float(answers.mean())) < 0.02
    error, count = task.score(torch.zeros(8192, 32, 1), targets)
    assert count == 8192 * 8 and abs(error / count - task.chance) < 0.03
    right = torch.where(targets.isnan(), 0.0, targets)[..., None]
    assert task.score(right, targets)[0] == 0 and float(task.loss(right, targets)) == 0
    early = right.clone()
    early[:, :16] = 5
    assert task.score(early, targets)[0] == 0, "the first half does not count"
    assert float(task.loss(early, targets)) > 1


def test_a_filter_that_knows_all_of_a_function_that_stays_is_least_squares() -> None:
    """Regularised least squares with numpy's solver, pair by pair."""
    task = InContextRegression(24, dim=4, noise=0.3)
    inputs, targets = task.batch(64, torch.Generator().manual_seed(7), "test")
    x, y = inputs[:, ::2, :4].double(), targets[:, ::2].double()
    errors = []
    for pair in range(6, 12):
        seen, known = x[:, :pair], y[:, :pair]
        gram = seen.mT @ seen + 4 * 0.3**2 * torch.eye(4, dtype=torch.float64)
        w = torch.linalg.solve(gram, (seen.mT @ known[..., None]))[..., 0]
        errors.append((y[:, pair] - (w * x[:, pair]).sum(-1)).square())
    assert math.isclose(task.reference(64, 7), float(torch.stack(errors).mean()) / 1.09, rel_tol=1e-6)


def test_what_drifts_has_to_be_forgotten() -> None:
    """All pairs weighed alike do worse than a filter that forgets, and no better than the last few."""
    steady = InContextRegression(64, noise=0.1)
    drifting = InContextRegression(64, noise=0.1, drift=0.3)
    assert steady.reference() < 0.02
    best = drifting.reference()
    inputs, targets = drifting.batch(2048, torch.Generator().manual_seed(10_000), "test")
    x, y = inputs[:, ::2, :4], targets[:, ::2]

    def squares(first: int) -> float:
        gram = x[:, first:31].mT @ x[:, first:31] + 0.04 * torch.eye(4)
        w = torch.linalg.solve(gram, x[:, first:31].mT @ y[:, first:31, None])[..., 0]
        return float((y[:, 31] - (w * x[:, 31]).sum(-1)).square().mean()) / 1.01

    everything, lately = squares(0), squares(22)
    assert 0.1 < best < lately < 0.8 * everything
    assert best < InContextRegression(64, noise=0.1, drift=0.3, key_noise=0.3).reference() < 0.9
    assert InContextRegression(64, noise=0.1, drift=0.3, skew=2.0).reference() < best, "fewer directions matter"


def test_impossible_sizes_are_refused() -> None:
    for wrong in ({"length": 7}, {"dim": 0}, {"noise": -1.0}, {"drift": 2.0}):
        with pytest.raises(OptionError, match="even length"):
            InContextRegression(**wrong)
