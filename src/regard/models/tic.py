"""TiC: an image classifier whose convolutions attend first.

Source: "TiC: Exploring Vision Transformer in Convolution", 2023, arXiv 2310.04134 (mechanism: :mod:`regard.local.tic`).
The paper's model is not released. This one follows its description: a convolutional stem, four stages, a global mean;
between stages a strided convolution, and in a block two attending convolutions, the second after inter-pooling. A batch
norm behind each of them is this model's own; without it, training is less steady.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.maps import PatchEmbed
from regard.local.tic import InterPooling, MSAConv2d
from regard.models.pyramid import Pyramid
from regard.nn import OnTokens

__all__ = ["TiC", "TiCBlock"]


class TiCBlock(nn.Module):
    """``(batch, channels, height, width)`` in and out: an attending convolution with cyclic shift, then one at the
    pooled scale, added. pooling 1 has no coarser scale."""

    def __init__(
        self,
        channels: int,
        *,
        kernel: int = 3,
        num_heads: int = 1,
        dropout: float = 0.1,
        shift: int = 0,
        pooling: int = 1,
    ) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(
                MSAConv2d(channels, kernel=kernel, num_heads=num_heads, dropout=dropout, shift=step),
                nn.BatchNorm2d(channels),
            )
            for step in (shift, 0)
        )
        self.pooling = InterPooling(pooling)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pooling(self.first(x), self.second)
        return out


class TiC(Pyramid):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; ``maps`` gives the stages.

    depths, num_heads: one value a stage. patch_size: stride of the stem. shift: of the cyclic shift, 0 for none.
    pooling: of inter-pooling, 1 for none.
    """

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 1, 2, 1),
        num_heads: Sequence[int] = (1, 1, 1, 1),
        kernel: int = 3,
        shift: int = 2,
        pooling: int = 2,
        dropout: float = 0.1,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        if len(depths) != len(num_heads) or not depths:
            raise OptionError(f"depths and num_heads have one value a stage, got {tuple(depths)} and {num_heads}.")
        embeds, stages, channels = [], [], in_channels
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            width, stride = embed_dim * 2**stage, 2 if stage else patch_size
            embeds.append(PatchEmbed(channels, width, 2 * stride - 1, stride, stride - 1))
            block = [
                TiCBlock(width, kernel=kernel, num_heads=heads, dropout=dropout, shift=shift, pooling=pooling)
                for _ in range(depth)
            ]
            stages.append([OnTokens(b) for b in block])
            channels = width
        super().__init__(embeds, stages, channels, num_classes)
