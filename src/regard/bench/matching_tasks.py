"""Tasks in which a query goes with the key that a rule names, one that no single product of linear maps can state.

Cells ``(feature, class)`` are followed by one that asks; the answer is the class of the cell that matches. Inputs
``(batch, cells + 1, input_dim)``, targets ``(batch,)``: for a model that reads out its last position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.tasks import Classification
from regard.errors import OptionError

__all__ = ["NearestValueRetrieval", "XorMatch"]


class _Matching(Classification):
    """Cells with a class each. A subclass draws ``(size, cells, features)``, the question ``(size, features)`` and the
    cell that matches it, ``(size,)``."""

    features: int

    def __init__(self, cells: int = 16, num_classes: int = 8) -> None:
        if cells < 2 or num_classes < 2:
            raise OptionError(f"Need at least two cells and two classes, got {cells} and {num_classes}.")
        self.cells, self.num_classes = cells, num_classes
        self.input_dim = self.features + num_classes

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        keys, asked, match = self.draw(size, generator)
        classes = torch.randint(self.num_classes, (size, self.cells), generator=generator)
        inputs = torch.zeros(size, self.cells + 1, self.input_dim)
        inputs[:, :-1, : self.features] = keys
        inputs[:, :-1, self.features :] = F.one_hot(classes, self.num_classes)
        inputs[:, -1, : self.features] = asked
        return inputs, classes[torch.arange(size), match]


class NearestValueRetrieval(_Matching):
    """Keys and the query are numbers in [-1, 1]; the nearest key matches. The score that says so, ``-(q - k)^2``, has
    the term ``k^2``, which is no product of linear maps of q and k."""

    features = 1

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        keys = 2 * torch.rand(size, self.cells, 1, generator=generator) - 1
        asked = 2 * torch.rand(size, 1, generator=generator) - 1
        return keys, asked, (keys - asked[:, None])[..., 0].abs().argmin(-1)


class XorMatch(_Matching):
    """A key is two bits, -1 or 1, and the query shows one in its first place; the one key whose product (the exclusive
    or of its bits) is the query's bit matches. That score, ``q k_1 k_2``, is of degree two in the key. Two
    heads can share it: for a query there are two keys that fit, and each head can look for one of them."""

    features = 2

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        bit, first = (
            2.0 * torch.randint(2, shape, generator=generator) - 1 for shape in ((size, 1), (size, self.cells))
        )
        match = torch.randint(self.cells, (size,), generator=generator)
        product = torch.where(torch.arange(self.cells) == match[:, None], bit, -bit)
        return torch.stack((first, first * product), -1), F.pad(bit, (0, 1)), match
