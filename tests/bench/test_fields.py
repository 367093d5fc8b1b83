"""Smooth fields: their spectrum, and what queries and keys share."""

from __future__ import annotations

import math

import torch

from regard.bench.fields import field_tokens, smooth_field


def test_neighbours_are_alike_as_the_spectrum_says() -> None:
    """A Gaussian spectrum of amplitude has the correlation exp(-(pi waves r / n)^2) at distance r of n."""
    field = smooth_field((64, 64), 64, torch.Generator().manual_seed(0), waves=3.0).T.view(64, 64, 64)
    assert math.isclose(float(field.std()), 1.0, rel_tol=1e-5)
    for step in (2, 4, 8):
        found = float((field * field.roll(step, 2)).mean())
        assert abs(found - math.exp(-((math.pi * 3.0 * step / 64) ** 2))) < 0.06


def test_noise_is_shared_or_not() -> None:
    for same in (True, False):
        query, key, value = field_tokens((2, 4, 8), 3, 5, seed=1, noise=0.5, same_noise=same, size=2.0)
        assert query.shape == key.shape == value.shape == (1, 3, 64, 5)
        assert torch.equal(query, key) == same
    assert torch.equal(*(field_tokens((4, 4), 1, 2, seed=3)[0] for _ in range(2)))
