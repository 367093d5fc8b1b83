"""Linear attention: every form against a loop over tokens that keeps the state by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels import LinearState, linear, linear_attention, linear_step, segments

# What runs in every dtype everywhere; test_native_linear.py has the native form.
FORMS = ["auto", *(form for form in linear.FORMS if form != "native")]
DECAYS = ["none", "head", "token", "channel"]


def features(length: int, kv_heads: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Positive features, so that a normaliser is never near zero."""
    query = torch.rand(2, 4, length, 6, dtype=torch.float64) + 0.1
    key = torch.rand(2, kv_heads, length, 6, dtype=torch.float64) + 0.1
    value = torch.randn(2, kv_heads, length, 3, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (query, key, value))  # type: ignore[return-value]


def decay_of(kind: str, length: int, strength: float = 1.0) -> Tensor | None:
    shapes = {"head": (4,), "token": (2, 4, length), "channel": (2, 4, length, 6)}
    return None if kind == "none" else (-strength * torch.rand(shapes[kind], dtype=torch.float64)).requires_grad_()


def looped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t``, and the same for the sum of keys."""
    heads, dim = query.shape[1], query.shape[-1]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    state, total = query.new_zeros(*query.shape[:2], dim, value.shape[-1]), query.new_zeros(*query.shape[:2], dim)
    rows = []
    for t in range(query.shape[2]):
        if log_decay is not None:
            g = log_decay[:, None] if log_decay.dim() == 1 else log_decay[:, :, t].reshape(*query.shape[:2], -1)
            state, total = g.exp()[..., None] * state, g.exp() * total
        q, k, v = query[:, :, t], key[:, :, t], value[:, :, t]
        state, total = state + k[..., None] * v[..., None, :], total + k
        out = (q[..., None] * state).sum(-2)
        rows.append(out / ((q * total).sum(-1, keepdim=True) + eps) if normalize else out)
    return torch.stack(rows, 2), torch.cat((state, total[..., None]), -1) if normalize else state


def compare(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], leaves: list[Tensor]) -> None:
    """Output and state, and the gradients of both."""
    flat = [torch.cat((out.flatten(), state.flatten())) for out, state in (actual, expected)]
    torch.testing.assert_close(flat[0], flat[1], rtol=1e-9, atol=1e-9)
    seed = torch.randn_like(flat[1])
    for a, b in zip(*(torch.autograd.grad(total, leaves, seed) for total in flat), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("length", [1, 5, 19])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", FORMS)
def test_causal_forms_are_the_recurrence(form: str, decay: str, length: int) -> None:
    for normalize, kv_heads, chunk in ((False, 4, 64), (True, 2, 4), (True, 1, 7)):
        leaves, g = features(length, kv_heads), decay_of(decay, length)
        out, state = linear_attention(
            *leaves, causal=True, log_decay=g, normalize=normalize, chunk_size=chunk, backend=form
        )
        expected = looped(*leaves, g, normalize)
        compare((out, state.sum), expected, [*leaves, *([] if g is None else [g])])


def test_noncausal_sees_all() -> None:
    """Every query meets the sum over all keys; lengths may differ."""
    query, (_, key, value) = features(5)[0], features(9, 2)
    wide_key, wide_value = (t.repeat_interleave(2, 1) for t in (key, value))
    scores = query @ wide_key.transpose(-1, -2)
    leaves = [query, key, value]
    out, state = linear_attention(*leaves)
    compare((out, state.sum), (scores @ wide_value, wide_key.transpose(-1, -2) @ wide_value), leaves)
    out, _ = linear_attention(*leaves, normalize=True, eps=0.0, scale=3.0)
    torch.testing.assert_close(out, scores @ wide_value / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", FORMS)
def test_states_continue_across_splits(form: str, decay: str) -> None:
    leaves, g = features(23, 2), decay_of(decay, 23)
    extra = [*leaves, *([] if g is None else [g])]
    whole = linear_attention(*leaves, causal=True, log_decay=g, normalize=True, chunk_size=4, backend=form)
    state, outs, start = None, [], 0
    for size in (1, 9, 4, 6, 3):
        piece = slice(start, start + size)
        part = g if g is None or g.dim() == 1 else g[:, :, piece]
        out, state = linear_attention(
            *(t[:, :, piece] for t in leaves),
            causal=True,
            log_decay=part,
            normalize=True,
            state=state,
            chunk_size=4,
            backend=form,
        )
        outs.append(out)
        start += size
    assert state is not None
    compare((torch.cat(outs, 2), state.sum), (whole[0], whole[1].sum), extra)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", [False, True])
def test_long_sequences_go_segment_by_segment(decay: str, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the state carried over: values, and gradients of everything, the first state included."""
    monkeypatch.setattr(segments, "_SEGMENT", 1)  # as if the cache held a single chunk
    first, second = features(6, 2), features(17, 2)
    g = decay_of(decay, 23)
    parts = [g if g is None or g.dim() == 1 else g[:, :, piece] for piece in (slice(6), slice(6, 23))]
    options = {"causal": True, "normalize": normalize, "chunk_size": 4}
    _, state = linear_attention(*first, log_decay=parts[0], **options)  # type: ignore[arg-type]
    out, last = linear_attention(*second, log_decay=parts[1], state=state, **options)  # type: ignore[arg-type]
    whole = [torch.cat(pair, 2) for pair in zip(first, second, strict=True)]
    expected, expected_state = looped(*whole, g, normalize)
    leaves = [*first, *second, *([] if g is None else [g])]
    compare((out, last.sum), (expected[:, :, 6:], expected_state), leaves)


@pytest.mark.parametrize("decay", DECAYS)
def test_steps_are_the_parallel_form(decay: str) -> None:
    leaves, g = features(11), decay_of(decay, 11)
    expected, _ = looped(*leaves, g, True)
    state = LinearState.empty(2, 4, 6, 3, normalize=True, like=leaves[0])
    for t in range(11):
        part = g if g is None or g.dim() == 1 else g[:, :, t : t + 1]
        now = [x[:, :, t : t + 1] for x in leaves]
        out, state = linear_step(*now, state, log_decay=part, normalize=True)
        torch.testing.assert_close(out, expected[:, :, t : t + 1])


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("form", FORMS)
def test_strong_decay_neither_overflows_nor_vanishes(form: str, decay: str) -> None:
    """Up to e^-80 a token: a form that divides by the running product would give inf or NaN, and one that takes
    differences of float32 sums (here up to 2800) would be right to a few 10^-4 only."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        query, key, value = features(70, dtype=dtype)
        g = decay_of(decay, 70, 80.0)
        assert g is not None
        g = g.detach().to(dtype).requires_grad_()
        out, state = linear_attention(query, key, value, causal=True, log_decay=g, chunk_size=32, backend=form)
        exact = looped(*(t.detach().double() for t in (query, key, value, g)))
        torch.testing.assert_close(out.double(), exact[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state.sum.double(), exact[1], rtol=tolerance, atol=tolerance)
        grads = torch.autograd.grad(out.sum() + state.sum.sum(), (query, key, value, g))
        assert all(bool(t.isfinite().all()) for t in grads)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("form", FORMS)
def test_a_decay_of_minus_infinity_forgets_everything(form: str, decay: str) -> None:
    """Where a document begins: each is as if it stood alone, in value and gradient."""
    leaves, g = features(23), decay_of(decay, 23)
    assert g is not None
    starts = (6, 7, 20)
    if decay == "head":
        never = torch.full((4,), float("-inf"), dtype=torch.float64)
        out, _ = linear_attention(*leaves, causal=True, log_decay=never, chunk_size=8, backend=form)
        torch.testing.assert_close(out, (leaves[0] * leaves[1]).sum(-1, keepdim=True) * leaves[2])
        return
    reset = torch.zeros(23, dtype=torch.bool)
    reset[list(starts)] = True
    cut = g.masked_fill(reset.view(23, *[1] * (g.dim() - 3)), float("-inf"))
    out, state = linear_attention(*leaves, causal=True, log_decay=cut, chunk_size=8, backend=form)
    pieces = [slice(a, b) for a, b in zip((0, *starts), (*starts, 23), strict=True)]
    alone = [looped(*(t[:, :, piece] for t in leaves), g[:, :, piece]) for piece in pieces]
    compare((out, state.sum), (torch.cat([o for o, _ in alone], 2), alone[-1][1]), [*leaves, g])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(form: str, dtype: torch.dtype) -> None:
    """A thousand terms of one size: a sum in half precision would stand still long before its end."""
    query, key, value = (torch.ones(1, 1, 1000, 1, dtype=dtype) for _ in range(3))
    out, state = linear_attention(query / 32, key, value, causal=True, backend=form)
    assert out.dtype == dtype and state.sum.dtype == torch.float32
    assert float(state.sum) == 1000.0
    expected = torch.arange(1, 1001).double() / 32
    torch.testing.assert_close(out.flatten().double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_no_decay_at_all_is_a_decay_of_zero(decay: str) -> None:
    leaves = features(17)
    g = decay_of(decay, 17)
    assert g is not None
    with_zero, _ = linear_attention(*leaves, causal=True, log_decay=torch.zeros_like(g), chunk_size=8)
    torch.testing.assert_close(with_zero, linear_attention(*leaves, causal=True)[0])


def test_errors_teach() -> None:
    leaves = features(5)
    with pytest.raises(OptionError, match="needs causal=True"):
        linear_attention(*leaves, log_decay=decay_of("head", 5))
    with pytest.raises(ShapeError, match="as many queries as keys, got 5 and 9"):
        linear_attention(leaves[0], *features(9)[1:], causal=True)
    with pytest.raises(ShapeError, match="is none of"):
        linear_attention(*leaves, causal=True, log_decay=torch.zeros(3))
    with pytest.raises(OptionError, match="chunk_size must be at least 1"):
        linear_attention(*leaves, causal=True, chunk_size=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_states_move_between_forms(decay: str, normalize: bool, tmp_path: Path) -> None:
    """A prompt in chunks, a few tokens one by one, saved and loaded, then any other form: the loop all along."""
    leaves = [leaf.detach() for leaf in features(40, 2)]
    g = decay_of(decay, 40)
    g = None if g is None else g.detach()
    expected, last = looped(*leaves, g, normalize)
    stretches = [("chunked", 0, 17), ("recurrent", 17, 20), ("parallel", 20, 31), ("chunked", 31, 39), ("auto", 39, 40)]
    state, file = None, tmp_path / "state.pt"
    for form, start, stop in stretches:
        part = g if g is None or g.dim() == 1 else g[:, :, start:stop]
        out, state = linear_attention(
            *(t[:, :, start:stop] for t in leaves),
            causal=True,
            log_decay=part,
            normalize=normalize,
            state=state,
            chunk_size=8,
            backend=form,
        )
        torch.testing.assert_close(out, expected[:, :, start:stop])
        torch.save(state.sum, file)
        state = LinearState(torch.load(file, weights_only=True))
    assert state is not None
    torch.testing.assert_close(state.sum, last)
