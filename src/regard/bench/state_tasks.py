"""Words of a finite group, to be multiplied out as they come: what a state that is only added to cannot follow."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from regard.bench.tasks import Classification
from regard.errors import OptionError

__all__ = ["GroupWords", "cyclic_group", "symmetric_group"]


def cyclic_group(order: int) -> Tensor:
    """Table ``(order, order)`` of sums modulo ``order``; of order 2 a word's product is its parity."""
    if order < 2:
        raise OptionError(f"A group with something to follow has at least 2 elements; got {order}.")
    number = torch.arange(order)
    return (number[:, None] + number) % order


def symmetric_group(degree: int) -> Tensor:
    """Table of the permutations of ``degree`` things, in lexicographic order: row ``a``, column ``b`` is ``b`` after
    ``a``. 6 elements for 3 things; for 5 (120 elements) the word problem is complete for NC1."""
    if not 2 <= degree <= 5:
        raise OptionError(f"Permutations of 2 to 5 things have a table of sensible size; got {degree}.")
    every = torch.tensor(list(permutations(range(degree))))
    # Row a, column b: i goes to b[a[i]].
    product = every[:, every].permute(1, 0, 2)
    place = degree ** torch.arange(degree)
    number = torch.full((degree**degree,), -1)
    number[(every * place).sum(-1)] = torch.arange(len(every))
    return number[(product * place).sum(-1)]


class GroupWords(Classification):
    """At each place the product of all elements up to it (Merrill, Petty and Sabharwal, "The Illusion of State in
    State-Space Models", 2024, arXiv 2404.08819, section 5). Inputs and targets ``(batch, length)``: elements of the
    group with this ``table``, drawn evenly."""

    def __init__(self, table: Tensor, length: int = 32) -> None:
        if table.dim() != 2 or table.shape[0] != table.shape[1] or length < 1:
            raise OptionError(f"Need a square table and length >= 1; got {tuple(table.shape)} and {length}.")
        self.table, self.length = table, length
        self.vocab_size = self.num_classes = len(table)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` words and the products of their beginnings."""
        words = torch.randint(self.vocab_size, (size, self.length), generator=generator)
        products = [words[:, 0]]
        for place in range(1, self.length):
            products.append(self.table[products[-1], words[:, place]])
        return words, torch.stack(products, 1)
