"""Embeddings with labels by a random hyperplane, to be told in context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["HyperplaneLabels"]


class HyperplaneLabels(Classification):
    """``count`` embeddings ``x``, each asked for and then shown with its label, which is 1 on the positive side of the
    sequence's own random plane through the origin.

    Inputs ``(batch, 2 count, dim + 2)``: a question ``[x | 0 | 1]``, then ``[x | -1 or 1 | 0]``, and so on. Targets
    ``(batch, 2 count)``: the label at a question, ignored elsewhere. x is normal, its entries' sizes fall by
    ``exp(-skew)`` from the first to the last.
    """

    num_classes = 2

    def __init__(self, count: int = 33, dim: int = 8, skew: float = 1.5) -> None:
        if min(count, dim) < 1 or skew < 0:
            raise OptionError(f"count and dim are at least 1 and skew at least 0; got {count}, {dim}, {skew}.")
        self.count, self.dim, self.input_dim = count, dim, dim + 2
        self.sizes = torch.exp(-skew * torch.linspace(0, 1, dim))

    def embeddings(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Random ``x`` ``(*shape, dim)``."""
        return self.sizes * torch.randn(*shape, self.dim, generator=generator)

    def prompt(self, x: Tensor, labels: Tensor) -> Tensor:
        """Inputs of embeddings ``(batch, n, dim)`` and labels ``(batch, n)``."""
        sign, zero = 2.0 * labels[..., None] - 1, torch.zeros_like(x[..., :1])
        asked, shown = torch.cat((x, zero, zero + 1), -1), torch.cat((x, sign, zero), -1)
        return torch.stack((asked, shown), 2).flatten(1, 2)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` sequences and their targets; both splits are drawn afresh."""
        x = self.embeddings(size, self.count, generator=generator)
        normal = torch.randn(size, self.dim, 1, generator=generator) / math.sqrt(self.dim)
        labels = ((x @ normal)[..., 0] >= 0).long()
        targets = torch.full((size, 2 * self.count), IGNORED)
        targets[:, ::2] = labels
        return self.prompt(x, labels), targets
