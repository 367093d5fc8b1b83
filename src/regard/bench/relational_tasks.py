"""Tasks that relations decide: which objects are alike, how rows match, where each stands in a hidden order.

Small forms of what Altabaa and Lafferty, 2024, arXiv 2405.16727, section 4, measure sample efficiency on. Objects are
vectors: those of split ``"train"`` come from a fixed pool, those of ``"test"`` are new ones, so that a rule must be
learned and not its cases. ``samples`` limits training to so many fixed examples.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["RELATIONS", "ArgSort", "ModularPolynomials", "RelationalGame"]

RELATIONS = ("same", "between", "match_pattern")


class _Sampled(Classification):
    """Training batches drawn from ``samples`` fixed examples (None: afresh each time)."""

    samples: int | None
    _kept: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def draw(self, size: int, generator: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
        """``size`` fresh examples."""

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` examples and their targets."""
        if split != "train" or self.samples is None:
            return self.draw(size, generator, split)
        if self._kept is None:
            self._kept = self.draw(self.samples, torch.Generator().manual_seed(1234), "train")
        chosen = torch.randint(self.samples, (size,), generator=generator)
        return self._kept[0][chosen], self._kept[1][chosen]


class RelationalGame(_Sampled):
    """Yes or no on a row or two rows of objects ``(batch, objects, dim)``.

    relation: ``"same"``, of two objects; ``"between"``, whether the outer two of three are alike and the middle one is
    not; ``"match_pattern"``, whether two rows of three have the same pattern among AAA, AAB, ABA, ABB, ABC. Half of
    the examples hold.
    """

    PATTERNS = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, 2))

    def __init__(
        self, relation: str = "match_pattern", dim: int = 16, pool: int = 64, samples: int | None = None
    ) -> None:
        if relation not in RELATIONS:
            raise OptionError(f"relation is one of {', '.join(RELATIONS)}; got {relation!r}.")
        if dim < 1 or pool < 6:
            raise OptionError(f"Need dim >= 1 and a pool of at least 6 objects; got {dim} and {pool}.")
        self.relation, self.num_classes, self.input_dim, self.samples = relation, 2, dim, samples
        self.pool = torch.randn(pool, dim, generator=torch.Generator().manual_seed(77))

    def draw(self, size: int, generator: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
        holds = torch.randint(2, (size,), generator=generator)
        names = torch.stack([self._names(bool(yes), generator) for yes in holds])
        if split == "train":
            order = torch.rand(size, len(self.pool), generator=generator).argsort(-1)[:, :6]
            objects = self.pool[order]
        else:
            objects = torch.randn(size, 6, self.input_dim, generator=generator)
        return objects.gather(1, names[..., None].expand(-1, -1, self.input_dim)), holds

    def _names(self, holds: bool, generator: torch.Generator) -> Tensor:
        """Which of six different objects stands where."""

        def pick(count: int) -> int:
            return int(torch.randint(count, (1,), generator=generator))

        if self.relation == "same":
            return torch.tensor((0, 0) if holds else (0, 1))
        if self.relation == "between":
            return torch.tensor(self.PATTERNS[2] if holds else [p for p in self.PATTERNS if p != (0, 1, 0)][pick(4)])
        first = pick(5)
        second = first if holds else (first + 1 + pick(4)) % 5
        # The second row is of objects of its own.
        return torch.tensor((*self.PATTERNS[first], *(3 + name for name in self.PATTERNS[second])))


class ArgSort(_Sampled):
    """At each of ``count`` objects its rank in a hidden order of a pool of ``pool`` random vectors. The order is of the
    pool, so both splits draw from it; test examples are other draws."""

    def __init__(self, count: int = 8, dim: int = 12, pool: int = 48, samples: int | None = None) -> None:
        if not 2 <= count <= pool:
            raise OptionError(f"Need 2 <= count <= pool, got {count} and {pool}.")
        self.num_classes, self.input_dim, self.samples = count, dim, samples
        # The index in the pool is the place in the order.
        self.pool = torch.randn(pool, dim, generator=torch.Generator().manual_seed(78))

    def draw(self, size: int, generator: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(size, len(self.pool), generator=generator).argsort(-1)[:, : self.num_classes]
        return self.pool[chosen], chosen.argsort(-1).argsort(-1)


class ModularPolynomials(_Sampled):
    """Text of a polynomial modulo ``prime``: coefficients, ``|``, an argument, ``=``, and its value, asked at ``=``.

    Tokens: residues, then ``|`` and ``=``. Split ``"test"`` is drawn afresh.
    """

    def __init__(self, prime: int = 7, degree: int = 2, samples: int | None = None) -> None:
        if prime < 2 or degree < 0:
            raise OptionError(f"Need prime >= 2 and degree >= 0, got {prime} and {degree}.")
        self.prime, self.degree, self.samples = prime, degree, samples
        self.num_classes, self.vocab_size = prime, prime + 2

    def draw(self, size: int, generator: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(self.prime, (size, self.degree + 2), generator=generator)
        coefficients, argument = numbers[:, :-1], numbers[:, -1:]
        value = torch.zeros_like(argument)
        for power in range(self.degree + 1):
            value = (value * argument + coefficients[:, power : power + 1]) % self.prime
        bar, equals = (torch.full((size, 1), self.prime + i) for i in range(2))
        inputs = torch.cat((coefficients, bar, argument, equals), 1)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1:] = value
        return inputs, targets
