"""A made-up click log: whether a target is clicked depends on how often and how lately its category was looked at."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.models.dare import Clicks, Prediction, TwoStageSequenceModel, two_stage_loss

__all__ = ["SyntheticClicks", "area_under_curve", "synthetic_ctr"]


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how likely a positive scores above a negative; ties count half."""
    positive = labels.bool()
    if positive.all() or not positive.any():
        raise OptionError("The area under the curve needs examples of both labels.")
    _, place, count = scores.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place]
    ones, zeros = int(positive.sum()), int((~positive).sum())
    return (float(rank[positive].sum()) - ones * (ones + 1) / 2) / (ones * zeros)


class SyntheticClicks:
    """A task for :func:`regard.bench.training.fit` on :class:`~regard.models.dare.Clicks`.

    Every item has a category. Behaviours and targets are drawn evenly from all items; with ``focus`` above zero, that
    share of a user's behaviours, and half of the targets, come from ``interests`` categories of the user's own. With
    ``lag`` 1 for the latest behaviour,

        count = sum over behaviours of the target's category of 2^(-(lag - 1) / half_life)
        P(click) = sigmoid(slope * (count - threshold))

    Fields: ``item`` and ``category`` (0 is padding), ``time`` (the lag; 0 is the target's). Histories have between
    half and all of ``length`` behaviours, the latest last.
    """

    num_classes = 2

    def __init__(
        self,
        n_items: int = 2000,
        n_categories: int = 50,
        length: int = 100,
        *,
        train: int = 20_000,
        test: int = 10_000,
        half_life: float = 20.0,
        slope: float = 4.0,
        threshold: float = 0.5,
        focus: float = 0.0,
        interests: int = 5,
        seed: int = 0,
    ) -> None:
        if not 1 <= interests <= n_categories <= n_items or length < 2 or not 0 <= focus <= 1 or half_life <= 0:
            raise OptionError(
                f"Need 1 <= interests <= n_categories <= n_items, length >= 2, focus in [0, 1], half_life > 0; got "
                f"{interests}, {n_categories}, {n_items}, {length}, {focus}, {half_life}."
            )
        self.n_items, self.n_categories, self.length = n_items, n_categories, length
        self.interests, self.focus, self.half_life = interests, focus, half_life
        self.slope, self.threshold = slope, threshold
        self.fields = {"item": n_items + 1, "category": n_categories + 1, "time": length + 1}
        generator = torch.Generator().manual_seed(seed)
        self.data = {split: self.draw(count, generator) for split, count in (("train", train), ("test", test))}

    def draw(self, count: int, generator: torch.Generator) -> tuple[Clicks, Tensor, Tensor]:
        """New examples, their labels ``(count,)`` and the chances of a click that they were drawn with."""
        length, categories = self.length, self.n_categories

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        own = uniform(count, categories).argsort(-1)[:, : self.interests]
        liked = own.gather(1, (uniform(count, length + 1) * self.interests).long())
        anything = (uniform(count, length + 1) * categories).long()
        focus = torch.full((length + 1,), self.focus)
        focus[-1] = min(self.focus, 0.5)
        category = torch.where(uniform(count, length + 1) < focus, liked, anything)
        # Item i is of category i modulo the number of categories.
        per = (self.n_items - 1 - category) // categories + 1
        item = category + categories * (uniform(count, length + 1) * per).long()
        lag = torch.arange(length, 0, -1).expand(count, -1)
        sizes = length // 2 + (uniform(count, 1) * (length - length // 2 + 1)).long()
        mask = lag <= sizes
        same = (category[:, :-1] == category[:, -1:]) & mask
        weight = 2.0 ** (-(lag - 1) / self.half_life)
        chance = (self.slope * ((same * weight).sum(-1) - self.threshold)).sigmoid()
        labels = (uniform(count) < chance).long()
        history = {"item": (item[:, :-1] + 1) * mask, "category": (category[:, :-1] + 1) * mask, "time": lag * mask}
        target = {"item": item[:, -1] + 1, "category": category[:, -1] + 1, "time": torch.zeros_like(labels)}
        return Clicks(target, history, mask), labels, chance

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Clicks, Tensor]:
        """Drawn with replacement."""
        clicks, labels, _ = self.data[split]
        index = torch.randint(len(labels), (size,), generator=generator)
        return clicks[index], labels[index]

    def loss(self, outputs: Prediction, targets: Tensor) -> Tensor:
        """Of both networks, in nats."""
        return two_stage_loss(outputs, targets)

    def score(self, outputs: Prediction, targets: Tensor) -> tuple[float, int]:
        """Right answers, and their number."""
        return float((outputs.main.argmax(-1) == targets).sum()), len(targets)

    @cached_property
    def information(self) -> Tensor:
        """Mutual information in bits of the label and "the behaviour at this lag is of the target's category" (row 0),
        or "is of another given category" (row 1): ``(2, length)`` by lag, among histories that reach so far.

        From 400000 new examples, whose chances are known; the other categories are alike, so they are counted together.
        """
        generator = torch.Generator().manual_seed(12345)
        real, same, clicked, both = torch.zeros(4, self.length, dtype=torch.float64)
        for _ in range(20):
            clicks, _, chance = self.draw(20_000, generator)
            hit = (clicks.history["category"] == clicks.target["category"][:, None]).double()
            real += clicks.mask.double().sum(0)
            same += hit.sum(0)
            clicked += (clicks.mask * chance[:, None].double()).sum(0)
            both += (hit * chance[:, None]).sum(0)
        others = max(self.n_categories - 1, 1)
        rows = torch.stack(
            (
                _information(same / real, both / same, clicked / real),
                _information((real - same) / real / others, (clicked - both) / (real - same), clicked / real),
            )
        )
        return rows.flip(-1)

    @torch.no_grad()
    def learned(self, model: TwoStageSequenceModel, split: str = "test") -> Tensor:
        """Mean score of behaviours of the target's category, and of others, ``(2, length)`` by lag."""
        clicks = self.data[split][0]
        scores = model.search(clicks).double()
        same = clicks.history["category"] == clicks.target["category"][:, None]
        rows = [torch.where(kind, scores, 0).sum(0) / kind.sum(0) for kind in (same, clicks.mask & ~same)]
        return torch.stack(rows).flip(-1)


def _information(share: Tensor, clicked: Tensor, base: Tensor) -> Tensor:
    """Between two binary variables, in bits: how often the first holds, how often the second does then, and at all."""
    rest = (base - share * clicked) / (1 - share)
    return _entropy(base) - share * _entropy(clicked) - (1 - share) * _entropy(rest)


def _entropy(chance: Tensor) -> Tensor:
    return -(torch.xlogy(chance, chance) + torch.xlogy(1 - chance, 1 - chance)) / math.log(2)


def synthetic_ctr(n_items: int = 2000, n_categories: int = 50, length: int = 100, **settings: Any) -> SyntheticClicks:
    """The click log of this size; settings as in :class:`SyntheticClicks`."""
    return SyntheticClicks(n_items, n_categories, length, **settings)
