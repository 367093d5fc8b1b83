"""Stochastic depth drops whole examples and keeps the mean."""

from __future__ import annotations

import pytest
import torch

from regard.errors import OptionError
from regard.layers.drop_path import DropPath, drop_path_rates


def test_whole_examples_are_dropped_and_the_mean_stays() -> None:
    x = torch.ones(4000, 2, 3)
    out = DropPath(0.25)(x)
    kept = out[:, 0, 0] > 0
    torch.testing.assert_close(out, kept[:, None, None] * x / 0.75)
    assert out.mean() == pytest.approx(1, abs=0.05)


def test_nothing_is_dropped_in_eval_mode_or_at_rate_zero() -> None:
    x = torch.randn(5, 2)
    assert torch.equal(DropPath(0.5).eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_rates_rise_linearly() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]
    with pytest.raises(OptionError):
        DropPath(1.0)
