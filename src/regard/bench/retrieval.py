"""Finding things far back: tasks of any length, from some hundred tokens to a hundred thousand."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError
from regard.inspect.needles import draw_needles

__all__ = ["NEEDLES", "NeedleCopy", "Passkey", "needle"]


class Passkey(Classification):
    """A key of ``digits`` digits in a long text of filler, asked for at the end (Mohtashami and Jaggi, "Landmark
    Attention", 2023, arXiv 2305.16300, section 4.2).

    Inputs ``(batch, length)`` int64: filler tokens from a vocabulary of ``fillers``; somewhere before the question, the
    digits in a row, each a token that tells its place and its value; at the very end one question token for each place.
    Targets: the digit at a question, ignored elsewhere. ``depth``: where the key stands, as a share of the text (None:
    anywhere). One hop of attention answers, so what is tested is that the one place is found.

    ``kinds``: of digits (26: letters). ``sentence``: the filler is one sentence of so many tokens over and over, drawn
    anew for each text; None for filler without any order.
    """

    def __init__(
        self,
        length: int = 2048,
        digits: int = 5,
        fillers: int = 64,
        depth: float | None = None,
        kinds: int = 10,
        sentence: int | None = None,
    ) -> None:
        if digits < 1 or fillers < 1 or length < 3 * digits:
            raise OptionError(f"A key of {digits} digits needs a text of at least {3 * digits} tokens; got {length}.")
        if depth is not None and not 0 <= depth <= 1:
            raise OptionError(f"depth is a share of the text, between 0 and 1; got {depth}.")
        if kinds < 2 or (sentence is not None and sentence < 1):
            raise OptionError(f"Need at least 2 kinds of digits and a sentence of a token; got {kinds} and {sentence}.")
        self.length, self.digits, self.fillers, self.depth, self.sentence = length, digits, fillers, depth, sentence
        self.num_classes, self.vocab_size = kinds, fillers + (kinds + 1) * digits

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` texts and their targets."""
        inputs = torch.randint(self.fillers, (size, self.sentence or self.length), generator=generator)
        inputs = inputs[:, torch.arange(self.length) % inputs.shape[1]]
        key = torch.randint(self.num_classes, (size, self.digits), generator=generator)
        room = self.length - 2 * self.digits
        if self.depth is None:
            start = torch.randint(room + 1, (size, 1), generator=generator)
        else:
            start = torch.full((size, 1), round(self.depth * room))
        place = torch.arange(self.digits)
        inputs.scatter_(1, start + place, self.fillers + self.num_classes * place + key)
        inputs[:, -self.digits :] = self.fillers + self.num_classes * self.digits + place
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -self.digits :] = key
        return inputs, targets


NEEDLES: dict[str, dict[str, int | None]] = {
    "passkey": {"sentence": 16, "kinds": 10},
    "number": {"sentence": None, "kinds": 10},
    "word": {"sentence": None, "kinds": 26},
}
"""The single needles of RULER (Hsieh et al., 2024, arXiv 2404.06654, section 3) in symbols: a number in one sentence
that repeats, a number in text, and a word, spelled letter by letter, in text."""


def needle(style: str, length: int = 2048, **options: int | float | None) -> Passkey:
    """The needle task of a style of :data:`NEEDLES`; options as in :class:`Passkey`."""
    if style not in NEEDLES:
        raise OptionError(f"There is no needle {style!r}; choose one of {', '.join(NEEDLES)}.")
    return Passkey(length, **{**NEEDLES[style], **options})  # type: ignore[arg-type]


class NeedleCopy(Classification):
    """Writing out a needle, token by token, that stands anywhere in a context
    (:func:`regard.inspect.needles.draw_needles`). Inputs ``(batch, length + needle_len - 1)``: a prompt and the answer
    up to its last token; in training a batch's prompts have any length up to ``context_len``. Targets: the answer, from
    the question on, ignored before.
    """

    def __init__(self, context_len: int = 40, needle_len: int = 12, vocab_size: int = 40) -> None:
        self.context_len, self.needle_len, self.vocab_size = context_len, needle_len, vocab_size
        self.num_classes = vocab_size

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` prompts with their answers."""
        length = self.context_len
        if split == "train":
            length = int(torch.randint(self.needle_len + 2, self.context_len + 1, (1,), generator=generator))
        prompts, start = draw_needles(size, length, None, self.needle_len, self.vocab_size, generator)
        answers = prompts.gather(1, start[:, None] + torch.arange(self.needle_len))
        inputs = torch.cat((prompts, answers[:, :-1]), 1)
        return inputs, torch.cat((torch.full_like(prompts[:, 1:], IGNORED), answers), 1)
