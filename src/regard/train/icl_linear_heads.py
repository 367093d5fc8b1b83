"""Training attention heads on linear regression in context, with fresh examples at every step.

"In-Context Linear Regression Demystified", 2025, arXiv 2503.12734: Adam at a constant rate of 1e-3, 128 prompts a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.errors import OptionError

__all__ = ["train_in_context"]

Prompts = tuple[Tensor, Tensor, Tensor]


def train_in_context(
    model: nn.Module,
    draw: Callable[[int, torch.Generator], Prompts],
    *,
    steps: int = 3000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
) -> list[float]:
    """Mean squared error of each step. draw: ``(n, generator) -> z, z_q, y_q``, as of
    :func:`regard.inspect.icl_linear_heads.icl_linear_regression`. watch: called after each step with its number."""
    if steps < 1:
        raise OptionError(f"Train for at least one step; got {steps}.")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator, losses = torch.Generator().manual_seed(seed), []
    model.train()
    for step in range(1, steps + 1):
        z, z_q, y_q = draw(batch_size, generator)
        loss = (model(z, z_q) - y_q).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if watch is not None:
            watch(step)
    return losses
