"""The Triton form of block-sparse attention against the dense reference: on a CPU through Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import BackendError
from regard.kernels import block_sparse_attention
from regard.kernels.tiled import tiled_attention
from regard.layout import BlockLayout
from regard.masks import Causal, KeyPadding, Mask, Sinks, SlidingWindow
from tests.kernels.triton_device import DEVICE, needs_triton

pytestmark = needs_triton


def tensors(
    q_len: int, k_len: int, heads: int = 2, kv_heads: int = 2, dim: int = 8, v_dim: int = 8, dtype: Any = torch.float32
) -> list[Tensor]:
    g = torch.Generator().manual_seed(q_len + k_len)
    shapes = ((2, heads, q_len, dim), (2, kv_heads, k_len, dim), (2, kv_heads, k_len, v_dim))
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def chosen(layout: BlockLayout, heads: int, seed: int = 0) -> BlockLayout:
    """Some of its blocks, others per batch and head."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, heads, *layout.visit.shape[2:], generator=g) < 0.6
    return layout.only(keep.to(DEVICE))


CASES: dict[str, tuple[Mask | None, tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "plain": (None, (64, 64, 32, 16), (2, 2, 8, 8)),
    "causal": (Causal(), (50, 50, 16, 16), (2, 2, 8, 8)),
    "grouped": (Causal(), (40, 70, 16, 32), (4, 2, 16, 8)),
    "window": (Causal() & SlidingWindow(20) | Sinks(3) & Causal(), (70, 70, 16, 16), (4, 1, 8, 24)),
    "odd blocks": (Causal(), (37, 37, 5, 7), (2, 1, 6, 10)),
    "rows": (Causal(), (9, 33, 1, 16), (2, 2, 8, 8)),
    "padded": (KeyPadding(torch.arange(45)[None] < torch.tensor([[45], [20]])), (45, 45, 16, 16), (2, 2, 8, 8)),
}


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_the_reference(case: str, some: bool) -> None:
    rule, (q_len, k_len, block_q, block_k), (heads, kv_heads, dim, v_dim) = CASES[case]
    rule = None if rule is None else rule.to(torch.device(DEVICE))
    layout = BlockLayout.of(rule, q_len, k_len, block_q, block_k, DEVICE)
    layout = chosen(layout, heads) if some else layout
    results = []
    for backend in ("triton", "reference"):
        inputs = [t.requires_grad_() for t in tensors(q_len, k_len, heads, kv_heads, dim, v_dim)]
        out, lse = block_sparse_attention(*inputs, layout, scale=0.3, return_lse=True, backend=backend)
        seen = lse > float("-inf")
        g = torch.Generator().manual_seed(7)
        weight = torch.randn(out.shape, generator=g).to(DEVICE)
        slope = torch.randn(lse.shape, generator=g).to(DEVICE)
        total = (out * weight).sum() + (torch.where(seen, lse, 0) * slope).sum()
        results.append((out, torch.where(seen, lse, -1), *torch.autograd.grad(total, inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_rows_that_see_nothing() -> None:
    layout = BlockLayout.of(None, 32, 32, 16, 16, DEVICE).only(torch.tensor([[True, True], [False, False]]).to(DEVICE))
    inputs = [t.requires_grad_() for t in tensors(32, 32)]
    out, lse = block_sparse_attention(*inputs, layout, return_lse=True, backend="triton")
    assert bool((out[:, :, 16:] == 0).all()) and bool((lse[:, :, 16:] == float("-inf")).all())
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads) and bool((grads[0][:, :, 16:] == 0).all())


def test_half_precision_accumulates_in_single() -> None:
    layout = BlockLayout.of(Causal(), 64, 64, 16, 16, DEVICE)
    inputs = tensors(64, 64, dtype=torch.float16)
    out = block_sparse_attention(*inputs, layout, backend="triton")
    exact = block_sparse_attention(*(t.double() for t in inputs), layout, backend="reference")
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0, float("inf")])
@pytest.mark.parametrize("quant", [None, "int8"])
def test_tiles_are_skipped_inside_the_online_softmax(threshold: float, quant: Any) -> None:
    """The same tiles as the plain loop over key blocks, and the same output."""
    query, key, value = tensors(70, 70, 4, 2, 16, 8)
    layout = chosen(BlockLayout.of(Causal(), 70, 70, 32, 16, DEVICE), 4)
    limit = torch.tensor([threshold, threshold + 1, threshold, 50.0]).to(DEVICE)
    runs = [
        tiled_attention(3 * query, key, value, layout, skip_threshold=limit, quant=quant, warps=2, backend=backend)
        for backend in ("triton", "reference")
    ]
    (out, stats), (expected, known) = runs
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(stats.kept, known.kept)
    assert torch.equal(stats.tiles, known.tiles) and torch.equal(stats.skipped, known.skipped)
    if threshold < 6:
        assert int(stats.skipped[:, :3].sum()) > 0


def test_gradients_of_the_tiles_computed() -> None:
    layout = BlockLayout.of(Causal(), 48, 48, 32, 16, DEVICE)
    grads = []
    for backend in ("triton", "reference"):
        query, key, value = (t.requires_grad_() for t in tensors(48, 48))
        out, _ = tiled_attention(3 * query, key, value, layout, skip_threshold=1.0, warps=2, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), (query, key, value)))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_run_is_refused() -> None:
    layout = BlockLayout.of(None, 32, 32, 16, 16, DEVICE)
    with pytest.raises(BackendError, match="gather"):
        block_sparse_attention(*(t.double() for t in tensors(32, 32)), layout, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_long_sequences_on_a_gpu(block: int, dtype: torch.dtype) -> None:
    """Triton and compiled FlexAttention against gathered blocks at length 4096, forward and backward."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, n, 4096, 64, generator=g).to("cuda", dtype) for n in (8, 2, 2)]
    layout = BlockLayout.of(Causal(), 4096, 4096, block, block, "cuda")
    keep = (torch.rand(1, 8, *layout.visit.shape[2:], generator=g) < 0.2).cuda()
    layout = layout.only(keep | torch.eye(keep.shape[-1], dtype=torch.bool, device="cuda"))
    results = []
    for backend in ("gather", "triton", *(("flex",) if block == 128 else ())):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = block_sparse_attention(*leaves, layout, backend=backend)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    loose = {torch.float32: 2e-3, torch.bfloat16: 5e-2}[dtype]
    for others in results[1:]:
        for got, expected in zip(others, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=loose, atol=loose)
