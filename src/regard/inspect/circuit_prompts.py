"""Prompts of two tasks that share a circuit, with minimal pairs: who is meant, and which colour an object has.

A prompt is a list of words and marks, so that small vocabularies of one token a word do. For a real model, draw with
its tokenizer, which leaves out the words that it splits, and then encode::

    pairs = ioi_prompts(64, tokenizer=tokenizer)
    clean, corrupt, answers = encode_prompts(tokenizer, pairs)
    effects = path_patching(model, len(discover(model)), clean, corrupt, answers)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from regard.errors import OptionError

__all__ = [
    "ColoredObjects",
    "Prompt",
    "colored_objects_prompts",
    "encode_prompts",
    "encode_words",
    "ioi_prompts",
    "single_tokens",
    "vocabulary",
    "wrong_color_weights",
]

NAMES = ("Mary", "John", "Anna", "Tom", "Sarah", "Paul", "Laura", "Mark", "Emma", "James", "Kate", "Peter")
PLACES = ("store", "park", "school", "office", "station", "garden")
THINGS = ("drink", "book", "ring", "letter", "ball", "key")
OBJECTS = ("pencil", "notebook", "pen", "cup", "plate", "jug", "mug", "puzzle", "leash", "necklace", "bottle", "ball")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SURFACES = ("table", "desk", "floor")
_MARKS = frozenset((",", ".", "?", ":"))


@dataclass(frozen=True)
class Prompt:
    """``words`` to be continued with ``answer``; ``wrong`` is what the answer is weighed against."""

    words: tuple[str, ...]
    answer: str
    wrong: str

    @property
    def text(self) -> str:
        """As it is written: no space before marks, nor at the beginning of a line."""
        out = ""
        for word in self.words:
            out += word if word in _MARKS or word == "\n" or out == "" or out.endswith("\n") else f" {word}"
        return out


def ioi_prompts(
    n: int,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    corrupt: Literal["third", "swap"] = "third",
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    things: Sequence[str] = THINGS,
) -> list[tuple[Prompt, Prompt]]:
    """Indirect objects (Wang et al., "Interpretability in the Wild", 2022, arXiv 2211.00593): two names, then one of
    them again, which gives something to the other. With each its corrupt twin, where three names stand once each, or
    (``"swap"``, as "Circuit Component Reuse" releases it) the giver is the other of the two.

    The names take either order; the answer is the name that stands once. tokenizer: draw only words that it writes as
    one token, so that all prompts have one length.
    """
    if corrupt not in ("third", "swap"):
        raise OptionError(f"corrupt is 'third' or 'swap', got {corrupt!r}.")
    names = _usable("names", names, 3, tokenizer)
    places, things = _usable("places", places, 1, tokenizer), _usable("things", things, 1, tokenizer)
    draw, found = random.Random(seed), []
    for _ in range(n):
        first, second, third = draw.sample(names, 3)
        place, thing = draw.choice(places), draw.choice(things)
        giver, taker = draw.sample((first, second), 2)
        opening = ("When", first, "and", second, "went", "to", "the", place, ",")
        rest = ("gave", "a", thing, "to")
        clean = Prompt((*opening, giver, *rest), taker, giver)
        found.append((clean, replace(clean, words=(*opening, third if corrupt == "third" else taker, *rest))))
    return found


@dataclass(frozen=True)
class ColoredObjects:
    """One question: ``objects`` of ``colors`` on a surface, of which the one at ``asked`` is asked for, or one that is
    not there (``invalid``)."""

    surface: str
    objects: tuple[str, ...]
    colors: tuple[str, ...]
    asked: int
    invalid: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """Question and the answer's beginning."""
        items: list[str] = []
        for place, (color, thing) in enumerate(zip(self.colors, self.objects, strict=True)):
            items += ["and"] * (place == len(self.objects) - 1 > 0)
            items += ["an" if color[0] in "aeiou" else "a", color, thing, ","]
        asked = self.invalid or self.objects[self.asked]
        question = ("What", "color", "is", "the", asked, "?", "\n", "A", ":")
        return ("Q", ":", "On", "the", self.surface, ",", "there", "is", *items[:-1], ".", *question)

    @property
    def answer(self) -> str:
        """The colour of what is asked for, with a capital, as the solved example has it. Raises OptionError for
        objects that are not there."""
        if self.invalid is not None:
            raise OptionError(f"There is no {self.invalid} on the {self.surface}, so no color answers.")
        return self.colors[self.asked].title()

    def min_pair_obj(self, asked: int) -> ColoredObjects:
        """The same things, another one asked for."""
        if asked == self.asked or not 0 <= asked < len(self.objects):
            raise OptionError(f"asked is another of 0 to {len(self.objects) - 1} than {self.asked}; got {asked}.")
        return replace(self, asked=asked, invalid=None)

    def min_pair_color(self, place: int, color: str) -> ColoredObjects:
        """One thing of another colour, that none has."""
        if color in self.colors or not 0 <= place < len(self.objects):
            raise OptionError(f"{color} is there already, or {place} is not among 0 to {len(self.objects) - 1}.")
        return replace(self, colors=(*self.colors[:place], color, *self.colors[place + 1 :]))

    def min_pair_invalid(self, thing: str) -> ColoredObjects:
        """The same things, asked for one that is not there."""
        if thing in self.objects:
            raise OptionError(f"{thing} is there; name something that is not.")
        return replace(self, invalid=thing)


def colored_objects_prompts(
    n: int,
    shots: int = 1,
    n_objects: int = 3,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    objects: Sequence[str] = OBJECTS,
    colors: Sequence[str] = COLORS,
    surfaces: Sequence[str] = SURFACES,
) -> list[tuple[Prompt, Prompt, ColoredObjects]]:
    """Which colour an object has, after ``shots`` solved examples (Srivastava et al., "Beyond the Imitation Game",
    2022, arXiv 2206.04615). Of each: the prompt, the corrupt one that asks about another object (whose colour is the
    clean prompt's ``wrong``), and the question. tokenizer: as in :func:`ioi_prompts`."""
    if not 2 <= n_objects <= min(len(colors), len(objects)) or shots < 0:
        most = min(len(colors), len(objects))
        raise OptionError(f"n_objects is 2 to {most} and shots at least 0; got {n_objects} and {shots}.")
    things, surfaces = _usable("objects", objects, n_objects, tokenizer), _usable("surfaces", surfaces, 1, tokenizer)
    shades = _usable("colors", colors, n_objects, tokenizer, capitals=True)
    draw, found = random.Random(seed), []

    def question() -> ColoredObjects:
        some, painted = draw.sample(things, n_objects), draw.sample(shades, n_objects)
        return ColoredObjects(draw.choice(surfaces), tuple(some), tuple(painted), draw.randrange(n_objects))

    for _ in range(n):
        solved: list[str] = []
        for example in (question() for _ in range(shots)):
            solved += [*example.words, example.answer, "\n"]
        asked = question()
        other = asked.min_pair_obj(draw.choice([at for at in range(n_objects) if at != asked.asked]))
        clean = Prompt((*solved, *asked.words), asked.answer, other.answer)
        found.append((clean, replace(clean, words=(*solved, *other.words)), asked))
    return found


def vocabulary(prompts: Sequence[Prompt]) -> dict[str, int]:
    """A number for every word of some prompts and their answers, from 0."""
    words = {word for prompt in prompts for word in (*prompt.words, prompt.answer, prompt.wrong)}
    return {word: number for number, word in enumerate(sorted(words))}


def encode_words(prompts: Sequence[Prompt], numbers: dict[str, int]) -> tuple[list[list[int]], list[list[int]]]:
    """Words of each prompt, and its answer and wrong answer, as numbers."""
    ids = [[numbers[word] for word in prompt.words] for prompt in prompts]
    return ids, [[numbers[prompt.answer], numbers[prompt.wrong]] for prompt in prompts]


def single_tokens(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Those of some words that a tokenizer of transformers writes as one token behind a space."""
    before = _plain(tokenizer, "the")
    return [word for word in words if _continued(tokenizer, "the", before, word) is not None]


def encode_prompts(tokenizer: Any, pairs: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and corrupt token ids ``(batch, length)`` and answers ``(batch, 2)``, of prompts drawn with the tokenizer.

    What a tokenizer puts before a text stays (a first token as the model is used to), what it puts behind is left out:
    the answer comes there. Raises OptionError where answers are not one token or prompts not of one length.
    """
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    answers = []
    for pair in pairs:
        for prompt, row in zip(pair[:2], rows, strict=True):
            row.append(_ids(tokenizer, prompt.text))
        text = pair[0].text
        both = [_continued(tokenizer, text, _plain(tokenizer, text), word) for word in (pair[0].answer, pair[0].wrong)]
        if None in both:
            raise OptionError(
                f"{pair[0].answer!r} or {pair[0].wrong!r} is not one token of this tokenizer behind {text[-12:]!r}. "
                "Draw prompts with tokenizer=..., which leaves out the words that it splits."
            )
        answers.append(both)
    lengths = sorted({len(ids) for row in rows for ids in row})
    if len(lengths) != 1:
        raise OptionError(
            f"These prompts have {lengths} tokens, and patching compares them place by place. Draw them with "
            "tokenizer=..., which leaves out the words that it splits."
        )
    return torch.tensor(rows[0]), torch.tensor(rows[1]), torch.tensor(answers)


def wrong_color_weights(tokenizer: Any, drawn: Sequence[tuple[Prompt, Prompt, ColoredObjects]]) -> Tensor:
    """``(batch, 1, length)``: equal weights on the question's other colours, for :func:`~regard.inspect.circuit_reuse.
    set_attention` at the last position; given to the inhibition heads and a negative mover head they are the repair of
    "Circuit Component Reuse", which keeps the movers from these colours."""
    weights = []
    for prompt, _, asked in drawn:
        ids, row = _ids(tokenizer, prompt.text), []
        start = len(prompt.words) - len(asked.words)
        for place, word in enumerate(asked.words):
            if word in asked.colors and word != asked.colors[asked.asked]:
                upto = _ids(tokenizer, replace(prompt, words=prompt.words[: start + place + 1]).text)
                if upto != ids[: len(upto)]:
                    raise OptionError(f"This tokenizer joins {word!r} with what follows it; its token cannot be told.")
                row.append(len(upto) - 1)
        weights.append(torch.zeros(1, len(ids)).index_fill(1, torch.tensor(row), 1 / len(row)))
    return torch.stack(weights)


def _usable(what: str, words: Sequence[str], count: int, tokenizer: Any, capitals: bool = False) -> Sequence[str]:
    """Words to draw from: with a tokenizer, those of one token (with a capital too)."""
    found = words if tokenizer is None else single_tokens(tokenizer, words)
    if tokenizer is not None and capitals:
        whole = single_tokens(tokenizer, [word.title() for word in found])
        found = [word for word in found if word.title() in whole]
    if len(found) < count:
        raise OptionError(
            f"At least {count} {what} are needed, and of {', '.join(words)} there are {len(found)} of one token: "
            f"{', '.join(found) or 'none'}. Give others that the tokenizer knows, {what}=[...]."
        )
    return found


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ids(tokenizer: Any, text: str) -> list[int]:
    """A text and what the tokenizer puts before it."""
    whole, plain = list(tokenizer(text)["input_ids"]), _plain(tokenizer, text)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[: start + len(plain)]
    return plain


def _continued(tokenizer: Any, text: str, before: list[int], word: str) -> int | None:
    """The one token that a word behind a text is, if it is one and known."""
    whole = _plain(tokenizer, f"{text} {word}")
    alone = whole[:-1] == before and whole[-1] != getattr(tokenizer, "unk_token_id", None)
    return whole[-1] if alone else None
