"""Copy the needle that is asked for: pairs of a key and a value among distractors, one key asked for at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["KeyedNeedle"]


class KeyedNeedle(Classification):
    """Prompts ``(batch, length)``: ``pairs`` of a key and a value behind it at random places, values as distractors
    everywhere else, one of the keys again at the end. The target, at the last place alone, is its value.

    Symbols: values 0 to ``values - 1``, then keys, then :attr:`blank`. In training the asked pair loses its key or its
    value with probability ``missing`` each, and a share of all others, drawn for every prompt, is blank too: the target
    is blank then. So a model knows what a missing token looks like, and no value is what it says by default.
    """

    def __init__(
        self, length: int = 32, pairs: int = 4, keys: int = 8, values: int = 16, missing: float = 0.15
    ) -> None:
        if pairs > min(keys, (length - 1) // 2):
            raise OptionError(f"{pairs} pairs of {keys} keys do not fit a length of {length}.")
        self.length, self.pairs, self.keys, self.values, self.missing = length, pairs, keys, values, missing
        self.blank = values + keys
        self.num_classes = self.vocab_size = values + keys + 1

    @property
    def chance(self) -> float:
        """The score of guessing a value."""
        return 1 / self.values

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Whole prompts ``(size, length)`` and where the value asked for stands ``(size,)``."""
        prompts = torch.randint(self.values, (size, self.length), generator=generator)
        slots = torch.rand(size, (self.length - 1) // 2, generator=generator).argsort(-1)[:, : self.pairs]
        keys = torch.rand(size, self.keys, generator=generator).argsort(-1)[:, : self.pairs] + self.values
        prompts.scatter_(1, 2 * slots, keys)
        prompts[:, -1] = keys[:, 0]
        return prompts, 2 * slots[:, 0] + 1

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` prompts and their targets; nothing is missing in split ``"test"``."""
        prompts, place = self.draw(size, generator)
        rows = torch.arange(size)
        answer = prompts[rows, place].clone()
        if split == "train":
            hide = torch.rand(size, self.length, generator=generator) < torch.rand(size, 1, generator=generator)
            lost = torch.rand(size, 2, generator=generator) < self.missing
            hide[rows, place - 1], hide[rows, place], hide[:, -1] = lost[:, 0], lost[:, 1], False
            prompts = prompts.masked_fill(hide, self.blank)
            answer = answer.masked_fill(lost.any(-1), self.blank)
        targets = torch.full((size, self.length), IGNORED)
        targets[:, -1] = answer
        return prompts, targets
