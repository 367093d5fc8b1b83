"""Prompts of two tasks that share a circuit, with minimal pairs: who is meant, and which colour an object has.

A prompt is a list of words and marks, so that small vocabularies of one token a word do; :attr:`Prompt.text` is what a
tokenizer gets. Answers begin with a space there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from regard.errors import OptionError

__all__ = ["ColoredObjects", "Prompt", "colored_objects_prompts", "encode_words", "ioi_prompts", "vocabulary"]

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


def ioi_prompts(n: int, seed: int = 0) -> list[tuple[Prompt, Prompt]]:
    """Indirect objects (Wang et al., "Interpretability in the Wild", 2022, arXiv 2211.00593): two names, then one of
    them again, which gives something to the other. With each its corrupt twin, where three names stand once each.

    The names take either order; the answer is the name that stands once.
    """
    draw, found = random.Random(seed), []
    for _ in range(n):
        first, second, third = draw.sample(NAMES, 3)
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        giver, taker = draw.sample((first, second), 2)
        opening = ("When", first, "and", second, "went", "to", "the", place, ",")
        rest = ("gave", "a", thing, "to")
        clean = Prompt((*opening, giver, *rest), taker, giver)
        found.append((clean, replace(clean, words=(*opening, third, *rest))))
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
    n: int, shots: int = 1, n_objects: int = 3, seed: int = 0
) -> list[tuple[Prompt, Prompt, ColoredObjects]]:
    """Which colour an object has, after ``shots`` solved examples (Srivastava et al., "Beyond the Imitation Game",
    2022, arXiv 2206.04615). Of each: the prompt, the corrupt one that asks about another object (whose colour is the
    clean prompt's ``wrong``), and the question."""
    if not 2 <= n_objects <= len(COLORS) or shots < 0:
        raise OptionError(f"n_objects is 2 to {len(COLORS)} and shots at least 0; got {n_objects} and {shots}.")
    draw, found = random.Random(seed), []

    def question() -> ColoredObjects:
        things, colors = draw.sample(OBJECTS, n_objects), draw.sample(COLORS, n_objects)
        return ColoredObjects(draw.choice(SURFACES), tuple(things), tuple(colors), draw.randrange(n_objects))

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
