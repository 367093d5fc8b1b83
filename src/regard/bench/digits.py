"""scikit-learn's digits as images, and small vision transformers trained on them: a real model in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.tasks import Digits
from regard.bench.training import fit
from regard.errors import OptionError
from regard.models.vit import VisionTransformer

__all__ = ["DigitImages", "PixelDigits", "digits_accuracy", "digits_vit"]


class PixelDigits(Digits):
    """The digits as sequences of 64 pixels, row by row, or with ``shuffled`` in one random order that is the same for
    all (Le et al., 2015, arXiv 1504.00941, section 4.2). Inputs ``(batch, 64, 1)``, targets ``(batch,)``."""

    length, input_dim = 64, 1

    def __init__(self, shuffled: bool = False) -> None:
        super().__init__()
        if shuffled:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(0))
            self._data = {split: (x[:, order], y) for split, (x, y) in self._data.items()}


class DigitImages(Digits):
    """The digits as images ``(batch, 1, 8 scale, 8 scale)``, enlarged bilinearly. Targets ``(batch,)``.

    shift: training images are moved by up to so many pixels in each direction (empty pixels come in); test images are
    not.
    """

    def __init__(self, scale: int = 2, shift: int = 0) -> None:
        if scale < 1 or not 0 <= shift < 8 * scale:
            raise OptionError(f"Need scale >= 1 and a shift inside the image; got {scale} and {shift}.")
        super().__init__()
        self.scale, self.shift, self.size = scale, shift, 8 * scale

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Images and classes."""
        images, classes = self._enlarged(*super().batch(size, generator, split))
        return (self._moved(images, generator) if self.shift and split == "train" else images), classes

    def all(self, split: str = "test") -> tuple[Tensor, Tensor]:
        """The whole split at once, unmoved."""
        return self._enlarged(*super().all(split))

    def _enlarged(self, pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels.transpose(1, 2).unflatten(2, self.grid)
        if self.scale > 1:
            images = F.interpolate(images, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return images, classes

    def _moved(self, images: Tensor, generator: torch.Generator) -> Tensor:
        # The value of an empty pixel is -1.
        wide = F.pad(images[:, 0], (self.shift,) * 4, value=-1.0)
        corner = torch.randint(2 * self.shift + 1, (2, len(images), 1), generator=generator)
        rows, columns = corner + torch.arange(self.size)
        return wide[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def digits_vit(
    seed: int = 0,
    *,
    steps: int = 600,
    batch_size: int = 32,
    lr: float = 3e-3,
    report: Callable[[str], None] | None = None,
    **model: Any,
) -> tuple[VisionTransformer, DigitImages]:
    """A vision transformer trained on digits of 16 x 16 pixels (64 patches and a class token), and its task.

    Keywords beyond these change the model (``mechanism``, ``options``, ``embed_dim``, ``depth``, ...).
    """
    task = DigitImages(scale=2, shift=1)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"embed_dim": 48, "depth": 4, "num_heads": 3, "mlp_ratio": 2.0, "position_std": 0.5}
    vit = VisionTransformer(task.size, 2, 1, task.num_classes, **{**sizes, **model})
    fit(vit, task, steps=steps, batch_size=batch_size, lr=lr, weight_decay=0.05, seed=seed, report=report, every=200)
    return vit.eval(), task


@torch.no_grad()
def digits_accuracy(model: nn.Module | Callable[[Tensor], Tensor], task: DigitImages) -> float:
    """Share of right answers on all held-out images."""
    images, classes = task.all("test")
    logits: Tensor = model(images)
    return float((logits.argmax(-1) == classes).double().mean())
