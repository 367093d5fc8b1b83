"""What a student learns from a dense teacher: its attention maps, its classes, its tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from regard.errors import ShapeError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["attention_reconstruction", "cls_distillation", "token_distillation"]


def attention_reconstruction(approx: Tensor, teacher_attn: Tensor) -> Tensor:
    """The sum of squared differences between a guessed map and a teacher's.

    approx ``(batch, heads, rows, N)``, teacher_attn ``(batch, heads, N, N)``, of which the last ``rows`` rows count: a
    guess may leave out the class token's.

    Wei et al., "Sparsifiner", 2023, arXiv 2303.13755, section 3: weight 0.01, mean over layers.
    """
    if approx.shape[:2] != teacher_attn.shape[:2] or approx.shape[-1] != teacher_attn.shape[-1]:
        raise ShapeError(f"A guess {tuple(approx.shape)} does not fit a map {tuple(teacher_attn.shape)}.")
    rows = teacher_attn.shape[2] - approx.shape[2]
    if rows < 0:
        raise ShapeError(f"The guess has {approx.shape[2]} rows, the teacher's map {teacher_attn.shape[2]}.")
    work = accumulation_dtype(approx.dtype)
    return F.mse_loss(approx.to(work), teacher_attn[:, :, rows:].detach().to(work), reduction="sum")


def cls_distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The divergence ``KL(teacher, student)`` of class probabilities in nats, mean over the batch; ``(batch, classes)``
    each.

    Sparsifiner's weight: 0.5.
    """
    _same(logits, teacher_logits)
    return F.kl_div(
        logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1), reduction="batchmean", log_target=True
    )


def token_distillation(tokens: Tensor, teacher_tokens: Tensor, kept: Tensor | None = None) -> Tensor:
    """The mean squared difference of tokens ``(batch, length, channels)``; kept: boolean ``(batch, length)``, those
    that were not pruned (None: all).

    Sparsifiner's weight: 0.5.
    """
    _same(tokens, teacher_tokens)
    if kept is not None:
        tokens, teacher_tokens = tokens[kept], teacher_tokens[kept]
    return F.mse_loss(tokens, teacher_tokens.detach())


def _same(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(f"Student and teacher differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}.")
