"""Gumbel-softmax: the right distribution, one-hot values, the gradient of the soft choice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regard.errors import OptionError
from regard.layers.gumbel import annealed_temperature, gumbel_one_hot


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_options_are_drawn_by_their_probability_at_any_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, float("-inf")], dtype=torch.float64)
    drawn = gumbel_one_hot(logits.expand(20_000, 4), temperature, generator=_generator())
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and (drawn.sum(-1) == 1).all()
    torch.testing.assert_close(drawn.mean(0), logits.softmax(-1), atol=0.012, rtol=0)
    assert drawn[:, 3].sum() == 0


def test_the_gradient_is_that_of_the_soft_choice() -> None:
    weight = torch.randn(6, 3, dtype=torch.float64, generator=_generator(1))
    gradients = []
    for hard in (True, False):
        logits = torch.randn(6, 3, dtype=torch.float64, generator=_generator(2)).requires_grad_()
        (gumbel_one_hot(logits, 0.7, hard, _generator(3)) * weight).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0] is not None and gradients[0].abs().sum() > 0


def test_a_hard_choice_is_where_the_soft_one_is_largest_and_exactly_one() -> None:
    logits = torch.randn(50, 4, generator=_generator(4))
    hard, soft = (gumbel_one_hot(logits, 1.0, choice, _generator(5)) for choice in (True, False))
    assert torch.equal(hard.argmax(-1), soft.argmax(-1)) and torch.equal(hard, hard.round())
    torch.testing.assert_close(soft.sum(-1), torch.ones(50))
    assert gumbel_one_hot(logits.bfloat16()).dtype == torch.bfloat16


def test_the_temperature_follows_half_a_cosine_and_stays() -> None:
    values = [annealed_temperature(step, 100) for step in range(101)]
    assert values[0] == 1.5 and values[60] == pytest.approx(1.0) and values[60:] == [pytest.approx(1.0)] * 41
    assert values[30] == pytest.approx(1.25)
    assert values[15] == pytest.approx(1.0 + 0.25 * (1 + math.cos(math.pi / 4)))
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(OptionError, match="temperature"):
        gumbel_one_hot(torch.zeros(2), 0.0)
    with pytest.raises(OptionError):
        annealed_temperature(0, 10, share=0.0)
