"""Block-sparse and token-sparse attention: every form against the formula written out, one query at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import BackendError, RegardError, ShapeError
from regard.kernels import block_sparse, block_sparse_attention, token_sparse, token_sparse_attention
from regard.layout import BlockLayout, TokenLayout
from regard.masks import Boolean, Causal, KeyPadding, Sinks, SlidingWindow
from tests.kernels.test_dense import compare, formula

# Triton is slow where it is interpreted: its tests have a file of their own.
BLOCK_FORMS = ["auto", *(form for form in block_sparse.FORMS if form not in ("flex", "triton"))]
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


def run(call: Callable[[], Any], ran: list[bool]) -> Any:
    """A form may refuse a layout or a dtype that it is not made for; that is no wrong number."""
    try:
        out = call()
    except BackendError:
        return None
    ran.append(True)
    return out


def skip_unless(ran: list[bool], backend: str) -> None:
    if not ran:
        pytest.skip(f"{backend} takes none of these here")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BLOCK_FORMS)
def test_block_forms_are_the_formula(size: str, backend: str) -> None:
    q_len, k_len, _, _ = SIZES[size]
    ran: list[bool] = []
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        for layout in layouts(size).values():
            for kv_heads in (4, 2, 1):
                leaves = inputs(q_len, k_len, kv_heads, dtype)
                out = run(partial(block_sparse_attention, *leaves, layout, scale=0.4, backend=backend), ran)
                if out is not None:
                    compare(out, formula(*leaves, layout.dense(), scale=0.4)[0], leaves, tolerance)
    skip_unless(ran, backend)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BLOCK_FORMS)
def test_block_log_sum_exp(size: str, backend: str) -> None:
    """With its gradient, which merging needs."""
    q_len, k_len, _, _ = SIZES[size]
    ran: list[bool] = []
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        for layout in layouts(size).values():
            leaves = inputs(q_len, k_len, dtype=dtype)
            both = run(partial(block_sparse_attention, *leaves, layout, return_lse=True, backend=backend), ran)
            if both is not None:
                expected = formula(*leaves, layout.dense())
                torch.testing.assert_close(both[1], expected[1], rtol=tolerance, atol=tolerance)
                seen = expected[1].isfinite()
                joined = [torch.cat((out.flatten(), lse[seen].sin())) for out, lse in (both, expected)]
                compare(joined[0], joined[1], leaves, tolerance)
    skip_unless(ran, backend)


@pytest.mark.parametrize("backend", BLOCK_FORMS)
def test_block_many_blocks(backend: str) -> None:
    """Rows that visit very different numbers of blocks, so that the work is cut into groups."""
    leaves, ran = inputs(150, 150), list[bool]()
    share = torch.linspace(0, 1, 50)[:, None]
    layout = BlockLayout.of(Causal(), 150, 150, 3, 5).only(torch.rand(2, 4, 50, 30) < share)
    out = run(partial(block_sparse_attention, *leaves, layout, backend=backend), ran)
    skip_unless(ran, backend)
    compare(out, formula(*leaves, layout.dense())[0], leaves)


@pytest.mark.parametrize("kind", ["block", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(kind: str, dtype: torch.dtype) -> None:
    query, key, value = (t.detach() for t in inputs(600, 600, 4, dtype))
    value = value + 1
    if kind == "block":
        layout: Any = BlockLayout.of(Causal(), 600, 600, 32, 32)
        attention, forms = block_sparse_attention, BLOCK_FORMS
    else:
        layout = TokenLayout.of(Causal().dense(600, 600))
        attention, forms = token_sparse_attention, TOKEN_FORMS
    exact, _ = formula(query.double(), key.double(), value.double(), layout.dense())
    for form in forms:
        out = run(partial(attention, query, key, value, layout, backend=form), [])
        if out is not None:
            assert out.dtype == dtype
            tolerance = max(3 * torch.finfo(dtype).eps, 3e-6)
            torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BLOCK_FORMS)
def test_block_views_and_large_scores(backend: str) -> None:
    """(batch, length, heads, dim) views, and scores far beyond what exp can hold, in single precision."""
    layout = BlockLayout.of(Causal(), 17, 17, 4, 4)
    leaves = [torch.randn(2, 17, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    scaled = [100 * leaves[0], 100 * leaves[1], leaves[2]]
    ran: list[bool] = []
    out = run(partial(block_sparse_attention, *scaled, layout, backend=backend), ran)
    skip_unless(ran, backend)
    expected, _ = formula(*(t.detach().double() for t in scaled), layout.dense())
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


def test_flex_form_says_what_it_cannot() -> None:
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
            expected, expected_lse = formula(*leaves, layout.dense(), scale=0.4)
            out, lse = token_sparse_attention(*leaves, layout, scale=0.4, return_lse=True, backend=backend)
            torch.testing.assert_close(lse, expected_lse)
            seen = expected_lse.isfinite()
            joined = [torch.cat((o.flatten(), e[seen].sin())) for o, e in ((out, lse), (expected, expected_lse))]
            compare(joined[0], joined[1], leaves)


@pytest.mark.parametrize("backend", TOKEN_FORMS)
@pytest.mark.parametrize("bias_heads", [2, 4])
def test_token_key_bias(backend: str, bias_heads: int) -> None:
    """One number per key, of each key-value head or of each head."""
    for layout in token_layouts(9, 11).values():
        bias = torch.randn(2, bias_heads, 11, dtype=torch.float64, requires_grad=True)
        leaves = (*inputs(9, 11), bias)
        wide = bias.repeat_interleave(4 // bias_heads, 1)[:, :, None]
        expected, _ = formula(*leaves[:3], layout.dense(), wide)
        out = token_sparse_attention(*leaves[:3], layout, key_bias=bias, backend=backend)
        assert isinstance(out, Tensor)
        compare(out, expected, leaves)


def test_token_stretch_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, layout = inputs(13, 13), TokenLayout.of(torch.rand(2, 4, 13, 13) < 0.4)
    expected, _ = formula(*leaves, layout.dense())
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
