"""Linear attention in C++ against the loop over tokens, in float32 against float64."""

from __future__ import annotations

import pytest
import torch

from regard.errors import BackendError
from regard.kernels import linear_attention, native, use_backend
from tests.kernels.test_linear import looped

pytestmark = pytest.mark.skipif(not native.available(build=True), reason="no C++ compiler")

DECAYS = ["none", "head", "token", "channel"]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def inputs(length: int, kv_heads: int, dim: int, value_dim: int) -> list[torch.Tensor]:
    """Positive features of small sums, so that outputs and their normaliser are near one."""
    query, key = (torch.rand(2, heads, length, dim).add_(0.1) / dim for heads in (4, kv_heads))
    return [query, key, torch.randn(2, kv_heads, length, value_dim)]


def decay_of(kind: str, length: int, dim: int) -> torch.Tensor | None:
    shape = {"head": (4,), "token": (2, 4, length), "channel": (2, 4, length, dim)}
    return None if kind == "none" else -torch.rand(shape[kind])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    ("length", "kv_heads", "dim", "value_dim", "chunk"), [(1, 4, 6, 3, 64), (150, 2, 40, 33, 64), (700, 1, 16, 16, 7)]
)
def test_native_is_the_recurrence(
    decay: str, normalize: bool, length: int, kv_heads: int, dim: int, value_dim: int, chunk: int
) -> None:
    """Output, last state, and gradients of everything, a first state included; widths that fill no panel, chunks that
    divide nothing, more chunks than states are kept."""
    leaves = [t.requires_grad_() for t in inputs(length + 5, kv_heads, dim, value_dim)]
    g = decay_of(decay, length + 5, dim)
    extra = [] if g is None else [g.requires_grad_()]
    state, outs = None, []
    for part in (slice(0, 5), slice(5, length + 5)):
        here = g if g is None or g.dim() == 1 else g[:, :, part]
        out, state = linear_attention(
            *(t[:, :, part] for t in leaves),
            causal=True,
            log_decay=here,
            normalize=normalize,
            scale=1.5,
            state=state,
            chunk_size=chunk,
            backend="native",
        )
        outs.append(out)
    assert state is not None
    exact = [t.detach().double().requires_grad_() for t in (*leaves, *extra)]
    expected, last = looped(exact[0] * 1.5, *exact[1:3], exact[3] if extra else None, normalize)
    actual = torch.cat(outs, 2)
    torch.testing.assert_close(actual.double(), expected, **TOLERANCE)
    torch.testing.assert_close(state.sum.double(), last, **TOLERANCE)
    seeds = torch.randn_like(expected), torch.randn_like(last)
    found = torch.autograd.grad((actual, state.sum), (*leaves, *extra), [s.float() for s in seeds])
    wanted = torch.autograd.grad((expected, last), exact, seeds)
    for a, b in zip(found, wanted, strict=True):
        size = float(b.abs().max())
        torch.testing.assert_close(a.double() / size, b / size, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 4, 300), (2, 4, 300, 8)])
def test_strong_and_infinite_decays(shape: tuple[int, ...]) -> None:
    leaves = inputs(300, 4, 8, 8)
    g = -80 * torch.rand(shape) * (torch.rand(shape) < 0.3)
    g[:, :, 100] = float("-inf")
    out, state = linear_attention(*leaves, causal=True, log_decay=g, backend="native")
    exact = looped(*(t.double() for t in leaves), g.double())
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.sum.double(), exact[1], rtol=1e-5, atol=1e-6)


def test_half_precision_goes_by_segments() -> None:
    leaves = [t.bfloat16() for t in inputs(3000, 2, 64, 64)]
    out, state = linear_attention(*leaves, causal=True, backend="native")
    expected, last = linear_attention(*(t.double() for t in leaves), causal=True)
    assert out.dtype == torch.bfloat16 and state.sum.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(state.sum.double(), last.sum, rtol=1e-4, atol=1e-5)


def test_keys_and_values_may_come_with_different_heads() -> None:
    """A feature map that differs by head gives keys all query heads."""
    query, key, value = inputs(40, 2, 8, 8)
    wide, _ = linear_attention(query, key.repeat_interleave(2, 1), value, causal=True, backend="native")
    torch.testing.assert_close(wide, linear_attention(query, key, value, causal=True, backend="native")[0])


def test_results_do_not_depend_on_threads() -> None:
    leaves = inputs(500, 2, 32, 32)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(linear_attention(*leaves, causal=True, backend="native")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_what_it_cannot_do_is_refused_by_name_and_left_to_others_otherwise() -> None:
    leaves = [t.double() for t in inputs(20, 4, 8, 8)]
    with pytest.raises(BackendError, match="float32 on a CPU"):
        linear_attention(*leaves, causal=True, backend="native")
    with use_backend("native"):
        out, _ = linear_attention(*leaves, causal=True)
    torch.testing.assert_close(out, linear_attention(*leaves, causal=True, backend="parallel")[0])
