"""Twenty-two small tasks on sequences of tokens, each for one thing that attention must be able to do.

After the tasks of "SLAY: Geometry-Aware Spherical Linearized Attention with Yat-Kernel", 2026, arXiv 2602.04915,
section 3.3, with its lengths and vocabularies, for a model that gives a class per position, such as
:class:`~regard.models.attention_only.AttentionOnlyModel`. ``batch`` gives inputs and targets ``(batch, length)``;
targets are ignored (-100) wherever nothing is asked. The metric is the share of right answers.

Tasks that answer with a sequence write it behind the input, into as many blanks: a causal model could not reverse or
sort in place. ``in_place=True`` asks for the answer at the input's own positions, as the paper's code does. Two of its
tasks are made so that they ask for what they are named after: the needle of ``retrieval`` is one of several (there its
answer is a constant), and ``multihop`` follows a chain (there it takes one hop).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["TASKS", "SequenceAnswer", "SequenceTask", "sequence_task"]


class SequenceTask(Classification):
    """A task on ``length`` tokens of ``vocab_size`` kinds, whose answers are ``num_classes`` kinds (by default
    tokens)."""

    least = 1

    def __init__(self, length: int, vocab_size: int, num_classes: int | None = None) -> None:
        if length < self.least or vocab_size < 2:
            raise OptionError(
                f"{type(self).__name__} needs length >= {self.least} and vocab_size >= 2; got {length}, {vocab_size}."
            )
        self.length, self.vocab_size = length, vocab_size
        self.num_classes = vocab_size if num_classes is None else num_classes

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` sequences and their targets; both splits are drawn afresh."""

    def _tokens(self, size: int, generator: torch.Generator, kinds: int | None = None) -> Tensor:
        return torch.randint(self.vocab_size if kinds is None else kinds, (size, self.length), generator=generator)

    @staticmethod
    def _at(inputs: Tensor, place: int, answer: Tensor) -> Tensor:
        """Targets that ask for ``answer (batch,)`` at one place."""
        targets = torch.full_like(inputs, IGNORED)
        targets[:, place] = answer
        return targets


def _shuffled(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows of ``0 .. count - 1`` in random order."""
    return torch.rand(size, count, generator=generator).argsort(-1)


def _to_front(tokens: Tensor, kept: Tensor) -> Tensor:
    """The tokens where ``kept`` is True moved to the front in order, IGNORED behind them."""
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tokens.gather(1, order).masked_fill(~kept.gather(1, order), IGNORED)


class SequenceAnswer(SequenceTask):
    """A task whose answer is a sequence: behind the input in as many blanks (a token of their own, the last of the
    vocabulary), or in place. Inputs are twice ``length`` tokens, or ``length`` in place."""

    def __init__(self, length: int, vocab_size: int, num_classes: int | None = None, in_place: bool = False) -> None:
        super().__init__(length, vocab_size, num_classes)
        self.in_place, self.blank = in_place, vocab_size
        if not in_place:
            self.vocab_size = vocab_size + 1
        self.kinds = vocab_size

    @abstractmethod
    def _pair(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and answers ``(size, length)``, IGNORED where there is none."""

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs, answers = self._pair(size, generator)
        if self.in_place:
            return inputs, answers
        nothing = torch.full_like(answers, IGNORED)
        return F.pad(inputs, (0, self.length), value=self.blank), torch.cat((nothing, answers), 1)


class Copy(SequenceAnswer):
    """The input again."""

    def __init__(self, length: int = 32, vocab_size: int = 32, in_place: bool = False) -> None:
        super().__init__(length, vocab_size, in_place=in_place)

    def _pair(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(size, generator, self.kinds)
        return tokens, tokens


class LongCopy(Copy):
    """:class:`Copy` of 256 tokens."""

    def __init__(self, length: int = 256, vocab_size: int = 32, in_place: bool = False) -> None:
        super().__init__(length, vocab_size, in_place)


class Sort(SequenceAnswer):
    """The tokens in ascending order."""

    def __init__(self, length: int = 16, vocab_size: int = 32, in_place: bool = False) -> None:
        super().__init__(length, vocab_size, in_place=in_place)

    def _pair(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(size, generator, self.kinds)
        return tokens, tokens.sort(-1).values


class Reverse(SequenceAnswer):
    """The tokens from last to first."""

    def __init__(self, length: int = 32, vocab_size: int = 32, in_place: bool = False) -> None:
        super().__init__(length, vocab_size, in_place=in_place)

    def _pair(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(size, generator, self.kinds)
        return tokens, tokens.flip(-1)


class SelectiveCopy(SequenceAnswer):
    """The tokens that follow a marker (the last kind), in order; an eighth of the tokens are markers."""

    least = 4

    def __init__(self, length: int = 64, vocab_size: int = 32, in_place: bool = False) -> None:
        super().__init__(length, vocab_size, in_place=in_place)

    def _pair(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(size, generator, self.kinds - 1)
        # Markers at even places, so that each has a token of its own behind it.
        pairs = _shuffled(size, self.length // 2, generator)[:, : max(self.length // 8, 1)]
        marked = torch.zeros(size, self.length, dtype=torch.bool).scatter(1, 2 * pairs + 1, True)
        tokens.scatter_(1, 2 * pairs, self.kinds - 1)
        return tokens, _to_front(tokens, marked)


class NoisyCopy(SequenceAnswer):
    """The tokens without the noise (the last kind, three in ten)."""

    def __init__(self, length: int = 64, vocab_size: int = 32, in_place: bool = False) -> None:
        super().__init__(length, vocab_size, in_place=in_place)

    def _pair(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.rand(size, self.length, generator=generator) < 0.3
        tokens = self._tokens(size, generator, self.kinds - 1).masked_fill(noise, self.kinds - 1)
        return tokens, _to_front(tokens, ~noise)


class Compression(SequenceAnswer):
    """Runs of one to three equal tokens, each written once."""

    def __init__(self, length: int = 32, vocab_size: int = 16, in_place: bool = False) -> None:
        super().__init__(length, vocab_size, in_place=in_place)

    def _pair(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        runs = torch.randint(1, 4, (size, self.length), generator=generator).cumsum(-1)
        index = torch.searchsorted(runs, torch.arange(self.length).expand(size, -1).contiguous(), right=True)
        tokens = self._tokens(size, generator, self.kinds).gather(1, index)
        # Neighbouring runs of the same token are one run.
        begins = F.pad(tokens[:, 1:] != tokens[:, :-1], (1, 0), value=True)
        return tokens, _to_front(tokens, begins)


class Histogram(SequenceAnswer):
    """How often each of ``colours`` kinds occurs, kind after kind, as classes 0 to ``length``."""

    def __init__(self, length: int = 32, colours: int = 5, in_place: bool = False) -> None:
        if not 2 <= colours <= length:
            raise OptionError(f"Need 2 <= colours <= length, got {colours} and {length}.")
        super().__init__(length, colours, length + 1, in_place)

    def _pair(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(size, generator, self.kinds)
        counts = F.one_hot(tokens, self.kinds).sum(1)
        return tokens, F.pad(counts, (0, self.length - self.kinds), value=IGNORED)


class Retrieval(SequenceTask):
    """A needle in a haystack: which of ``needles`` kinds stands among others; asked at the last place, where a token of
    its own stands."""

    least = 2

    def __init__(self, length: int = 64, vocab_size: int = 64, needles: int = 16) -> None:
        super().__init__(length, vocab_size)
        if not 1 <= needles <= vocab_size - 2:
            raise OptionError(f"Need 1 <= needles <= vocab_size - 2, got {needles} of {vocab_size}.")
        self.needles = needles

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        hay = self.vocab_size - 1 - self.needles
        inputs = self._tokens(size, generator, hay)
        needle = torch.randint(hay, self.vocab_size - 1, (size, 1), generator=generator)
        inputs.scatter_(1, torch.randint(self.length - 1, (size, 1), generator=generator), needle)
        inputs[:, -1] = self.vocab_size - 1
        return inputs, self._at(inputs, -1, needle[:, 0])


class KeyValueRecall(SequenceTask):
    """``k1 v1 k2 v2 ... SEP k``: the value of key ``k`` at the last place. Keys differ; keys and values are of the same
    kinds. :class:`~regard.bench.tasks.MultiQueryRecall` asks for all pairs, amid filler."""

    def __init__(self, pairs: int = 10, vocab_size: int = 64) -> None:
        if not 1 <= pairs < vocab_size:
            raise OptionError(f"{pairs} pairs need as many keys of vocab_size - 1 = {vocab_size - 1} kinds.")
        super().__init__(2 * pairs + 2, vocab_size)
        self.pairs = pairs

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        keys = _shuffled(size, self.vocab_size - 1, generator)[:, : self.pairs]
        values = torch.randint(self.vocab_size - 1, (size, self.pairs), generator=generator)
        asked = torch.randint(self.pairs, (size, 1), generator=generator)
        separator = torch.full((size, 1), self.vocab_size - 1)
        inputs = torch.cat((torch.stack((keys, values), -1).flatten(1), separator, keys.gather(1, asked)), 1)
        return inputs, self._at(inputs, -1, values.gather(1, asked)[:, 0])


class MultiHop(SequenceTask):
    """Pairs ``key value`` in random order, then ``SEP key``: the value is itself a key, and so on, ``hops`` times; the
    last value is the answer. Other chains of the same kind stand beside it."""

    def __init__(self, hops: int = 2, chains: int = 5, vocab_size: int = 64) -> None:
        if hops < 1 or chains < 1 or chains * (hops + 1) >= vocab_size:
            raise OptionError(f"{chains} chains of {hops} hops need more than {chains * (hops + 1)} kinds of tokens.")
        super().__init__(2 * hops * chains + 2, vocab_size)
        self.hops, self.chains = hops, chains

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        count = self.chains * (self.hops + 1)
        nodes = _shuffled(size, self.vocab_size - 1, generator)[:, :count].view(size, self.chains, -1)
        pairs = nodes.unfold(2, 2, 1).flatten(1, 2)
        order = _shuffled(size, pairs.shape[1], generator)
        pairs = pairs.gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)
        # The chains are alike, so that it may be the first that is asked for.
        separator = torch.full((size, 1), self.vocab_size - 1)
        inputs = torch.cat((pairs, separator, nodes[:, 0, :1]), 1)
        return inputs, self._at(inputs, -1, nodes[:, 0, -1])


class FirstToken(SequenceTask):
    """The first token, asked at the last place."""

    def __init__(self, length: int = 64, vocab_size: int = 32) -> None:
        super().__init__(length, vocab_size)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator)
        return inputs, self._at(inputs, -1, inputs[:, 0])


class DistantMatch(SequenceTask):
    """The first token, asked in the middle."""

    def __init__(self, length: int = 128, vocab_size: int = 32) -> None:
        super().__init__(length, vocab_size)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator)
        return inputs, self._at(inputs, self.length // 2, inputs[:, 0])


class Stack(SequenceTask):
    """Tokens are pushed as they come, and each POP (the last kind) is answered, at its place, with what it takes
    off."""

    def __init__(self, length: int = 32, vocab_size: int = 32) -> None:
        super().__init__(length, vocab_size)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator, self.vocab_size - 1)
        wanted = torch.rand(size, self.length, generator=generator) < 0.4
        targets, rows = torch.full_like(inputs, IGNORED), torch.arange(size)
        depth = torch.zeros(size, dtype=torch.int64)
        held = torch.zeros(size, self.length + 1, dtype=torch.int64)
        for t in range(self.length):
            pop = wanted[:, t] & (depth > 0)
            targets[pop, t] = held[rows, depth - 1][pop]
            held[rows, depth] = torch.where(pop, held[rows, depth], inputs[:, t])
            inputs[pop, t] = self.vocab_size - 1
            depth = depth + torch.where(pop, -1, 1)
        return inputs, targets


class Induction(SequenceTask):
    """``... A B ... A``: at the last place, what followed the only other ``A``."""

    least = 3

    def __init__(self, length: int = 64, vocab_size: int = 64) -> None:
        super().__init__(length, vocab_size)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator)
        place = torch.randint(self.length - 2, (size, 1), generator=generator)
        trigger = torch.randint(self.vocab_size, (size, 1), generator=generator)
        # Every other occurrence of the trigger gives way to its neighbour among the kinds.
        inputs = torch.where(inputs == trigger, (inputs + 1) % self.vocab_size, inputs)
        inputs.scatter_(1, place, trigger)
        inputs[:, -1] = trigger[:, 0]
        return inputs, self._at(inputs, -1, inputs.gather(1, place + 1)[:, 0])


class Pattern(SequenceTask):
    """Four tokens over and over: the next one, at each place from the fourth."""

    def __init__(self, length: int = 32, vocab_size: int = 16, period: int = 4) -> None:
        super().__init__(length, vocab_size)
        if not 1 <= period <= length:
            raise OptionError(f"Need 1 <= period <= length, got {period} and {length}.")
        self.period = period

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        cycle = torch.randint(self.vocab_size, (size, self.period), generator=generator)
        whole = cycle.repeat(1, self.length // self.period + 2)[:, : self.length + 1]
        targets = whole[:, 1:].clone()
        targets[:, : self.period - 1] = IGNORED
        return whole[:, :-1], targets


class Counting(SequenceTask):
    """How often token 0 occurs, at the last place: classes 0 to ``length``."""

    def __init__(self, length: int = 32, vocab_size: int = 10) -> None:
        super().__init__(length, vocab_size, length + 1)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator)
        return inputs, self._at(inputs, -1, (inputs == 0).sum(-1))


class Modular(SequenceTask):
    """The sum of the tokens modulo ``modulus``, at the last place."""

    def __init__(self, length: int = 16, modulus: int = 7) -> None:
        super().__init__(length, modulus)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator)
        return inputs, self._at(inputs, -1, inputs.sum(-1) % self.num_classes)


class Parity(Modular):
    """Whether the number of ones is even (0) or odd (1), at the last place."""

    def __init__(self, length: int = 32) -> None:
        super().__init__(length, 2)


class Addition(SequenceTask):
    """The sum of binary digits, at the last place: classes 0 to ``length``."""

    def __init__(self, length: int = 16) -> None:
        super().__init__(length, 2, length + 1)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator)
        return inputs, self._at(inputs, -1, inputs.sum(-1))


class Bigram(SequenceTask):
    """Each token's entry in a fixed random table."""

    def __init__(self, length: int = 32, vocab_size: int = 32, seed: int = 0) -> None:
        super().__init__(length, vocab_size)
        self.table = torch.randint(vocab_size, (vocab_size,), generator=torch.Generator().manual_seed(seed))

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator)
        return inputs, self.table[inputs]


class Majority(SequenceTask):
    """The most frequent token (the smallest of several), at the last place."""

    def __init__(self, length: int = 32, vocab_size: int = 5) -> None:
        super().__init__(length, vocab_size)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs = self._tokens(size, generator)
        counts = F.one_hot(inputs, self.vocab_size).sum(1)
        # Among equal counts the smallest token: argmax alone does not say which.
        best = counts * self.vocab_size - torch.arange(self.vocab_size)
        return inputs, self._at(inputs, -1, best.argmax(-1))


TASKS: dict[str, type[SequenceTask]] = {
    "copy": Copy,
    "sort": Sort,
    "reverse": Reverse,
    "retrieval": Retrieval,
    "kv_recall": KeyValueRecall,
    "first_token": FirstToken,
    "selective_copy": SelectiveCopy,
    "long_copy": LongCopy,
    "distant_match": DistantMatch,
    "multihop": MultiHop,
    "stack": Stack,
    "induction": Induction,
    "pattern": Pattern,
    "counting": Counting,
    "parity": Parity,
    "addition": Addition,
    "modular": Modular,
    "bigram": Bigram,
    "majority": Majority,
    "noisy_copy": NoisyCopy,
    "compression": Compression,
    "histogram": Histogram,
}
"""The tasks by name."""


def sequence_task(name: str, **options: Any) -> SequenceTask:
    """One of :data:`TASKS`, with the paper's sizes unless ``options`` give others."""
    if name not in TASKS:
        raise OptionError(f"No sequence task {name!r}. There are: {', '.join(TASKS)}.")
    return TASKS[name](**options)
