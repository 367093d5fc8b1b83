"""Two small tasks for one model, with prompts that differ in what decides the answer alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification

__all__ = ["LookupKind", "TwoLookups"]

LookupKind = Literal["names", "attributes"]


class TwoLookups(Classification):
    """Half of a batch names, half attributes, ``(batch, 10)``; the answer is wanted at the last token.

    Names: ``. A . B . S . . who``, where ``S`` is one of the names ``A`` and ``B``, and the answer the other.
    Attributes: ``c1 o1 c2 o2 c3 o3 . which . o``: colours before their objects, and the answer is the colour of ``o``.
    Dots are filler, drawn anew.
    """

    length = 10

    def __init__(self, names: int = 10, objects: int = 8, colors: int = 8, fillers: int = 4) -> None:
        self.names, self.objects, self.colors, self.fillers = names, objects, colors, fillers
        self.vocab_size = self.num_classes = names + objects + colors + fillers + 2

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` prompts and their answers at the last place."""
        kinds: tuple[LookupKind, LookupKind] = ("names", "attributes")
        pairs = [self.pairs(kind, size // 2, generator) for kind in kinds]
        inputs = torch.cat([clean for clean, _, _ in pairs])
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1] = torch.cat([answers[:, 0] for _, _, answers in pairs])
        return inputs, targets

    def pairs(self, kind: LookupKind, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clean and corrupt prompts ``(size, 10)``, and the correct and the wrong answer ``(size, 2)``.

        Corrupt: the second ``S`` is a third name; another of the three objects is asked for, whose colour is wrong.
        """

        def draw(kinds: int, first: int, count: int) -> Tensor:
            return torch.rand(size, kinds, generator=generator).argsort(-1)[:, :count] + first

        start = self.names + self.objects + self.colors
        clean = torch.randint(start, start + self.fillers, (size, self.length), generator=generator)
        row = torch.arange(size)
        if kind == "names":
            named = draw(self.names, 0, 3)
            twice = torch.randint(2, (size,), generator=generator)
            clean[:, [1, 3]] = named[:, :2]
            clean[:, 5], clean[:, -1] = named[row, twice], self.vocab_size - 2
            corrupt = clean.clone()
            corrupt[:, 5] = named[:, 2]
            answers = torch.stack((named[row, 1 - twice], named[row, twice]), 1)
            return clean, corrupt, answers
        things, colors = draw(self.objects, self.names, 3), draw(self.colors, self.names + self.objects, 3)
        asked = torch.randint(3, (size,), generator=generator)
        other = (asked + torch.randint(1, 3, (size,), generator=generator)) % 3
        clean[:, 0:6:2], clean[:, 1:6:2] = colors, things
        clean[:, -1], clean[:, 7] = things[row, asked], self.vocab_size - 1
        corrupt = clean.clone()
        corrupt[:, -1] = things[row, other]
        return clean, corrupt, torch.stack((colors[row, asked], colors[row, other]), 1)
