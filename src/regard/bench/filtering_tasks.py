"""Noisy measurements of moving systems, and the states behind them to be told; the Kalman filter, the best there is
where a system is linear and known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError, UnknownNameError

__all__ = [
    "SYSTEMS",
    "KalmanEstimates",
    "System",
    "Trajectories",
    "TrajectoryFiltering",
    "filtering_error",
    "kalman_filter",
    "linear_sde",
    "lorenz",
    "spiral",
    "transitions",
    "van_der_pol",
]


@dataclass(frozen=True, eq=False)
class System:
    """``dx = f(x) dt + process dw``. drift: ``f`` of ``(..., dim)``; matrix ``(dim, dim)``: of a linear one, None
    otherwise. radius: of the sphere (in 2-D, the ring) about ``centre`` on which trajectories begin, give or take 15
    percent. settle: time that passes before the first measurement. step: between measurements."""

    dim: int
    drift: Callable[[Tensor], Tensor]
    matrix: Tensor | None = None
    radius: float = 2.0
    centre: float = 0.0
    settle: float = 0.0
    step: float = 0.1


def _linear(matrix: Tensor) -> System:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"The matrix of a linear system is square, got {tuple(matrix.shape)}.")
    return System(len(matrix), lambda x: x @ matrix.to(x).T, matrix.double())


def spiral(decay: float = -0.1, frequency: float = 1.0) -> System:
    """The plane's linear system with eigenvalues ``decay +- i frequency``."""
    return _linear(torch.tensor([[decay, -frequency], [frequency, decay]], dtype=torch.float64))


def van_der_pol(strength: float = 1.0) -> System:
    """``x' = y, y' = strength (1 - x^2) y - x``: from wherever it starts onto one cycle."""

    def drift(state: Tensor) -> Tensor:
        x, y = state.unbind(-1)
        return torch.stack((y, strength * (1 - x.square()) * y - x), -1)

    return System(2, drift)


def lorenz(sigma: float = 10.0, rho: float = 28.0, beta: float = 8 / 3) -> System:
    """``x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z``: chaotic. Measured on its attractor."""

    def drift(state: Tensor) -> Tensor:
        x, y, z = state.unbind(-1)
        return torch.stack((sigma * (y - x), x * (rho - z) - y, x * y - beta * z), -1)

    return System(3, drift, radius=5.0, centre=5.0, settle=5.0, step=0.02)


# Time step of what passes before the first measurement.
_SETTLING = 0.01

SYSTEMS: dict[str, Callable[[], System]] = {"spiral": spiral, "van_der_pol": van_der_pol, "lorenz": lorenz}
"""Systems by name, each with its usual parameters."""


class Trajectories(NamedTuple):
    """states and measurements ``(trajectories, length, dim)``, at times ``(length,)``."""

    states: Tensor
    measurements: Tensor
    times: Tensor


def linear_sde(
    system: str | System | Tensor = "spiral",
    noise: tuple[float, float] = (0.1, 0.2),
    *,
    trajectories: int = 32,
    length: int = 64,
    times: Tensor | None = None,
    substeps: int = 20,
    generator: torch.Generator | None = None,
) -> Trajectories:
    """Simulate ``dx = f(x) dt + process dw`` and measure ``z = x + measurement n``, in float64.

    system: a name in :data:`SYSTEMS`, a system, or the matrix of a linear one. noise: process (per square root of
    time) and measurement, standard deviations. times: of the measurements, rising (default: ``length`` of them, the
    system's step apart). Linear systems are drawn from their exact transitions, others in ``substeps`` Runge-Kutta
    steps between measurements, noise added after each.
    """
    process, measurement = noise
    made = _system(system)
    if min(process, measurement) < 0 or trajectories < 1 or length < 1 or substeps < 1:
        raise OptionError(
            "Noise is at least 0 and trajectories, length and substeps at least 1; got "
            f"{noise}, {trajectories}, {length}, {substeps}."
        )
    when = made.step * torch.arange(length, dtype=torch.float64) if times is None else times.double()
    if when.dim() != 1 or bool((when.diff() <= 0).any()):
        raise OptionError("times is one rising row, shared by all trajectories.")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    direction = normal(trajectories, made.dim)
    sizes = made.radius * (0.85 + 0.3 * torch.rand(trajectories, 1, generator=generator, dtype=torch.float64))
    state = made.centre + sizes * direction / direction.norm(dim=-1, keepdim=True)
    if made.settle:
        count = math.ceil(made.settle / _SETTLING)
        for _ in range(count):
            state = _runge_kutta(made.drift, state, made.settle / count)
    states = [state]
    if made.matrix is not None:
        moves, spreads = transitions(made.matrix, when.diff())
        # The square root of a covariance that may be singular: process noise of 0, or none in some directions.
        sizes, axes = torch.linalg.eigh(spreads)
        roots = process * axes * sizes.clamp_min(0).sqrt()[:, None, :]
        for move, root in zip(moves, roots, strict=True):
            states.append(states[-1] @ move.T + normal(trajectories, made.dim) @ root.T)
    else:
        for gap in when.diff().tolist():
            state = states[-1]
            for _ in range(substeps):
                moved = _runge_kutta(made.drift, state, gap / substeps)
                state = moved + process * math.sqrt(gap / substeps) * normal(trajectories, made.dim)
            states.append(state)
    path = torch.stack(states, 1)
    return Trajectories(path, path + measurement * normal(*path.shape), when)


def transitions(matrix: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """``e^{A h}`` and ``int_0^h e^{A s} e^{A^T s} ds`` ``(gaps, dim, dim)``, from one matrix exponential (Van Loan,
    1978)."""
    dim = len(matrix)
    block = torch.zeros(2 * dim, 2 * dim, dtype=matrix.dtype)
    block[:dim, :dim], block[:dim, dim:], block[dim:, dim:] = -matrix, torch.eye(dim, dtype=matrix.dtype), matrix.T
    powers = torch.linalg.matrix_exp(gaps[:, None, None] * block)
    move = powers[:, dim:, dim:].transpose(-1, -2)
    return move, move @ powers[:, :dim, dim:]


class KalmanEstimates(NamedTuple):
    """means ``(trajectories, length, dim)`` of the state given the measurements so far, predicted ones given those
    before, and covariances ``(length, dim, dim)`` of the former, which all trajectories share."""

    means: Tensor
    predicted: Tensor
    covariances: Tensor


def kalman_filter(
    measurements: Tensor,
    system: str | System | Tensor = "spiral",
    noise: tuple[float, float] = (0.1, 0.2),
    *,
    times: Tensor | None = None,
    prior: float = 1e3,
) -> KalmanEstimates:
    """The best estimates there are for a linear system that is known (Kalman, 1960), for measurements as
    :func:`linear_sde` gives them.

    prior: standard deviation of the first state about 0; large for nothing known.
    """
    made = _system(system)
    if made.matrix is None:
        raise OptionError("The Kalman filter is for linear systems: give 'spiral' or a matrix.")
    if measurements.dim() != 3 or measurements.shape[-1] != made.dim:
        raise ShapeError(
            f"Measurements of this system are (trajectories, length, {made.dim}), got {tuple(measurements.shape)}."
        )
    process, measurement = noise
    length, dim = measurements.shape[1:]
    when = made.step * torch.arange(length, dtype=torch.float64) if times is None else times.double()
    moves, spreads = transitions(made.matrix, when.diff())
    told, identity = measurements.double(), torch.eye(dim, dtype=torch.float64)
    mean, covariance = torch.zeros_like(told[:, 0]), prior**2 * identity
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for place in range(length):
        if place:
            mean = mean @ moves[place - 1].T
            covariance = moves[place - 1] @ covariance @ moves[place - 1].T + process**2 * spreads[place - 1]
        found[1].append(mean)
        gain = torch.linalg.solve(covariance + measurement**2 * identity, covariance).T
        mean = mean + (told[:, place] - mean) @ gain.T
        kept = identity - gain
        # Joseph's form stays symmetric and positive.
        covariance = kept @ covariance @ kept.T + measurement**2 * gain @ gain.T
        found[0].append(mean)
        found[2].append(covariance)
    return KalmanEstimates(torch.stack(found[0], 1), torch.stack(found[1], 1), torch.stack(found[2]))


def filtering_error(estimates: Tensor, states: Tensor, skip: int = 0) -> float:
    """Mean squared error a component, of ``(trajectories, length, dim)`` from place ``skip`` on."""
    if estimates.shape != states.shape or estimates.dim() != 3 or not 0 <= skip < states.shape[1]:
        raise ShapeError(
            "Estimates and states are (trajectories, length, dim) alike, and skip less than length; got "
            f"{tuple(estimates.shape)}, {tuple(states.shape)} and {skip}."
        )
    return float((estimates.double() - states.double())[:, skip:].square().mean())


class TrajectoryFiltering:
    """Tell states from measurements so far: a fixed set of trajectories to learn from, others to be tested on.

    Inputs and targets ``(batch, length, dim)`` float32: measurements and states, or with ``ahead`` measurements and the
    next ones, so that no state is seen in training. The metric is the mean squared error a component; lower is better.
    """

    metric: ClassVar[str] = "mean squared error"
    higher_is_better: ClassVar[bool] = False

    def __init__(
        self,
        system: str | System | Tensor = "spiral",
        noise: tuple[float, float] = (0.1, 0.2),
        *,
        trajectories: int = 500,
        held_out: int = 500,
        length: int = 64,
        ahead: bool = False,
        seed: int = 0,
    ) -> None:
        self.system, self.noise, self.ahead = _system(system), noise, ahead
        self.num_classes = self.input_dim = self.system.dim
        generator = torch.Generator().manual_seed(seed)
        self.sets = {
            split: linear_sde(self.system, noise, trajectories=count, length=length + ahead, generator=generator)
            for split, count in (("train", trajectories), ("test", held_out))
        }

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` trajectories of the split's, drawn with replacement."""
        states, told, _ = self.sets[split]
        chosen = torch.randint(len(states), (size,), generator=generator)
        inputs = told[chosen].float()
        return (inputs[:, :-1], inputs[:, 1:]) if self.ahead else (inputs, states[chosen].float())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return (outputs - targets).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Sum of squared errors, and their number."""
        return float((outputs - targets).double().square().sum()), targets.numel()


def _system(system: str | System | Tensor) -> System:
    if isinstance(system, System):
        return system
    if isinstance(system, Tensor):
        return _linear(system)
    if system not in SYSTEMS:
        raise UnknownNameError("system", system, SYSTEMS, f"There are: {', '.join(SYSTEMS)}.")
    return SYSTEMS[system]()


def _runge_kutta(drift: Callable[[Tensor], Tensor], state: Tensor, step: float) -> Tensor:
    first = drift(state)
    second = drift(state + step / 2 * first)
    third = drift(state + step / 2 * second)
    return state + step / 6 * (first + 2 * second + 2 * third + drift(state + step * third))
