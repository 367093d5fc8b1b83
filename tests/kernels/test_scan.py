"""The elementwise scan and the selective scan: every form against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.kernels import linear_scan, scan, segments, selective_scan

FORMS = ["auto", *scan.FORMS]


def same_gradients(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(total, leaves, seed, allow_unused=True) for total in (actual, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 2, 23, 64])
@pytest.mark.parametrize("shape", ["full", "over state", "over time", "over batch"])
@pytest.mark.parametrize("form", FORMS)
def test_scan_is_the_loop(form: str, shape: str, length: int) -> None:
    sizes = {"full": (2, length, 3, 4), "over state": (2, length, 1, 1), "over time": (2, 1, 3, 4)}
    gap = -torch.rand(sizes.get(shape, (1, length, 3, 4)), dtype=torch.float64)
    leaves = [gap, *(torch.randn(size, dtype=torch.float64) for size in ((2, length, 3, 4), (2, 3, 4)))]
    for leaf in leaves:
        leaf.requires_grad_()
    wide, state, expected = leaves[0].expand(2, length, 3, 4), leaves[2], []
    for t in range(length):
        state = wide[:, t].exp() * state + leaves[1][:, t]
        expected.append(state)
    same_gradients(linear_scan(*leaves, backend=form), torch.stack(expected, 1), leaves)


@pytest.mark.parametrize("form", FORMS)
def test_scan_forgets_at_minus_infinity_and_survives_strong_decay(form: str) -> None:
    gap = -200 * torch.rand(1, 50, 2)
    gap[:, [0, 20]] = float("-inf")
    gap.requires_grad_()
    new = torch.randn(1, 50, 2)
    states = linear_scan(gap, new, torch.ones(1, 2), backend=form)
    torch.testing.assert_close(states[:, [0, 20]], new[:, [0, 20]])
    (grad,) = torch.autograd.grad(states.sum(), gap)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_scan_of_half_precision_counts_in_float32(form: str) -> None:
    states = linear_scan(torch.zeros(1, 1, 1), torch.ones(1, 1000, 1, dtype=torch.bfloat16), backend=form)
    assert states.dtype == torch.float32 and float(states[0, -1]) == 1000.0


def selective_inputs(length: int) -> list[Tensor]:
    u, delta = torch.randn(2, length, 3), torch.rand(2, length, 3)
    leaves = [u, delta, -torch.rand(3, 4), torch.randn(2, length, 4), torch.randn(2, length, 4), torch.randn(3)]
    return [leaf.double().requires_grad_() for leaf in (*leaves, torch.randn(2, 3, 4))]


def selective_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """Output and last state side by side, from the formula alone."""
    outs = []
    for t in range(u.shape[1]):
        rows = []
        for channel in range(u.shape[2]):
            fade = (delta[:, t, channel, None] * A[channel]).exp()
            add = (delta[:, t, channel] * u[:, t, channel])[:, None] * B[:, t]
            rows.append(fade * state[:, channel] + add)
        state = torch.stack(rows, 1)
        outs.append((state * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.cat((torch.stack(outs, 1).flatten(), state.flatten()))


@pytest.mark.parametrize("limit", [1, 1 << 19])
@pytest.mark.parametrize("form", FORMS)
def test_selective_scan_is_the_loop(form: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one segment, and as many."""
    monkeypatch.setattr(segments, "_SEGMENT", limit)
    leaves = selective_inputs(41)
    out, state = selective_scan(*leaves[:6], state=leaves[6], backend=form)
    same_gradients(torch.cat((out.flatten(), state.flatten())), selective_loop(*leaves), leaves)


def test_selective_scan_continues_across_splits() -> None:
    *rows, state = selective_inputs(30)
    u, delta, A, B, C, D = rows
    whole, last = selective_scan(*rows, state=state)
    outs = []
    for part in (slice(0, 1), slice(1, 18), slice(18, 30)):
        out, state = selective_scan(u[:, part], delta[:, part], A, B[:, part], C[:, part], D, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    torch.testing.assert_close(state, last)


def test_errors_teach() -> None:
    with pytest.raises(ShapeError, match="does not broadcast"):
        linear_scan(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="initial state is"):
        linear_scan(torch.zeros(2, 4, 1), torch.zeros(2, 4, 3), torch.zeros(2, 4))
    u = torch.zeros(2, 5, 3)
    with pytest.raises(ShapeError, match="B and C are"):
        selective_scan(u, u, torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 4, 4))
