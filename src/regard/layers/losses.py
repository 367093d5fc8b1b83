"""Losses that shape features beside a task's own loss."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["category_consistent_loss"]


def category_consistent_loss(
    features: Tensor,
    labels: Tensor,
    delta_v: float = 0.5,
    delta_d: float = 1.5,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.001,
    ignore: int = 255,
) -> Tensor:
    """Pixels of a class near their mean, means of classes apart, no mean far from zero:
    ``alpha l_var + beta l_dis + gamma l_reg``.

    features ``(batch, channels, *space)`` (the paper reduces them to 16 channels first), labels ``(batch, *space)``
    integers, those of value ``ignore`` left out. With the mean ``mu_c`` of all pixels of class ``c`` in the batch and
    the distance ``d`` of a pixel to it,

    - ``l_var``: the mean over classes of the mean over pixels of 0 up to ``delta_v``, ``(d - delta_v)^2`` up to
      ``delta_d``, and ``d - delta_d + (delta_d - delta_v)^2`` beyond;
    - ``l_dis``: the mean over pairs of classes of ``max(0, 2 delta_d - |mu_a - mu_b|)^2``;
    - ``l_reg``: the mean of ``|mu_c|``.

    Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", 2018, arXiv 1811.11721, section 3.4; after
    De Brabandere et al., "Semantic Instance Segmentation with a Discriminative Loss Function", 2017, arXiv 1708.02551,
    whose ``l_var`` is quadratic throughout.
    """
    if features.dim() < 3 or labels.shape != (features.shape[0], *features.shape[2:]):
        raise ShapeError(
            f"Features (batch, channels, *space) need labels (batch, *space); got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}. Bring labels to the features' size with nearest-neighbour interpolation."
        )
    if not 0 <= delta_v <= delta_d:
        raise OptionError(f"Need 0 <= delta_v <= delta_d, got {delta_v} and {delta_d}.")
    counted = labels.flatten() != ignore
    pixels = features.movedim(1, -1).flatten(0, -2)[counted].to(accumulation_dtype(features.dtype))
    classes, member = labels.flatten()[counted].unique(return_inverse=True)
    if not len(classes):
        return pixels.sum()
    size = pixels.new_zeros(len(classes)).index_add(0, member, pixels.new_ones(len(pixels)))
    means = pixels.new_zeros(len(classes), pixels.shape[1]).index_add(0, member, pixels) / size[:, None]

    distance = torch.linalg.vector_norm(pixels - means[member], dim=-1)
    near = (distance - delta_v).clamp_min(0).square()
    penalty = torch.where(distance > delta_d, distance - delta_d + (delta_d - delta_v) ** 2, near)
    loss = alpha * (penalty.new_zeros(len(classes)).index_add(0, member, penalty) / size).mean()

    first, second = torch.triu_indices(len(classes), len(classes), offset=1, device=means.device)
    if len(first):
        apart = torch.linalg.vector_norm(means[first] - means[second], dim=-1)
        loss = loss + beta * (2 * delta_d - apart).clamp_min(0).square().mean()
    return loss + gamma * torch.linalg.vector_norm(means, dim=-1).mean()
