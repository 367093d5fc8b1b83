"""Losses that shape features beside a task's own loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["SparsityLagrangian", "category_consistent_loss", "warmed_target"]


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


def warmed_target(step: int, warmup: int, start: float, end: float) -> float:
    """A target that goes linearly from ``start`` to ``end`` over ``warmup`` steps and stays there."""
    return end if step >= warmup else start + (end - start) * step / warmup


class SparsityLagrangian(nn.Module):
    """A sparsity bound to its target, task by task: ``lambda1 |s - s*| + lambda2 (s - s*)^2``.

    tasks: their names, or how many there are. The multipliers begin uniform in ``[0, initial]`` and are to be raised
    along their gradients ``|s - s*|`` and ``(s - s*)^2`` while everything else descends: give them to an optimizer with
    ``maximize=True``. They grow as long as the target is missed.

    "Flux Attention", 2026, arXiv 2604.07394.
    """

    def __init__(self, tasks: int | Sequence[str], initial: float = 0.5) -> None:
        super().__init__()
        self.tasks = tuple(map(str, range(tasks))) if isinstance(tasks, int) else tuple(tasks)
        if not self.tasks or initial < 0:
            raise OptionError(f"Need at least one task and initial >= 0, got {self.tasks} and {initial}.")
        self.lambda1, self.lambda2 = (nn.Parameter(initial * torch.rand(len(self.tasks))) for _ in range(2))

    def loss(self, model_sparsity: Tensor, target: float | Tensor, task: Tensor | Sequence[str]) -> Tensor:
        """The mean over the tasks present of the mean over their samples.

        model_sparsity ``(batch,)``: share of a sample's layers (or heads) that are sparse. target: one number or
        ``(batch,)``. task ``(batch,)``: index or name of each sample's task.
        """
        if isinstance(task, Tensor):
            index = task.to(model_sparsity.device)
        else:
            unknown = [name for name in task if name not in self.tasks]
            if unknown:
                raise OptionError(f"There is no task {unknown[0]!r}; there are {', '.join(self.tasks)}.")
            index = torch.tensor([self.tasks.index(name) for name in task], device=model_sparsity.device)
        if model_sparsity.dim() != 1 or index.shape != model_sparsity.shape:
            raise ShapeError(
                f"Sparsity and task are one number a sample, (batch,); got {tuple(model_sparsity.shape)} and "
                f"{tuple(index.shape)}."
            )
        gap = model_sparsity.to(self.lambda1.dtype) - target
        each = self.lambda1[index] * gap.abs() + self.lambda2[index] * gap.square()
        _, member = index.unique(return_inverse=True)
        count = torch.zeros_like(each).index_add(0, member, torch.ones_like(each))
        return (each / count[member]).sum() / (count > 0).sum()
