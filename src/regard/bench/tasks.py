"""Small tasks that separate mechanisms: a generator, a loss and a metric each.

A task draws batches from a ``torch.Generator``, so that every mechanism sees the same data.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import MissingExtraError, OptionError

__all__ = ["Digits", "MultiQueryRecall", "StdlibText", "Task", "stdlib_text"]

IGNORED = -100


class Task(Protocol):
    """What :func:`regard.bench.training.fit` needs."""

    num_classes: int

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``size`` examples; ``split`` is ``"train"`` or ``"test"``."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Sum of the metric over the counted targets, and their number."""
        ...


class _Classification:
    num_classes: int

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        counted = targets != IGNORED
        return float((outputs.argmax(-1) == targets)[counted].sum()), int(counted.sum())


class MultiQueryRecall(_Classification):
    """Multi-query associative recall (Arora et al., "Zoology", 2023, arXiv 2312.04927).

    A sequence opens with ``pairs`` key-value pairs; later each key comes again once, at random places among filler,
    and the model must answer with its value at that place. Inputs ``(batch, length)``: keys and values have disjoint
    halves of the vocabulary, filler is token 0. Targets: the value at a repeated key, ignored elsewhere.
    """

    def __init__(self, vocab_size: int = 64, pairs: int = 16, length: int = 256) -> None:
        if 3 * pairs > length or pairs > (vocab_size - 1) // 2:
            raise OptionError(
                f"{pairs} pairs need length >= {3 * pairs} and vocab_size >= {2 * pairs + 1}; "
                f"got {length} and {vocab_size}."
            )
        self.vocab_size, self.pairs, self.length = vocab_size, pairs, length
        self.num_classes = vocab_size

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        half = (self.vocab_size - 1) // 2
        keys = torch.rand(size, half, generator=generator).argsort(-1)[:, : self.pairs] + 1
        values = torch.randint(half, (size, self.pairs), generator=generator) + 1 + half
        inputs = torch.zeros(size, self.length, dtype=torch.int64)
        inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2] = keys, values
        free = self.length - 2 * self.pairs
        places = torch.rand(size, free, generator=generator).argsort(-1)[:, : self.pairs] + 2 * self.pairs
        targets = torch.full_like(inputs, IGNORED)
        inputs.scatter_(1, places, keys)
        targets.scatter_(1, places, values)
        return inputs, targets


@cache
def stdlib_text(limit: int = 4_000_000) -> tuple[bytes, bytes]:
    """Train and held-out bytes of Python source: the standard library that this interpreter ships, a tenth held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    files = (f for f in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")) if "site-packages" not in f.parts)
    for index, file in enumerate(f for f in files if "test" not in f.parts):
        text = file.read_bytes()
        parts[index % 10 == 9].append(text)
        total += len(text)
        if total > limit:
            break
    return b"\n".join(parts[0]), b"\n".join(parts[1])


class StdlibText(_Classification):
    """Next-byte prediction on Python source. Inputs and targets ``(batch, length)``; metric: accuracy."""

    num_classes = 256
    vocab_size = 256

    def __init__(self, length: int = 128, limit: int = 4_000_000) -> None:
        self.length = length
        self._text = {
            split: torch.frombuffer(bytearray(text), dtype=torch.uint8)
            for split, text in zip(("train", "test"), stdlib_text(limit), strict=True)
        }

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        text = self._text[split]
        start = torch.randint(len(text) - self.length - 1, (size, 1), generator=generator)
        piece = text[start + torch.arange(self.length + 1)].long()
        return piece[:, :-1], piece[:, 1:]


class Digits(_Classification):
    """scikit-learn's 8 x 8 digits as 64 tokens of one value. Inputs ``(batch, 64, 1)``, targets ``(batch,)``."""

    num_classes = 10
    grid = (8, 8)

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingExtraError("The digits task", "dev") from error
        images, labels = load_digits(return_X_y=True)
        x, y = torch.as_tensor(images, dtype=torch.float32) / 8 - 1, torch.as_tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        held = len(x) // 5
        self._data = {"test": (x[order[:held]], y[order[:held]]), "train": (x[order[held:]], y[order[held:]])}

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        x, y = self._data[split]
        index = torch.randint(len(x), (size,), generator=generator)
        return x[index][..., None], y[index]

    def all(self, split: str = "test") -> tuple[Tensor, Tensor]:
        """The whole split at once."""
        x, y = self._data[split]
        return x[..., None], y
