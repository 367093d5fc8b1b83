"""Recurrences of layers/ssm.py and layers/gated_recurrence.py, and the convolution before them, against their loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import LinearState
from regard.layers.causal_conv import CausalConv
from regard.layers.gated_recurrence import QuasiLSTM, RealGatedLRU
from regard.layers.ssm import ScalarSSM, SelectiveSSM, ssd_scan, step_size_bias


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def moved(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_causal_convolution_is_torchs_cut_to_the_past(kernel_size: int) -> None:
    x, conv = draw(2, 11, 3), CausalConv(3, kernel_size).double()
    theirs = nn.Conv1d(3, 3, kernel_size, padding=kernel_size - 1, groups=3).double()
    theirs.load_state_dict({"weight": conv.weight[:, None], "bias": conv.bias})
    expected = theirs(x.mT)[..., :11].mT
    out, tail = conv(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    assert tail.shape == (2, kernel_size - 1, 3)
    first, tail = conv(x[:, :1])
    rest, _ = conv(x[:, 1:], tail)
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=0, atol=1e-14)
    with pytest.raises(OptionError):
        CausalConv(3, 0)


@pytest.mark.parametrize("backend", [None, "parallel", "chunked", "recurrent"])
def test_ssd_scan_is_the_loop(backend: str | None) -> None:
    u, b, c = draw(2, 19, 3, 4), draw(2, 19, 5), draw(2, 19, 5)
    delta, a, d = torch.rand(2, 19, 3, dtype=torch.float64), -torch.rand(3, dtype=torch.float64), draw(3)
    h, rows = torch.zeros(2, 3, 5, 4, dtype=torch.float64), []
    for t in range(19):
        fade = torch.exp(delta[:, t] * a)[..., None, None]
        h = fade * h + torch.einsum("bh,bn,bhp->bhnp", delta[:, t], b[:, t], u[:, t])
        rows.append(torch.einsum("bn,bhnp->bhp", c[:, t], h) + d[:, None] * u[:, t])
    out, state = ssd_scan(u, delta, a, b, c, d, chunk_size=8, backend=backend)
    torch.testing.assert_close(out, torch.stack(rows, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(state.sum, h, rtol=0, atol=1e-12)
    with pytest.raises(ShapeError):
        ssd_scan(u, delta[..., :2], a, b, c)


def test_selective_ssm_is_the_loop() -> None:
    core, u = moved(SelectiveSSM(6, 4, dt_rank=2).double()), draw(2, 19, 6)
    raw = u @ core.select.weight.T
    delta = F.softplus(raw[..., :2] @ core.step_size.weight.T + core.step_size.bias)
    b, c, a = raw[..., 2:6], raw[..., 6:], -core.log_a.exp()
    h, rows = torch.zeros(2, 6, 4, dtype=torch.float64), []
    for t in range(19):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        rows.append((h * c[:, t, None]).sum(-1) + core.skip * u[:, t])
    y, state = core(u)
    torch.testing.assert_close(y, torch.stack(rows, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(state, h, rtol=0, atol=1e-12)
    first, state = core(u[:, :7])
    torch.testing.assert_close(torch.cat((first, core(u[:, 7:], state)[0]), 1), y, rtol=0, atol=1e-12)


def test_scalar_ssm_is_selective_ssm_with_shared_numbers() -> None:
    core, u = moved(ScalarSSM(6, 2, 4).double()), draw(2, 19, 6)
    other = SelectiveSSM(6, 4, dt_rank=6).double()
    with torch.no_grad():
        other.select.weight.copy_(torch.cat((torch.eye(6, dtype=torch.float64), core.select.weight)))
        other.step_size.weight.copy_(core.step_size.weight.repeat_interleave(3, 0))
        other.step_size.bias.copy_(core.step_size.bias.repeat_interleave(3))
        other.log_a.copy_(core.log_a.repeat_interleave(3)[:, None].expand(6, 4))
        other.skip.copy_(core.skip.repeat_interleave(3))
    torch.testing.assert_close(core(u)[0], other(u)[0], rtol=0, atol=1e-12)


def test_rg_lru_is_the_loop() -> None:
    core, x = moved(RealGatedLRU(6, 2).double()), draw(2, 19, 6)
    recur, admit = torch.empty_like(x), torch.empty_like(x)
    for block in range(2):
        rows = slice(3 * block, 3 * block + 3)
        both = torch.sigmoid(x[..., rows] @ core.gates[block] + core.bias[block])
        recur[..., rows], admit[..., rows] = both[..., :3], both[..., 3:]
    h, out = torch.zeros(2, 6, dtype=torch.float64), []
    for t in range(19):
        # a = sigmoid(Lambda)^(8 r) with sigmoid(Lambda) = 1 / (1 + exp(rate))
        a = (1 / (1 + core.rate.exp())) ** (8 * recur[:, t])
        h = a * h + torch.sqrt(1 - a**2) * admit[:, t] * x[:, t]
        out.append(h)
    torch.testing.assert_close(core(x)[0], torch.stack(out, 1), rtol=0, atol=1e-12)


def test_rg_lru_has_finite_gradients_where_nothing_fades() -> None:
    core, x = RealGatedLRU(6), (1e4 * draw(1, 5, 6)).float().requires_grad_()
    core(x)[0].sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_initial_numbers() -> None:
    """Mamba's step sizes, S4D-real's A, Griffin's decays."""
    steps = F.softplus(step_size_bias(1000))
    assert 1e-3 * 0.99 <= float(steps.min()) < 2e-3 and 0.05 < float(steps.max()) <= 0.1 * 1.01
    core = SelectiveSSM(6, 4)
    torch.testing.assert_close(-core.dynamics(torch.zeros(1, 1, 6))[1], torch.arange(1.0, 5).expand(6, 4))
    slowest = (1 / (1 + RealGatedLRU(1000).rate.detach().exp())) ** 8
    assert 0.9 * 0.999 < float(slowest.min()) < 0.91 and 0.98 < float(slowest.max()) < 0.9995
    assert ScalarSSM(6, 3).log_a.exp().min().item() >= 1
    for build in (
        lambda: step_size_bias(3, 0.1, 0.01),
        lambda: SelectiveSSM(6, 0),
        lambda: ScalarSSM(6, 4),
        lambda: ScalarSSM(6, 2, a_range=(0.0, 1.0)),
        lambda: RealGatedLRU(6, 4),
    ):
        with pytest.raises(OptionError):
            build()


@pytest.mark.parametrize(
    "build", [lambda: SelectiveSSM(6, 4), lambda: ScalarSSM(6, 2, 4), lambda: RealGatedLRU(6), lambda: QuasiLSTM(6)]
)
def test_half_precision_keeps_its_state_in_float32(build: object) -> None:
    core = build().to(torch.bfloat16)  # type: ignore[operator]
    y, state = core(draw(2, 40, 6).to(torch.bfloat16))
    kept = state.sum if isinstance(state, LinearState) else state
    assert y.dtype == torch.bfloat16 and kept.dtype == torch.float32
