"""Pairs of sentences that differ in one token: whether they say the same hangs on that token alone."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.tasks import Classification
from regard.errors import OptionError

__all__ = ["MinimalEditPairs", "TokenDifference", "minimal_edit_pairs"]


class MinimalEditPairs(Classification):
    """Is the second sentence a paraphrase of the first? One of its tokens is another: a synonym (class 1), or a random
    word or the token's negation (class 0, half each).

    Words come in fours: ``w ^ 1`` is a synonym of ``w``, ``w ^ 2`` its negation (numbers as bits). Inputs ``(batch, 2
    length + 1)``: ``[a ; separator ; b]``; targets ``(batch,)``. The training split has ``pairs`` pairs and no more;
    the test split is drawn afresh.
    """

    num_classes = 2

    def __init__(self, length: int = 12, words: int = 48, pairs: int = 2000, seed: int = 0) -> None:
        if length < 1 or words < 8 or words % 4 or pairs < 1:
            raise OptionError(
                f"Need length and pairs >= 1 and words in fours, 8 or more; got {length}, {pairs}, {words}."
            )
        self.length, self.words, self.separator = length, words, words
        self.vocab_size = words + 1
        self.train = self.draw(pairs, torch.Generator().manual_seed(seed))

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``size`` new pairs and their classes."""

        def integers(high: int) -> Tensor:
            return torch.randint(high, (size,), generator=generator)

        first = torch.randint(self.words, (size, self.length), generator=generator)
        place, label, negated = integers(self.length), integers(2), integers(2)
        row = torch.arange(size)
        word = first[row, place]
        # Another four than its own, so that a random word is neither synonym nor negation.
        other = (word + 4 * (1 + integers(self.words // 4 - 1))) % self.words
        second = first.clone()
        second[row, place] = torch.where(label == 1, word ^ 1, torch.where(negated == 1, word ^ 2, other))
        between = torch.full((size, 1), self.separator)
        return torch.cat((first, between, second), 1), label

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` pairs of the split, with replacement."""
        if split != "train":
            return self.draw(size, generator)
        inputs, labels = self.train
        chosen = torch.randint(len(inputs), (size,), generator=generator)
        return inputs[chosen], labels[chosen]


def minimal_edit_pairs(length: int = 12, words: int = 48, pairs: int = 2000, seed: int = 0) -> MinimalEditPairs:
    """The task of :class:`MinimalEditPairs`."""
    return MinimalEditPairs(length, words, pairs, seed)


class TokenDifference:
    """The difference of two tokens: ``x (batch, 2, dim + 2)``, normal numbers and which of the two it is, to ``x_1 -
    x_2 (batch, dim)``. Metric: squared error relative to the target's variance, 1 for who tells the mean."""

    metric = "relative error"
    higher_is_better = False
    chance = 1.0

    def __init__(self, dim: int = 8) -> None:
        self.dim, self.input_dim, self.num_classes = dim, dim + 2, dim

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` pairs of tokens and their differences; both splits are drawn afresh."""
        x = torch.randn(size, 2, self.dim, generator=generator)
        return torch.cat((x, torch.eye(2).expand(size, 2, 2)), -1), x[:, 0] - x[:, 1]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return (outputs - targets).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Squared errors in units of the target's variance, 2; and how many."""
        return float((outputs - targets).square().double().sum() / 2), targets.numel()
