"""Operations on whole attention maps ``(batch, heads, rows, k_len)``, scores or weights, beside the row-by-row ones.

A convolution over queries and keys lets a weight depend on several tokens (Golovneva et al., "Multi-Token Attention",
2025, arXiv 2504.00927); a mixture of heads lets it depend on several heads (Shazeer et al., "Talking-Heads Attention",
2020, arXiv 2003.02436). Neighbouring rows must be at hand, so the map is kept whole: memory grows with ``N^2``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = ["head_conv", "identity_head_kernel", "identity_kernel", "key_query_conv", "scale_map"]


def identity_kernel(num_heads: int, q_kernel: int, k_kernel: int, later: int = 0) -> Tensor:
    """The kernel ``(num_heads, q_kernel, k_kernel)`` that leaves a map as it is: one at the current query, no shift.

    later: how many of the queries that it spans come after the current one.
    """
    if q_kernel < 1 or k_kernel < 1 or k_kernel % 2 == 0:
        raise OptionError(
            f"q_kernel is at least 1 and k_kernel odd, as keys are taken from both sides; got {q_kernel}, {k_kernel}."
        )
    kernel = torch.zeros(num_heads, q_kernel, k_kernel)
    kernel[:, q_kernel - 1 - later, k_kernel // 2] = 1
    return kernel


def identity_head_kernel(num_heads: int, group: int) -> Tensor:
    """The kernel ``(num_heads / group, group, group)`` that leaves every head as it is."""
    if group < 1 or num_heads % group:
        raise OptionError(f"Groups of {group} heads do not divide {num_heads} heads.")
    return torch.eye(group).repeat(num_heads // group, 1, 1)


def key_query_conv(
    scores: Tensor,
    kernel: Tensor,
    visible: Tensor | None = None,
    rows: Tensor | None = None,
    later: int = 0,
) -> Tensor:
    """``S'_ij = sum over a, b of w[c_q - 1 - later - a, b + (c_k - 1) / 2] S_{i - a, j + b}``, each head with its own
    kernel.

    scores ``(batch, heads, q_len, k_len)``; kernel ``(heads, c_q, c_k)``, ``-later <= a < c_q - later``, ``|b| <=
    (c_k - 1) / 2``. later: queries after the current one that count; none in the paper, and none in a causal map.
    visible: boolean, broadcastable to the scores; what is not visible counts as zero before, and is zero after, so that
    a causal map stays causal: a key to the right of ``j`` enters only from a query that sees it. rows: boolean
    ``(batch | 1, heads | 1, q_len, q_len)``, whether a query takes from another one (itself always); with packed
    documents or padding the mask of self-attention itself, so that no query takes from another document.
    """
    heads, c_q, c_k = kernel.shape if kernel.dim() == 3 else (0, 0, 0)
    if scores.dim() != 4 or heads != scores.shape[1] or c_k % 2 == 0:
        raise ShapeError(
            "The convolution takes scores (batch, heads, q_len, k_len) and a kernel (heads, c_q, c_k) with odd c_k; "
            f"got {tuple(scores.shape)} and {tuple(kernel.shape)}."
        )
    q_len, kernel = scores.shape[2], kernel.to(scores.dtype)
    inside = scores if visible is None else scores.masked_fill(~visible, 0)
    if rows is None:
        padded = F.pad(inside, (c_k // 2, c_k // 2, c_q - 1 - later, later))
        out = F.conv2d(padded, kernel[:, None], groups=heads)
    else:
        out = torch.zeros_like(inside)
        for back in range(max(-later, 1 - q_len), min(c_q - later, q_len)):
            taken_from = slice(0, q_len - back) if back >= 0 else slice(-back, None)
            place = c_q - 1 - later - back
            part = F.conv2d(
                inside[:, :, taken_from], kernel[:, None, place : place + 1], padding=(0, c_k // 2), groups=heads
            )
            if back:
                part = part.masked_fill(~rows.diagonal(-back, -2, -1)[..., None], 0)
                part = F.pad(part, (0, 0, back, 0) if back > 0 else (0, 0, 0, -back))
            out = out + part
    return out if visible is None else out.masked_fill(~visible, 0)


def head_conv(weights: Tensor, kernel: Tensor) -> Tensor:
    """``A'_h = sum over h' in h's group of u_{h h'} A_h'``: heads mixed inside groups that do not overlap.

    weights ``(batch, heads, ...)``; kernel ``(groups, g, g)`` with ``groups * g = heads``, or ``(heads, heads)``. MTA's
    released code applies its kernel after the softmax transposed.
    """
    groups = kernel[None] if kernel.dim() == 2 else kernel
    if groups.dim() != 3 or groups.shape[1] != groups.shape[2] or len(groups) * groups.shape[1] != weights.shape[1]:
        raise ShapeError(
            f"A head kernel is (groups, g, g) with groups * g = {weights.shape[1]} heads, got {tuple(kernel.shape)}."
        )
    parted = weights.unflatten(1, (len(groups), groups.shape[1]))
    return torch.einsum("gij,bgj...->bgi...", groups.to(weights.dtype), parted).flatten(1, 2)


def scale_map(scores: Tensor, scale: Tensor) -> Tensor:
    """Scores ``(batch, heads, ...)`` times a number per head, ``scale (heads,)``: inverse temperatures before the
    softmax. It is :func:`key_query_conv` with ``c_q = c_k = 1``."""
    if scale.shape != scores.shape[1:2]:
        raise ShapeError(f"scale has one number for each of {scores.shape[1]} heads, got shape {tuple(scale.shape)}.")
    return scores * scale.to(scores.dtype).view(1, -1, *[1] * (scores.dim() - 2))
