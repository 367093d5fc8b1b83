"""Two samples compared: the chances far into the tails against scipy, ranges, and what no test can be made of."""

from __future__ import annotations

import math

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.inspect.two_samples import _kolmogorov_p, _student_p, compare_samples


@pytest.mark.paper("graph_window")
@pytest.mark.parametrize("degrees", [0.7, 1.0, 1.5, 3.0, 29.4, 1e3, 1e6])
def test_students_chance_as_scipy_says_into_the_tails(degrees: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for t in (1e-9, 1e-3, 0.3, 1.0, 2.0, 6.0, 30.0, 1e3, 1e8):
        expected = 2 * stats.t.sf(t, degrees)
        for sign in (1, -1):
            assert math.isclose(_student_p(sign * t, degrees), expected, rel_tol=2e-8, abs_tol=1e-300)


@pytest.mark.paper("graph_window")
def test_students_chance_in_closed_form() -> None:
    """Of one degree of freedom 1 - 2 atan(t) / pi, of two 1 - t / sqrt(2 + t^2)."""
    for t in (0.01, 0.5, 1.0, 3.0, 50.0):
        assert _student_p(t, 1) == pytest.approx(2 * math.atan(1 / t) / math.pi, rel=1e-13)
        assert _student_p(t, 2) == pytest.approx(2 / (2 + t * t + t * math.sqrt(2 + t * t)), rel=1e-12)
    assert (_student_p(0.0, 5), _student_p(math.inf, 5), _student_p(1e200, 5)) == (1, 0, 0)


@pytest.mark.paper("graph_window")
def test_kolmogorovs_chance_as_scipy_says_into_the_tails() -> None:
    special = pytest.importorskip("scipy.special")
    for x in (0.0, 0.1, 0.19, 0.21, 0.4, 0.8, 1.3, 2.5, 5.0, 15.0, 18.0):
        assert math.isclose(_kolmogorov_p(x), special.kolmogorov(x), rel_tol=1e-11, abs_tol=1e-300)


@pytest.mark.paper("graph_window")
@pytest.mark.parametrize("scale", [1e-120, 1.0, 1e120])
def test_units_make_no_difference(scale: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(30, dtype=torch.float64), 2 * torch.randn(12, dtype=torch.float64) + 1
    one, other = compare_samples(a, b), compare_samples(scale * a, scale * b)
    for name in ("t", "t_p", "ks", "ks_p", "js"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9)
    assert one.t > 0 and compare_samples(b, a).t == pytest.approx(-one.t)


def test_samples_without_variance() -> None:
    ones, twos = torch.ones(4), 2 * torch.ones(5)
    same, apart = compare_samples(ones, ones), compare_samples(ones, twos)
    assert (same.t, same.t_p, same.ks, same.js) == (0, 1, 0, 0)
    assert (apart.t, apart.t_p, apart.ks) == (math.inf, 0, 1) and apart.js == pytest.approx(math.log(2))


def test_what_cannot_be_compared_is_told() -> None:
    a = torch.arange(5.0)
    for bad in (a[:1], torch.tensor([1.0, torch.nan])):
        with pytest.raises(ShapeError, match="finite"):
            compare_samples(a, bad)
    with pytest.raises(OptionError, match="within"):
        compare_samples(a, a + 10, limits=(0, 5))
    for settings in ({"bins": 0}, {"limits": (2.0, 1.0)}):
        with pytest.raises(OptionError, match="Histograms"):
            compare_samples(a, a, **settings)  # type: ignore[arg-type]
