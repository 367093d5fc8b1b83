"""A function given as its table, applied several times over: what one layer of attention can compose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.tasks import Classification
from regard.errors import OptionError

__all__ = ["FunctionComposition", "function_composition_task"]


def function_composition_task(
    symbols: int, hops: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """``size`` random permutations f of so many symbols: arguments i in random order, f(i), and f applied ``hops``
    times to i, each ``(size, symbols)`` int64."""
    if symbols < 2 or hops < 1:
        raise OptionError(f"Need at least 2 symbols and 1 hop; got {symbols} and {hops}.")
    arguments, function = (torch.rand(size, symbols, generator=generator).argsort(-1) for _ in range(2))
    found = arguments
    for _ in range(hops):
        found = function.gather(1, found)
    return arguments, function.gather(1, arguments), found


class FunctionComposition(Classification):
    """At the token (i, f(i)) of a permutation's table: f applied ``hops`` times to i.

    Inputs ``(batch, symbols, 2 symbols)``: i and f(i) as indicators beside each other, in random order. Each token
    knows one hop and one more is one look-up away, so that three take two attentions, one inside or above the other.
    """

    def __init__(self, symbols: int = 12, hops: int = 3) -> None:
        self.hops, self.num_classes, self.input_dim = hops, symbols, 2 * symbols

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` tables and their answers; both splits are drawn afresh."""
        *pair, found = function_composition_task(self.num_classes, self.hops, size, generator)
        return torch.cat([F.one_hot(part, self.num_classes).float() for part in pair], -1), found
