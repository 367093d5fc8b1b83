"""Many small symmetric positive definite systems at once, by conjugate gradients, known only by their products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradient"]


def conjugate_gradient(operator: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """``x (..., d)`` with ``A x = right`` for systems ``A`` along the leading axes; ``operator(x)`` gives ``A x``.

    Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952. Exact after ``d``
    iterations but for rounding. A system that is solved to rounding stands still, so that what other systems of the
    batch need does not change it.
    """
    x, residual, direction = torch.zeros_like(right), right, right
    size = residual.square().sum(-1, keepdim=True)
    solved = size * torch.finfo(right.dtype).eps ** 2
    for _ in range(iterations):
        image = operator(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        going = (size > solved) & (curvature > 0)
        step = torch.where(going, size / torch.where(going, curvature, 1), 0)
        x, residual = x + step * direction, residual - step * image
        left = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(going, left / torch.where(going, size, 1), 0) * direction
        size = torch.where(going, left, size)
    return x
