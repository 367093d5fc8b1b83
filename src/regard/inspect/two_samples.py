"""Whether two samples come from one distribution: Student's or Welch's t, Kolmogorov-Smirnov, Jensen-Shannon."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.inspect.metrics import js_divergence

__all__ = ["Comparison", "compare_samples"]


@dataclass(frozen=True)
class Comparison:
    """Two samples: their means, ``t`` (positive: the second mean is the greater) and ``ks`` (greatest distance of the
    distribution functions, 0 to 1) with the chances ``p`` of such a value were there no difference, and ``js``, the
    Jensen-Shannon divergence of their histograms in nats, 0 to ``log 2``."""

    means: tuple[float, float]
    t: float
    t_p: float
    ks: float
    ks_p: float
    js: float


def compare_samples(
    first: Tensor,
    second: Tensor,
    *,
    equal_variance: bool = False,
    bins: int = 100,
    limits: tuple[float, float] | None = None,
) -> Comparison:
    """Compare two samples of any shape, at least two numbers each.

    equal_variance: Student's test instead of Welch's. bins, limits: of the histograms, by default over the range of
    both; what lies outside of ``limits`` is left out of them. The chance of ``ks`` is the asymptotic one, which is too
    large for small samples.
    """
    a, b = first.detach().flatten().double(), second.detach().flatten().double()
    if len(a) < 2 or len(b) < 2 or not bool(torch.cat((a, b)).isfinite().all()):
        raise ShapeError(f"Two samples of at least two finite numbers are compared; got {len(a)} and {len(b)}.")
    if bins < 1 or (limits is not None and not limits[0] < limits[1]):
        raise OptionError(f"Histograms have a bin at least, between limits that rise; got {bins} and {limits}.")
    t, degrees = _t_statistic(a, b, equal_variance)
    ks = _largest_step(a, b)
    low, high = limits or (float(min(a.min(), b.min())), float(max(a.max(), b.max())))
    parts = [torch.histc(x, bins, low, high) for x in (a, b)]
    if not all(bool(part.any()) for part in parts):
        raise OptionError(f"A sample has nothing within {limits}: no divergence of histograms can be told. Widen them.")
    shares = [part / part.sum() for part in parts]
    size = len(a) * len(b) / (len(a) + len(b))
    return Comparison(
        (float(a.mean()), float(b.mean())),
        t,
        _student_p(t, degrees),
        ks,
        _kolmogorov_p(math.sqrt(size) * ks),
        float(js_divergence(*shares)),
    )


def _t_statistic(a: Tensor, b: Tensor, equal_variance: bool) -> tuple[float, float]:
    """``t`` and its degrees of freedom."""
    n, m, va, vb = len(a), len(b), float(a.var()), float(b.var())
    if equal_variance:
        spread = ((n - 1) * va + (m - 1) * vb) / (n + m - 2) * (1 / n + 1 / m)
        degrees = float(n + m - 2)
    else:
        spread = va / n + vb / m
        # Of shares of the spread: squares of tiny variances would vanish.
        share = va / n / spread if spread else 0.5
        degrees = 1 / (share**2 / (n - 1) + (1 - share) ** 2 / (m - 1))
    apart = float(b.mean() - a.mean())
    return (apart / math.sqrt(spread) if spread else math.copysign(math.inf, apart) if apart else 0.0), degrees


def _student_p(t: float, degrees: float) -> float:
    """Chance of ``|T| >= |t|``: the incomplete beta function ``I_x(degrees / 2, 1 / 2)``, ``x = degrees / (degrees +
    t^2)``, by its continued fraction (Lentz). torch has none."""
    x, y, a, b = degrees / (degrees + t * t), t * t / degrees, degrees / 2, 0.5
    if x in (0.0, 1.0):
        return x
    # y is (1 - x) / x, which keeps its digits where x is nearly 1.
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - (a + b) * math.log1p(y) + b * math.log(y))
    # The fraction converges fast on one side of the mean alone; the other side is its complement.
    if x > (a + 1) / (a + b + 2):
        return 1 - front * _beta_fraction(x * y, b, a) / b
    return front * _beta_fraction(x, a, b) / a


def _beta_fraction(x: float, a: float, b: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 10_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 + step * d, 1 + step / c
            d, c = 1 / (d if abs(d) > tiny else tiny), c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return value


def _largest_step(a: Tensor, b: Tensor) -> float:
    """Greatest distance of two empirical distribution functions."""
    both = torch.cat((a, b))
    below = [torch.searchsorted(x.sort().values, both, right=True).double() / len(x) for x in (a, b)]
    return float((below[0] - below[1]).abs().max())


def _kolmogorov_p(x: float) -> float:
    """Chance of a larger value under Kolmogorov's limit, ``2 sum (-1)^(k-1) exp(-2 k^2 x^2)``."""
    if x < 0.2:
        return 1.0  # but for 1e-12, where the series needs ever more terms
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(max(sum(terms), 0.0), 1.0)
