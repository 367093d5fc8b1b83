"""Normalisation of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.kernels.shapes import accumulation_dtype

__all__ = ["ChannelNorm", "SRMSNorm", "srms_norm"]


def srms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / max(|x|_2 / sqrt(d), eps)`` over the last axis: simple RMS norm, without parameters.

    Qin et al., "TransNormerLLM", 2023, arXiv 2307.14995, section 3.1. A vector of RMS above ``eps`` comes out
    with RMS one, whatever its scale. Half precision is normed in float32.
    """
    work = x.to(accumulation_dtype(x.dtype))
    rms = torch.linalg.vector_norm(work, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return (work / rms.clamp_min(eps)).to(x.dtype)


class SRMSNorm(nn.Module):
    """:func:`srms_norm` as a module."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` in and out."""
        return srms_norm(x, self.eps)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map ``(batch, channels, *space)``."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape in and out."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
