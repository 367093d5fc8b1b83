"""The key-block-major executor against the dense form, for any layout."""

from __future__ import annotations

import pytest
import torch

from regard.kernels import block_sparse_attention, query_gather
from regard.layout import BlockLayout, num_blocks
from regard.masks import Causal, KeyPadding, Mask, SlidingWindow


def layout_of(mask: Mask | None, q_len: int, k_len: int, block_q: int, block_k: int, seed: int) -> BlockLayout:
    base = BlockLayout.of(mask, q_len, k_len, block_q, block_k)
    generator = torch.Generator().manual_seed(seed)
    return base.only(
        torch.rand(2, 4, num_blocks(q_len, block_q), num_blocks(k_len, block_k), generator=generator) < 0.5
    )


VALID = torch.ones(2, 37, dtype=torch.bool)
VALID[1, 20:30] = False
MASKS = {
    "none": None,
    "causal": Causal(),
    "window": SlidingWindow(6) & Causal(),
    "padding": KeyPadding(VALID) & Causal(),
}


@pytest.mark.parametrize("pieces", [1 << 19, 64], ids=["whole", "cut"])
@pytest.mark.parametrize("block_q", [1, 4])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("q_len", [37, 21, 1])
def test_agrees_with_the_reference(
    monkeypatch: pytest.MonkeyPatch, mask: str, block_q: int, q_len: int, pieces: int
) -> None:
    monkeypatch.setattr(query_gather, "_GROUP", pieces)
    monkeypatch.setattr(query_gather, "_PARTS", pieces * 4)
    generator = torch.Generator().manual_seed(q_len)
    shapes = ((2, 4, q_len, 8), (2, 2, 37, 8), (2, 2, 37, 5))
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    layout = layout_of(MASKS[mask], q_len, 37, block_q, 8, seed=block_q)
    weights = torch.randn(2, 4, q_len, 5, generator=generator, dtype=torch.float64)
    results = []
    for backend in ("merged", "reference"):
        out, lse = block_sparse_attention(*tensors, layout, return_lse=True, backend=backend)
        total = (out * weights).sum() + torch.where(lse.isfinite(), lse, 0).sin().sum()
        results.append((out, lse, *torch.autograd.grad(total, tensors)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_rows_with_nothing_to_see_are_zeros() -> None:
    query, key, value = (torch.randn(1, 1, 9, 4, requires_grad=True) for _ in range(3))
    base = BlockLayout.of(Causal(), 9, 9, 1, 4)
    layout = base.only(torch.arange(9)[None, None, :, None] % 2 == 0)
    out, lse = block_sparse_attention(query, key, value, layout, return_lse=True, backend="merged")
    assert not bool(out[:, :, 1::2].any()) and bool((lse[:, :, 1::2] == float("-inf")).all())
    for grad in torch.autograd.grad(out.sum(), (query, key, value)):
        assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 16, generator=generator).to(dtype) for _ in range(3))
    layout = BlockLayout.of(Causal(), 64, 64, 1, 16)
    out = block_sparse_attention(query, key, value, layout, backend="merged")
    exact = block_sparse_attention(query.double(), key.double(), value.double(), layout, backend="reference")
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
