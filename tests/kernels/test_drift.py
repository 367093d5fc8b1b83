"""Very long sequences in the step form: a float32 state that is updated token by token stays with one in float64.

Tolerance: 1e-4 of the state's size. Roundings of a sum of N terms of one sign add up like ``eps sqrt(N)``, 6e-5 at a
million; a decay forgets them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.kernels import LinearState, delta_rule, linear_attention, linear_step

DIM, TOLERANCE = 8, 1e-4
STRETCH = 4096
LENGTHS = [pytest.param(16_384), pytest.param(1_000_000, marks=pytest.mark.slow)]


def tokens(start: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, positive keys (nothing cancels, so that errors would add up), values and a gate in (0, 1)."""
    generator = torch.Generator().manual_seed(start)
    query, key, value = (torch.rand(1, 1, length, DIM, generator=generator) for _ in range(3))
    return query, key / DIM**0.5, value + 0.5, torch.rand(1, 1, length, generator=generator)


def compare(found: Tensor, exact: Tensor) -> None:
    assert float((found.double() - exact).abs().max()) <= TOLERANCE * float(exact.abs().max())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", [None, -1e-6, -1e-3])
def test_sums_do_not_drift(decay: float | None, length: int) -> None:
    """Without a decay, with one that remembers the whole sequence, and with one that remembers a thousand tokens."""
    log_decay = None if decay is None else torch.tensor([decay])
    wide = None if log_decay is None else log_decay.double()
    state, exact = LinearState.empty(1, 1, DIM, DIM, normalize=True, like=torch.zeros(1)), None
    for start in range(0, length, STRETCH):
        query, key, value, _ = tokens(start, min(STRETCH, length - start))
        out, state = linear_step(query, key, value, state, log_decay=log_decay, normalize=True)
        expected, exact = linear_attention(
            query.double(),
            key.double(),
            value.double(),
            causal=True,
            log_decay=wide,
            normalize=True,
            state=exact,
        )
        compare(out, expected)
    assert exact is not None and state.sum.dtype == torch.float32
    compare(state.sum, exact.sum)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_delta_rule_does_not_drift(length: int) -> None:
    state = exact = None
    for start in range(0, length, STRETCH):
        query, key, value, beta = tokens(start, min(STRETCH, length - start))
        out, state = delta_rule(query, key, value, beta, state=state, backend="recurrent")
        inputs = (t.double() for t in (query, key, value, beta))
        expected, exact = delta_rule(*inputs, state=exact)
        compare(out, expected)
    assert state is not None and exact is not None and state.sum.dtype == torch.float32
    compare(state.sum, exact.sum)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_leave_a_float32_state(dtype: torch.dtype) -> None:
    """As far from the exact state of the same rounded tokens as float32 is, not as their own dtype would be."""
    state, exact = LinearState.empty(1, 1, DIM, DIM, like=torch.zeros(1, dtype=dtype)), None
    for start in range(0, 16_384, STRETCH):
        query, key, value = (t.to(dtype) for t in tokens(start, STRETCH)[:3])
        _, state = linear_step(query, key, value, state)
        _, exact = linear_attention(query.double(), key.double(), value.double(), causal=True, state=exact)
    assert exact is not None and state.sum.dtype == torch.float32
    compare(state.sum, exact.sum)
