"""Choices that train: one of several options, drawn by its probability, with a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["annealed_temperature", "gumbel_one_hot"]


def gumbel_one_hot(
    logits: Tensor, temperature: float = 1.0, hard: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """An option along the last axis, drawn with probability ``softmax(logits)``: one-hot, the shape of ``logits``.

    With Gumbel noise ``g``, ``soft = softmax((logits + g) / temperature)``. ``hard`` gives the one-hot of its largest
    entry with the gradient of ``soft`` (straight-through); otherwise ``soft`` itself is returned. An option of logit
    ``-inf`` is never drawn.

    Jang et al., "Categorical Reparameterization with Gumbel-Softmax", 2016, arXiv 1611.01144, section 2.
    """
    if not temperature > 0:
        raise OptionError(f"A temperature is above 0, got {temperature}.")
    work = logits.to(accumulation_dtype(logits.dtype))
    uniform = torch.rand(work.shape, dtype=work.dtype, device=work.device, generator=generator)
    # Never 0 or 1, where the noise would be infinite.
    tiny = torch.finfo(work.dtype).tiny
    noise = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
    soft = ((work + noise) / temperature).softmax(-1)
    if hard:
        chosen = torch.zeros_like(soft).scatter_(-1, soft.detach().argmax(-1, keepdim=True), 1.0)
        soft = chosen + (soft - soft.detach())  # the bracket is exactly zero, so the value is exactly one-hot
    return soft.to(logits.dtype)


def annealed_temperature(step: int, total: int, start: float = 1.5, end: float = 1.0, share: float = 0.6) -> float:
    """``start`` at step 0, falling along half a cosine to ``end`` at ``share`` of ``total`` steps, ``end`` after it."""
    if total < 1 or not 0 < share <= 1 or min(start, end) <= 0:
        raise OptionError(
            f"Need total >= 1, a share in (0, 1] and temperatures above 0; got {total}, {share}, {start}, {end}."
        )
    done = min(max(step, 0) / (share * total), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
