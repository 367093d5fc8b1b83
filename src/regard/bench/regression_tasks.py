"""A linear function to be learned from examples in the sequence, one that stays and one that changes on the way."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from regard.errors import OptionError

__all__ = ["DriftingRegression", "InContextRegression"]


class InContextRegression:
    """Pairs of ``x`` and ``y = w x + noise`` with a function ``w`` of each sequence's own (Garg et al., "What Can
    Transformers Learn In-Context?", 2022, arXiv 2208.01066), each ``y`` to be told before it is shown.

    Inputs ``(batch, length, dim + 2)``: a question ``[x | 0 | 1]``, then ``[x | y | 0]``, and so on. Targets ``(batch,
    length)``: ``y`` at a question, NaN elsewhere. x and w are normal, so that ``y`` has unit variance but for its noise
    (standard deviation ``noise``).

    key_noise: standard deviation of what is added to every x that is shown, while y comes from the x without it. drift:
    from one pair to the next ``w`` keeps ``sqrt(1 - drift**2)`` of itself and gets ``drift`` of something new. skew:
    the x are longer along some directions, ``exp(-skew)`` between the first and the last.

    The metric is the mean squared error over the sequence's second half, relative to the variance of y: 1 for who tells
    the mean. Lower is better; :meth:`reference` is what can be reached.
    """

    metric: ClassVar[str] = "relative error"
    higher_is_better: ClassVar[bool] = False
    chance: ClassVar[float] = 1.0
    num_classes = 1

    def __init__(
        self,
        length: int = 64,
        dim: int = 4,
        noise: float = 0.1,
        key_noise: float = 0.0,
        drift: float = 0.0,
        skew: float = 0.0,
    ) -> None:
        if length < 4 or length % 2 or dim < 1 or min(noise, key_noise, drift, skew) < 0 or drift > 1:
            raise OptionError(
                f"Need an even length >= 4, dim >= 1, noise, key_noise and skew >= 0 and drift from 0 to 1; got "
                f"{length}, {dim}, {noise}, {key_noise}, {skew}, {drift}."
            )
        self.length, self.dim, self.noise, self.key_noise, self.drift = length, dim, noise, key_noise, drift
        self.input_dim = dim + 2
        sizes = torch.exp(-skew * torch.linspace(0, 1, dim)) if dim > 1 else torch.ones(1)
        self.sizes = sizes * math.sqrt(dim) / sizes.norm()

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` sequences and their targets; both splits are drawn afresh."""
        pairs = self.length // 2
        x = self.sizes * torch.randn(size, pairs, self.dim, generator=generator)
        new = torch.randn(size, pairs, self.dim, generator=generator) / math.sqrt(self.dim)
        kept, functions = math.sqrt(1 - self.drift**2), [new[:, 0]]
        for place in range(1, pairs):
            functions.append(kept * functions[-1] + self.drift * new[:, place])
        y = (torch.stack(functions, 1) * x).sum(-1) + self.noise * torch.randn(size, pairs, generator=generator)
        shown = x + self.key_noise * torch.randn(x.shape, generator=generator)
        inputs = torch.zeros(size, pairs, 2, self.input_dim)
        inputs[..., : self.dim] = shown[:, :, None]
        inputs[:, :, 0, -1] = 1
        inputs[:, :, 1, self.dim] = y
        targets = torch.full((size, pairs, 2), math.nan)
        targets[:, :, 0] = y
        return inputs.flatten(1, 2), targets.flatten(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error over all questions."""
        asked = ~targets.isnan()
        return (outputs[..., 0][asked] - targets[asked]).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Squared errors over the second half's questions, in units of the variance of y; and their number."""
        told, true = (t[:, self.length // 2 :] for t in (outputs[..., 0], targets))
        asked = ~true.isnan()
        errors = (told[asked] - true[asked]).square()
        return float(errors.double().sum() / (1 + self.noise**2)), int(asked.sum())

    def reference(self, size: int = 2048, seed: int = 10_000) -> float:
        """The relative error of a Kalman filter that is told how the sequences are made: the least there is, without
        ``key_noise``; with ``drift = 0`` it is regularised least squares."""
        inputs, targets = self.batch(size, torch.Generator().manual_seed(seed), "test")
        questions, y = inputs[:, ::2, : self.dim].double(), targets[:, ::2].double()
        power = self.sizes.double().square()
        # What is known of x from x with noise, and what y varies by what is not known of it.
        believed = questions * power / (power + self.key_noise**2)
        unknown = (power * self.key_noise**2 / (power + self.key_noise**2)).mean()
        spread = float(self.noise**2 + unknown) + 1e-9
        prior = torch.eye(self.dim, dtype=torch.float64) / self.dim
        mean = torch.zeros(size, self.dim, dtype=torch.float64)
        cov = prior.expand(size, -1, -1)
        told = []
        for place in range(self.length // 2):
            x = believed[:, place]
            told.append((mean * x).sum(-1))
            reach = (cov @ x[..., None])[..., 0]
            gain = reach / ((reach * x).sum(-1, keepdim=True) + spread)
            mean = mean + gain * (y[:, place] - told[-1])[:, None]
            cov = cov - gain[..., None] * reach[:, None]
            kept = 1 - self.drift**2
            mean, cov = math.sqrt(kept) * mean, kept * cov + (1 - kept) * prior
        outputs = torch.zeros(*targets.shape, 1, dtype=torch.float64)
        outputs[:, ::2, 0] = torch.stack(told, 1)
        errors, count = self.score(outputs, targets.double())
        return errors / count


class DriftingRegression(InContextRegression):
    """:class:`InContextRegression` whose function changes, with keys that are noisy and of one direction more than of
    another: old pairs have to be forgotten, and what is new in a pair depends on what is known."""

    def __init__(
        self,
        length: int = 64,
        dim: int = 4,
        noise: float = 0.1,
        key_noise: float = 0.1,
        drift: float = 0.3,
        skew: float = 1.0,
    ) -> None:
        super().__init__(length, dim, noise, key_noise, drift, skew)
