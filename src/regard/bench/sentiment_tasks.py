"""Documents of words that are positive, negative or neutral: which of the first two are more."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.tasks import Classification
from regard.errors import OptionError

__all__ = ["SentimentWords"]


class SentimentWords(Classification):
    """Inputs ``(batch, length)`` int64, [CLS] first; target 1 where positive words outnumber negative ones, else 0.

    Tokens: [CLS] 0, unknown 1, then ``positive``, ``negative`` and ``neutral`` words. A document has from half of
    ``length`` to all of it, and unknown tokens fill up the rest. Of its words an odd number has a sentiment, from 5 to
    15 and up to a quarter of ``length``, at random places; how many of them are of its own class is drawn evenly from
    the majorities.
    """

    num_classes = 2
    cls, unk = 0, 1

    def __init__(self, length: int = 64, positive: int = 20, negative: int = 20, neutral: int = 200) -> None:
        if length < 24 or min(positive, negative, neutral) < 1:
            raise OptionError(
                f"Documents have 24 tokens or more and words of each kind; got length {length}, {positive} positive, "
                f"{negative} negative and {neutral} neutral words."
            )
        self.length, self.sizes = length, (positive, negative, neutral)
        self.vocab_size = 2 + sum(self.sizes)

    def sentiment(self, tokens: Tensor) -> Tensor:
        """1 for positive words, -1 for negative ones, 0 for all else."""
        positive, negative, _ = self.sizes
        is_positive = (tokens >= 2) & (tokens < 2 + positive)
        is_negative = (tokens >= 2 + positive) & (tokens < 2 + positive + negative)
        return is_positive.long() - is_negative.long()

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Documents and their classes."""

        def draw(high: Tensor | int, *shape: int) -> Tensor:
            """Whole numbers evenly below ``high``."""
            return (torch.rand(*shape, generator=generator) * high).long()

        positive, negative, neutral = self.sizes
        words = self.length - 1
        target = draw(2, size)
        most = min(15, self.length // 4)
        charged = 5 + 2 * draw((most - 3) // 2, size)
        own = charged // 2 + 1 + draw(charged - charged // 2, size)
        count = words - draw(words // 2, size)
        filled = torch.arange(words) >= count[:, None]
        # A random order of the words, the filling behind them.
        rank = (torch.rand(size, words, generator=generator) + filled).argsort(-1).argsort(-1)
        of_class = torch.where(rank < own[:, None], target[:, None], 1 - target[:, None])
        charged_word = torch.where(
            of_class == 1, 2 + draw(positive, size, words), 2 + positive + draw(negative, size, words)
        )
        word = torch.where(rank < charged[:, None], charged_word, 2 + positive + negative + draw(neutral, size, words))
        word = word.masked_fill(filled, self.unk)
        return torch.cat((torch.full((size, 1), self.cls), word), 1), target
