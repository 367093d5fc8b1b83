"""Finding things far back: tasks of any length, from some hundred tokens to a hundred thousand."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["Passkey"]


class Passkey(Classification):
    """A key of ``digits`` digits in a long text of filler, asked for at the end (Mohtashami and Jaggi, "Landmark
    Attention", 2023, arXiv 2305.16300, section 4.2).

    Inputs ``(batch, length)`` int64: filler tokens from a vocabulary of ``fillers``; somewhere before the question, the
    digits in a row, each a token that tells its place and its value; at the very end one question token for each place.
    Targets: the digit at a question, ignored elsewhere. ``depth``: where the key stands, as a share of the text (None:
    anywhere). One hop of attention answers, so what is tested is that the one place is found.
    """

    def __init__(self, length: int = 2048, digits: int = 5, fillers: int = 64, depth: float | None = None) -> None:
        if digits < 1 or fillers < 1 or length < 3 * digits:
            raise OptionError(f"A key of {digits} digits needs a text of at least {3 * digits} tokens; got {length}.")
        if depth is not None and not 0 <= depth <= 1:
            raise OptionError(f"depth is a share of the text, between 0 and 1; got {depth}.")
        self.length, self.digits, self.fillers, self.depth = length, digits, fillers, depth
        self.num_classes, self.vocab_size = 10, fillers + 11 * digits

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` texts and their targets."""
        inputs = torch.randint(self.fillers, (size, self.length), generator=generator)
        key = torch.randint(10, (size, self.digits), generator=generator)
        room = self.length - 2 * self.digits
        if self.depth is None:
            start = torch.randint(room + 1, (size, 1), generator=generator)
        else:
            start = torch.full((size, 1), round(self.depth * room))
        place = torch.arange(self.digits)
        inputs.scatter_(1, start + place, self.fillers + 10 * place + key)
        inputs[:, -self.digits :] = self.fillers + 10 * self.digits + place
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -self.digits :] = key
        return inputs, targets
