"""Peak memory over length: every point is a process of its own, so that nothing kept from another one hides it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.rows import Report, Row, gradients, inputs, peak_growth, run_alone
from regard.kernels import block_sparse_attention, linear_attention
from regard.layout import BlockLayout
from regard.masks import Causal, SlidingWindow

WINDOW, HEADS = 1024, 8


def run(report: Report, quick: bool) -> list[Row]:
    """How much more memory the second doubling of the length takes than the first: 2 is linear, 4 is quadratic."""
    lengths = (4096, 8192, 16384) if quick else (8192, 16384, 32768)
    rows = []
    for kernel in ("block_sparse", "linear"):
        report(f"memory of {kernel}: {', '.join(map(str, lengths))} tokens")
        first, second, third = (int(run_alone("benchmarks.memory", kernel, str(length))) for length in lengths)
        note = "peak beyond the inputs, forward + backward, 8 heads: " + ", ".join(
            f"{peak / 2**20:.0f} MiB at {length}" for peak, length in zip((first, second, third), lengths, strict=True)
        )
        growth = (third - second) / (second - first)
        rows.append(
            Row(f"memory of {kernel}, second doubling over first", growth, "(2: linear, 4: quadratic)", 2.4, "<=", note)
        )
    return rows


def peak(kernel: str, length: int) -> int:
    """Bytes that a forward and backward pass holds at most beyond what is resident before it."""
    tensors = inputs(HEADS, length, grad=True)
    if kernel == "block_sparse":
        layout = BlockLayout.of(Causal() & SlidingWindow(WINDOW), length, length, 64, 64)
        call: Callable[[Tensor, Tensor, Tensor], Tensor] = partial(block_sparse_attention, layout=layout)
    else:
        decay = -torch.linspace(0.01, 1, HEADS)
        call = lambda q, k, v: linear_attention(q, k, v, causal=True, log_decay=decay)[0]  # noqa: E731
    step = gradients(call, tensors)
    # A small call first, so that what libraries set up once is not counted.
    short = tuple(t[:, :, :64].detach().requires_grad_() for t in tensors)
    small = BlockLayout.of(Causal(), 64, 64, 64, 64)
    torch.autograd.grad(block_sparse_attention(*short, small).sum(), short)
    return peak_growth(step)


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2])))
