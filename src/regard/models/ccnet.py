"""CCNet's segmentation head: recurrent criss-cross attention on reduced features, beside the features themselves.

Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", 2018, arXiv 1811.11721, section 3.1
(mechanism: :mod:`regard.local.ccnet`). Batch norms are followed by a leaky ReLU of slope 0.01 and dropout drops whole
channels, as in the released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.local.ccnet import RecurrentCrissCross

__all__ = ["RCCAHead"]


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.01),
    )


class RCCAHead(nn.Module):
    """``(batch, in_channels, height, width)`` -> logits ``(batch, classes, height, width)``.

    A 3x3 convolution to a quarter of the channels, ``recurrence`` passes of criss-cross attention, another 3x3
    convolution; with the input beside it, a 3x3 convolution to ``out_channels``, dropout and a linear classifier.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        classes: int,
        recurrence: int = 2,
        reduction: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        inner = in_channels // 4
        if inner < reduction:
            raise OptionError(
                f"A quarter of in_channels {in_channels}, reduced by {reduction}, leaves no channel for queries; give "
                f"at least {4 * reduction} channels or a smaller reduction."
            )
        self.reduce = _convolution(in_channels, inner)
        self.attention = RecurrentCrissCross(inner, recurrence, reduction)
        self.refine = _convolution(inner, inner)
        self.fuse = _convolution(in_channels + inner, out_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(out_channels, classes, 1)

    def features(self, x: Tensor) -> Tensor:
        """What is classified, ``(batch, out_channels, height, width)``; the consistency loss acts on a reduction of
        it."""
        context = self.refine(self.attention(self.reduce(x)))
        fused: Tensor = self.fuse(torch.cat((x, context), 1))
        return fused

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the resolution of the input."""
        logits: Tensor = self.classify(self.dropout(self.features(x)))
        return logits
