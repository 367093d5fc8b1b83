"""A needle in a haystack: prompts of which one short piece alone holds the answer, in symbols and in text.

The question repeats how the needle begins, so that a model need not have learnt to answer questions. Depth 0 is the
beginning of the haystack, 1 its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from regard.errors import OptionError

__all__ = ["MARKER", "Needle", "NeedleTask", "TextNeedle", "draw_needles", "needle_task", "text_needle_task"]

MARKER = 0
"""The symbol that stands before the needle, and at the very end as the question."""

_WORDS = (
    "apple bread chair cloud dance eagle flame glass horse island jacket kitchen lemon mirror night ocean paper "
    "queen river silver table umbrella valley window yellow garden stone winter music train"
)


@dataclass(frozen=True)
class Needle:
    """``prompt`` ``(length,)`` int64, the question at its end; the answer stands at ``span`` (start, end) of it."""

    prompt: Tensor
    span: tuple[int, int]

    def __post_init__(self) -> None:
        start, end = self.span
        if self.prompt.dim() != 1 or self.prompt.is_floating_point() or not 0 <= start < end <= len(self.prompt):
            raise OptionError(
                f"A needle is token ids (length,) and a span of at least one of them; got {self.prompt.dtype} "
                f"{tuple(self.prompt.shape)} and {self.span}."
            )

    @property
    def answer(self) -> Tensor:
        """Tokens of the answer."""
        return self.prompt[slice(*self.span)]


NeedleTask = Callable[[int], Needle]
"""The needle of a number; the same number gives the same needle."""


@dataclass(frozen=True)
class TextNeedle:
    """``begin`` and ``answer`` make the sentence that is hidden; ``question`` is asked at the end (by default the
    sentence begins again)."""

    begin: str
    answer: str
    question: str | None = None
    end: str = ".\n"


def draw_needles(
    count: int, context_len: int, depth: float | None, needle_len: int, vocab: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Prompts ``(count, context_len)`` int64 and where their needles start ``(count,)``.

    ``needle_len`` different symbols after :data:`MARKER`, among filler of the other symbols below ``vocab``; the last
    symbol is the marker again. depth None: anywhere.
    """
    room = context_len - needle_len - 2
    if needle_len < 1 or room < 0:
        raise OptionError(
            f"A needle of {needle_len} tokens needs a context of at least {max(needle_len, 1) + 2}, with the marker "
            f"before it and the question; got {context_len}."
        )
    if vocab < needle_len + 2:
        raise OptionError(f"{needle_len} different tokens, filler and a marker need a vocab of {needle_len + 2}.")
    if depth is not None and not 0 <= depth <= 1:
        raise OptionError(f"depth is a share of the context, between 0 and 1; got {depth}.")
    symbols = torch.rand(count, vocab - 1, generator=generator).argsort(-1) + 1
    prompts = symbols.gather(1, torch.randint(needle_len, vocab - 1, (count, context_len), generator=generator))
    at = torch.full((count,), round((depth or 0) * room))
    if depth is None:
        at = torch.randint(room + 1, (count,), generator=generator)
    prompts.scatter_(1, at[:, None], MARKER)
    prompts.scatter_(1, at[:, None] + 1 + torch.arange(needle_len), symbols[:, :needle_len])
    prompts[:, -1] = MARKER
    return prompts, at + 1


def needle_task(
    context_len: int | Sequence[int], depth: float | Sequence[float], needle_len: int, vocab: int, seed: int = 0
) -> NeedleTask:
    """Needles of :func:`draw_needles` in contexts of all lengths and depths in turn."""
    places = _grid(context_len, depth)

    def draw(index: int) -> Needle:
        length, share = places[index % len(places)]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        prompts, start = draw_needles(1, length, share, needle_len, vocab, generator)
        first = int(start)
        return Needle(prompts[0], (first, first + needle_len))

    return draw


def text_needle_task(
    tokenizer: Any,
    haystack: str,
    context_len: int | Sequence[int],
    depth: float | Sequence[float],
    needles: Sequence[TextNeedle] = (),
    seed: int = 0,
) -> NeedleTask:
    """Sentences hidden in ``haystack`` (over and over, where it is shorter), where a sentence or line of it ends.

    tokenizer: of transformers. context_len: tokens of the prompt. needles: taken in turn; by default random words, in
    turn as the signature of a function and as a sentence (every length and depth before the next form).
    """
    straw = list(tokenizer(haystack, add_special_tokens=False, verbose=False)["input_ids"])
    if not straw:
        raise OptionError("The haystack has no tokens; give some text.")
    places = _grid(context_len, depth)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def piece(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def draw(index: int) -> Needle:
        length, share = places[index % len(places)]
        if needles:
            hidden = needles[index % len(needles)]
        else:
            hidden = _random(seed * 1_000_003 + index, code=index // len(places) % 2 == 0)
        begin, answer, end = piece(hidden.begin), piece(hidden.answer), piece(hidden.end)
        asked = begin if hidden.question is None else piece(hidden.question)
        room = length - len(start) - len(begin) - len(answer) - len(end) - len(asked)
        if room < 0 or not answer:
            raise OptionError(
                f"The needle {hidden.begin + hidden.answer!r} and its question take {length - room} tokens, and the "
                f"context has {length}."
            )
        hay = (straw * (room // len(straw) + 1))[:room]
        at = round(share * room)
        # The last token of the haystack is as good an end as any.
        while 0 < at < room and not tokenizer.decode([hay[at - 1]]).rstrip(" ").endswith((".", "\n")):
            at -= 1
        before = [*start, *hay[:at], *begin]
        ids = [*before, *answer, *end, *hay[at:], *asked]
        return Needle(torch.tensor(ids), (len(before), len(before) + len(answer)))

    return draw


def _grid(context_len: int | Sequence[int], depth: float | Sequence[float]) -> list[tuple[int, float]]:
    lengths = [context_len] if isinstance(context_len, int) else list(context_len)
    depths = [depth] if isinstance(depth, (int, float)) else list(depth)
    if not lengths or not depths or not all(0 <= share <= 1 for share in depths):
        raise OptionError(f"Need context lengths, and depths between 0 and 1; got {lengths} and {depths}.")
    return list(product(lengths, depths))


def _random(seed: int, code: bool) -> TextNeedle:
    generator = torch.Generator().manual_seed(seed)
    known = _WORDS.split()
    first, second, *words = [known[at] for at in torch.randperm(len(known), generator=generator)[:7].tolist()]
    if code:
        return TextNeedle(f"\n    def {first}_{second}(", f"self, {', '.join(words[:4])}", end="):\n        pass\n")
    return TextNeedle(f"\nThe secret words of {first.title()} {second.title()} are", "".join(f" {w}" for w in words))
