"""Dense softmax attention: both forms against the formula written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.errors import BackendError
from regard.kernels import dense_attention, dense_weights, masked_softmax
from regard.masks import Causal, KeyPadding, Mask, SlidingWindow

SHAPES = {  # batch, heads, kv heads, q_len, k_len, head_dim, value_dim
    "self": (2, 4, 4, 9, 9, 8, 8),
    "grouped": (2, 4, 2, 9, 9, 8, 8),
    "cross": (1, 4, 1, 5, 11, 8, 3),
    "long-query": (1, 2, 2, 11, 5, 8, 8),
    "decode": (2, 4, 2, 1, 7, 8, 8),
    "narrow-value": (2, 4, 2, 6, 9, 8, 5),
    "wide-value": (1, 2, 1, 6, 6, 8, 13),
    "one": (1, 1, 1, 1, 1, 1, 1),
}


def inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, q_len, k_len, dim, value_dim = SHAPES[name]
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)  # type: ignore[return-value]


def looped(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One query at a time: the softmax of its visible scores, and their log-sum-exp."""
    batch, heads, q_len, dim = query.shape
    group, k_len = heads // key.shape[1], key.shape[2]
    seen = seen.expand(batch, heads, q_len, k_len)
    bias = query.new_zeros(1) if bias is None else bias
    bias = bias.expand(batch, heads, q_len, k_len)
    out, lse = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                keys = seen[b, h, i].nonzero().flatten()
                if not len(keys):
                    out.append(value[b, h // group, 0] * 0)
                    lse.append(torch.tensor(-math.inf, dtype=query.dtype))
                    continue
                scores = key[b, h // group, keys] @ query[b, h, i] * (dim**-0.5 if scale is None else scale)
                scores = scores + bias[b, h, i, keys]
                weights = (scores - scores.max()).exp()
                out.append(weights @ value[b, h // group, keys] / weights.sum())
                lse.append(weights.sum().log() + scores.max())
    return torch.stack(out).view(batch, heads, q_len, -1), torch.stack(lse).view(batch, heads, q_len)


def formula(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`looped`, all queries at once (and compared with it below)."""
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    some = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -math.inf)
    top = torch.where(some, scores.detach().amax(-1, keepdim=True), 0)
    weights = (scores - top).exp()
    total = torch.where(some, weights.sum(-1, keepdim=True), 1)
    lse = torch.where(some, total.log() + top, -math.inf)
    return weights @ values / total, lse[..., 0]


def rules(name: str) -> list[tuple[bool, Mask | None]]:
    batch, _, _, _, k_len, _, _ = SHAPES[name]
    valid = torch.rand(batch, k_len) < 0.6
    valid[-1] = False
    return [
        (False, None),
        (True, None),
        (False, KeyPadding(valid)),
        (True, KeyPadding(valid)),
        (True, SlidingWindow(3)),
    ]


def visible(name: str, causal: bool, mask: Mask | None) -> Tensor:
    _, _, _, q_len, k_len, _, _ = SHAPES[name]
    seen = torch.ones(1, 1, q_len, k_len, dtype=torch.bool)
    seen = seen & mask.dense(q_len, k_len) if mask is not None else seen
    return seen & Causal().dense(q_len, k_len) if causal else seen


def compare(actual: Tensor, expected: Tensor, leaves: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    seed = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, leaves, seed, allow_unused=True),
        torch.autograd.grad(expected, leaves, seed, allow_unused=True),
        strict=True,
    ):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        torch.testing.assert_close(a, b.expand_as(a), rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("name", SHAPES)
def test_formula_is_the_loop(name: str) -> None:
    for causal, mask in rules(name):
        leaves, seen = tuple(t.detach() for t in inputs(name)), visible(name, causal, mask)
        for actual, expected in zip(formula(*leaves, seen), looped(*leaves, seen), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_forms_are_the_formula(name: str, backend: str) -> None:
    for causal, mask in rules(name):
        for scale in (None, 0.7):
            leaves = inputs(name)
            expected, _ = formula(*leaves, visible(name, causal, mask), scale=scale)
            actual = dense_attention(*leaves, causal=causal, mask=mask, scale=scale, backend=backend)
            compare(actual, expected, leaves)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_bias(name: str, backend: str) -> None:
    batch, heads, _, q_len, k_len, _, _ = SHAPES[name]
    for shape in ((q_len, k_len), (heads, q_len, k_len), (batch, 1, 1, k_len), (1, heads, 1, 1)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for causal, mask in rules(name):
            leaves = (*inputs(name), bias)
            expected, _ = formula(*leaves[:3], visible(name, causal, mask), bias)
            actual = dense_attention(*leaves[:3], causal=causal, mask=mask, bias=bias, backend=backend)
            compare(actual, expected, leaves)


@pytest.mark.parametrize("name", SHAPES)
def test_log_sum_exp(name: str) -> None:
    for causal, mask in rules(name):
        leaves = inputs(name)
        expected = formula(*leaves, visible(name, causal, mask))
        actual = dense_attention(*leaves, causal=causal, mask=mask, return_lse=True)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-10, atol=1e-10)
        finite = expected[1].isfinite()
        if bool(finite.any()):
            totals = [torch.cat((out.flatten(), lse[finite].sin())) for out, lse in (actual, expected)]
            compare(totals[0], totals[1], leaves)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_what_multiplies_the_values(name: str) -> None:
    for causal, mask in rules(name):
        query, key, _ = inputs(name)
        k_len = key.shape[2]
        identity = torch.eye(k_len, dtype=torch.float64).expand(*key.shape[:2], -1, -1)
        expected, _ = formula(query, key, identity, visible(name, causal, mask), scale=0.6)
        compare(dense_weights(query, key, causal=causal, mask=mask, scale=0.6), expected, (query, key))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(backend: str, dtype: torch.dtype) -> None:
    """The error is that of rounding the output, not of summing 2000 keys in half precision."""
    query, key, value = (torch.randn(1, 2, n, 16, dtype=torch.float64).to(dtype) for n in (4, 2000, 2000))
    value = value + 1
    exact = dense_attention(query.double(), key.double(), value.double(), backend="reference")
    actual = dense_attention(query, key, value, backend=backend)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=3 * torch.finfo(dtype).eps, atol=3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_rows_with_nothing_to_see(backend: str) -> None:
    """Zeros, and neither value nor gradient is NaN, in single precision too."""
    leaves = inputs("self", torch.float32)
    seen = torch.rand(9, 9) < 0.5
    seen[4] = False
    mask = KeyPadding(torch.tensor([[True] * 9, [False] * 9]))
    for rule in (mask, Mask.__and__(mask, SlidingWindow(2))):
        out = dense_attention(*leaves, mask=rule, backend=backend)
        assert not bool(out[1].any())
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


def test_masked_softmax() -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    seen = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    weights = masked_softmax(scores, seen)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    assert not bool(weights[~seen].any())
    torch.testing.assert_close(weights[0, [0, 1, 3]], scores[0, [0, 1, 3]].softmax(-1))
    (grad,) = torch.autograd.grad(weights[0, 0] + weights[1].sum(), scores)
    assert bool(grad.isfinite().all()) and not bool(grad[1].any())


def test_fused_form_cannot_return_the_log_sum_exp() -> None:
    with pytest.raises(BackendError, match="reference"):
        dense_attention(*inputs("self"), return_lse=True, backend="sdpa")
