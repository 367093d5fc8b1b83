"""Small tasks that separate mechanisms: a generator, a loss and a metric each.

A task draws batches from a ``torch.Generator``, so that every mechanism sees the same data.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import MissingExtraError, OptionError

__all__ = [
    "Classification",
    "ClutteredDigits",
    "Digits",
    "DistractorRetrieval",
    "MultiQueryRecall",
    "ShortRangeTask",
    "StdlibText",
    "Task",
    "stdlib_text",
]

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


class Classification:
    """Loss and score of tasks whose targets are classes, ignored where negative."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    num_classes: int

    @property
    def chance(self) -> float:
        """The score of guessing, where all classes are as frequent."""
        return 1 / self.num_classes

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        counted = targets != IGNORED
        return float((outputs.argmax(-1) == targets)[counted].sum()), int(counted.sum())


class MultiQueryRecall(Classification):
    """Multi-query associative recall (Arora et al., "Zoology", 2023, arXiv 2312.04927).

    A sequence opens with ``pairs`` key-value pairs; later each key comes again once, at random places among filler,
    and the model must answer with its value at that place. Inputs ``(batch, length)``: keys and values have disjoint
    halves of the vocabulary, filler is token 0. Targets: the value at a repeated key, ignored elsewhere. power: the
    ``i``-th place behind the pairs is drawn in proportion to ``i^(power - 1)``, by default all alike; 0.01, as in
    Zoology, asks mostly soon.
    """

    def __init__(self, vocab_size: int = 64, pairs: int = 16, length: int = 256, power: float | None = None) -> None:
        if power is not None and not power > 0:
            raise OptionError(f"power is above 0, got {power}.")
        if 3 * pairs > length or pairs > (vocab_size - 1) // 2:
            raise OptionError(
                f"{pairs} pairs need length >= {3 * pairs} and vocab_size >= {2 * pairs + 1}; "
                f"got {length} and {vocab_size}."
            )
        self.vocab_size, self.pairs, self.length = vocab_size, pairs, length
        self.num_classes = vocab_size
        self.power = power

    @property
    def chance(self) -> float:
        """Of guessing among the values."""
        return 1 / ((self.vocab_size - 1) // 2)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        half = (self.vocab_size - 1) // 2
        keys = torch.rand(size, half, generator=generator).argsort(-1)[:, : self.pairs] + 1
        values = torch.randint(half, (size, self.pairs), generator=generator) + 1 + half
        inputs = torch.zeros(size, self.length, dtype=torch.int64)
        inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2] = keys, values
        free = self.length - 2 * self.pairs
        if self.power is None:
            places = torch.rand(size, free, generator=generator).argsort(-1)[:, : self.pairs]
        else:
            chances = torch.arange(1, free + 1, dtype=torch.float64) ** (self.power - 1)
            places = torch.multinomial(chances.expand(size, -1), self.pairs, generator=generator)
        places = places + 2 * self.pairs
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


class StdlibText(Classification):
    """Next-byte prediction on Python source. Inputs and targets ``(batch, length)``; metric: accuracy."""

    num_classes = 256
    vocab_size = 256

    def __init__(self, length: int = 128, limit: int = 4_000_000) -> None:
        self.length = length
        self._text = {
            split: torch.frombuffer(bytearray(text), dtype=torch.uint8)
            for split, text in zip(("train", "test"), stdlib_text(limit), strict=True)
            if len(text) > length + 1
        }
        if len(self._text) < 2:
            raise OptionError(f"{limit} bytes of text leave a split too short for length {length}; raise the limit.")

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        text = self._text[split]
        start = torch.randint(len(text) - self.length - 1, (size, 1), generator=generator)
        piece = text[start + torch.arange(self.length + 1)].long()
        return piece[:, :-1], piece[:, 1:]


class Digits(Classification):
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


# Digits as one stroke each, corner by corner on a grid of 4 x 6, x to the right and y down.
_STROKES: tuple[tuple[tuple[float, float], ...], ...] = (
    ((1, 0), (3, 0), (4, 1.5), (4, 4.5), (3, 6), (1, 6), (0, 4.5), (0, 1.5), (1, 0)),
    ((0.8, 1.5), (2, 0.5), (2.4, 0), (2.4, 2), (2.4, 4), (2.4, 6)),
    ((0, 1.5), (1, 0), (3, 0), (4, 1.3), (3.5, 2.8), (1.5, 4.4), (0, 6), (2, 6), (4, 6)),
    ((0, 0.8), (1.2, 0), (3, 0), (3.8, 1.3), (3, 2.7), (1.5, 3), (3, 3.2), (4, 4.5), (3, 6), (1.2, 6), (0, 5.2)),
    ((3, 6), (3, 3), (3, 0), (1.5, 2), (0, 4), (2, 4), (4, 4)),
    ((3.8, 0), (0.5, 0), (0.3, 2.6), (2.2, 2.2), (3.8, 3.2), (3.8, 4.8), (2.6, 6), (1, 6), (0, 5.3)),
    ((3.4, 0), (1.5, 0.8), (0.3, 2.6), (0, 4.5), (1, 6), (3, 6), (4, 4.6), (3, 3.1), (1.2, 3.2), (0.1, 4.2)),
    ((0, 0), (2, 0), (4, 0), (3, 2), (2, 4), (1.4, 6)),
    ((2, 2.8), (0.4, 1.5), (1, 0), (3, 0), (3.6, 1.5), (2, 2.8), (0, 4.5), (1, 6), (3, 6), (4, 4.5), (2, 2.8)),
    ((3.9, 1.8), (3, 3), (1, 3), (0, 1.6), (1, 0), (3, 0), (4, 1.5), (3.8, 4), (2.6, 6)),
)


class ClutteredDigits(Classification):
    """A digit drawn somewhere on a canvas among pieces of other digits, in the manner of cluttered MNIST (Mnih et al.,
    "Recurrent Models of Visual Attention", 2014, arXiv 1406.6247, section 4.1). The digits are strokes of this module's
    own, turned, stretched, slanted and bent at random, so no data set is needed.

    Inputs ``(batch, 1, size, size)`` between 0 and 1, targets ``(batch,)``. A fixed number of images is drawn for each
    split, always the same. :meth:`draw` makes others, and says where the digits lie.
    """

    num_classes = 10

    def __init__(
        self,
        size: int = 32,
        height: float = 13.0,
        pieces: int = 8,
        noise: float = 0.1,
        train: int = 2000,
        test: int = 1000,
    ) -> None:
        if size < 1.6 * height or pieces < 0 or noise < 0:
            raise OptionError(f"A digit of height {height} needs a canvas of {1.6 * height:.0f} or more; got {size}.")
        self.size, self.height, self.pieces, self.noise = size, height, pieces, noise
        self._sizes = {"train": train, "test": test}
        self._drawn: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        longest = max(len(stroke) for stroke in _STROKES) - 1
        self._lines = torch.zeros(10, longest, 2, 2)
        self._counts = torch.tensor([len(stroke) - 1 for stroke in _STROKES])
        for digit, stroke in enumerate(_STROKES):
            points = torch.tensor(stroke) - torch.tensor([2.0, 3.0])
            lines = torch.stack((points[:-1], points[1:]), 1)
            # Shorter strokes repeat their last line, which draws nothing new.
            self._lines[digit] = torch.cat((lines, lines[-1:].expand(longest - len(lines), -1, -1)))

    def _pose(self, lines: Tensor, generator: torch.Generator) -> Tensor:
        """Bend, stretch, slant and turn ``(count, lines, 2, 2)`` around its middle, in pixels."""

        def draw(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(len(lines), *shape, generator=generator)

        # The two ends of neighbouring lines are one point: bending is a function of the place.
        phase, strength = draw(0, 6.28, 1, 1, 2), draw(-0.35, 0.35, 1, 1, 2)
        lines = lines + strength * torch.sin(lines.flip(-1) * 0.8 + phase)
        angle, slant = draw(-0.3, 0.3), draw(-0.25, 0.25)
        unit = self.height / 6
        wide, high = draw(0.8, 1.2) * unit, draw(0.85, 1.15) * unit
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack(
            (
                torch.stack((cos * wide, (slant * cos - sin) * high), -1),
                torch.stack((sin * wide, (slant * sin + cos) * high), -1),
            ),
            -2,
        )
        return lines @ turn.transpose(-1, -2)[:, None]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images, digits and the digits' boxes ``(count, 4)``: left, top, right, bottom in pixels."""
        digits = torch.randint(10, (count,), generator=generator)
        lines = self._pose(self._lines[digits], generator)
        ends = lines.flatten(1, 2)
        low, high = ends.amin(1), ends.amax(1)
        room = self.size - 2 - (high - low)
        shift = 1 - low + torch.rand(count, 2, generator=generator) * room.clamp_min(0)
        lines = lines + shift[:, None, None]
        boxes = torch.cat((low + shift, high + shift), -1)
        every = [lines]
        if self.pieces:
            total = count * self.pieces
            other = torch.randint(10, (total,), generator=generator)
            first = (torch.rand(total, generator=generator) * (self._counts[other] - 1)).long()
            pair = first[:, None] + torch.arange(2)
            scrap = self._pose(self._lines[other].gather(1, pair[:, :, None, None].expand(-1, -1, 2, 2)), generator)
            scrap = scrap - scrap.mean((1, 2), keepdim=True)
            scrap = scrap + torch.rand(total, 1, 1, 2, generator=generator) * self.size
            every.append(scrap.reshape(count, -1, 2, 2))
        image = self._paint(torch.cat(every, 1))
        image = image + self.noise * torch.randn(image.shape, generator=generator)
        return image.clamp(0, 1)[:, None], digits, boxes

    def _paint(self, lines: Tensor) -> Tensor:
        """Lines ``(count, lines, 2, 2)`` as an image: one up to 0.6 pixels from a line, falling to zero at 1.6."""
        axis = torch.arange(self.size) + 0.5
        start, along = lines[:, :, 0], lines[:, :, 1] - lines[:, :, 0]
        across = axis.expand(self.size, -1).flatten() - start[..., :1]
        down = axis[:, None].expand(-1, self.size).flatten() - start[..., 1:]
        dx, dy = along.unbind(-1)
        square = (dx.square() + dy.square()).clamp_min(1e-6)
        share = across * (dx / square)[..., None] + down * (dy / square)[..., None]
        share = share.clamp_(0, 1)
        across, down = across - share * dx[..., None], down - share * dy[..., None]
        distance = (across.square_() + down.square_()).amin(1).sqrt()
        return (1.6 - distance).clamp(0, 1).view(-1, self.size, self.size)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        images, digits, _ = self.all(split)
        index = torch.randint(len(images), (size,), generator=generator)
        return images[index], digits[index]

    def all(self, split: str = "test") -> tuple[Tensor, Tensor, Tensor]:
        """The whole split: images, digits, and the digits' boxes."""
        if split not in self._drawn:
            # Few at a time, so that the distances to all lines stay in the cache.
            generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
            counts = [min(16, self._sizes[split] - start) for start in range(0, self._sizes[split], 16)]
            parts = [self.draw(count, generator) for count in counts]
            self._drawn[split] = tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[assignment]
        return self._drawn[split]


class DistractorRetrieval(Classification):
    """Find one key among distractors: of ``length - 1`` cells each holds a key vector and a class; the last cell holds
    the key that is asked for, blurred by ``noise``, and the answer is the class of the cell with that key.

    Inputs ``(batch, length, key_dim + num_classes)``, targets ``(batch,)``: for a model that reads out its last
    position. :meth:`draw` also says which cell it was.
    """

    def __init__(self, length: int = 64, key_dim: int = 8, num_classes: int = 8, noise: float = 0.4) -> None:
        if length < 2 or key_dim < 1 or num_classes < 2 or noise < 0:
            raise OptionError(
                f"Need length >= 2, key_dim >= 1, num_classes >= 2, noise >= 0; got {length}, {key_dim}, "
                f"{num_classes}, {noise}."
            )
        self.length, self.key_dim, self.num_classes, self.noise = length, key_dim, num_classes, noise
        self.input_dim = key_dim + num_classes

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, classes and the relevant cell ``(size,)``."""
        cells = self.length - 1
        keys = torch.randn(size, cells, self.key_dim, generator=generator)
        classes = torch.randint(self.num_classes, (size, cells), generator=generator)
        relevant = torch.randint(cells, (size,), generator=generator)
        rows = torch.arange(size)
        asked = keys[rows, relevant] + self.noise * torch.randn(size, self.key_dim, generator=generator)
        inputs = torch.zeros(size, self.length, self.input_dim)
        inputs[:, :-1, : self.key_dim] = keys
        inputs[:, :-1, self.key_dim :] = F.one_hot(classes, self.num_classes)
        inputs[:, -1, : self.key_dim] = asked
        return inputs, classes[rows, relevant], relevant

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        return self.draw(size, generator)[:2]


class ShortRangeTask(Classification):
    """Next-token prediction where the next token depends on the last ``order`` (1 to 3) tokens alone: a Markov source
    with a fixed random table, so that attention beyond ``order`` tokens is of no use.

    The chances of the next token are a softmax of ``sharpness`` times normal numbers. Inputs and targets ``(batch,
    length)``; metric: accuracy. :meth:`least_loss` is what no model can beat.
    """

    def __init__(
        self, vocab_size: int = 16, order: int = 3, length: int = 128, sharpness: float = 2.0, seed: int = 0
    ) -> None:
        if vocab_size < 2 or not 1 <= order <= 3 or length < 1 or sharpness < 0:
            raise OptionError(
                f"Need vocab_size >= 2, order from 1 to 3, length >= 1 and sharpness >= 0; got {vocab_size}, {order}, "
                f"{length}, {sharpness}."
            )
        self.vocab_size = self.num_classes = vocab_size
        self.order, self.length = order, length
        logits = torch.randn(vocab_size**order, vocab_size, generator=torch.Generator().manual_seed(seed))
        self.table = (sharpness * logits).softmax(-1)

    def _context(self, tokens: Tensor) -> Tensor:
        """The table's row for each stretch of ``order`` tokens along the last axis: ``(..., length - order + 1)``."""
        stretches = tokens.unfold(-1, self.order, 1)
        return (stretches * self.vocab_size ** torch.arange(self.order)).sum(-1)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        tokens = torch.randint(self.vocab_size, (size, self.order), generator=generator)
        # The sequence proper begins some tokens later: the first ones were not drawn from the source.
        for _ in range(self.length + 1):
            chances = self.table[self._context(tokens[:, -self.order :])[:, 0]]
            tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=generator)), 1)
        return tokens[:, self.order : -1], tokens[:, self.order + 1 :]

    def least_loss(self, inputs: Tensor) -> float:
        """Mean entropy (nats) of the next token where its whole context is among the inputs."""
        chances = self.table[self._context(inputs)]
        return float(-(chances * chances.log()).sum(-1).mean())
