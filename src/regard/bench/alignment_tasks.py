"""Tasks in which every target comes from one source position: a noisy pointer, and number words in two languages.

Both give :class:`~regard.models.latent_translation.Pairs`, for
:func:`regard.train.variational_attention.fit_alignment`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.models.latent_translation import IGNORED, Pairs

__all__ = ["NoisyAlignment", "NumberWords", "english_number", "german_number"]


class NoisyAlignment:
    """The source is random symbols, the one input a place in it; the target is a fixed relabelling of the symbol a few
    places after that, how many being drawn with ``chances`` (round the end). Nobody can tell which of the places it is,
    so a model that reads the mean of them has to unmix it.
    """

    def __init__(
        self, vocab_size: int = 50, source_length: int = 8, chances: Sequence[float] = (0.5, 0.3, 0.2), seed: int = 0
    ) -> None:
        if len(chances) > source_length or min(chances) < 0 or abs(sum(chances) - 1) > 1e-6:
            raise OptionError(f"Chances add up to 1, at most one a position; got {list(chances)} for {source_length}.")
        self.vocab_size, self.source_length = vocab_size, source_length
        self.chances = torch.tensor(chances)
        self.relabel = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> Pairs:
        source = torch.randint(self.vocab_size, (size, self.source_length), generator=generator)
        place = torch.randint(self.source_length, (size, 1), generator=generator)
        after = torch.multinomial(self.chances, size, replacement=True, generator=generator)[:, None]
        target = self.relabel[source.gather(1, (place + after) % self.source_length)]
        return Pairs(source, torch.full((size,), self.source_length), place, target)

    def best(self, pairs: Pairs) -> Tensor:
        """``log p(y | x)`` of the rule itself, ``(batch, 1)``: the floor of any model's loss, negated."""
        places = (pairs.inputs + torch.arange(len(self.chances))) % self.source_length
        hit = self.relabel[pairs.source.gather(1, places)] == pairs.targets
        return (hit * self.chances).sum(-1, keepdim=True).log()


_ONES = ("eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf")
_TENS = ("zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")
# fmt: off
_ENGLISH = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
_ENGLISH_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def german_number(number: int) -> list[str]:
    """1 to 999 999 in German, cut into its parts: 427 is ``vier hundert sieben und zwanzig``."""
    _check_number(number)
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        return [*_bare(german_number(thousands)), "tausend", *(german_number(rest) if rest else [])]
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        return [*_bare([_ONES[hundreds - 1]]), "hundert", *(german_number(rest) if rest else [])]
    if number <= 12:
        return [_ONES[number - 1]]
    tens, ones = divmod(number, 10)
    if tens == 1:
        return [{6: "sech", 7: "sieb"}.get(ones, _ONES[ones - 1]), "zehn"]
    return [*([*_bare([_ONES[ones - 1]]), "und"] if ones else []), _TENS[tens - 2]]


def _bare(words: list[str]) -> list[str]:
    """One is ``ein`` before another part."""
    return [*words[:-1], "ein" if words[-1] == "eins" else words[-1]]


def english_number(number: int) -> list[str]:
    """1 to 999 999 in English: 427 is ``four hundred twenty seven``."""
    _check_number(number)
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        return [*english_number(thousands), "thousand", *(english_number(rest) if rest else [])]
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        return [_ENGLISH[hundreds - 1], "hundred", *(english_number(rest) if rest else [])]
    if number < 20:
        return [_ENGLISH[number - 1]]
    tens, ones = divmod(number, 10)
    return [_ENGLISH_TENS[tens - 2], *([_ENGLISH[ones - 1]] if ones else [])]


def _check_number(number: int) -> None:
    if not 1 <= number <= 999_999:
        raise OptionError(f"Number words go from 1 to 999999, got {number}.")


class NumberWords:
    """German number words to English ones, whose order differs. Numbers up to ``largest``; a tenth of them, drawn once,
    is the test split. Tokens 0, 1 and 2 are padding, the first decoder input, and the end that every target has."""

    first, last = 1, 2

    def __init__(self, largest: int = 999_999, seed: int = 0) -> None:
        _check_number(largest)
        if largest < 20:
            raise OptionError(f"There are too few numbers up to {largest} for two splits; take at least 20.")
        german = {*_ONES, *_TENS, "ein", "und", "hundert", "tausend", "sech", "sieb"}
        self.source_words = ["", "<s>", "</s>", *sorted(german)]
        self.target_words = ["", "<s>", "</s>", *_ENGLISH, *_ENGLISH_TENS, "hundred", "thousand"]
        order = torch.randperm(largest, generator=torch.Generator().manual_seed(seed)) + 1
        held = max(largest // 10, 1)
        self._numbers = {"test": order[:held], "train": order[held:]}

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> Pairs:
        numbers = self._numbers[split]
        drawn = numbers[torch.randint(len(numbers), (size,), generator=generator)].tolist()
        return self.pairs(drawn)

    def pairs(self, numbers: Sequence[int]) -> Pairs:
        """The given numbers as one batch."""
        sources = [[self.source_words.index(word) for word in german_number(n)] for n in numbers]
        targets = [[self.target_words.index(word) for word in english_number(n)] + [self.last] for n in numbers]
        inputs = [[self.first, *words[:-1]] for words in targets]
        lengths = torch.tensor([len(words) for words in sources])
        return Pairs(_padded(sources, 0), lengths, _padded(inputs, 0), _padded(targets, IGNORED))

    def words(self, tokens: Tensor) -> list[list[str]]:
        """What target tokens ``(batch, T)`` say, up to the end."""
        rows = [[self.target_words[token] for token in row if token > 0] for row in tokens.tolist()]
        return [row[: row.index("</s>")] if "</s>" in row else row for row in rows]


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
