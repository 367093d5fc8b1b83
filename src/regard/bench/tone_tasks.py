"""Speech for very small ears: bursts of tones in a spectrogram, to be written down as symbols."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["ToneBursts"]


class ToneBursts(Classification):
    """A spectrogram of bursts, to the symbols in the order in which they sound.

    Inputs: a pair of the spectrogram ``(batch, frames, bins)`` and decoder inputs ``(batch, most + 1)``, 0 first; the
    targets ``(batch, most + 1)`` are the symbols 2 to ``symbols + 1``, then the end 1, then ignored. A symbol is a
    band of ``bins / symbols`` bins that sounds for ``duration`` frames; from ``least`` to ``most`` bursts come at
    random times in order, with silent gaps between them, under noise.
    """

    bos, eos = 0, 1

    def __init__(
        self,
        frames: int = 40,
        bins: int = 16,
        symbols: int = 8,
        least: int = 3,
        most: int = 5,
        duration: tuple[int, int] = (3, 6),
        noise: float = 0.2,
    ) -> None:
        if bins % symbols or not 1 <= least <= most or frames < most * (duration[1] + 1):
            raise OptionError(
                f"bins is a multiple of symbols, and {most} bursts of up to {duration[1]} frames with gaps fit in; "
                f"got {bins} bins, {symbols} symbols, {frames} frames."
            )
        self.frames, self.bins, self.symbols = frames, bins, symbols
        self.least, self.most, self.duration, self.noise = least, most, duration, noise
        self.vocab_size = self.num_classes = symbols + 2

    def batch(
        self, size: int, generator: torch.Generator, split: str = "train"
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Spectrograms with decoder inputs, and targets."""

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=generator)

        count = draw(self.least, self.most, size, 1)
        sounds = torch.arange(self.most) < count
        symbol = draw(0, self.symbols - 1, size, self.most)
        length = draw(*self.duration, size, self.most) * sounds
        spare = self.frames - (length + sounds).sum(-1, keepdim=True)
        # Where the spare silence is cut, in order.
        cuts = (torch.rand(size, self.most, generator=generator) * (spare + 1)).long().sort(-1).values
        start = cuts + (length + sounds.long()).cumsum(-1) - length
        time = torch.arange(self.frames)[:, None]
        on = (time >= start[:, None]) & (time < (start + length)[:, None])
        band = torch.arange(self.bins) // (self.bins // self.symbols) == symbol[..., None]
        energy = torch.einsum("btn,bnf->btf", on.float(), band.float())
        loudness = 0.75 + 0.5 * torch.rand(size, 1, 1, generator=generator)
        x = energy * loudness + self.noise * torch.rand(energy.shape, generator=generator)
        tokens = (symbol + 2).masked_fill(~sounds, IGNORED)
        targets = torch.cat((tokens, torch.full((size, 1), IGNORED)), 1).scatter(1, count, self.eos)
        before = torch.cat((torch.full((size, 1), self.bos), tokens), 1).clamp_min(self.bos)
        return (x, before), targets
