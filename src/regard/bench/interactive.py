"""Interactive segmentation: noisy blobs to be cut out, a simulated annotator who clicks, and how many clicks it takes.

The annotator looks at a prediction, clicks where it is wrong and tells the right class; the measure is intersection
over union of the foreground after each click, or the number of clicks to reach a given one.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.fields import smooth_field
from regard.bench.tasks import Classification
from regard.errors import OptionError, ShapeError

__all__ = ["NoisyBlobs", "foreground_iou", "noc_at_iou", "simulate_clicks"]


class NoisyBlobs(Classification):
    """Label every pixel of a ``side x side`` map as blob or background.

    Inputs ``(batch, channels, side, side)``: a class mean of ``+`` or ``- contrast`` along one direction that is the
    same for all images, plus noise of unit variance in every channel. contrast: 0.67 leaves 75 percent of the pixels on
    their side of the best line between the classes. smooth: share of the noise's variance that varies slowly over the
    map, so that a reader of neighbourhoods, too, errs in whole regions. Targets ``(batch, side * side)``: 1 for blobs,
    thresholded smooth random fields.
    """

    num_classes = 2

    def __init__(self, side: int = 16, channels: int = 4, contrast: float = 0.67, smooth: float = 0.5) -> None:
        if side < 2 or channels < 1 or not 0 <= smooth <= 1:
            raise OptionError(
                f"Need side >= 2, channels >= 1 and smooth from 0 to 1; got {side}, {channels} and {smooth}."
            )
        self.side, self.channels, self.contrast, self.smooth = side, channels, contrast, smooth

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Maps are drawn anew for each batch; the splits differ by the generator alone."""
        grid, shape = (self.side, self.side), (size, self.channels, self.side, self.side)
        level = smooth_field(grid, size, generator).T.reshape(size, *grid)
        # About two fifths of every map is foreground.
        cut = level.flatten(1).quantile(0.6, 1)[:, None, None]
        target = (level > cut).long()
        slow = smooth_field(grid, size * self.channels, generator).T.reshape(shape)
        noise = self.smooth**0.5 * slow + (1 - self.smooth) ** 0.5 * torch.randn(shape, generator=generator)
        mean = self.contrast * self.channels**-0.5 * (2 * target[:, None] - 1)
        return noise + mean, target.flatten(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """outputs: log probabilities or logits ``(batch, classes, side, side)``."""
        return F.cross_entropy(outputs.flatten(2), targets)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        return float((outputs.flatten(2).argmax(1) == targets).sum()), targets.numel()


def foreground_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of the foreground (class 1) of each image, ``(batch,)``; 1 where both have none."""
    a, b = (prediction == 1).flatten(1), (target == 1).flatten(1)
    union = (a | b).sum(1)
    return torch.where(union > 0, (a & b).sum(1) / union.clamp_min(1), 1.0)


def _spread(values: Tensor, steps: str) -> Tensor:
    """The largest of each pixel and its four neighbours, or the smallest."""
    padded = F.pad(values, (1, 1, 1, 1))
    around = [
        padded[:, 1:-1, 1:-1],
        padded[:, :-2, 1:-1],
        padded[:, 2:, 1:-1],
        padded[:, 1:-1, :-2],
        padded[:, 1:-1, 2:],
    ]
    stacked = torch.stack(around)
    return stacked.amax(0) if steps == "largest" else stacked.amin(0)


def _regions(mask: Tensor) -> Tensor:
    """A number for each region of pixels that touch by a side, ``(batch, height, width)``; 0 outside."""
    number = torch.arange(1, mask[0].numel() + 1, device=mask.device).view(mask.shape[1:]) * mask
    while True:
        grown = _spread(number, "largest") * mask
        if torch.equal(grown, number):
            return number
        number = grown


def _inner_rank(mask: Tensor) -> Tensor:
    """Larger in larger regions of ``mask``, and within a region farther from its border; 0 outside."""
    number, height, width = _regions(mask), *mask.shape[1:]
    size = torch.zeros(len(mask), height * width + 1, dtype=torch.long, device=mask.device)
    size.scatter_add_(1, number.flatten(1), mask.flatten(1).long())
    depth, inner = torch.zeros_like(number), mask
    while bool(inner.any()):
        depth = depth + inner
        inner = _spread(inner.long(), "smallest").bool()
    return (size.gather(1, number.flatten(1)).view(mask.shape) * (height + width) + depth) * mask


def simulate_clicks(
    target: Tensor,
    prediction: Tensor | None = None,
    strategy: Literal["largest_error", "random_error"] = "largest_error",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The annotator's next click in each image: places ``(batch, 1, 2)`` as row and column, and classes ``(batch, 1)``.

    target, prediction ``(batch, height, width)``: classes (prediction None: nothing is foreground yet).
    ``"largest_error"`` clicks into the largest region that is wrongly given one class, at the pixel farthest from its
    border (city-block distance; the map's edge counts as border); ``"random_error"`` at any wrong pixel. An image
    without error gets class -1.
    """
    if strategy not in ("largest_error", "random_error"):
        raise OptionError(f"strategy is 'largest_error' or 'random_error', got {strategy!r}.")
    prediction = torch.zeros_like(target) if prediction is None else prediction
    if target.dim() != 3 or target.shape != prediction.shape:
        raise ShapeError(
            f"Target and prediction are (batch, height, width); got {tuple(target.shape)}, {tuple(prediction.shape)}."
        )
    wrong = target != prediction
    if strategy == "random_error":
        rank = (torch.rand(target.shape, generator=generator).to(target.device) + 1) * wrong
    else:
        rank = torch.zeros_like(target)
        for label in target.unique():
            rank = torch.maximum(rank, _inner_rank(wrong & (target == label)))
    place = rank.flatten(1).argmax(1)
    label = torch.where(wrong.flatten(1).any(1), target.flatten(1).gather(1, place[:, None])[:, 0], -1)
    return torch.stack((place // target.shape[2], place % target.shape[2]), -1)[:, None], label[:, None]


def noc_at_iou(ious: Tensor, threshold: float) -> Tensor:
    """Clicks until the IoU reaches ``threshold``, for each image ``(batch,)``.

    ious ``(batch, clicks)``: after the first click, the second and so on. Images that never get there count the number
    of clicks in all, as is usual.
    """
    if ious.dim() != 2 or not ious.shape[1]:
        raise ShapeError(f"IoUs are (batch, clicks), after one click and more; got {tuple(ious.shape)}.")
    reached = ious >= threshold
    return torch.where(reached.any(1), reached.long().argmax(1) + 1, ious.shape[1])
