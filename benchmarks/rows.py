"""What a benchmark returns, and the small things that all of them need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.bench.measure import median_ratio

__all__ = ["Report", "Row", "Times", "gradients", "inputs", "ratio"]

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


def gradients(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], object]:
    """Forward and backward of ``call`` as one call without arguments."""
    grad = torch.randn(*tensors[0].shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(call(*tensors), tensors, grad)
