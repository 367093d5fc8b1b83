"""Associative recall in one hop: a key comes with its value on one token, so that one attention layer can answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.bench.training import evaluate, fit
from regard.errors import OptionError
from regard.models.sequence import SequenceModel

__all__ = ["PairedRecall", "recall_accuracy"]


class PairedRecall(Classification):
    """Multi-query recall with key and value on the same token.

    Inputs ``(batch, length, input_dim)``: ``pairs`` memory tokens ``[key | value | 0]`` at random places of the first
    ``memory`` tokens, later each key again as a query token ``[key | 0 | 1]`` at a random place, noise of size
    ``noise`` everywhere. Targets: the value at a query token, ignored elsewhere. In split ``"far"`` (and ``"test"``)
    queries stand in the last half of the sequence, or ``distance`` tokens and more behind the memory, in ``"train"``
    anywhere behind the memory.
    """

    def __init__(
        self,
        length: int = 256,
        pairs: int = 8,
        keys: int = 16,
        values: int = 16,
        memory: int = 64,
        noise: float = 0.0,
        distance: int | None = None,
    ) -> None:
        if pairs > min(keys, memory) or memory + pairs > length // 2:
            raise OptionError(f"{pairs} pairs of {keys} keys in {memory} tokens do not fit a length of {length}.")
        if distance is not None and not 0 <= distance <= length - memory - pairs:
            raise OptionError(f"{pairs} queries {distance} tokens behind a memory of {memory} do not fit {length}.")
        self.length, self.pairs, self.keys, self.values, self.memory = length, pairs, keys, values, memory
        self.noise, self.distance = noise, distance
        self.num_classes, self.input_dim = values, keys + values + 1

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` sequences and their targets."""

        def draw(count: int, chosen: int) -> Tensor:
            return torch.rand(size, count, generator=generator).argsort(-1)[:, :chosen]

        far = self.length // 2 if self.distance is None else self.memory + self.distance
        first = self.memory if split == "train" else far
        keys = F.one_hot(draw(self.keys, self.pairs), self.keys).float()
        answers = torch.randint(self.values, (size, self.pairs), generator=generator)
        values, nothing = F.one_hot(answers, self.values).float(), torch.zeros(size, self.pairs, 1)
        stored = torch.cat((keys, values, nothing), -1)
        asked = torch.cat((keys, torch.zeros_like(values), nothing + 1), -1)
        inputs = self.noise * torch.randn(size, self.length, self.input_dim, generator=generator)
        places = draw(self.length - first, self.pairs) + first
        for at, tokens in ((draw(self.memory, self.pairs), stored), (places, asked)):
            inputs.scatter_add_(1, at[..., None].expand(-1, -1, self.input_dim), tokens)
        targets = torch.full((size, self.length), IGNORED).scatter_(1, places, answers)
        return inputs, targets


def recall_accuracy(
    task: PairedRecall,
    rivals: Mapping[str, tuple[str, Mapping[str, Any]]],
    report: Callable[[str], None],
    *,
    steps: int,
    num_heads: int = 2,
    batches: int = 4,
) -> dict[str, float]:
    """Accuracy on far pairs of small models that differ in their mechanism (a name and its options) alone."""
    found = {}
    for name, (mechanism, options) in rivals.items():
        torch.manual_seed(0)
        model = SequenceModel(
            task.num_classes,
            input_dim=task.input_dim,
            embed_dim=64,
            num_heads=num_heads,
            mechanism=mechanism,
            options=dict(options),
            positions="none",
        )
        fit(model, task, steps=steps, batch_size=8, lr=5e-3)
        found[name] = evaluate(model, task, batches=batches, batch_size=32)[1]
        report(f"{name}: accuracy on far pairs {found[name]:.4f}")
    return found
