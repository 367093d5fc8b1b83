"""Scenes of four handwritten digits to be spelled out letter by letter: an answer that takes a while."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.tasks import IGNORED, Digits

__all__ = ["DigitScenes"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "".join(sorted(set("".join(WORDS))))


class DigitScenes(Digits):
    """Four of scikit-learn's digits tiled 2 x 2 and cut into 64 patches of 2 x 2 pixels, row by row.

    Inputs: patches ``(batch, 64, 4)`` and text ``(batch, length)``, ``question`` tokens and then the answer such as
    ``"two nine one six."``; targets: the next token where it belongs to the answer. Scenes of a split are made of its
    own digits.
    """

    patch_dim, num_patches, scene = 4, 64, (8, 8)
    space, stop, ask = len(LETTERS), len(LETTERS) + 1, len(LETTERS) + 2
    vocab_size = num_classes = len(LETTERS) + 3

    def __init__(self, question: int = 1) -> None:
        super().__init__()
        self.question = question
        spelled = [torch.tensor([LETTERS.index(c) for c in word]) for word in WORDS]
        self._spelled = spelled
        self.longest = 4 * max(map(len, WORDS)) + 4
        """Most tokens of an answer."""

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Any, Tensor]:
        """``size`` scenes with their answers."""
        patches, digits = self.scenes(size, generator, split)
        answers = self.answers(digits)
        prompt = torch.full((size, self.question), self.ask)
        text = torch.cat((prompt, answers.clamp_min(0)), 1)[:, :-1]
        targets = F.pad(answers, (self.question - 1, 0), value=IGNORED)
        return (patches, text), targets

    def scenes(self, size: int, generator: torch.Generator, split: str = "test") -> tuple[Tensor, Tensor]:
        """Patches ``(size, 64, 4)`` and the digits ``(size, 4)`` in reading order."""
        pixels, digits = super().batch(4 * size, generator, split)
        tiles = pixels.view(size, 2, 2, 8, 8).permute(0, 1, 3, 2, 4).reshape(size, 16, 16)
        return tiles.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2), digits.view(size, 4)

    def answers(self, digits: Tensor) -> Tensor:
        """Letters of four digits ``(batch, 4)``, ``IGNORED`` behind the end: ``(batch, longest)``."""
        rows = torch.full((len(digits), self.longest), IGNORED)
        between = torch.tensor([self.space])
        for row, scene in zip(rows, digits.tolist(), strict=True):
            parts = [part for digit in scene for part in (self._spelled[digit], between)]
            words = torch.cat(parts[:-1])
            row[: len(words)], row[len(words)] = words, self.stop
        return rows

    def right_words(self, written: Tensor, digits: Tensor) -> Tensor:
        """Which digits an answer ``(batch, tokens)`` names rightly in their place, boolean ``(batch, 4)``."""
        hits = torch.zeros(digits.shape, dtype=torch.bool)
        for row, (tokens, scene) in enumerate(zip(written.tolist(), digits.tolist(), strict=True)):
            line = tokens[: tokens.index(self.stop)] if self.stop in tokens else tokens
            text = "".join(LETTERS[t] if t < self.space else " " for t in line)
            words = text.split(" ")
            hits[row] = torch.tensor([n < len(words) and words[n] == WORDS[digit] for n, digit in enumerate(scene)])
        return hits
