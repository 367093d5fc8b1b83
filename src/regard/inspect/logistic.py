"""Logistic regression with an L2 penalty, to the optimum, for few examples of many dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = ["fit_logistic"]


def fit_logistic(x: Tensor, labels: Tensor, penalty: float = 1.0, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Normal ``(D,)`` and intercept of ``p(1) = sigmoid(w.x + b)``, float64, from ``x`` ``(n, D)`` and labels 0 and 1.

    The least of ``sum of log losses + penalty |w|^2 / 2`` (the intercept is free), by Newton's method, steps halved
    where they would overshoot. ``w`` lies in the span of the centred examples, so the work is ``n D min(n, D)``, then
    ``min(n, D)^3`` an iteration.
    """
    if x.dim() != 2 or labels.shape != x.shape[:1]:
        raise ShapeError(f"Need x (n, D) and labels (n,); got {tuple(x.shape)} and {tuple(labels.shape)}.")
    if set(labels.unique().tolist()) != {0, 1}:
        raise OptionError(f"Logistic regression needs both labels, 0 and 1; got {labels.unique().tolist()}.")
    if penalty <= 0:
        raise OptionError(f"penalty is positive (separable examples have no optimum without it); got {penalty}.")
    if not bool(x.isfinite().all()):
        raise OptionError("Some examples are not finite.")
    x, y = x.detach().double(), labels.double()
    mean = x.mean(0)
    left, sizes, right = torch.linalg.svd(x - mean, full_matrices=False)
    rows = torch.cat((left * sizes, torch.ones_like(y)[:, None]), 1)
    shrink = torch.full_like(rows[0], penalty)
    shrink[-1] = 0

    def objective(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(rows @ w, y, reduction="sum") + (shrink * w * w).sum() / 2

    w = torch.zeros_like(shrink)
    for _ in range(iterations):
        p = torch.sigmoid(rows @ w)
        slope = rows.T @ (p - y) + shrink * w
        curve = (rows * (p * (1 - p))[:, None]).T @ rows + torch.diag(shrink)
        move, now = torch.linalg.solve(curve, slope), objective(w)
        size = 1.0
        while objective(w - size * move) > now and size > 1e-8:
            size /= 2
        w = w - size * move
        if float(slope.abs().max()) < 1e-10:
            break
    normal = right.T @ w[:-1]
    return normal, w[-1] - normal @ mean
