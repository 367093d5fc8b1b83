"""Attention inside short windows against a loop over windows and heads, forward and backward, in every form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import BackendError, OptionError, PlacementError, ShapeError
from regard.kernels import flash_window, flash_window_attention, use_backend
from regard.local.swin import WindowAttention

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
FORMS = ("reference", "chunked", "batched", "auto")


def looped(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """One window and head at a time, one query after the other."""
    windows, heads, n, _ = query.shape
    rows = []
    for w in range(windows):
        for h in range(heads):
            for i in range(n):
                scores = scale * key[w, h] @ query[w, h, i]
                scores = scores if bias is None else scores + bias[h % len(bias), i]
                seen = torch.ones(key.shape[2], dtype=torch.bool)
                if mask is not None:
                    rule = mask[w % len(mask)]
                    rule = rule[i] if rule.dim() == 2 else rule[h % len(rule), i]
                    seen = rule if rule.dtype == torch.bool else rule > -torch.inf
                    scores = scores if rule.dtype == torch.bool else scores + rule
                if not seen.any():
                    rows.append(0 * value[w, h, 0])
                    continue
                weights = (scores[seen] - scores[seen].max()).exp()
                rows.append(weights @ value[w, h, seen] / weights.sum())
    return torch.stack(rows).view(windows, heads, n, -1)


def windows_of(n: int, dim: int = 8, heads: int = 2, windows: int = 6, value_dim: int | None = None) -> list[Tensor]:
    shape = (windows, heads, n)
    q, k, bias = torch.randn(*shape, dim), torch.randn(*shape, dim), torch.randn(heads, n, n)
    return [x.double().requires_grad_() for x in (q, k, torch.randn(*shape, value_dim or dim), bias)]


def masks(n: int, heads: int = 2) -> dict[str, Tensor | None]:
    seen = torch.rand(3, n, n) < 0.6
    seen[0, 0] = False  # a row with nothing to see
    added = torch.randn(3, n, n, dtype=torch.float64)
    return {
        "none": None,
        "boolean": seen,
        "per head": torch.rand(3, heads, n, n) < 0.7,
        "added": added,
        "hidden by infinity": added.masked_fill(~seen, -torch.inf),
    }


@pytest.fixture(params=[1, 1 << 18], ids=["window by window", "in groups"])
def groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_window, "_CACHED", request.param)


@pytest.mark.paper("flash_window")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", masks(3))
@pytest.mark.usefixtures("groups")
def test_forms_are_the_loop(form: str, kind: str) -> None:
    for n, value_dim in ((5, 8), (1, 3)):
        leaves, mask = windows_of(n, value_dim=value_dim), masks(n)[kind]
        expected = looped(*leaves, mask, 0.7)
        out = flash_window_attention(*leaves, mask, 0.7, chunk=3, backend=form)
        torch.testing.assert_close(out, expected, **TIGHT)
        probe = torch.randn_like(out)
        for ours, exact in zip(
            torch.autograd.grad(out, leaves, probe, allow_unused=True),
            torch.autograd.grad(expected, leaves, probe, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if exact is None else exact, **TIGHT)


@pytest.mark.paper("flash_window")
@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
def test_equals_window_attention_written_out_for_every_chunk(chunk: int, kind: str) -> None:
    attention = WindowAttention(64, (3, 7), 2, impl="math")
    windows, mask = torch.randn(6, 21, 64), masks(21)[kind]
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    expected = attention(windows, mask)
    attention.impl = lambda *inputs: flash_window_attention(*inputs, chunk=chunk, backend="chunked")
    torch.testing.assert_close(attention(windows, mask), expected, rtol=1e-5, atol=1e-5)
    attention.impl = "flash_window"
    torch.testing.assert_close(attention(windows, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.paper("flash_window")
@pytest.mark.parametrize("form", ["chunked", "batched"])
@pytest.mark.parametrize("kind", masks(3))
@pytest.mark.usefixtures("groups")
def test_gradient(form: str, kind: str) -> None:
    leaves, mask = windows_of(3, dim=3, windows=3), masks(3)[kind]
    for scale in (None, 1.7):
        assert torch.autograd.gradcheck(
            lambda *x, scale=scale: flash_window_attention(*x, mask, scale, chunk=2, backend=form), leaves
        )


@pytest.mark.paper("flash_window")
def test_chunks_do_not_matter() -> None:
    leaves, mask = windows_of(7), masks(7)["boolean"]
    probe = torch.randn_like(leaves[2])
    outs = []
    for chunk in (1, 3, 4, 8, 100):
        out = flash_window_attention(*leaves, mask, chunk=chunk, backend="chunked")
        outs.append((out, *torch.autograd.grad(out, leaves, probe)))
    for other in outs[1:]:
        for ours, first in zip(other, outs[0], strict=True):
            torch.testing.assert_close(ours, first, **TIGHT)


@pytest.mark.paper("flash_window")
@pytest.mark.parametrize("form", ["chunked", "batched", "auto"])
def test_nothing_of_the_size_of_the_scores_is_saved(form: str) -> None:
    (query, key, value, bias), mask = windows_of(7), masks(7)["boolean"]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        flash_window_attention(query, key, value, bias, mask, backend=form)
    given = {x.untyped_storage().data_ptr() for x in (query, key, value, bias, mask)}
    assert {x.untyped_storage().data_ptr() for x in saved} <= given
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        flash_window_attention(query, key, value, bias, mask, backend="reference")
    assert any(x.numel() >= 6 * 2 * 7 * 7 for x in saved), "the written-out form does save its weights"


@pytest.mark.parametrize("form", FORMS)
def test_few_key_heads_serve_many_queries(form: str) -> None:
    query, *_, bias = windows_of(5, heads=4)
    _, key, value, _ = windows_of(5, heads=2)
    wide = [x.repeat_interleave(2, 1) for x in (key, value)]
    torch.testing.assert_close(
        flash_window_attention(query, key, value, bias, backend=form), looped(query, *wide, bias, None, 8**-0.5)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(form: str, dtype: torch.dtype) -> None:
    leaves = [x.detach().to(dtype).requires_grad_() for x in windows_of(49, dim=32)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    mask = masks(49)["boolean"]
    out, expected = (flash_window_attention(*x, mask, backend=form) for x in (leaves, exact))
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps, atol=eps / 4)
    probe = torch.randn_like(expected).to(dtype)
    for ours, fine in zip(
        torch.autograd.grad(out, leaves, probe), torch.autograd.grad(expected, exact, probe.double()), strict=True
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), fine, rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("form", FORMS)
def test_one_bias_for_all_heads_and_strided_input(form: str) -> None:
    packed = torch.randn(6, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 5, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x.transpose(1, 2) for x in packed.unbind(2)]
    out, expected = flash_window_attention(*inputs, bias, backend=form), looped(*inputs, bias, None, 8**-0.5)
    torch.testing.assert_close(out, expected, **TIGHT)
    probe = torch.randn_like(out)
    for ours, exact in zip(
        *(torch.autograd.grad(x, (packed, bias), probe) for x in (out, expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, **TIGHT)


def test_the_form_can_be_chosen_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    plain = flash_window._chunks
    monkeypatch.setattr(flash_window, "_chunks", lambda x, chunk: steps.append(chunk) or plain(x, chunk))
    leaves = windows_of(5)
    flash_window_attention(*leaves, chunk=2)
    with use_backend("chunked"):
        flash_window_attention(*leaves, chunk=2)
    assert steps == [8, 8, 2, 2]
    with pytest.raises(BackendError, match="batched"):
        flash_window_attention(*leaves, backend="triton")


def test_bad_calls_teach() -> None:
    query, key, value, bias = windows_of(5)
    with pytest.raises(ShapeError, match="head_dim"):
        flash_window_attention(query[0], key[0], value[0])
    with pytest.raises(ShapeError, match="fit"):
        flash_window_attention(query, key[:, :, :4], value)
    with pytest.raises(ShapeError, match="heads"):
        flash_window_attention(query[:, :1], key, value)
    with pytest.raises(ShapeError, match="bias"):
        flash_window_attention(query, key, value, bias[:, :4])
    with pytest.raises(ShapeError, match="mask"):
        flash_window_attention(query, key, value, bias, torch.ones(3, 4, 5, dtype=torch.bool))
    with pytest.raises(ShapeError, match="multiple"):
        flash_window_attention(query, key, value, bias, torch.ones(4, 5, 5, dtype=torch.bool))
    with pytest.raises(PlacementError, match="boolean"):
        flash_window_attention(query, key, value, bias, torch.ones(3, 5, 5, dtype=torch.int64))
    with pytest.raises(OptionError, match="chunk"):
        flash_window_attention(query, key, value, chunk=0)
