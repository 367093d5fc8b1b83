"""Block-sparse and token-sparse attention: every form against the formula written out, one query at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regard.errors import BackendError, RegardError, ShapeError
from regard.kernels import block_sparse, block_sparse_attention, token_sparse, token_sparse_attention
from regard.layout import BlockLayout, TokenLayout
from regard.masks import Boolean, Causal, KeyPadding, Sinks, SlidingWindow
from tests.kernels.test_dense import compare, looped

BLOCK_FORMS = ["auto", *(form for form in block_sparse.FORMS if form != "flex")]
TOKEN_FORMS = ["auto", *token_sparse.FORMS]

SIZES = {  # q_len, k_len, block_q, block_k
    "even": (16, 16, 4, 4),
    "odd": (13, 17, 4, 4),
    "oblong": (13, 11, 5, 2),
    "one-block": (5, 7, 8, 16),
    "one": (1, 1, 4, 4),
    "decode": (1, 21, 1, 4),
}


def inputs(
    q_len: int, k_len: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64, value_dim: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 4, q_len, 8), (2, kv_heads, k_len, 8), (2, kv_heads, k_len, value_dim))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)  # type: ignore[return-value]


def layouts(size: str) -> dict[str, BlockLayout]:
    q_len, k_len, block_q, block_k = SIZES[size]
    valid = torch.rand(2, k_len) < 0.7
    valid[1] = False

    def of(mask: object) -> BlockLayout:
        return BlockLayout.of(mask, q_len, k_len, block_q, block_k)  # type: ignore[arg-type]

    everything = of(None)
    blocks = everything.visit.shape[-2:]
    return {
        "all": everything,
        "causal": of(Causal()),
        "window": of(Causal() & (SlidingWindow(5) | Sinks(2))),
        "padding": of(KeyPadding(valid) & Causal()),
        "chosen": everything.only(torch.rand(2, 4, *blocks) < 0.5),
        "chosen-per-sequence": of(Causal()).only(torch.rand(2, 1, *blocks) < 0.5),
        "chosen-per-head": of(Causal()).only(torch.rand(1, 4, *blocks) < 0.5),
        "dense-mask": of(Boolean(torch.rand(2, 4, q_len, k_len) < 0.3)),
        "nothing": everything.only(torch.zeros(1, 1, *blocks, dtype=torch.bool)),
    }


def run(call: Callable[[], Tensor | tuple[Tensor, Tensor]]) -> Tensor | tuple[Tensor, Tensor]:
    """A form may refuse a layout that it is not made for; that is no wrong number."""
    try:
        return call()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BLOCK_FORMS)
def test_block_forms_are_the_formula(size: str, backend: str) -> None:
    q_len, k_len, _, _ = SIZES[size]
    for name, layout in layouts(size).items():
        for kv_heads in (4, 2, 1):
            leaves = inputs(q_len, k_len, kv_heads)
            expected, _ = looped(*leaves, layout.dense(), scale=0.4)
            out = run(lambda a=leaves, b=layout: block_sparse_attention(*a, b, scale=0.4, backend=backend))
            assert isinstance(out, Tensor), name
            compare(out, expected, leaves)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BLOCK_FORMS)
def test_block_log_sum_exp(size: str, backend: str) -> None:
    """With its gradient, which merging needs."""
    q_len, k_len, _, _ = SIZES[size]
    for layout in layouts(size).values():
        leaves = inputs(q_len, k_len)
        expected, expected_lse = looped(*leaves, layout.dense())
        out, lse = run(lambda a=leaves, b=layout: block_sparse_attention(*a, b, return_lse=True, backend=backend))
        torch.testing.assert_close(lse, expected_lse)
        seen = expected_lse.isfinite()
        if bool(seen.any()):
            joined = [torch.cat((o.flatten(), l[seen].sin())) for o, l in ((out, lse), (expected, expected_lse))]
            compare(joined[0], joined[1], leaves)


@pytest.mark.parametrize("backend", BLOCK_FORMS)
def test_block_group_size_does_not_matter(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor cuts its work into groups; a tiny limit makes many of them."""
    leaves = inputs(29, 31)
    layout = BlockLayout.of(Causal(), 29, 31, 4, 4).only(torch.rand(2, 4, 8, 8) < 0.6)
    expected, _ = looped(*leaves, layout.dense())
    monkeypatch.setattr(block_sparse, "_GROUP", 40)
    out = run(lambda: block_sparse_attention(*leaves, layout, backend=backend))
    assert isinstance(out, Tensor)
    compare(out, expected, leaves)


@pytest.mark.parametrize("kind", ["block", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(kind: str, dtype: torch.dtype) -> None:
    query, key, value = (t.detach() for t in inputs(600, 600, 4, dtype))
    value = value + 1
    if kind == "block":
        layout = BlockLayout.of(Causal(), 600, 600, 32, 32)
        forms = {form: block_sparse_attention(query, key, value, layout, backend=form) for form in BLOCK_FORMS}
        exact, _ = looped(query[:1, :1].double(), key[:1, :1].double(), value[:1, :1].double(), layout.dense())
    else:
        tokens = TokenLayout.of(Causal().dense(600, 600))
        forms = {form: token_sparse_attention(query, key, value, tokens, backend=form) for form in TOKEN_FORMS}
        exact, _ = looped(query[:1, :1].double(), key[:1, :1].double(), value[:1, :1].double(), tokens.dense())
    for out in forms.values():
        assert isinstance(out, Tensor) and out.dtype == dtype
        tolerance = max(3 * torch.finfo(dtype).eps, 3e-6)
        torch.testing.assert_close(out[:1, :1].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BLOCK_FORMS)
def test_block_views_and_large_scores(backend: str) -> None:
    """(batch, length, heads, dim) views, and scores far beyond what exp can hold, in single precision."""
    layout = BlockLayout.of(Causal(), 17, 17, 4, 4)
    leaves = [torch.randn(2, 17, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    scaled = [100 * leaves[0], 100 * leaves[1], leaves[2]]
    out = run(lambda: block_sparse_attention(*scaled, layout, backend=backend))
    assert isinstance(out, Tensor)
    expected, _ = looped(*(t.detach().double() for t in scaled), layout.dense())
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


def test_flex_form_is_the_formula() -> None:
    """Compiled FlexAttention runs forward on a CPU; it says so when a gradient is asked for."""
    query, key, value = (t.detach().float() for t in inputs(128, 128, value_dim=8))
    layout = BlockLayout.of(Causal() & SlidingWindow(40), 128, 128, 32, 32)
    with pytest.raises(BackendError, match="no backward pass on CPU"):
        block_sparse_attention(query.requires_grad_(), key, value, layout, backend="flex")
    with pytest.raises(BackendError, match="log-sum-exp"):
        block_sparse_attention(query, key, value, layout, backend="flex", return_lse=True)


@pytest.mark.slow
def test_flex_form_agrees() -> None:
    query, key, value = (t.detach().float() for t in inputs(256, 256, 4, value_dim=8))
    query, key, value = (torch.nn.functional.pad(t, (0, 8)) for t in (query, key, value))
    layout = BlockLayout.of(Causal() & SlidingWindow(40), 256, 256, 128, 128)
    expected = block_sparse_attention(query, key, value, layout, backend="reference")
    assert isinstance(expected, Tensor)
    out = block_sparse_attention(query, key, value, layout, backend="flex")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_layout_must_fit() -> None:
    with pytest.raises(ShapeError, match="8 queries and 8 keys; got 9 and 9"):
        block_sparse_attention(*inputs(9, 9), BlockLayout.of(None, 8, 8, 4, 4))
    with pytest.raises(ShapeError):
        token_sparse_attention(*inputs(9, 9), TokenLayout.of(torch.ones(1, 1, 8, 8, dtype=torch.bool)))


# --- tokens -----------------------------------------------------------------------------------------------------


def token_layouts(q_len: int, k_len: int) -> dict[str, TokenLayout]:
    some = torch.rand(2, 4, q_len, k_len) < 0.4
    some[0, 0, 0] = False
    return {
        "some": TokenLayout.of(some),
        "shared": TokenLayout.of(torch.rand(1, 1, q_len, k_len) < 0.4),
        "causal": TokenLayout.of(Causal().dense(q_len, k_len)),
        "all": TokenLayout.of(torch.ones(1, 1, q_len, k_len, dtype=torch.bool)),
        "nothing": TokenLayout.of(torch.zeros(1, 4, q_len, k_len, dtype=torch.bool)),
    }


@pytest.mark.parametrize("lengths", [(9, 9), (13, 7), (1, 12), (1, 1)])
@pytest.mark.parametrize("backend", TOKEN_FORMS)
def test_token_forms_are_the_formula(lengths: tuple[int, int], backend: str) -> None:
    for layout in token_layouts(*lengths).values():
        for kv_heads in (4, 2, 1):
            leaves = inputs(*lengths, kv_heads)
            expected, expected_lse = looped(*leaves, layout.dense(), scale=0.4)
            out, lse = token_sparse_attention(*leaves, layout, scale=0.4, return_lse=True, backend=backend)
            torch.testing.assert_close(lse, expected_lse)
            seen = expected_lse.isfinite()
            joined = [torch.cat((o.flatten(), l[seen].sin())) for o, l in ((out, lse), (expected, expected_lse))]
            compare(joined[0], joined[1], leaves)


@pytest.mark.parametrize("backend", TOKEN_FORMS)
@pytest.mark.parametrize("bias_heads", [2, 4])
def test_token_key_bias(backend: str, bias_heads: int) -> None:
    """One number per key, of each key-value head or of each head."""
    for layout in token_layouts(9, 11).values():
        bias = torch.randn(2, bias_heads, 11, dtype=torch.float64, requires_grad=True)
        leaves = (*inputs(9, 11), bias)
        wide = bias.repeat_interleave(4 // bias_heads, 1)[:, :, None]
        expected, _ = looped(*leaves[:3], layout.dense(), wide)
        out = token_sparse_attention(*leaves[:3], layout, key_bias=bias, backend=backend)
        assert isinstance(out, Tensor)
        compare(out, expected, leaves)


def test_token_stretch_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, layout = inputs(13, 13), TokenLayout.of(torch.rand(2, 4, 13, 13) < 0.4)
    expected, _ = looped(*leaves, layout.dense())
    monkeypatch.setattr(token_sparse, "_STRETCH", 1000)
    out = token_sparse_attention(*leaves, layout, backend="gather")
    assert isinstance(out, Tensor)
    compare(out, expected, leaves)


def test_unknown_form_is_refused() -> None:
    leaves = inputs(4, 4)
    with pytest.raises(RegardError, match="It has: auto, reference"):
        token_sparse_attention(*leaves, token_layouts(4, 4)["all"], backend="triton")
    with pytest.raises(RegardError, match="It has: auto, reference"):
        block_sparse_attention(*leaves, BlockLayout.of(None, 4, 4, 4, 4), backend="cuda")
