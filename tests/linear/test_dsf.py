from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import LinearState
from regard.layers.feature_maps import poly_width, taylor_exp
from regard.layers.ssm import log_reversed_sigmoid, ssd_scan
from regard.linear.dsf import LTV, separable_ltv, to_ltv
from regard.linear.dsf_mixers import (
    QLSTM,
    RGLRU,
    S6,
    SSD,
    NormalizedAttention,
    SeparableAttention,
    StateMixer,
    normalized_attention,
)
from regard.masks import Causal, KeyPadding

LENGTH, DIM = 23, 12
LAYERS = {
    "linear": lambda: SeparableAttention(DIM, 3, 5),
    "unnormalised": lambda: SeparableAttention(DIM, 3, 5, normalizer="none"),
    "taylor": lambda: SeparableAttention(DIM, 2, 3, kernel="taylor", kernel_size=3, gate="silu"),
    "normalized": lambda: NormalizedAttention(DIM, 2, 5),
    "s6": lambda: S6(DIM, 4),
    "ssd": lambda: SSD(DIM, 2, 4),
    "rg_lru": lambda: RGLRU(DIM, 3),
    "qlstm": lambda: QLSTM(DIM, reversed_sigmoid=False),
    "qlstm-reversed": lambda: QLSTM(DIM),
}


def layer_of(name: str) -> StateMixer:
    """In float64, with generic parameters: step sizes start so small that a state would hardly fade."""
    layer: StateMixer = LAYERS[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.float64)


def projected(layer: SeparableAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    core = layer.core
    heads = core.num_heads
    query, key, value = (
        linear(x).unflatten(-1, (heads, -1)).transpose(1, 2) for linear in (core.query, core.key, core.value)
    )
    return query, key, value


def joined(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(2)


@pytest.mark.paper("dsf")
@pytest.mark.parametrize("placement", ["readout", "state"])
@pytest.mark.parametrize("mode", ["recurrent", "scan", "matrix"])
def test_linear_attention_in_all_forms(mode: str, placement: str) -> None:
    """Against the masked matrix of scores, divided by its rows' sums."""
    layer, x = layer_of("linear"), tokens()
    query, key, value = projected(layer, x)
    scores = ((F.elu(query) + 1) @ (F.elu(key) + 1).transpose(-1, -2)).tril()
    expected = joined(scores / (scores.sum(-1, keepdim=True) + 1e-6) @ value)
    system = to_ltv(layer, x, placement=placement)
    torch.testing.assert_close(system.run(mode), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), layer.out(expected), rtol=0, atol=1e-12)
    assert system.structure == {"readout": "identity", "state": "scalar"}[placement]


@pytest.mark.paper("dsf")
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_its_system(name: str) -> None:
    """The kernels against the container, in three forms, and stretch by stretch with a state."""
    layer, x = layer_of(name), tokens()
    _, gate, _ = layer.drive(x)
    system, out = to_ltv(layer, x), layer(x)
    for mode in ("recurrent", "scan", "matrix"):
        torch.testing.assert_close(layer.readout(system.run(mode), gate), out, rtol=0, atol=1e-11)
    state, parts = layer.init_state(2, like=x), []
    for piece in x.split((9, 1, 13), 1):
        part, state = layer.step(piece, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), out, rtol=0, atol=1e-11)


@pytest.mark.paper("dsf")
@pytest.mark.parametrize("name", LAYERS)
def test_matrix_is_causal_and_mixes_tokens_per_channel(name: str) -> None:
    layer, x = layer_of(name), tokens()
    system = to_ltv(layer, x)
    matrix = system.attention_matrix()
    assert not bool(matrix.triu(1).any())
    assert bool((matrix.diagonal(dim1=-2, dim2=-1) != 0).all())
    # Column j is what a unit input at token j alone gives.
    pulse = torch.zeros_like(system.u)
    pulse[:, 7] = 1
    heads, channels = system.u.shape[2:]
    answer = system.run("recurrent", pulse).unflatten(-1, (heads, channels))
    torch.testing.assert_close(answer, matrix[..., 7].expand(-1, -1, channels, -1).movedim(-1, 1), rtol=0, atol=1e-12)


@pytest.mark.paper("dsf")
@pytest.mark.parametrize("name", LAYERS)
def test_state_size_is_the_memory_of_the_recurrence(name: str) -> None:
    layer, x = layer_of(name), tokens()
    system = to_ltv(layer, x)
    width = system.u.shape[2] * system.u.shape[3]
    _, last = system.advance("recurrent")
    assert last is not None and last[0].numel() == system.state_size == system.expansion * width
    expansion = {"linear": 5, "unnormalised": 5, "normalized": 5, "taylor": poly_width(3, 2), "s6": 4, "ssd": 4}
    assert system.expansion == expansion.get(name, 1)
    kept = layer.step(x, layer.init_state(2, like=x))[1].inner
    kept = kept.sum if isinstance(kept, LinearState) else kept
    assert kept[0].numel() == layer.state_size
    # The sum of keys, by which linear attention divides, is one more value per head.
    keys = system.expansion * system.u.shape[2] if name in ("linear", "taylor") else 0
    assert layer.state_size == system.state_size + keys


@pytest.mark.paper("dsf")
def test_decay_of_ssd_is_a_reversed_sigmoid() -> None:
    z = torch.linspace(-20, 20, 401, dtype=torch.float64)
    for a in (0.3, 1.0, 7.5):
        torch.testing.assert_close(torch.exp(-a * F.softplus(z)), torch.sigmoid(-z) ** a, rtol=0, atol=1e-14)
        torch.testing.assert_close(log_reversed_sigmoid(z, a).exp(), torch.sigmoid(-z) ** a, rtol=0, atol=1e-14)
    # No underflow on the way: the gate of a large number is known where its sigmoid is zero.
    assert float(log_reversed_sigmoid(torch.tensor(1e4), 2.0)) == -2e4
    layer, x = layer_of("ssd"), tokens()
    core, u = layer.core, layer.drive(x)[0]
    gate = torch.sigmoid(-core.step_size(u)) ** core.log_a.exp()
    torch.testing.assert_close(to_ltv(layer, x).A[..., 0, 0], gate, rtol=0, atol=1e-14)


@pytest.mark.paper("dsf")
def test_ssd_and_normalized_attention_contain_unnormalised_linear_attention() -> None:
    """SSD with ``a = 0`` and ``Delta = 1``; normalized attention with ``w = 0``."""
    query, key, value = (torch.randn(2, 1, LENGTH, size, dtype=torch.float64) for size in (5, 5, 8))
    expected = (query @ key.transpose(-1, -2)).tril() @ value
    delta, none = torch.ones(2, LENGTH, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    heads = value.transpose(1, 2).reshape(2, LENGTH, 2, 4)
    out, _ = ssd_scan(heads, delta, none, key[:, 0], query[:, 0])
    torch.testing.assert_close(out.flatten(2), joined(expected), rtol=0, atol=1e-12)
    out, _ = normalized_attention(query, key, value, torch.zeros(2, 1, LENGTH, dtype=torch.float64))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    layer = NormalizedAttention(DIM, 2, 5).double()
    for parameter in layer.core.log_eta.parameters():
        nn.init.zeros_(parameter)
    x = tokens()
    query, key, value = projected(layer, x)
    torch.testing.assert_close(
        layer(x), layer.out(joined((query @ key.transpose(-1, -2)).tril() @ value)), rtol=0, atol=1e-12
    )


@pytest.mark.paper("dsf")
def test_normaliser_that_absorbs_the_decay_makes_linear_attention_of_ssd() -> None:
    """With ``eta_{i-1} / eta_i = exp(Delta_i A)`` attention's system is SSD's: what separates them is ``eta``."""
    u = torch.randn(2, LENGTH, 1, 4, dtype=torch.float64)
    b, c = (torch.randn(2, LENGTH, 5, dtype=torch.float64) for _ in range(2))
    delta, a = torch.rand(2, LENGTH, 1, dtype=torch.float64), torch.tensor([-0.7], dtype=torch.float64)
    expected, _ = ssd_scan(u, delta, a, b, c)
    eta = (-(delta * a).cumsum(1)).exp().transpose(1, 2)
    key = (delta * b)[:, None] * eta[..., None]
    system = separable_ltv(c[:, None], key, u.transpose(1, 2), eta, placement="state")
    torch.testing.assert_close(system.run("recurrent"), expected.flatten(2), rtol=0, atol=1e-12)


@pytest.mark.paper("dsf")
def test_normalized_attention_divides_by_what_it_learned() -> None:
    layer, x = layer_of("normalized"), tokens()
    query, key, value = projected(layer, x)
    eta = layer.core.log_eta(x).exp().transpose(1, 2)
    rows = []
    for i in range(LENGTH):
        scores = torch.einsum("bhd,bhjd->bhj", query[:, :, i], key[:, :, : i + 1])
        rows.append(torch.einsum("bhj,bhjv->bhv", scores, value[:, :, : i + 1]) / eta[:, :, i, None])
    torch.testing.assert_close(layer(x), layer.out(joined(torch.stack(rows, 2))), rtol=0, atol=1e-12)
    # Not even a normaliser far out of range overflows.
    out, _ = normalized_attention(query, key, value, torch.full((2, 2, LENGTH), -1e4, dtype=torch.float64))
    assert bool(torch.isfinite(out).all())


@pytest.mark.paper("dsf")
@pytest.mark.parametrize("reversed_sigmoid", [False, True])
def test_qlstm_is_the_gated_loop(reversed_sigmoid: bool) -> None:
    layer = layer_of("qlstm-reversed" if reversed_sigmoid else "qlstm")
    x = tokens()
    core = layer.core
    both = x @ layer.enter.weight.T
    inner, gate = both[..., : 2 * DIM], both[..., 2 * DIM :]
    padded = F.pad(inner, (0, 0, 3, 0))
    taps = layer.conv.weight
    inner = sum(padded[:, j : j + LENGTH] * taps[:, j] for j in range(4)) + layer.conv.bias
    forget, admit, show = (inner @ core.gates.weight.T + core.gates.bias).split(2 * DIM, -1)
    state, rows = torch.zeros(2, 2 * DIM, dtype=torch.float64), []
    for t in range(LENGTH):
        keep = (
            torch.sigmoid(-forget[:, t]) ** core.alpha.clamp_min(0) if reversed_sigmoid else torch.sigmoid(forget[:, t])
        )
        state = keep * state + torch.sigmoid(admit[:, t]) * inner[:, t]
        rows.append(torch.sigmoid(show[:, t]) * state)
    expected = (torch.stack(rows, 1) * F.gelu(gate)) @ layer.out.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)


@pytest.mark.paper("dsf")
def test_reversed_gate_keeps_everything_where_alpha_is_not_positive() -> None:
    layer, x = layer_of("qlstm-reversed"), tokens()
    assert QLSTM(DIM).core.alpha.item() == 1.0
    with torch.no_grad():
        layer.core.alpha.fill_(-0.5)
    assert bool((to_ltv(layer, x).A == 1).all())


@pytest.mark.paper("dsf")
def test_taylor_map_comes_as_close_to_softmax_as_its_degree() -> None:
    """On bounded scores the error of exp falls with every degree, and so does that of the layer's system."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * (2 * torch.rand(64, 64, generator=generator, dtype=torch.float64) - 1)
    degrees = (1, 2, 4, 8, 12)
    errors = [float((taylor_exp(scores, p) - scores.exp()).abs().max()) for p in degrees]
    assert all(later < before for before, later in pairwise(errors)) and errors[-1] < 1e-3
    layer = SeparableAttention(DIM, 2, 3, kernel="softmax").double()
    x = tokens(12)
    query, key, value = projected(layer, x)
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(layer(x), layer.out(joined(exact)), rtol=0, atol=1e-12)
    gaps = []
    for p in degrees:
        system = to_ltv(layer, x, degree=p)
        assert system.expansion == poly_width(3, p)  # fewer than sum of d_k^p: equal products stand once
        gaps.append((system.run() - joined(exact)).abs().max().item())
    assert all(later < before for before, later in pairwise(gaps)) and gaps[-1] < 1e-5


@pytest.mark.paper("dsf")
def test_taylor_kernel_is_that_series() -> None:
    layer, x = SeparableAttention(DIM, 2, 3, kernel="taylor", degree=4).double(), tokens()
    query, key, value = projected(layer, x)
    scores = taylor_exp(query @ key.transpose(-1, -2) * 3**-0.5, 4).tril()
    expected = joined(scores @ value / (scores.sum(-1, keepdim=True) + 1e-6))
    torch.testing.assert_close(layer(x), layer.out(expected), rtol=0, atol=1e-11)


@pytest.mark.paper("dsf")
def test_softmax_has_full_rank_where_inner_products_have_that_of_their_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (2 * torch.randn(16, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = query @ key.T
    assert int(torch.linalg.matrix_rank(plain)) == 4
    assert int(torch.linalg.matrix_rank(plain.exp())) == 16
    ranks = [int(torch.linalg.matrix_rank(taylor_exp(plain, p))) for p in (0, 1, 2)]
    assert ranks == [1, poly_width(4, 1), poly_width(4, 2)]  # the state expansions, as long as length exceeds them


@pytest.mark.paper("dsf")
@pytest.mark.parametrize("name", [*LAYERS, "softmax"])
def test_padding_leaves_the_state_as_it_was(name: str) -> None:
    """Tokens behind left padding give the numbers of a sequence without it."""
    layer = SeparableAttention(DIM, 3, 5, kernel="softmax").double() if name == "softmax" else layer_of(name)
    x = tokens()
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[:, :6] = False
    out = layer(x, mask=KeyPadding(valid))
    torch.testing.assert_close(out[:, 6:], layer(x[:, 6:]), rtol=0, atol=1e-11)
    with pytest.raises(UnsupportedMaskError):
        layer(x, mask=Causal())


def test_decoding_of_softmax_and_moved_states() -> None:
    layer, x = SeparableAttention(DIM, 3, 5, kernel="softmax").double(), tokens()
    state, parts = layer.init_state(2, like=x), []
    for piece in x.split((9, 1, 13), 1):
        part, state = layer.step(piece, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=0, atol=1e-12)
    assert layer.state_size is None
    # A state is not changed by what follows: from a copy and from itself one goes on alike.
    layer = layer_of("s6")
    with torch.no_grad():
        _, state = layer.step(x[:, :9], layer.init_state(2, like=x))
    before = copy.deepcopy(state)
    first = layer.step(x[:, 9:], state)[0]
    torch.testing.assert_close(layer.step(x[:, 9:], before)[0], first, rtol=0, atol=0)


def test_a_system_of_ones_own() -> None:
    """A negative, growing and vanishing ``A``, a ``D``, an initial state."""
    a = torch.tensor([-1.3, 0.5, 0.0], dtype=torch.float64).expand(1, 1, 1, 1, 3)
    u = torch.randn(2, 9, 1, 2, dtype=torch.float64)
    b, c = (torch.randn(2, 9, 1, 2, 3, dtype=torch.float64) for _ in range(2))
    d = torch.randn(1, 1, 1, 2, dtype=torch.float64)
    system = LTV(a, b, c, d, u)
    assert system.structure == "diagonal" and system.state_size == 6
    start = torch.randn_like(system.init_state())
    h, rows = start, []
    for t in range(9):
        h = a[0, 0] * h + b[:, t] * u[:, t, ..., None]
        rows.append(((c[:, t] * h).sum(-1) + d[:, 0] * u[:, t]).flatten(1))
    for mode in ("recurrent", "scan"):
        y, last = system.advance(mode, state=start)
        torch.testing.assert_close(y, torch.stack(rows, 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(last, h, rtol=0, atol=1e-12)
    torch.testing.assert_close(system.run("matrix"), system.run("recurrent"), rtol=0, atol=1e-12)


def test_gradients_reach_through_every_form() -> None:
    layer, x = layer_of("ssd"), tokens()
    wanted = list(layer.core.parameters())
    grads = [
        torch.autograd.grad(to_ltv(layer, x).run(mode).square().sum(), wanted)
        for mode in ("recurrent", "scan", "matrix")
    ]
    direct = torch.autograd.grad(layer.core(layer.drive(x)[0])[0].square().sum(), wanted)
    for form in grads:
        for ours, theirs in zip(form, direct, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_wrong_use_is_told() -> None:
    x = tokens()
    with pytest.raises(OptionError, match="infinite"):
        to_ltv(SeparableAttention(DIM, 3, kernel="softmax").double(), x)
    with pytest.raises(OptionError, match="finite"):
        to_ltv(layer_of("linear"), x, degree=2)
    with pytest.raises(OptionError, match="neither"):
        to_ltv(layer_of("s6"), x, degree=2)
    with pytest.raises(OptionError, match="no linear time-varying"):
        to_ltv(nn.Linear(DIM, DIM).double(), x)
    system = to_ltv(layer_of("ssd"), x)
    with pytest.raises(OptionError, match="mode"):
        system.run("fast")
    with pytest.raises(ShapeError, match="inputs"):
        system.run(u=x)
    with pytest.raises(ShapeError, match="C "):
        LTV(system.A, system.B, system.C[:, :5], None, system.u)
    with pytest.raises(OptionError, match="from nothing"):
        system.run("matrix", state=system.init_state())
    query = torch.zeros(1, 1, 4, 3)
    with pytest.raises(OptionError, match="placement"):
        separable_ltv(query, query, query, placement="nowhere")
    with pytest.raises(ShapeError, match="eta"):
        separable_ltv(query, query, query, query)
    with pytest.raises(ShapeError):
        separable_ltv(query, query[:, :, :2], query)
    with pytest.raises(ShapeError, match="normalizer"):
        normalized_attention(query, query, query, query)
    with pytest.raises(ShapeError, match="takes"):
        layer_of("s6")(x[..., :5])
    for build in (
        lambda: SeparableAttention(DIM, 0),
        lambda: QLSTM(DIM, 0),
        lambda: RGLRU(DIM, expansion=0),
        lambda: SeparableAttention(DIM, 5),
        lambda: SeparableAttention(DIM, 3, kernel="cosine"),
        lambda: SeparableAttention(DIM, 3, kernel="softmax", normalizer="exp"),
        lambda: SeparableAttention(DIM, 3, 0),
        lambda: S6(DIM, gate="tanh"),
        lambda: S6(DIM, kernel_size=-1),
        lambda: S6(DIM, 0),
        lambda: SSD(DIM, 5),
        lambda: RGLRU(DIM, 5),
    ):
        with pytest.raises(OptionError):
            build()
    with pytest.raises(UnsupportedPatternError):
        QLSTM(DIM)(x.float(), causal=False)
