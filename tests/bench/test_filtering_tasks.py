"""Simulated systems, their noise, and the Kalman filter against least squares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.bench.filtering_tasks import (
    SYSTEMS,
    TrajectoryFiltering,
    filtering_error,
    kalman_filter,
    linear_sde,
    lorenz,
    spiral,
    transitions,
    van_der_pol,
)
from regard.errors import OptionError, ShapeError, UnknownNameError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_transitions_are_the_exponential_and_its_integral() -> None:
    matrix = torch.randn(3, 3, dtype=torch.float64)
    gaps = torch.tensor([0.1, 0.7], dtype=torch.float64)
    moves, spreads = transitions(matrix, gaps)
    for place, gap in enumerate(gaps.tolist()):
        torch.testing.assert_close(moves[place], torch.linalg.matrix_exp(gap * matrix))
        points = (torch.arange(2000, dtype=torch.float64) + 0.5) * gap / 2000
        powers = torch.linalg.matrix_exp(points[:, None, None] * matrix)
        torch.testing.assert_close(spreads[place], (powers @ powers.mT).mean(0) * gap, rtol=1e-5, atol=1e-7)


@pytest.mark.paper("afa")
def test_a_spiral_without_noise_turns_and_fades() -> None:
    states, measured, times = linear_sde("spiral", (0.0, 0.0), trajectories=50, length=30, generator=seeded())
    assert torch.equal(states, measured) and float(times[1]) == pytest.approx(0.1)
    paths = torch.complex(states[..., 0], states[..., 1])
    expected = paths[:, :1] * torch.exp(torch.complex(torch.tensor(-0.1).double(), torch.tensor(1.0).double()) * times)
    torch.testing.assert_close(paths, expected)
    starts = paths[:, 0].abs()
    assert 1.7 <= float(starts.min()) < 1.8 and 2.2 < float(starts.max()) <= 2.3


@pytest.mark.paper("afa")
@pytest.mark.parametrize("system", ["spiral", "van_der_pol", "lorenz"])
def test_noise_has_the_variance_that_was_asked_for(system: str) -> None:
    made = SYSTEMS[system]()
    times = torch.tensor([0.0, 0.004])
    states, measured, _ = linear_sde(system, (0.5, 0.3), trajectories=4000, times=times, generator=seeded())
    assert states.shape == (4000, 2, made.dim) and bool(states.isfinite().all())
    assert float((measured - states).std()) == pytest.approx(0.3, rel=0.03)
    moved = states[:, 1] - states[:, 0] - 0.004 * made.drift(states[:, 0])
    assert float(moved.std()) == pytest.approx(0.5 * math.sqrt(0.004), rel=0.05)


@pytest.mark.paper("afa")
def test_nonlinear_systems_are_what_they_are_known_for() -> None:
    """Van der Pol: one cycle of amplitude 2 and, for strength 1, period 6.663. Lorenz: chaos within bounds."""
    times = torch.arange(0, 40, 0.05, dtype=torch.float64)
    states, _, _ = linear_sde(van_der_pol(1.0), (0.0, 0.0), trajectories=6, times=times, substeps=4, generator=seeded())
    late = states[:, 400:, 0]
    torch.testing.assert_close(late.amax(1), torch.full((6,), 2.009, dtype=torch.float64), rtol=0, atol=5e-3)
    ups = ((late[0, :-1] < 0) & (late[0, 1:] >= 0)).nonzero()[:, 0]
    assert float((ups[-1] - ups[0]) * 0.05 / (len(ups) - 1)) == pytest.approx(6.663, abs=0.05)
    paths, _, _ = linear_sde(lorenz(), (0.0, 0.0), trajectories=20, length=200, substeps=4, generator=seeded())
    assert bool((paths[..., 2] > 0).all()) and float(paths.abs().max()) < 60
    assert float(paths[..., 0].min()) < -5 and float(paths[..., 0].max()) > 5


def least_squares(measured: Tensor, matrix: Tensor, times: Tensor, process: float, measurement: float) -> Tensor:
    """The last state by generalised least squares over all measurements, from the joint Gaussian."""
    length, dim = measured.shape
    moves, spreads = transitions(matrix, times.diff())
    # Each measurement is the last state moved back, plus what the process added since, plus its own noise.
    back = [torch.eye(dim, dtype=torch.float64)]
    for move in moves.flip(0):
        back.append(back[-1] @ torch.linalg.inv(move))
    back = back[::-1]
    design = torch.cat(back)
    noise = torch.zeros(length * dim, length * dim, dtype=torch.float64)
    for gap in range(length - 1):
        # The noise of one gap reaches all measurements before it.
        reach = torch.cat(
            [-back[j] @ torch.linalg.inv(back[gap + 1]) if j <= gap else 0 * back[j] for j in range(length)]
        )
        noise += process**2 * reach @ spreads[gap] @ reach.T
    noise += measurement**2 * torch.eye(length * dim, dtype=torch.float64)
    weighted = torch.linalg.solve(noise, design)
    return torch.linalg.solve(design.T @ weighted, weighted.T @ measured.flatten())


@pytest.mark.paper("afa")
def test_the_kalman_filter_is_generalised_least_squares() -> None:
    times = torch.rand(7, dtype=torch.float64).cumsum(0)
    matrix = spiral(-0.2, 1.5).matrix
    assert matrix is not None
    _, measured, _ = linear_sde(matrix, (0.4, 0.3), trajectories=3, times=times, generator=seeded())
    found = kalman_filter(measured, matrix, (0.4, 0.3), times=times, prior=1e5)
    for row in range(3):
        expected = least_squares(measured[row], matrix, times, 0.4, 0.3)
        torch.testing.assert_close(found.means[row, -1], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.means[:, 0], measured[:, 0], rtol=0, atol=1e-6)
    moved = found.means[:, 2] @ torch.linalg.matrix_exp(matrix * (times[3] - times[2])).T
    torch.testing.assert_close(found.predicted[:, 3], moved)


@pytest.mark.paper("afa")
def test_the_kalman_filter_knows_its_error() -> None:
    states, measured, _ = linear_sde("spiral", (0.2, 0.3), trajectories=2000, length=30, generator=seeded())
    found = kalman_filter(measured, "spiral", (0.2, 0.3))
    error = (found.means - states).square().mean((0, 2))
    torch.testing.assert_close(error, found.covariances.diagonal(dim1=-2, dim2=-1).mean(-1), rtol=0.1, atol=0)
    assert filtering_error(found.means, states) < 0.4 * filtering_error(measured, states)
    # Other beliefs about the noise do worse.
    for wrong in ((0.02, 0.3), (2.0, 0.3)):
        worse = kalman_filter(measured, "spiral", wrong).means
        assert filtering_error(worse, states, skip=5) > 1.1 * filtering_error(found.means, states, skip=5)


def test_the_task_and_its_splits() -> None:
    task = TrajectoryFiltering(trajectories=30, held_out=20, length=10)
    inputs, targets = task.batch(64, seeded())
    assert inputs.shape == targets.shape == (64, 10, 2) and inputs.dtype == torch.float32
    assert len(inputs[:, 0, 0].unique()) <= 30
    score, count = task.score(inputs, targets)
    assert count == 64 * 20 and score / count == pytest.approx(0.04, rel=0.2)
    assert float(task.loss(inputs, targets)) == pytest.approx(score / count, rel=1e-4)
    other, _ = task.batch(64, seeded(), "test")
    assert not set(other[:, 0, 0].tolist()) & set(inputs[:, 0, 0].tolist())
    inputs, targets = TrajectoryFiltering(trajectories=5, length=10, ahead=True).batch(8, seeded())
    assert inputs.shape == (8, 10, 2) and torch.equal(inputs[:, 1:], targets[:, :-1])


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UnknownNameError, match="lorenz"):
        linear_sde("lorentz")
    with pytest.raises(OptionError):
        linear_sde("spiral", (-0.1, 0.1))
    with pytest.raises(OptionError, match="rising"):
        linear_sde("spiral", times=torch.zeros(3))
    with pytest.raises(ShapeError, match="square"):
        linear_sde(torch.zeros(2, 3))
    with pytest.raises(OptionError, match="linear"):
        kalman_filter(torch.zeros(1, 3, 3), "lorenz")
    with pytest.raises(ShapeError):
        kalman_filter(torch.zeros(1, 3, 3))
    with pytest.raises(ShapeError):
        filtering_error(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), skip=3)
