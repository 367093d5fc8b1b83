"""Adaptive filter attention against the Lyapunov equation, rotary attention, explicit differences and true systems."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.bench.filtering_tasks import kalman_filter, linear_sde, spiral
from regard.dense.afa import (
    AdaptiveFilterAttention,
    FilterDynamics,
    dle_variance,
    filter_logits,
    isotropic_residual,
    pull_forward,
    tensor_afa,
)
from regard.errors import OptionError, ShapeError, UnsupportedMaskError
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import KeyPadding
from regard.registry import build
from tests.conformance.subjects import check_gradient

LENGTH, HEADS, DIM, WIDTH = 9, 3, 4, 6


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer(**options: Any) -> AdaptiveFilterAttention:
    return AdaptiveFilterAttention(WIDTH, HEADS, DIM, options.pop("v_dim", DIM), 20, **options).double()


def as_complex(pairs: Tensor) -> Tensor:
    return torch.complex(*pairs.chunk(2, -1))


def dynamics(heads: int = HEADS, dim: int = DIM, **given: Tensor) -> FilterDynamics:
    """Some system, with pairs of frequencies."""
    omega = torch.rand(heads, dim // 2, dtype=torch.float64).repeat_interleave(2, -1)
    omega = omega * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(dim // 2)
    some = {name: 0.2 + torch.rand(heads, dtype=torch.float64) for name in ("sigma2", "eta2", "gamma2", "nu", "tau")}
    values = {"mu": -0.3 * torch.rand(heads, dtype=torch.float64), "omega": omega, "omega_v": omega, **some, **given}
    return FilterDynamics(**values)


def explicit(made: AdaptiveFilterAttention, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and estimates before gate and prediction, pair by pair from the formulas; one sequence."""
    query, key, value = (as_complex(t)[0] for t in made.project(x))
    p = made.dynamics
    attention = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.float64)
    estimates = torch.zeros(HEADS, LENGTH, value.shape[-1], dtype=torch.complex128)
    for h, i in itertools.product(range(HEADS), range(LENGTH)):
        logits, moved = [], []
        for j in range(i + 1):
            dt = float(times[i] - times[j])
            mu, sigma2, eta2, gamma2 = (float(v[h].detach()) for v in (p.mu, p.sigma2, p.eta2, p.gamma2))
            forward = torch.exp(torch.complex(p.mu[h].expand_as(p.omega[h]), p.omega[h]) * dt)
            residual = float((query[h, i] - forward * key[h, j]).abs().square().sum().detach())
            growth = (math.exp(2 * mu * dt) - 1) / (2 * mu)
            kinds = {
                "dle": sigma2 * growth + eta2 * math.exp(2 * mu * dt) + gamma2,
                "linear": sigma2 * dt + eta2 + gamma2,
                None: eta2 + gamma2,
            }
            nu, tau = float(p.nu[h].detach()), float(p.tau[h].detach())
            prior = {"dle": -math.log(kinds["dle"]), "linear": -nu * dt, None: 0.0}[made.additive_bias]
            misfit = residual / (nu * DIM * kinds[made.multiplicative_bias])
            logits.append(tau**2 * (prior - (math.log(1 + misfit) if made.robust else misfit)))
            moved.append(torch.exp(torch.complex(p.mu[h].expand_as(p.omega_v[h]), p.omega_v[h]) * dt) * value[h, j])
        attention[h, i, : i + 1] = torch.tensor(logits, dtype=torch.float64).softmax(0)
        estimates[h, i] = sum(float(a) * m for a, m in zip(attention[h, i], moved, strict=False))
    return attention, estimates


@pytest.mark.paper("afa")
@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("additive", ["dle", "linear", None])
@pytest.mark.parametrize("multiplicative", ["dle", "linear", None])
def test_every_pair_by_the_formulas(robust: bool, additive: Any, multiplicative: Any) -> None:
    made = layer(robust=robust, additive_bias=additive, multiplicative_bias=multiplicative, gate=None, v_dim=2)
    with torch.no_grad():
        made.temperature.copy_(1 + 0.3 * torch.rand(HEADS))
    x, times = normal(1, LENGTH, WIDTH), torch.rand(LENGTH, dtype=torch.float64).cumsum(0) * 3
    attention, estimates = explicit(made, x, times)
    found = made.filtered(x, times)
    torch.testing.assert_close(found.attention[0], attention)
    torch.testing.assert_close(as_complex(found.estimates[0]), estimates)
    assert torch.equal(made(x, times), found.output)


def integrated(rate: float, process: float, start: float, dt: float, steps: int = 4000) -> float:
    """``dV/dt = 2 rate V + process`` from ``V(0) = start`` by Euler steps, extrapolated from two step sizes."""
    ends = []
    for count in (steps, 2 * steps):
        value = start
        for _ in range(count):
            value += dt / count * (2 * rate * value + process)
        ends.append(value)
    return 2 * ends[1] - ends[0]


@pytest.mark.paper("afa")
@pytest.mark.parametrize("mu", [-1.3, -0.1, -1e-7, 0.0, 0.2])
@pytest.mark.parametrize("dt", [0.0, 0.05, 2.0])
def test_closed_forms_solve_the_lyapunov_equation(mu: float, dt: float) -> None:
    """Each kind is the equation with less of it: all, process noise alone, nothing."""
    sigma2, eta2, gamma2 = 0.7, 0.4, 0.25
    rates, noises = {"dle": mu, "linear": 0.0, None: 0.0}, {"dle": sigma2, "linear": sigma2, None: 0.0}
    given = dict(mu=mu, sigma2=sigma2, eta2=eta2, gamma2=gamma2, dt=dt)
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in given.items()}
    kinds: tuple[Any, ...] = ("dle", "linear", None)
    for kind in kinds:
        expected = integrated(rates[kind], noises[kind], eta2, dt) + gamma2
        assert float(dle_variance(**tensors, kind=kind)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.paper("afa")
def test_the_linear_prior_is_a_growing_mode() -> None:
    """``-nu dt`` is ``-log V`` of ``dV/dt = nu V`` from 1."""
    p = dynamics()
    dt = torch.tensor([0.0, 0.3, 1.5], dtype=torch.float64).view(1, 1, 1, 3)
    found = filter_logits(torch.zeros(1, HEADS, 1, 3, dtype=torch.float64), dt, p, additive="linear")
    for h, place in itertools.product(range(HEADS), range(3)):
        grown = integrated(float(p.nu[h]) / 2, 0.0, 1.0, float(dt[0, 0, 0, place]))
        assert float(found[0, h, 0, place]) == pytest.approx(-(float(p.tau[h]) ** 2) * math.log(grown), abs=1e-6)


@pytest.mark.paper("afa")
def test_variance_is_smooth_at_zero_decay() -> None:
    sigma2, eta2, gamma2, dt = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.4, 0.25, 3.0))
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = dle_variance(zero, sigma2, eta2, gamma2, dt)
    assert float(value.detach()) == pytest.approx(0.7 * 3 + 0.4 + 0.25, rel=1e-14)
    (slope,) = torch.autograd.grad(value, zero)
    assert float(slope) == pytest.approx(0.7 * 3**2 + 2 * 0.4 * 3, rel=1e-12)
    # On both sides of where the series gives way.
    for mu in (-1.001e-2 / 6, -0.999e-2 / 6, -1e-9):
        exact = 0.7 * math.expm1(6 * mu) / (2 * mu) + 0.4 * math.exp(6 * mu) + 0.25
        found = dle_variance(torch.tensor(mu, dtype=torch.float64), sigma2, eta2, gamma2, dt)
        assert float(found) == pytest.approx(exact, rel=1e-14)
    assert torch.autograd.gradcheck(lambda m: dle_variance(m, sigma2, eta2, gamma2, dt), (zero,))


@pytest.mark.paper("afa")
def test_without_decay_and_process_noise_it_is_rotary_attention() -> None:
    """Gaussian form, normalised queries and keys: ``softmax(2 c Re(q~^* k~))``, which is torch's attention on rotary
    queries and keys; values are rotated too."""
    query, key = (F.normalize(normal(2, HEADS, LENGTH, 2 * DIM), dim=-1) for _ in range(2))
    cos, sin = rotary_angles(LENGTH, 2 * DIM, dtype=torch.float64)
    omega = 10000.0 ** (-torch.arange(DIM, dtype=torch.float64) / DIM)
    zero, times = torch.zeros(HEADS, dtype=torch.float64), torch.arange(LENGTH)
    p = dynamics(mu=zero, sigma2=zero, omega=-omega.expand(HEADS, -1))
    residual = isotropic_residual(query, key, p.omega, p.mu, times)
    dt = (times[:, None] - times).clamp_min(0).double()[None, None]
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    found = filter_logits(residual, dt, p, robust=False).masked_fill(future, -math.inf).softmax(-1)
    c = p.tau**2 / (p.nu * DIM * (p.eta2 + p.gamma2))
    rotated = [apply_rotary(t, cos, sin) for t in (query, key)]
    identity = torch.eye(LENGTH, dtype=torch.float64).expand(2, HEADS, -1, -1)
    scaled = rotated[0] * (2 * c)[:, None, None]
    expected = F.scaled_dot_product_attention(scaled, rotated[1], identity, is_causal=True, scale=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.paper("afa")
def test_inner_product_alone_is_dot_product_attention() -> None:
    """``full_residual=False``, no bias: ``softmax(2 c E Re(q~^* k~))`` for queries and keys of any length, and with
    fixed rotations those of rotary positions."""
    made = layer(
        robust=False,
        full_residual=False,
        additive_bias=None,
        multiplicative_bias=None,
        learn_rotations=False,
        gate=None,
    )
    x, p = normal(2, LENGTH, WIDTH), made.dynamics
    turns = 10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) * 2 / DIM)
    torch.testing.assert_close(p.omega[1, ::2], turns)
    torch.testing.assert_close(p.omega[1, 1::2], -turns)
    query, key, _ = (as_complex(t) for t in made.project(x))
    place = torch.arange(LENGTH, dtype=torch.float64)[:, None]
    query, key = (t * torch.polar(torch.ones_like(p.omega), -p.omega)[:, None] ** place for t in (query, key))
    gap = (place - place.T).clamp_min(0)
    scores = (query @ key.mH).real * torch.exp(p.mu[:, None, None] * gap)
    scores = scores * (2 * p.tau**2 / (p.nu * DIM * (p.eta2 + p.gamma2)))[:, None, None]
    expected = scores.masked_fill(place < place.T, -math.inf).softmax(-1)
    torch.testing.assert_close(made.filtered(x).attention, expected)


@pytest.mark.paper("afa")
def test_robust_logits_tend_to_gaussian_ones() -> None:
    """The misfit in units of 1 / nu: the difference falls as 1 / nu."""
    residual = 5 * torch.rand(1, HEADS, 4, 4, dtype=torch.float64)
    dt = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    last, some = math.inf, dynamics(tau=torch.ones(HEADS, dtype=torch.float64))
    for nu in (1e1, 1e2, 1e3, 1e4):
        p = some._replace(nu=torch.full((HEADS,), nu, dtype=torch.float64))
        base = filter_logits(torch.zeros_like(residual), dt, p)
        robust, gaussian = ((filter_logits(residual, dt, p, robust=kind) - base) * nu for kind in (True, False))
        error = float((robust - gaussian).abs().max())
        assert float(gaussian.abs().max()) > 0.5 and error < last / 5
        last = error
    assert last < 1e-2


@pytest.mark.paper("afa")
@pytest.mark.parametrize("shared", [True, False])
def test_fast_residual_is_the_pulled_forward_difference(shared: bool) -> None:
    query, key = normal(2, HEADS, LENGTH, 2 * DIM), normal(2, HEADS, LENGTH, 2 * DIM)
    times = torch.rand(LENGTH if shared else 2 * LENGTH, dtype=torch.float64).view(-1, LENGTH).cumsum(-1)
    p = dynamics()
    given = times[0] if shared else times
    fast = isotropic_residual(query, key, p.omega, p.mu, given)
    pulled = as_complex(pull_forward(key, p.omega, p.mu, given))
    for b, h, i in itertools.product(range(2), range(HEADS), range(LENGTH)):
        clock = times[0 if shared else b]
        for j in range(i + 1):
            moved = torch.exp(torch.complex(p.mu[h].expand(DIM), p.omega[h]) * (clock[i] - clock[j]))
            moved = moved * as_complex(key)[b, h, j]
            torch.testing.assert_close(pulled[b, h, i, j], moved)
            expected = (as_complex(query)[b, h, i] - moved).abs().square().sum()
            torch.testing.assert_close(fast[b, h, i, j], expected)


@pytest.mark.paper("afa")
@pytest.mark.parametrize("robust", [True, False])
def test_isotropic_is_the_tensor_form_with_equal_eigenvalues(robust: bool) -> None:
    made = layer(robust=robust, gate=None)
    x, times = normal(2, LENGTH, WIDTH), torch.rand(LENGTH, dtype=torch.float64).cumsum(0)
    p = made.dynamics
    wide = {name: getattr(p, name)[:, None].expand(-1, DIM) for name in ("mu", "sigma2", "eta2", "gamma2")}
    estimates, weights = tensor_afa(*made.project(x), times, p._replace(**wide), robust=robust)
    found = made.filtered(x, times)
    torch.testing.assert_close(estimates, found.estimates)
    torch.testing.assert_close(weights, found.attention[..., None].expand_as(weights))
    # And with unequal ones it is another thing.
    other = p._replace(**{**wide, "mu": wide["mu"] * torch.linspace(0.5, 2, DIM, dtype=torch.float64)})
    assert float((tensor_afa(*made.project(x), times, other)[1].std(-1)).max().detach()) > 1e-3


@pytest.mark.paper("afa")
def test_tensor_form_by_the_formula() -> None:
    query, key, value = (normal(1, 1, 4, 4) for _ in range(3))
    times = torch.tensor([0.0, 0.5, 0.6, 2.0], dtype=torch.float64)
    wide = {name: 0.2 + torch.rand(1, 2, dtype=torch.float64) for name in ("sigma2", "eta2", "gamma2")}
    p = dynamics(1, 2, mu=-torch.rand(1, 2, dtype=torch.float64), **wide)
    estimates, weights = tensor_afa(query, key, value, times, p)
    q, k, v = (as_complex(t)[0, 0] for t in (query, key, value))
    for i in range(4):
        raw, moved = [], []
        for j in range(i + 1):
            dt = float(times[i] - times[j])
            forward = torch.exp(torch.complex(p.mu[0], p.omega[0]) * dt)
            variance = p.sigma2[0] * torch.expm1(2 * p.mu[0] * dt) / (2 * p.mu[0])
            variance = variance + p.eta2[0] * torch.exp(2 * p.mu[0] * dt) + p.gamma2[0]
            misfit = ((q[i] - forward * k[j]).abs() ** 2 / variance).sum() / (p.nu[0] * 2)
            raw.append((1 / (1 + misfit) / variance) ** (p.tau[0] ** 2))
            moved.append(forward * v[j])
        share = torch.stack(raw) / torch.stack(raw).sum(0)
        torch.testing.assert_close(weights[0, 0, i, : i + 1], share)
        torch.testing.assert_close(as_complex(estimates)[0, 0, i], (share * torch.stack(moved)).sum(0))


@pytest.mark.paper("afa")
@pytest.mark.parametrize("options", [{}, {"gate": "precision", "predict_next": True}, {"rotate_values": False}])
def test_shifting_all_times_changes_nothing(options: dict[str, Any]) -> None:
    made, x = layer(**options), normal(2, LENGTH, WIDTH)
    times = torch.rand(2, LENGTH, dtype=torch.float64).cumsum(-1)
    torch.testing.assert_close(made(x, times + 1000), made(x, times), rtol=0, atol=1e-10)
    torch.testing.assert_close(made(x, torch.arange(LENGTH) + 5), made(x), rtol=0, atol=1e-12)
    assert float((made(x, 2 * times) - made(x, times)).abs().max().detach()) > 1e-3


@pytest.mark.paper("afa")
@pytest.mark.parametrize("gate", ["learned", "precision", None])
def test_causal(gate: Any) -> None:
    made, x, times = layer(gate=gate), normal(2, LENGTH, WIDTH), torch.arange(LENGTH).double()
    changed, later = x.clone(), times.clone()
    changed[:, 5:], later[5:] = 3 * normal(2, 4, WIDTH), later[5:] + 7
    torch.testing.assert_close(made(changed, later)[:, :5], made(x, times)[:, :5], rtol=0, atol=1e-12)
    assert not bool(made.filtered(x).attention.triu(1).any())


@pytest.mark.paper("afa")
@pytest.mark.parametrize("robust", [True, False])
def test_a_noise_free_system_is_followed_exactly(robust: bool) -> None:
    """Irregular times, true decay and frequency: every key pulled forward is the state, and so is the estimate."""
    matrix = torch.block_diag(*(spiral(-0.1, w).matrix for w in (1.0, 0.3)))
    rotation = torch.linalg.qr(normal(4, 4))[0]
    matrix = rotation @ matrix @ rotation.T
    times = torch.rand(12, dtype=torch.float64).cumsum(0)
    states, measured, _ = linear_sde(matrix, (0.0, 0.0), trajectories=5, times=times)
    assert torch.equal(states, measured)
    made = AdaptiveFilterAttention.of_system(matrix, 0.0, 0.0, max_len=40, robust=robust)
    found = made.filtered(measured, times)
    torch.testing.assert_close(found.output, states, rtol=0, atol=1e-10)
    assert float(found.attention[0, 0, -1].max().detach()) < 0.9
    query, key, _ = made.project(measured)
    pulled = pull_forward(key, made.dynamics.omega, made.dynamics.mu, times)
    past = torch.ones(12, 12, dtype=torch.bool).tril()
    difference = (pulled - query[:, :, :, None])[:, :, past]
    assert float(difference.abs().max().detach()) < 1e-10
    ahead = AdaptiveFilterAttention.of_system(matrix, 0.0, 0.0, max_len=40, robust=robust, predict_next=True)
    expected = states @ torch.linalg.matrix_exp(matrix).T
    torch.testing.assert_close(ahead(measured, times), expected, rtol=0, atol=1e-10)


@pytest.mark.paper("afa")
def test_without_process_noise_and_residuals_it_is_the_kalman_filter() -> None:
    """Precision-weighted maximum likelihood: with nothing but measurement noise, pulled-forward measurements are
    independent, and the estimate is the Kalman filter's from an open prior."""
    _, measured, times = linear_sde("spiral", (0.0, 0.3), trajectories=6, length=20)
    matrix = spiral().matrix
    assert matrix is not None
    made = AdaptiveFilterAttention.of_system(matrix, 0.0, 0.3, step=0.1, nu=1e12, max_len=20)
    with torch.no_grad():
        made.anchor.fill_(-40)
    # The anchor's variance is at least 1e-5, beside 0.09.
    torch.testing.assert_close(made(measured), kalman_filter(measured, "spiral", (0.0, 0.3)).means, rtol=0, atol=1e-4)
    # In physical time as in steps.
    slow = AdaptiveFilterAttention.of_system(matrix, 0.0, 0.3, nu=1e12, max_len=20)
    torch.testing.assert_close(slow(measured, times), made(measured), rtol=0, atol=1e-9)


@pytest.mark.paper("afa")
def test_frames_gates_and_prediction() -> None:
    """``rotate_values=False`` stays in the turning frame; the gate mixes in the value; prediction moves on by one."""
    made = layer(gate=None)
    x, times = normal(2, LENGTH, WIDTH), torch.rand(LENGTH, dtype=torch.float64).cumsum(0)
    others = {
        name: layer(**options)
        for name, options in (
            ("frame", {"gate": None, "rotate_values": False}),
            ("ahead", {"gate": None, "predict_next": True}),
            ("learned", {}),
            ("precision", {"gate": "precision"}),
        )
    }
    for other in others.values():
        other.load_state_dict(made.state_dict(), strict=False)
    p, value = made.dynamics, as_complex(made.project(x)[2])
    plain = made.filtered(x, times)
    state = as_complex(plain.estimates)
    found = {name: as_complex(other.filtered(x, times).estimates) for name, other in others.items()}
    turned = torch.polar(
        torch.ones(HEADS, LENGTH, DIM, dtype=torch.float64), -p.omega[:, None] * (times - times[0])[:, None]
    )
    torch.testing.assert_close(found["frame"], state * turned)
    one = torch.exp(torch.complex(p.mu[:, None].expand(-1, DIM), p.omega))[:, None]
    torch.testing.assert_close(found["ahead"], state * one)
    gate = others["learned"].gate
    assert gate is not None
    torch.testing.assert_close(found["learned"], gate.sigmoid() * state + (1 - gate.sigmoid()) * value)
    # The total precision is the sum of unnormalised weights, which the tensor form's variances give again.
    precise = others["precision"]
    query, key, _ = made.project(x)
    residual = isotropic_residual(query, key, p.omega, p.mu, times)
    dt = (times[:, None] - times).clamp_min(0)[None, None]
    total = filter_logits(residual, dt, p).exp().tril().sum(-1, keepdim=True)
    assert precise.gate is not None and precise.gate_scale is not None
    prior = precise.gate.square() + 1e-5
    power = total ** precise.gate_scale.square()
    share = power / (power + prior)
    torch.testing.assert_close(found["precision"], share * state + (1 - share) * value)


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "precision", "predict_next": True},
        {"gate": None, "rotate_values": False, "v_dim": 2, "additive_bias": None, "multiplicative_bias": "linear"},
        {"robust": False, "full_residual": False, "additive_bias": "linear", "learn_rotations": False},
    ],
)
def test_gradients_of_the_options(options: dict[str, Any]) -> None:
    check_gradient(layer(**options), normal(1, LENGTH, WIDTH))


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.found = max(self.found, tensor.numel())
        return out


@pytest.mark.paper("afa")
def test_memory_is_linear_in_length_and_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(gate="precision")
    x = normal(2, 40, WIDTH).requires_grad_()
    parameters = list(made.parameters())
    whole = made(x)
    grads = torch.autograd.grad(whole.square().sum(), [x, *parameters])
    monkeypatch.setattr("regard.kernels.scored._TILE", 1 << 14)
    tiled = made(x)
    torch.testing.assert_close(tiled, whole)
    # Regular times that are given are not known to be regular.
    torch.testing.assert_close(made(x, torch.arange(40)), whole)
    for a, b in zip(torch.autograd.grad(tiled.square().sum(), [x, *parameters]), grads, strict=True):
        torch.testing.assert_close(a, b)
    largest = []
    for length in (100, 200):
        with _Largest() as watch:
            made(normal(2, length, WIDTH)).sum().backward()
        largest.append(watch.found)
    assert largest[1] <= 2 * largest[0] < 2 * HEADS * 100**2


@pytest.mark.paper("afa")
def test_parametrisation_at_the_start() -> None:
    made = AdaptiveFilterAttention(32, 64, 6, 8, max_len=50)
    p = made.dynamics
    assert p.omega.shape == (64, 6) and p.omega_v.shape == (64, 8)
    torch.testing.assert_close(p.omega[:, ::2], -p.omega[:, 1::2])
    assert bool((p.mu < 0).all()) and float(p.mu.min().detach()) > -0.1 - 2e-5
    torch.testing.assert_close(p.mu, (torch.sigmoid(made.decay) - 1) * 10 / 100 - 1e-5)
    assert made.frequency is not None
    torch.testing.assert_close(p.omega[:, ::2], made.frequency * 10 * 2 * math.pi / 100)
    assert bool((p.tau == 1).all()) and float(p.nu[0].detach()) == pytest.approx(math.log(1 + math.e), abs=2e-5)
    # Complex weights of variance 1 / (real + complex width) a part, without bias.
    for linear, total in ((made.query, 32 + 384), (made.value, 32 + 512), (made.out, 32 + 512)):
        assert float(linear.weight.std().detach()) == pytest.approx(total**-0.5, rel=0.05)
        assert not bool(linear.bias.any())


def test_masks_and_sequences_with_nothing_to_see() -> None:
    made, x = layer(gate="precision"), normal(2, LENGTH, WIDTH)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, :3] = False
    out = made(x, mask=KeyPadding(valid))
    torch.testing.assert_close(out[:1, 3:], made(x[:1, 3:]))
    leaf = x.clone().requires_grad_()
    made(leaf, mask=torch.zeros(LENGTH, LENGTH, dtype=torch.bool)).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    empty = layer(gate=None).filtered(x, mask=KeyPadding(valid)).estimates
    assert not bool(empty[0, :, :3].any())


def test_hosts_and_errors() -> None:
    made = build("afa", {}, embed_dim=32, num_heads=4, num_kv_heads=4, layer_index=1, num_layers=2)
    assert isinstance(made, AdaptiveFilterAttention) and (made.qk_dim, made.v_dim) == (8, 8)
    wrong: tuple[dict[str, Any], ...] = (
        {"qk_dim": 3},
        {"v_dim": 0, "qk_dim": 5},
        {"max_len": 0},
        {"additive_bias": "alibi"},
        {"multiplicative_bias": "none"},
        {"gate": "sigmoid"},
        {"full_residual": False},
    )
    for options in wrong:
        with pytest.raises(OptionError):
            AdaptiveFilterAttention(16, 4, **options)
    x = normal(2, LENGTH, WIDTH)
    with pytest.raises(ShapeError, match="batch, length"):
        layer()(normal(2, LENGTH, 5))
    with pytest.raises(ShapeError, match="times"):
        layer()(x, torch.arange(4))
    with pytest.raises(OptionError, match="sort"):
        layer()(x, -torch.arange(LENGTH))
    with pytest.raises(UnsupportedMaskError):
        layer()(x, mask=torch.zeros(LENGTH, LENGTH))
    with pytest.raises(OptionError, match="one decay"):
        AdaptiveFilterAttention.of_system(torch.diag(torch.tensor([-0.1, -0.2])), 0.1, 0.1, max_len=10)
    with pytest.raises(OptionError, match="max_len"):
        AdaptiveFilterAttention.of_system(-torch.eye(2), 0.1, 0.1)
    still = AdaptiveFilterAttention.of_system(torch.zeros(2, 2).double(), 0.1, 0.2)
    assert float(still.dynamics.mu.detach()) == pytest.approx(-1e-5, rel=1e-3)
    assert float(still.dynamics.eta2.detach()) == pytest.approx(0.04) and float(
        still.dynamics.sigma2.detach()
    ) == pytest.approx(0.01)
