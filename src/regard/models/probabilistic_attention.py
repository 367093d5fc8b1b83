"""Segmentation that takes corrections: a small model around probabilistic attention, and a session with an annotator.

Gabbur, Bilkhu and Movellan, "Probabilistic Attention for Interactive Segmentation", 2021, arXiv 2106.15338. Here values
of the last attention are class probabilities, so that what an annotator says of a place is a known value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.dense.probabilistic_attention import AxialProbabilisticAttention2d, probabilistic_attention
from regard.errors import OptionError, ShapeError

__all__ = ["InteractiveSession", "ProbabilisticSegmenter"]

FREE = -1
"""In a map of annotations: a place of which nothing is said."""


class ProbabilisticSegmenter(nn.Module):
    """``(batch, in_channels, height, width)`` to log probabilities of classes ``(batch, num_classes, height, width)``.

    A 3 x 3 convolution of the map and its annotations (one channel for each class), axial probabilistic attention, and
    probabilistic attention among all pixels, whose values are each pixel's own class probabilities: ``p_i = sum_j w_ij
    v_j``. There a unit answers for what looks like it and is near: queries and keys end in the pixel's coordinates, by
    a deviation that is learned from ``reach`` pixels on. Annotated pixels have known values and keep them. Outside of
    training ``key_iters`` and ``value_iters`` steps of EM fit keys and values, under priors of these precisions
    (values: against precision 1 of what is annotated).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int = 2,
        embed_dim: int = 32,
        num_heads: int = 2,
        max_size: int = 64,
        reach: float = 2.0,
        key_iters: int = 1,
        value_iters: int = 1,
        key_prior_precision: float | None = 0.3,
        value_prior_precision: float | None = 0.03,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.alpha = in_channels, num_classes, embed_dim**-0.5
        self.key_iters, self.value_iters = key_iters, value_iters
        self.key_prior_precision, self.value_prior_precision = key_prior_precision, value_prior_precision
        self.embed = nn.Conv2d(in_channels + num_classes, embed_dim, 3, padding=1)
        self.norm = nn.GroupNorm(1, embed_dim)
        self.axial = AxialProbabilisticAttention2d(embed_dim, num_heads, max_size)
        self.query, self.key = (nn.Conv2d(embed_dim, embed_dim, 1) for _ in range(2))
        self.classes = nn.Conv2d(embed_dim, num_classes, 1)
        self.log_reach = nn.Parameter(torch.tensor(reach).log())

    def project(self, x: Tensor, annotations: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the last attention, ``(batch, 1, height * width, ...)``."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(f"This model takes (batch, {self.in_channels}, height, width), got {tuple(x.shape)}.")
        known, _ = self._known(x, annotations)
        hidden = F.gelu(self.embed(torch.cat((x, known), 1)))
        hidden = hidden + self.axial(self.norm(hidden))
        place = torch.stack(torch.meshgrid(*(torch.arange(side).to(x) for side in x.shape[2:]), indexing="ij"))
        # Under precision alpha a difference of one pixel counts 1 / reach^2.
        place = (place * (-self.log_reach).exp() * self.alpha**-0.5).expand(len(x), -1, -1, -1)
        query, key = (_places(torch.cat((part(hidden), place), 1)) for part in (self.query, self.key))
        return query, key, _places(self.classes(hidden)).softmax(-1)

    def _known(self, x: Tensor, annotations: Tensor | None) -> tuple[Tensor, Tensor]:
        """The annotated classes as probabilities, ``(batch, num_classes, height, width)``, zero elsewhere; and where
        they are, ``(batch, height, width)``."""
        if annotations is None:
            annotations = torch.full((len(x), *x.shape[2:]), FREE, device=x.device)
        said = annotations != FREE
        known = F.one_hot(annotations.clamp_min(0), self.num_classes).movedim(-1, 1).to(x)
        return known * said[:, None], said

    def forward(
        self,
        x: Tensor,
        annotations: Tensor | None = None,
        *,
        key_iters: int | None = None,
        value_iters: int | None = None,
    ) -> Tensor:
        """annotations: ``(batch, height, width)``, a class or -1 for free. key_iters, value_iters: in place of the
        model's own."""
        query, key, value = self.project(x, annotations)
        known, said = self._known(x, annotations)
        using = not self.training
        mixed = probabilistic_attention(
            query,
            key,
            value,
            self.alpha,
            beta=1.0,
            value_fixed=_places(known),
            fixed_mask=said.flatten(1)[:, None],
            key_iters=(self.key_iters if key_iters is None else key_iters) if using else 0,
            value_iters=(self.value_iters if value_iters is None else value_iters) if using else 0,
            key_prior_precision=self.key_prior_precision,
            value_prior_precision=self.value_prior_precision,
            clamp_output=using,
        )
        return mixed[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]).clamp_min(torch.finfo(mixed.dtype).tiny).log()


def _places(maps: Tensor) -> Tensor:
    """``(batch, channels, height, width)`` as one head's tokens."""
    return maps.flatten(2).transpose(1, 2)[:, None]


class InteractiveSession:
    """A model and an annotator at work on images: ``annotate`` and ``predict``, in turns.

    model: called as ``model(images, annotations, **options)`` with annotations ``(batch, height, width)``, -1 for
    free, gives scores of classes ``(batch, classes, height, width)``. It is put into evaluation mode; its weights stay.
    """

    def __init__(self, model: nn.Module, images: Tensor, **options: Any) -> None:
        if images.dim() != 4:
            raise ShapeError(f"Images are (batch, channels, height, width), got {tuple(images.shape)}.")
        self.model, self.images, self.options = model.eval(), images, options
        self.annotations = torch.full((len(images), *images.shape[2:]), FREE, device=images.device)

    def annotate(self, positions: Tensor | Sequence[Sequence[int]], labels: Tensor | Sequence[int]) -> None:
        """Say what is at some places. positions: rows and columns ``(batch, clicks, 2)``; labels: classes ``(batch,
        clicks)``, negative for a click left out. For a single image also without the batch."""
        where, what = (torch.as_tensor(given, device=self.images.device) for given in (positions, labels))
        if where.dim() == 2 and len(self.images) == 1:
            where, what = where[None], what[None]
        if where.dim() != 3 or where.shape != (len(self.images), *what.shape[1:], 2):
            raise ShapeError(
                f"Clicks on {len(self.images)} images are positions (batch, clicks, 2) and labels (batch, clicks); got "
                f"{tuple(where.shape)} and {tuple(what.shape)}."
            )
        height, width = self.annotations.shape[1:]
        if bool(((where < 0) | (where >= torch.tensor((height, width), device=where.device))).any()):
            raise OptionError(f"A click lies outside of the map of {height} x {width}.")
        image = torch.arange(len(where), device=where.device)[:, None].expand(what.shape)
        said = what >= 0
        self.annotations[image[said], where[..., 0][said], where[..., 1][said]] = what[said]

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Classes ``(batch, height, width)``, with all that was said so far."""
        scores: Tensor = self.model(self.images, self.annotations, **self.options)
        return scores.argmax(1)
