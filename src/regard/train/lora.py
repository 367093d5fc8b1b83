"""Low-rank adapters: a weight plus a trained product of two thin matrices.

    y = W x + alpha / rank  U D x,      D (rank, in) random, U (out, rank) zero at first,

so that a model begins as it was, and few numbers are trained. Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models", 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError

__all__ = ["LoRALinear", "add_lora", "merge_lora"]


class LoRALinear(nn.Linear):
    """A linear layer, its weight and bias frozen, beside it ``alpha / rank  up down x``."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.down = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.up = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One layer that gives the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight + self.scale * self.up @ self.down), self.bias
        return linear.train(self.training)


def add_lora(
    model: nn.Module,
    rank: int = 64,
    alpha: float | None = None,
    names: Sequence[str] = ("query", "key", "value", "out"),
) -> list[nn.Parameter]:
    """Freeze ``model`` and give each of its linear layers that has one of the ``names`` an adapter; alpha is ``rank``
    by default. Returns the parameters of the adapters, the only ones that still require a gradient."""
    if rank < 1:
        raise OptionError(f"The rank of an adapter is at least 1, got {rank}.")
    model.requires_grad_(False)
    adapters: list[nn.Parameter] = []

    def adapted(name: str, linear: nn.Linear) -> nn.Linear:
        if name not in names:
            return linear
        layer = LoRALinear(linear, rank, rank if alpha is None else alpha)
        adapters.extend((layer.down, layer.up))
        return layer

    _replace(model, adapted)
    if not adapters:
        raise OptionError(f"The model has no linear layer named one of {tuple(names)}; give the names of its own.")
    return adapters


def merge_lora(model: nn.Module) -> None:
    """Write the adapters into the weights, and put plain linear layers in their place."""
    _replace(model, lambda _, linear: linear.merged() if isinstance(linear, LoRALinear) else linear)


def _replace(model: nn.Module, change: Callable[[str, nn.Linear], nn.Linear]) -> None:
    """Put ``change(name, layer)`` in the place of each linear layer."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, change(name, child))
