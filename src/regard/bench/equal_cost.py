"""Models brought to equal parameters, and their FLOPs counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from regard.cost import AttentionShape
from regard.errors import OptionError
from regard.nn import MultiHeadAttention

__all__ = ["count_parameters", "forward_flops", "matched"]

M = TypeVar("M", bound=nn.Module)


def count_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def matched(build: Callable[[int], M], parameters: int, width: int, tolerance: float = 0.01) -> tuple[M, int]:
    """The model that comes nearest to a number of parameters, and its width.

    build: a model of a width, of which its parameters are a linear function. width: any to begin with. Raises
    OptionError where the nearest is further off than this share.
    """
    first, second = (count_parameters(build(width + more)) for more in (0, 1))
    found = max(width + round((parameters - first) / (second - first)), 1)
    model = build(found)
    if abs(count_parameters(model) - parameters) > tolerance * parameters:
        raise OptionError(
            f"With a width of {found} this model has {count_parameters(model)} parameters, which is as near as it "
            f"comes to {parameters}; compare larger models."
        )
    return model, found


@torch.no_grad()
def forward_flops(model: nn.Module, inputs: torch.Tensor) -> int:
    """FLOPs of a forward pass as the model is (in training or not), counted as :mod:`regard.cost` does.

    They are what torch's counter sees or, where a mechanism in a :class:`~regard.nn.MultiHeadAttention` says by its
    ``cost`` that it takes more (the counter does not see inside solvers), what it says.
    """
    # Not torch's fused kernel, inside which the counter does not see either.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(inputs)
    total, seen = counter.get_total_flops(), counter.get_flop_counts()
    batch, length = inputs.shape[:2]
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            heads, kv_heads = module.num_heads, module.num_kv_heads
            shape = AttentionShape(length, length, heads, module.head_dim, batch, num_kv_heads=kv_heads, causal=True)
            counted = sum(seen.get(f"{type(model).__name__}.{name}.mechanism", {}).values())
            total += max(module.mechanism.cost(shape).flops - counted, 0)
    return total
