"""Sinusoidal position codes."""

from __future__ import annotations

import math

import pytest
import torch

from regard.errors import OptionError
from regard.layers.sinusoids import sinusoids


def test_codes_are_the_formula_and_turn_with_the_distance() -> None:
    codes = sinusoids(50, 8).double()
    for t in (0, 1, 49):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            assert codes[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert codes[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    # Products depend on the distance alone.
    products = codes @ codes.T
    torch.testing.assert_close(products[3, 10], products[20, 27], atol=1e-5, rtol=0)


def test_odd_widths_are_refused() -> None:
    with pytest.raises(OptionError, match="even"):
        sinusoids(4, 5)
