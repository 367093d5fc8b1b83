"""The Triton form of attention to listed blocks: its numbers on a CPU through Triton's interpreter or on a GPU, and
that the compiler takes it too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError
from regard.kernels import selected_blocks
from regard.kernels.selected_blocks import selected_attention
from tests.kernels.test_selected_blocks import inputs, value_and_gradients
from tests.kernels.triton_device import DEVICE, needs_triton

pytestmark = needs_triton


def small(
    q_len: int, k_len: int, heads: int, block: int = 8, slots: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """One sequence, two key/value heads: the interpreter takes a while for each program."""
    tensors, index = inputs(q_len, k_len, heads=heads, block=block, slots=slots, dtype=dtype)
    return [t[:1].to(DEVICE) for t in tensors], index[:1].to(DEVICE)


def agree(tensors: list[Tensor], index: Tensor, block: int, keys: Tensor | None = None, scale: float = 0.4) -> None:
    """Output, log-sum-exp and gradients are those of the reference."""
    expected = value_and_gradients(tensors, index, block, "reference", keys=keys, scale=scale)
    ours = value_and_gradients(tensors, index, block, "triton", keys=keys, scale=scale)
    for actual, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-5)


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize(
    ("q_len", "k_len", "heads", "block"), [(21, 21, 2, 8), (30, 41, 6, 8), (19, 7, 4, 16), (1, 29, 8, 4)]
)
@pytest.mark.parametrize("hide", [False, True])
def test_agrees_with_the_reference(q_len: int, k_len: int, heads: int, block: int, hide: bool) -> None:
    tensors, index = small(q_len, k_len, heads, block)
    keys = torch.rand(1, 1, k_len, generator=torch.Generator().manual_seed(5)) < 0.7
    agree(tensors, index, block, keys.to(DEVICE) if hide else None)


@pytest.mark.paper("flash_sparse_nsa")
def test_segments_and_stretches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists longer than a segment, and stretches of queries that begin inside a head."""
    from regard.kernels import triton_selected

    monkeypatch.setattr(triton_selected, "_SEGMENT", 1)
    monkeypatch.setattr(triton_selected, "_PARTS", 25 * 3 * 10 * 8)
    agree(*small(20, 20, 20), 8)


def test_all_blocks_is_causal_attention() -> None:
    tensors, index = small(21, 21, 4)
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    ours = torch.as_tensor(selected_attention(*tensors, index, 8, backend="triton"))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_and_empty_lists() -> None:
    tensors, index = small(21, 21, 4, dtype=torch.float16)
    index[:, 1] = -1
    expected = value_and_gradients([t.double() for t in tensors], index, 8, "reference")
    results = value_and_gradients(tensors, index, 8, "triton")
    assert results[0].dtype == torch.float16 and results[1].dtype == torch.float32
    assert not bool(results[0][:, 2:].any()) and bool((results[1][:, 2:] == float("-inf")).all())
    for ours, other in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), other.double(), rtol=4e-3, atol=8e-3)


def test_strides_do_not_matter() -> None:
    tensors, index = small(21, 21, 2)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    first, second = (torch.as_tensor(selected_attention(*t, index, 8, backend="triton")) for t in (tensors, apart))
    assert torch.equal(first, second)


def test_what_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, index = small(9, 9, 2, dtype=torch.float64)
    with pytest.raises(BackendError, match="key_major"):
        selected_attention(*tensors, index, 8, backend="triton")
    monkeypatch.setattr(selected_blocks, "has_triton", lambda: False)
    with pytest.raises(BackendError, match="not installed"):
        selected_attention(*tensors, index, 8, backend="triton")


COMPILED = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from regard.errors import BackendError
from regard.kernels.selected_blocks import selected_attention

x, index = torch.randn(1, 1, 20, 8), torch.zeros(1, 1, 20, 1, dtype=torch.int64)
selected_attention(x, x, x, index, 8)
assert "regard.kernels.triton_selected" not in sys.modules, "imported without being chosen"
try:
    selected_attention(x, x, x, index, 8, backend="triton")
    raise AssertionError("ran without a GPU and without the interpreter")
except BackendError as error:
    assert "runs on a GPU" in str(error)

from regard.kernels import triton_selected
named = {
    "i32": "lane_first start slots q_len k_len blocks count",
    "fp32": "scale factor",
    "*bf16": "query key value grad out",
    "*fp32": "parts tops totals lse delta key_parts value_parts",
    "*i64": "order offsets segment_block segment_first index",
    "*u8": "hidden",
}
types = {name: type_ for type_, names in named.items() for name in names.split()}
every = dict(
    GROUP=3, HEAD=40, HEAD_PAD=64, VALUE=64, VALUE_PAD=64, BLOCK=32, COLUMNS=32, SEGMENT=210, ROWS=64, HIDDEN=True,
    PRECISION="tf32", SLOTS=16, WIDTH=40, PADDED=64, WEIGHTED=True,
)
for kernel in (triton_selected._forward, triton_selected._backward, triton_selected._gather):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in every else types[name] for name in names}
    constants = {(names.index(name),): value for name, value in every.items() if name in names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4})
    assert built.metadata.shared <= 99 * 1024, "more than every GPU of that generation has"
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles it anyway")
def test_compiles_for_a_gpu() -> None:
    """The interpreter runs more than the compiler takes: machine code for compute capability 8.0, in a process whose
    Triton is no interpreter. There, without a GPU, the form is neither chosen nor run."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 4, 16])
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu(dtype: torch.dtype, heads: int, dim: int) -> None:
    """Real sizes: the numbers of the reference, the same bits each time, and the form of choice."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2 * heads, 700, dim), (2, 2, 700, dim), (2, 2, 700, dim)]
    tensors = [torch.randn(*shape, generator=generator).to("cuda", dtype) for shape in shapes]
    own = torch.arange(700)[:, None] // 64
    ranks = torch.rand(2, 2, 700, 11, generator=generator) + 2 * (torch.arange(11) == own)
    best = ranks.masked_fill(torch.arange(11) > own, -1).topk(5, -1)
    index = best.indices.masked_fill(best.values < 0, -1).cuda()
    expected = value_and_gradients([t.double() for t in tensors], index, 64, "reference")
    results, again = (value_and_gradients(tensors, index, 64, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 5e-2}
    for ours, other in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), other.double(), **tolerance)
    assert torch.equal(torch.as_tensor(selected_attention(*tensors, index, 64)), results[0])
