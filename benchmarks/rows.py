"""What a benchmark returns, and the small things that all of them need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from regard.bench.measure import median_ratio

__all__ = ["Report", "Row", "Times", "gradients", "inputs", "peak_growth", "ratio", "resident", "run_alone"]

Report = Callable[[str], None]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One measured figure. ``target`` is what it should be at least, or at most; None where it only informs."""

    name: str
    measured: float | None
    unit: str = "x"
    target: float | None = None
    sense: Literal[">=", "<="] = ">="
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is met; None without a target or a figure."""
        if self.measured is None or self.target is None:
            return None
        return self.measured >= self.target if self.sense == ">=" else self.measured <= self.target


def ratio(times: Times, numerator: str, denominator: str) -> float:
    """Median over rounds of the ratio of two calls of the same run."""
    return median_ratio(times[numerator], times[denominator])


def inputs(
    heads: int, length: int, *, kv_heads: int | None = None, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 query, key and value of one sequence with 64 channels a head."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads or heads, kv_heads or heads)
    query, key, value = (torch.randn(1, h, length, 64, generator=generator).requires_grad_(grad) for h in sizes)
    return query, key, value


def gradients(call: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward of ``call`` as one call without arguments."""
    grad = torch.randn(*tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    return lambda: torch.autograd.grad(call(*tensors), tensors, grad)


# glibc is told to give freed memory back at once, so that a peak is what was held and not what was ever touched,
# or to keep it, so that a time is the kernel's own and not that of the system clearing fresh pages.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
_KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**12), "MALLOC_TOP_PAD_": str(10**9)}


def run_alone(module: str, *arguments: str, memory: Literal["given back", "kept", "default"] = "given back") -> str:
    """The last line that ``python -m module arguments`` prints: a process of its own, where nothing hides a peak."""
    environment = {**os.environ, **{"given back": _GIVE_BACK, "kept": _KEEP, "default": {}}[memory]}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout.strip().splitlines()[-1]


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes that a call holds at most beyond what is resident before it."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    held = call()
    peak = _status("VmHWM")
    del held
    return peak - before


def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; this measurement needs Linux.")
