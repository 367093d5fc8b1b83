"""The damped moving average in all its forms against the recurrence and the double sum written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels import use_backend
from regard.kernels.ema import FORMS, damped_ema
from regard.layers.ema import DampedEMA

DIM = 3


def draw(h: int = 4, both: bool = False) -> tuple[Tensor, ...]:
    """alpha, delta, beta, gamma and omega."""
    rows = 2 * DIM if both else DIM
    return (*(torch.randn(rows, h, dtype=torch.float64) for _ in range(4)), torch.randn(DIM, dtype=torch.float64))


def loop(x: Tensor, parameters: tuple[Tensor, ...], state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, token by token: output without ``omega x``, and the last state."""
    alpha, delta, beta, gamma = parameters[:4]
    p, r = 1 / (1 + torch.exp(-alpha)), 1 / (1 + torch.exp(-delta))
    s = torch.zeros(len(x), *alpha.shape, dtype=x.dtype) if state is None else state
    rows = []
    for token in x.unbind(1):
        s = p * (beta * token[..., None]) + (1 - p * r) * s
        rows.append((gamma * s).sum(-1) / max(alpha.shape[1], 1) ** 0.5)
    return torch.stack(rows, 1), s


def kernel(parameters: tuple[Tensor, ...], length: int) -> Tensor:
    """``K[t]`` as a power, ``(rows, length)``."""
    alpha, delta, beta, gamma = parameters[:4]
    p, r = alpha.sigmoid(), delta.sigmoid()
    powers = (1 - p * r)[..., None] ** torch.arange(length)
    return (gamma * p * beta / alpha.shape[1] ** 0.5)[:, None].matmul(powers)[:, 0]


def same(actual: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.paper("mega")
@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize(("length", "h"), [(1, 4), (2, 1), (37, 16), (64, 3), (5, 0)])
def test_every_form_is_the_recurrence(form: str, length: int, h: int) -> None:
    parameters, x = draw(h), torch.randn(2, length, DIM, dtype=torch.float64)
    out, state = damped_ema(x, *parameters, backend=form)
    expected, last = loop(x, parameters)
    same(out, expected + parameters[4] * x)
    assert state is not None
    same(state, last)


@pytest.mark.paper("mega")
@pytest.mark.parametrize("form", FORMS)
def test_state_goes_on_in_any_form(form: str) -> None:
    parameters, x = draw(), torch.randn(2, 41, DIM, dtype=torch.float64)
    whole, last = loop(x, parameters)
    state: Tensor | None = None
    outs = []
    for index, part in enumerate(x.split((17, 1, 1, 22), 1)):
        # Every other stretch runs as a convolution.
        out, state = damped_ema(part, *parameters[:4], state=state, backend="fft" if index % 2 else form)
        outs.append(out)
    same(torch.cat(outs, 1), whole)
    assert state is not None
    same(state, last)


@pytest.mark.paper("mega")
def test_one_token_at_a_time_is_the_convolution() -> None:
    parameters, x = draw(16), torch.randn(2, 30, DIM, dtype=torch.float64)
    whole, last = damped_ema(x, *parameters, backend="fft")
    state: Tensor | None = torch.zeros(2, DIM, 16, dtype=torch.float64)
    for t in range(30):
        out, state = damped_ema(x[:, t : t + 1], *parameters, state=state)
        same(out, whole[:, t : t + 1])
    assert state is not None and last is not None
    same(state, last)


@pytest.mark.paper("mega")
@pytest.mark.parametrize("both", [False, True])
def test_forms_agree_in_gradients(both: bool) -> None:
    parameters, x = draw(5, both), torch.randn(2, 23, DIM, dtype=torch.float64)
    before = None if both else torch.randn(2, DIM, 5, dtype=torch.float64)
    found = []
    for form in FORMS:
        leaves = [t.clone().requires_grad_() for t in (x, *parameters, *(() if before is None else (before,)))]
        state = None if before is None else leaves[-1]
        out, last = damped_ema(*leaves[:6], both, state, backend=form)
        total = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
        total = total if last is None else total + last.square().sum()
        found.append(torch.autograd.grad(total, leaves))
    for grads in found[1:]:
        for ours, theirs in zip(grads, found[0], strict=True):
            same(ours, theirs, 1e-12)


@pytest.mark.paper("mega")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("official", [False, True])
def test_both_ways_is_the_double_sum(form: str, official: bool) -> None:
    parameters, x = draw(both=True), torch.randn(2, 19, DIM, dtype=torch.float64)
    ahead, behind = kernel(parameters, 19).chunk(2)
    expected = torch.zeros_like(x)
    for t in range(19):
        for s in range(19):
            own = (ahead[:, 0] + behind[:, 0]) / (1 if official else 2)
            weight = ahead[:, t - s] if s < t else behind[:, s - t] if s > t else own
            expected[:, t] += weight * x[:, s]
    out, state = damped_ema(x, *parameters[:4], bidirectional=True, official=official, backend=form)
    same(out, expected)
    assert state is None


@pytest.mark.paper("mega")
@pytest.mark.parametrize("official", [False, True])
def test_a_reversed_sequence_with_swapped_halves_is_the_reversed_output(official: bool) -> None:
    parameters, x = draw(both=True), torch.randn(2, 26, DIM, dtype=torch.float64)
    swapped = [t.roll(DIM, 0) for t in parameters[:4]]
    out, _ = damped_ema(x, *parameters, bidirectional=True, official=official)
    turned, _ = damped_ema(x.flip(1), *swapped, parameters[4], bidirectional=True, official=official)
    same(turned.flip(1), out)
    kept, _ = damped_ema(x.flip(1), *parameters, bidirectional=True, official=official)
    assert float((kept.flip(1) - out).abs().max()) > 0.1  # the two halves do differ


@pytest.mark.paper("mega")
def test_the_direct_term_makes_up_for_a_token_that_counts_twice() -> None:
    parameters, x = draw(both=True), torch.randn(2, 11, DIM, dtype=torch.float64)
    twice, _ = damped_ema(x, *parameters, bidirectional=True, official=True)
    own = kernel(parameters, 1)[:, 0].view(2, DIM).mean(0)
    once, _ = damped_ema(x, *parameters[:4], parameters[4] + own, bidirectional=True)
    same(twice, once)


@pytest.mark.paper("mega")
@pytest.mark.parametrize("form", FORMS)
def test_no_number_overflows(form: str) -> None:
    """Sigmoids that round to one or to zero, and a sum that never forgets."""
    alpha, delta = torch.tensor([[60.0, 60.0, -60.0]]), torch.tensor([[60.0, -60.0, 60.0]])
    leaves = [t.requires_grad_() for t in (alpha, delta, torch.ones(1, 3), torch.tensor([[1.0, 1.0, 0.0]]))]
    x = torch.randn(1, 50, 1)
    out, state = damped_ema(x, *leaves, backend=form)
    expected = (x + x.cumsum(1)) / 3**0.5  # the first forgets all but the token, the second nothing
    torch.testing.assert_close(out, expected)
    assert state is not None
    grads = torch.autograd.grad(out.square().sum() + state.sum(), leaves)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


@pytest.mark.paper("mega")
def test_fifty_thousand_tokens() -> None:
    layer = DampedEMA(2)
    x = torch.randn(1, 50_000, 2)
    with torch.no_grad():
        out, state = layer(x)
        near, _ = layer(x[:, -2000:])
    # Weights of tokens further back than 2000 are below what float32 tells.
    torch.testing.assert_close(out[:, -500:], near[:, -500:], rtol=1e-4, atol=1e-4)
    assert state.shape == (1, 2, 16)


@pytest.mark.paper("mega")
def test_half_precision_keeps_its_state_in_float32() -> None:
    layer = DampedEMA(DIM).bfloat16()
    x = torch.randn(2, 300, DIM).bfloat16()
    state = layer.init_state(2, like=x)
    for token in x.split(1, 1):
        out, state = layer(token, state)
    exact, last = loop(x.double(), tuple(p.detach().double() for p in layer.parameters()))
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), last, rtol=0, atol=1e-5)
    expected = exact[:, -1:] + layer.omega.detach().double() * x[:, -1:].double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.paper("mega")
def test_initial_values() -> None:
    layer = DampedEMA(400, 16)
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    for name, mean, std in (("alpha", 0.0, 0.2), ("delta", 0.0, 0.2), ("gamma", 0.0, 1.0), ("omega", 0.0, 1.0)):
        values = layer.get_parameter(name).detach()
        assert abs(float(values.mean()) - mean) < 0.15 * std and abs(float(values.std()) / std - 1) < 0.1, name
    spread = layer.beta.detach() - signs
    assert abs(float(spread.mean())) < 0.002 and abs(float(spread.std()) / 0.02 - 1) < 0.1
    assert layer.alpha.shape == (400, 16) and DampedEMA(400, 16, bidirectional=True).alpha.shape == (800, 16)


@pytest.mark.paper("mega")
def test_hidden_tokens_enter_no_average() -> None:
    layer = DampedEMA(DIM, bidirectional=True).double()
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    keys = torch.ones(2, 20, dtype=torch.bool)
    keys[1, 13:] = False
    out, _ = layer(x, keys=keys)
    alone, _ = layer(x[1:, :13])
    same(out[1:, :13], alone)


def test_the_form_is_chosen_from_outside() -> None:
    parameters, x = draw(), torch.randn(1, 9, DIM, dtype=torch.float64)
    with use_backend("recurrent"):
        inside, _ = damped_ema(x, *parameters)
    outside, _ = damped_ema(x, *parameters, backend="recurrent")
    assert torch.equal(inside, outside)


def test_bad_input_is_explained() -> None:
    parameters, x = draw(), torch.randn(1, 9, DIM, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"\(2 dim, h\)"):
        damped_ema(x, *parameters, bidirectional=True)
    with pytest.raises(ShapeError, match="at least one token"):
        damped_ema(x[:, :0], *parameters)
    with pytest.raises(ShapeError, match="omega"):
        damped_ema(x, *parameters[:4], torch.ones(2))
    with pytest.raises(ShapeError, match="state is"):
        damped_ema(x, *parameters, state=torch.zeros(1, DIM, 5))
    with pytest.raises(OptionError, match="both ends"):
        damped_ema(x, *draw(both=True), bidirectional=True, state=torch.zeros(1, DIM, 4))
    with pytest.raises(OptionError, match="ema_dim"):
        DampedEMA(4, -1)
    with pytest.raises(ShapeError, match="keys are"):
        DampedEMA(DIM)(x.float(), keys=torch.ones(1, 8, dtype=torch.bool))
