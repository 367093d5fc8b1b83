"""The fused executor of shared layouts agrees with softmax under the layout's mask, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import BackendError
from regard.kernels import TableBias, block_sparse_attention, shared_blocks
from regard.layout import BlockLayout
from regard.masks import Boolean, Causal, Dilated, KeyPadding, Mask, SlidingWindow


def inputs(q_len: int, k_len: int, kv_heads: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((2, 4, q_len, 8), (2, kv_heads, k_len, 8), (2, kv_heads, k_len, 8))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def expected(
    tensors: list[Tensor], seen: Tensor, scale: float = 8**-0.5, added: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    query, key, value = tensors
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale + added).masked_fill(~seen, float("-inf"))
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return weights @ value, scores.logsumexp(-1)


MASKS: list[Mask | None] = [
    None,
    SlidingWindow(9),
    Causal() & SlidingWindow(5),
    Dilated(3),
    Boolean(torch.rand(37, 41, generator=torch.Generator().manual_seed(3)) > 0.97),
]


@pytest.mark.parametrize("mask", MASKS, ids=["none", "window", "causal", "dilated", "random"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_value_and_gradient(mask: Mask | None, kv_heads: int) -> None:
    tensors = inputs(37, 41, kv_heads)
    layout = BlockLayout.of(mask, 37, 41, 8, 4)
    out = block_sparse_attention(*tensors, layout, backend="fused")
    wanted, _ = expected(tensors, layout.dense())
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-11)
    probe = torch.randn_like(out)
    for found, exact in zip(
        torch.autograd.grad(out, tensors, probe), torch.autograd.grad(wanted, tensors, probe), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["fused", "gather", "auto"])
@pytest.mark.parametrize("table_heads", [1, 4])
@pytest.mark.parametrize("mask", MASKS, ids=["none", "window", "causal", "dilated", "random"])
def test_a_bias_from_a_table(mask: Mask | None, table_heads: int, backend: str) -> None:
    tensors = inputs(37, 41, 2)
    table = torch.randn(table_heads, 7, dtype=torch.float64, requires_grad=True)
    bias = TableBias(table, lambda q, k: (2 * q + k) % 7)
    layout = BlockLayout.of(mask, 37, 41, 8, 4)
    out = block_sparse_attention(*tensors, layout, bias=bias, backend=backend)
    place = (2 * torch.arange(37)[:, None] + torch.arange(41)) % 7
    wanted, _ = expected(tensors, layout.dense(), added=table[:, place])
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-11)
    probe = torch.randn_like(out)
    leaves = [*tensors, table]
    for found, exact in zip(
        torch.autograd.grad(out, leaves, probe), torch.autograd.grad(wanted, leaves, probe), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


def test_rows_that_see_the_same_picture_share_one_mask() -> None:
    layout = BlockLayout.of(SlidingWindow(9), 256, 256, 16, 16)
    plan = shared_blocks._plan(layout, None)
    assert sum(len(rows.codes) for rows in plan.rows if rows.codes is not None) == 3  # both ends and the inside


@pytest.mark.parametrize("mask", MASKS, ids=["none", "window", "causal", "dilated", "random"])
def test_log_sum_exp(mask: Mask | None) -> None:
    tensors = [x.detach() for x in inputs(37, 41)]
    layout = BlockLayout.of(mask, 37, 41, 8, 4)
    out, lse = block_sparse_attention(*tensors, layout, scale=0.7, return_lse=True)
    wanted, wanted_lse = expected(tensors, layout.dense(), 0.7)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-10, atol=1e-11)


def test_gradient_of_the_log_sum_exp_goes_through_the_general_executor() -> None:
    tensors = inputs(12, 12)
    layout = BlockLayout.of(SlidingWindow(4), 12, 12, 4, 4)
    _, lse = block_sparse_attention(*tensors, layout, return_lse=True)
    _, wanted = expected(tensors, layout.dense())
    for found, exact in zip(
        torch.autograd.grad(lse.sum(), tensors[:2]), torch.autograd.grad(wanted.sum(), tensors[:2]), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_single(dtype: torch.dtype) -> None:
    tensors = [x.detach() for x in inputs(64, 64, dtype=dtype)]
    layout = BlockLayout.of(SlidingWindow(9), 64, 64, 16, 16)
    out = block_sparse_attention(*tensors, layout)
    wanted, _ = expected([x.double() for x in tensors], layout.dense())
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_what_the_fused_form_cannot_run_runs_elsewhere() -> None:
    tensors = inputs(16, 16)
    real = torch.rand(2, 16) > 0.3
    layout = BlockLayout.of(KeyPadding(real), 16, 16, 4, 4)
    with pytest.raises(BackendError, match="shared"):
        block_sparse_attention(*tensors, layout, backend="fused")
    wanted, _ = expected(tensors, layout.dense())
    torch.testing.assert_close(block_sparse_attention(*tensors, layout), wanted, rtol=1e-10, atol=1e-11)
    shared = BlockLayout.of(Causal(), 16, 16, 4, 4)
    narrow = block_sparse_attention(tensors[0], tensors[1], tensors[2][..., :3], shared)
    torch.testing.assert_close(narrow, expected(tensors, shared.dense())[0][..., :3], rtol=1e-10, atol=1e-11)
