"""Sparsifiner's two stages: predictors learn a dense teacher's maps, then the backbone learns under their masks.

Wei et al., "Sparsifiner", 2023, arXiv 2303.13755, section 3; rates of the released configuration (5 and 45 epochs of
ImageNet with a batch of 168; a backbone that begins as the teacher).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.layers.distillation import attention_reconstruction, cls_distillation, token_distillation
from regard.models.sparsifiner import SparsifinerViT
from regard.models.vit import VisionTransformer
from regard.sparse.sparsifiner import ConnectivityPredictor

__all__ = ["Student", "sparsifiner_loss", "teacher_maps", "train_backbone", "train_predictors", "train_sparsifiner"]

Draw = Callable[[], tuple[Tensor, Tensor]]


class Student(Protocol):
    """A vision transformer that can be tuned in the second stage."""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`regard.models.sparsifiner.SparsifinerViT.features`."""


@torch.no_grad()
def teacher_maps(teacher: VisionTransformer, images: Tensor) -> list[Tensor]:
    """The attention of each layer, ``(batch, num_heads, tokens, tokens)``."""
    tokens, maps = teacher.embed(images), []
    for layer in range(len(teacher.blocks)):
        maps.append(teacher.attention_weights(tokens, layer))
        tokens = teacher.encode(tokens, layer, layer + 1)
    return maps


def sparsifiner_loss(
    student: Student,
    teacher: VisionTransformer,
    images: Tensor,
    labels: Tensor,
    cls_weight: float = 0.5,
    token_weight: float = 0.5,
) -> Tensor:
    """The second stage's loss: cross-entropy, and what the teacher says of classes and tokens."""
    logits, tokens, kept = student.features(images)
    with torch.no_grad():
        wanted = teacher.norm(teacher.encode(teacher.embed(images)))
        classes = teacher.head(wanted[:, 0])
    loss = F.cross_entropy(logits, labels) + cls_weight * cls_distillation(logits, classes)
    return loss + token_weight * token_distillation(tokens, wanted[:, 1:], kept)


def train_predictors(
    student: SparsifinerViT,
    teacher: VisionTransformer,
    draw: Draw,
    steps: int,
    *,
    lr: float = 3e-4,
    final_lr: float = 2e-4,
    weight: float = 0.01,
    weight_decay: float = 0.05,
) -> list[float]:
    """The first stage: everything but the predictors rests and attention is dense. Returns the loss at each step, a
    sample and layer."""
    student.requires_grad_(False)
    predictors = nn.ModuleList(layer.predictor for layer in student.layers).requires_grad_(True)
    student.set_mode("dense")
    student.train()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        student(images)
        maps = teacher_maps(teacher, images)
        found = [layer.approx for layer in student.layers]
        sums = [attention_reconstruction(a, m) for a, m in zip(found, maps, strict=True) if a is not None]
        return weight * torch.stack(sums).mean()

    history = [
        value / (weight * size)
        for value, size in _train(predictors.parameters(), loss, draw, steps, lr, final_lr, weight_decay)
    ]
    student.requires_grad_(True).set_mode("sparse")
    return history


def train_backbone(
    student: Student,
    teacher: VisionTransformer,
    draw: Draw,
    steps: int,
    *,
    lr: float = 8e-5,
    final_lr: float = 2e-6,
    weight_decay: float = 0.05,
) -> list[float]:
    """The second stage: predictors rest, the others learn. Returns the loss at each step; the student is left in
    evaluation mode."""
    model = cast(nn.Module, student)
    resting = {id(p) for part in model.modules() if isinstance(part, ConnectivityPredictor) for p in part.parameters()}
    learning = [p for p in model.parameters() if id(p) not in resting]
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in resting)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return sparsifiner_loss(student, teacher, images, labels)

    model.train()
    history = [value for value, _ in _train(learning, loss, draw, steps, lr, final_lr, weight_decay)]
    model.requires_grad_(True).eval()
    return history


def train_sparsifiner(
    student: SparsifinerViT, teacher: VisionTransformer, draw: Draw, *, predictor_steps: int, steps: int
) -> tuple[list[float], list[float]]:
    """Both stages at the paper's rates, ``draw()`` giving images and labels; a history of losses each. The teacher is
    in evaluation mode."""
    return train_predictors(student, teacher, draw, predictor_steps), train_backbone(student, teacher, draw, steps)


def _train(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    draw: Draw,
    steps: int,
    lr: float,
    final_lr: float,
    weight_decay: float,
) -> list[tuple[float, int]]:
    """AdamW, a warm-up of a tenth of the steps and a cosine to ``final_lr``; loss and batch size at each step."""
    chosen = list(parameters)
    wide, narrow = [p for p in chosen if p.dim() > 1], [p for p in chosen if p.dim() < 2]
    groups = [{"params": wide, "weight_decay": weight_decay}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)
    warmup, history = max(steps // 10, 1), []
    for step in range(steps):
        done = max(step - warmup, 0) / max(steps - warmup, 1)
        rate = final_lr + (lr - final_lr) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = min((step + 1) / warmup, 1.0) * rate
        images, labels = draw()
        value = loss(images, labels)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        history.append((float(value.detach()), len(images)))
    return history
