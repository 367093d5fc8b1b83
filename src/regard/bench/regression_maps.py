"""Test-time regression: what attention is as an estimator of the map from keys to values, without any training.

A :class:`MapSample` holds pairs of keys and values with queries and what their values would be. The tasks, as arXiv
2510.01450 has them: a smooth non-linear map, a piecewise affine one whose pieces come one after the other, recall of
values at known keys, and a linear map of each sequence's own. Tracking of permutations and regression by a trained
model are :class:`regard.bench.state_tasks.GroupWords` with ``symmetric_group`` and
:class:`regard.bench.regression_tasks.InContextRegression`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regard.bench.regression_tasks import InContextRegression
from regard.dense.lla import local_linear_attention
from regard.errors import OptionError

__all__ = [
    "BANDWIDTHS",
    "ESTIMATORS",
    "MapSample",
    "associative_recall",
    "in_context_regression",
    "piecewise_affine_drift",
    "smooth_map",
    "test_time_regression",
]


@dataclass(frozen=True)
class MapSample:
    """``key (batch, n, d)``, ``value (batch, n, dv)``, ``query (batch, m, d)``, ``target (batch, m, dv)`` without
    noise. sequential: query ``i`` comes before pair ``i`` is shown and sees the pairs before it; else it sees all."""

    key: Tensor
    value: Tensor
    query: Tensor
    target: Tensor
    sequential: bool = False


def smooth_map(
    batch: int, generator: torch.Generator, pairs: int = 512, queries: int = 256, dim: int = 2, noise: float = 0.05
) -> MapSample:
    """Keys and queries even in ``[-1, 1]^dim``, ``v = sin(W k) + k / 2`` with a normal ``W`` for each sequence."""
    matrix = torch.randn(batch, dim, dim, generator=generator)
    key, query = (2 * torch.rand(batch, count, dim, generator=generator) - 1 for count in (pairs, queries))

    def values(x: Tensor) -> Tensor:
        return (x @ matrix.transpose(1, 2)).sin() + x / 2

    shown = values(key)
    return MapSample(key, shown + noise * torch.randn(shown.shape, generator=generator), query, values(query))


def piecewise_affine_drift(
    batch: int,
    generator: torch.Generator,
    pairs: int = 256,
    segments: int = 4,
    dim: int = 2,
    spread: float = 0.3,
    noise: float = 0.05,
) -> MapSample:
    """A stream whose keys move from place to place, each with an affine map of its own; each value is told before it
    is shown.

    Segment ``s`` has keys around a centre even in ``[-1, 1]^dim`` with standard deviation ``spread`` and ``v = A_s k +
    b_s``, entries normal with variance ``1 / dim`` and 1.
    """
    if pairs % segments:
        raise OptionError(f"{pairs} pairs do not divide into {segments} segments.")
    length = pairs // segments
    centre = 2 * torch.rand(batch, segments, 1, dim, generator=generator) - 1
    key = centre + spread * torch.randn(batch, segments, length, dim, generator=generator)
    matrix = torch.randn(batch, segments, dim, dim, generator=generator) / math.sqrt(dim)
    value = (key @ matrix + torch.randn(batch, segments, 1, dim, generator=generator)).flatten(1, 2)
    key = key.flatten(1, 2)
    return MapSample(key, value + noise * torch.randn(value.shape, generator=generator), key, value, True)


def associative_recall(
    batch: int, generator: torch.Generator, pairs: int = 64, dim: int = 8, noise: float = 0.1
) -> MapSample:
    """Unit keys with normal values; each is asked for by its key with ``noise`` of that length added."""
    key = torch.nn.functional.normalize(torch.randn(batch, pairs, dim, generator=generator), dim=-1)
    value = torch.randn(batch, pairs, dim, generator=generator)
    query = key + noise * torch.randn(key.shape, generator=generator) / math.sqrt(dim)
    return MapSample(key, value, query, value)


def in_context_regression(
    batch: int, generator: torch.Generator, pairs: int = 64, dim: int = 4, noise: float = 0.1, drift: float = 0.0
) -> MapSample:
    """The pairs of an :class:`~regard.bench.regression_tasks.InContextRegression`, each ``y`` told before it is shown;
    the targets have the noise of the values."""
    inputs, targets = InContextRegression(2 * pairs, dim, noise, drift=drift).batch(batch, generator)
    key, value = inputs[:, ::2, :dim], targets[:, ::2, None]
    return MapSample(key, value, key, value, True)


Estimator = Callable[[MapSample, float, float], Tensor]
"""``(sample, bandwidth, ridge) -> estimates (batch, m, dv)``."""


def _local(sample: MapSample, bandwidth: float, ridge: float, constant: bool = False) -> Tensor:
    """The local linear fit, or with ``constant`` the local constant one, which is its limit for large ridges."""
    seen = torch.ones(sample.query.shape[1], sample.key.shape[1], dtype=torch.bool)
    out = local_linear_attention(
        sample.query[:, None],
        sample.key[:, None],
        sample.value[:, None],
        causal=False,
        mask=seen.tril(-1) if sample.sequential else None,
        bandwidth=bandwidth,
        ridge=1e9 if constant else ridge,
        kernel="rbf",
    )
    return out[:, 0]


def _global_linear(sample: MapSample, bandwidth: float, ridge: float) -> Tensor:
    """One affine map for all queries that see the same pairs: ridge regression with intercept."""
    return _local(sample, math.inf, ridge)


ESTIMATORS: dict[str, Estimator] = {
    "global_linear": _global_linear,
    "softmax": partial(_local, constant=True),
    "lla": _local,
}
"""Linear attention's regression, softmax attention (Nadaraya and Watson) and local linear attention, the last two with
Gaussian weights."""

BANDWIDTHS = tuple(2.0**-power for power in range(1, 11))


def test_time_regression(
    sample: MapSample,
    bandwidths: Sequence[float] = BANDWIDTHS,
    ridge: float = 1e-4,
    estimators: Mapping[str, Estimator] = ESTIMATORS,
) -> dict[str, tuple[float, float]]:
    """For each estimator the mean squared error and the bandwidth, variance of the Gaussian weights.

    The bandwidth is the best of ``bandwidths`` on the first half of the sequences, the error that on the second half.
    In a stream the first half of the queries, which see few pairs, does not count.
    """
    half = len(sample.key) // 2
    if not half:
        raise OptionError("Bandwidths are chosen on one half of the sequences; draw a batch of two or more.")
    first = sample.query.shape[1] // 2 if sample.sequential else 0
    found = {}
    for name, estimate in estimators.items():
        tried = []
        for bandwidth in bandwidths:
            error = (estimate(sample, bandwidth, ridge) - sample.target).square()[:, first:].mean((1, 2))
            tried.append((float(error[:half].mean()), float(error[half:].mean()), bandwidth))
        _, mse, bandwidth = min(tried)
        found[name] = (mse, bandwidth)
    return found
