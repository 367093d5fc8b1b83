"""The C++ form: against the dense reference in float64, and what happens where it cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard.errors import BackendError
from regard.kernels import TableBias, block_sparse_attention, dense_attention, native
from regard.kernels.block_plan import plan_of
from regard.layout import BlockLayout
from regard.masks import Boolean, Causal, KeyPadding, Mask, Predicate, SlidingWindow

needs_compiler = pytest.mark.skipif(
    not native.available(build=True), reason=f"native kernels do not run here: {native.status()}"
)

MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal window": Causal() & SlidingWindow(20),
    "per head": Predicate(lambda b, h, q, k: ((q * 7 + k * 3 + h) % 3 != 0) & (q % 11 != 3), 1, 4),
    "padding": KeyPadding(torch.arange(131) < torch.tensor([[131], [40]])),
    "boolean": Boolean(torch.rand(1, 4, 70, 131, generator=torch.Generator().manual_seed(5)) < 0.3),
}


@needs_compiler
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (10, 24), (32, 8), (64, 64), (70, 200)])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (5, 9), (64, 40)])
def test_equals_the_dense_form_forward_and_backward(mask, block_q, block_k, dim, value_dim):
    generator = torch.Generator().manual_seed(dim)
    layout = BlockLayout.of(mask, 70, 131, block_q, block_k)
    layout = layout.only(torch.rand(2, 4, *layout.visit.shape[-2:], generator=generator) < 0.6)
    query, key, value, grad, lse_grad = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 4, 70, dim), (2, 2, 131, dim), (2, 2, 131, value_dim), (2, 4, 70, value_dim), (2, 4, 70))
    )

    def results(form: str, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        if form == "native":
            out, lse = block_sparse_attention(*tensors, layout, return_lse=True, backend="native")
        else:
            out, lse = dense_attention(*tensors, mask=layout.as_mask(), return_lse=True, backend="reference")
        seen = lse.isfinite()
        loss = (out * grad).sum() + (torch.where(seen, lse, 0) * lse_grad).sum()
        return [out, torch.where(seen, lse, -1), *torch.autograd.grad(loss, tensors)]

    for ours, theirs in zip(results("native", torch.float32), results("reference", torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=2e-5)


@needs_compiler
@pytest.mark.parametrize("alike", [0, 1 << 21], ids=["equal masks once", "each mask"])
def test_masks_that_are_evaluated_in_stretches_give_the_same(monkeypatch, alike):
    monkeypatch.setattr("regard.kernels.block_plan._ALIKE", alike)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        tensors = [torch.randn(1, 2, 130, 16, requires_grad=True) for _ in range(3)]
        layout = BlockLayout.of(Predicate(lambda b, h, q, k: (q + k + h) % 3 != 0, 1, 2), 130, 130, 16, 16)
        out = block_sparse_attention(*tensors, layout, backend="native")
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    whole = run()
    monkeypatch.setattr("regard.kernels.block_plan._KEPT", 0)
    monkeypatch.setattr("regard.kernels.native._MASKS", 16 * 16 * 20)
    for part, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(part, expected)


@needs_compiler
@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("table_heads", [1, 4])
@pytest.mark.parametrize("mask", [None, SlidingWindow(9), Causal() & SlidingWindow(20)])
def test_biases_are_those_of_the_gathered_form(mask, table_heads, block):
    tensors = [torch.randn(2, h, 77, 16, requires_grad=True) for h in (4, 2, 2)]
    table = torch.randn(table_heads, 11, requires_grad=True)
    bias = TableBias(table, lambda q, k: (3 * q + k) % 11)
    layout = BlockLayout.of(mask, 77, 77, block, block)
    results = []
    for form in ("native", "gather"):
        out, lse = block_sparse_attention(*tensors, layout, bias=bias, return_lse=True, backend=form)
        total = out.square().sum() + lse.sum()
        results.append((out, lse, *torch.autograd.grad(total, (*tensors, table))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@needs_compiler
def test_biases_need_a_shared_layout():
    tensors = [torch.randn(2, 2, 32, 8) for _ in range(3)]
    bias = TableBias(torch.randn(2, 3), lambda q, k: (q + k) % 3)
    layout = BlockLayout.of(None, 32, 32, 8, 8).only(torch.ones(1, 2, 4, 4, dtype=torch.bool))
    with pytest.raises(BackendError, match="share"):
        block_sparse_attention(*tensors, layout, bias=bias, backend="native")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 96, 16, dtype=dtype) for _ in range(3))
    layout = BlockLayout.of(Causal(), 96, 96, 16, 16)
    out = block_sparse_attention(query, key, value, layout, backend="native")
    exact = dense_attention(query.double(), key.double(), value.double(), causal=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=0, rtol=2 * torch.finfo(dtype).eps)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(threads):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 200, 16, requires_grad=True) for _ in range(3)]
    layout = BlockLayout.of(Causal(), 200, 200, 16, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        grads = torch.autograd.grad(block_sparse_attention(*tensors, layout, backend="native").sum(), tensors)
    finally:
        torch.set_num_threads(before)
    expected = torch.autograd.grad(dense_attention(*tensors, causal=True, backend="reference").sum(), tensors)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_huge_and_tiny_scores_stay_finite():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 64, 16) for _ in range(3))
    layout = BlockLayout.of(Causal(), 64, 64, 16, 16)
    for size in (1e-20, 1e4):
        out, lse = block_sparse_attention(query * size, key * size, value, layout, return_lse=True, backend="native")
        exact, exact_lse = dense_attention(
            (query * size).double(), (key * size).double(), value.double(), causal=True, return_lse=True
        )
        torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)


def test_float64_is_refused_by_name_and_left_to_the_other_form_by_default():
    query, key, value = (torch.randn(1, 1, 64, 16, dtype=torch.float64) for _ in range(3))
    layout = BlockLayout.of(None, 64, 64, 16, 16)
    assert not native.worthwhile(query, value, layout)
    with pytest.raises(BackendError, match=r"float64.*gather"):
        block_sparse_attention(query, key, value, layout, backend="native")


def test_switched_off_it_says_so_and_attention_still_works(monkeypatch):
    monkeypatch.setenv("REGARD_NATIVE", "0")
    query, key, value = (torch.randn(1, 1, 64, 16) for _ in range(3))
    layout = BlockLayout.of(None, 64, 64, 16, 16)
    assert native.status() == native.Status("off", "REGARD_NATIVE=0")
    with pytest.raises(BackendError, match="REGARD_NATIVE=0"):
        block_sparse_attention(query, key, value, layout, backend="native")
    torch.testing.assert_close(block_sparse_attention(query, key, value, layout), dense_attention(query, key, value))


@pytest.mark.parametrize("compiler", ["", "echo broken"], ids=["absent", "broken"])
def test_without_a_working_compiler_the_other_form_runs_and_the_reason_is_kept(tmp_path: Path, compiler: str):
    script = """
import torch
from regard.errors import BackendError
from regard.kernels import block_sparse_attention, native
from regard.layout import BlockLayout
query, key, value = (torch.randn(1, 1, 64, 16) for _ in range(3))
layout = BlockLayout.of(None, 64, 64, 16, 16)
assert native.available(build=True) is False
print(native.status())
block_sparse_attention(query, key, value, layout)
try:
    block_sparse_attention(query, key, value, layout, backend="native")
except BackendError as error:
    print(error)
"""
    tools = tmp_path / "bin"
    tools.mkdir()
    if compiler:
        (tools / "c++").write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
        (tools / "c++").chmod(0o755)
    environment = {
        "PATH": f"{tools}:/bin" if compiler else str(tools),
        "REGARD_CACHE": str(tmp_path),
        "PYTHONPATH": ":".join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason = "no such header" if compiler else "no C++ compiler found"
    assert done.stdout.count(reason) == 2 and "backend='auto'" in done.stdout


def test_a_plan_is_made_once_and_masks_are_evaluated_once_for_all_heads():
    calls: list[int] = []

    def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = k <= q + 3
        calls.append(seen.numel())
        return seen

    query, key, value = (torch.randn(2, 4, 64, 8, requires_grad=True) for _ in range(3))
    layout = BlockLayout.of(Predicate(rule), 64, 64, 16, 16)
    calls.clear()
    for _ in range(2):
        block_sparse_attention(query, key, value, layout, backend="gather").sum().backward()
    assert plan_of(layout) is plan_of(layout)
    assert calls == [int(layout.partial.sum()) * 16 * 16]
