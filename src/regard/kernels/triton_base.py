"""What Triton kernels share: rows in and out of registers, and where such kernels can run at all.

Imported only where a Triton form runs: on GPUs, and anywhere under Triton's interpreter (``TRITON_INTERPRET=1`` set
before the import of triton), in float32 and half precision.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.errors import BackendError

__all__ = ["load_rows", "on_device", "padded", "precision", "require_triton", "store_rows"]


@triton.jit
def load_rows(
    pointer: tl.tensor, row: tl.tensor, shown: tl.tensor, WIDTH: tl.constexpr, PADDED: tl.constexpr
) -> tl.tensor:
    """Rows ``row (rows,)`` of a contiguous matrix of ``WIDTH`` columns, zeros where not ``shown`` and behind them."""
    column = tl.arange(0, PADDED)
    return tl.load(
        pointer + row[:, None] * WIDTH + column[None, :], mask=shown[:, None] & (column < WIDTH)[None, :], other=0.0
    )


@triton.jit
def store_rows(
    pointer: tl.tensor, row: tl.tensor, shown: tl.tensor, x: tl.tensor, WIDTH: tl.constexpr, PADDED: tl.constexpr
) -> None:
    """The reverse of :func:`load_rows`."""
    column = tl.arange(0, PADDED)
    at = pointer + row[:, None] * WIDTH + column[None, :]
    tl.store(at, x, mask=shown[:, None] & (column < WIDTH)[None, :])


def padded(width: int) -> int:
    """Sides of a matrix product are powers of two from 16 on."""
    return max(int(triton.next_power_of_2(width)), 16)


def precision(dtype: torch.dtype) -> str:
    """By default a GPU rounds float32 to 10 bits before it multiplies."""
    return "ieee" if dtype == torch.float32 else "tf32"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def require_triton(query: Tensor, otherwise: str) -> None:
    """Raises BackendError where no Triton kernel can run; ``otherwise``: the form to use then."""
    interpreted = not isinstance(load_rows, triton.runtime.JITFunction)
    if query.dtype == torch.float64:
        raise BackendError(f"The triton form runs in float32 and half precision; use backend={otherwise!r}.")
    if interpreted and query.dtype == torch.bfloat16:
        raise BackendError("Triton's interpreter cannot multiply bfloat16; use float32 or float16 there.")
    if not query.is_cuda and not interpreted:
        raise BackendError(
            f"The triton form runs on a GPU; elsewhere use backend={otherwise!r} (or, for tests, set "
            "TRITON_INTERPRET=1 before triton is imported)."
        )
