"""RAVLT: a pyramid of rank-augmented linear attention on large maps and softmax attention on small ones, both gated.

Source: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", 2024, arXiv 2411.07635, section 3.4
(mechanism: :mod:`regard.linear.rala`). A stem of four 3 x 3 convolutions quarters the resolution; a strided one with
BatchNorm halves it between stages. A block adds a depthwise 3 x 3 convolution for positions, attention, and a
convolutional MLP. The head projects to 1024 channels and reads the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.maps import tokens_of
from regard.layers.norms import ChannelNorm
from regard.linear.rala import RALA, GatedAttention2d, GatedSoftmax2d
from regard.models.pyramid import Pyramid, truncated_normal_weights
from regard.nn import OnTokens

__all__ = ["RAVLT", "RAVLTBlock"]

ATTENTIONS: Mapping[str, type[GatedAttention2d]] = {"linear": RALA, "softmax": GatedSoftmax2d}


class RAVLTBlock(nn.Module):
    """``x + DWConv(x)``, then attention and a convolutional MLP, each behind a norm, with a scale per channel:
    ``(batch, channels, height, width)`` in and out.

    layer_scale: where the scales start. The MLP is ``1 x 1, GELU, x + depthwise 3 x 3, 1 x 1``.
    """

    def __init__(
        self,
        attention: GatedAttention2d,
        mlp_ratio: float = 3.5,
        drop_path: float = 0.0,
        layer_scale: float = 1.0,
    ) -> None:
        super().__init__()
        channels = attention.channels
        hidden = int(mlp_ratio * channels)
        self.position = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.attention_norm, self.attention = ChannelNorm(channels, eps=1e-6), attention
        self.mlp_norm = ChannelNorm(channels, eps=1e-6)
        self.expand, self.reduce = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.attention_scale, self.mlp_scale = (
            nn.Parameter(torch.full((channels, 1, 1), layer_scale)) for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Maps in and out."""
        x = x + self.position(x)
        x = x + self.drop_path(self.attention_scale * self.attention(self.attention_norm(x)))
        hidden = nn.functional.gelu(self.expand(self.mlp_norm(x)))
        out: Tensor = x + self.drop_path(self.mlp_scale * self.reduce(hidden + self.depthwise(hidden)))
        return out


class _Convolved(nn.Sequential):
    """Convolutions as a pyramid's embedding: a map to tokens and their grid."""

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return tokens_of(super().forward(maps))


def _stem(in_channels: int, width: int) -> _Convolved:
    layers: list[nn.Module] = []
    channels = in_channels
    for out, stride in ((width // 2, 2), (width // 2, 1), (width // 2, 1), (width, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.GELU()]
        channels = out
    return _Convolved(*layers[:-1])


class RAVLT(Pyramid):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; ``maps`` gives the stages.

    dims, depths, num_heads, attentions (``"linear"`` or ``"softmax"``), layer_scales: one value a stage.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {},
        "small": {
            "dims": (64, 128, 320, 512),
            "depths": (3, 5, 9, 3),
            "num_heads": (1, 2, 5, 8),
            "drop_path": 0.15,
        },
        "base": {
            "dims": (96, 192, 384, 512),
            "depths": (4, 6, 12, 6),
            "num_heads": (1, 2, 6, 8),
            "drop_path": 0.4,
            "layer_scales": (1.0, 1.0, 1e-6, 1e-6),
        },
        "large": {
            "dims": (96, 192, 448, 640),
            "depths": (4, 7, 19, 8),
            "num_heads": (1, 2, 7, 10),
            "drop_path": 0.55,
            "layer_scales": (1e-6, 1e-6, 1e-6, 1e-6),
        },
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        attentions: Sequence[str] = ("linear", "linear", "softmax", "softmax"),
        layer_scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        mlp_ratio: float = 3.5,
        projection: int = 1024,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.1,
    ) -> None:
        if len({len(given) for given in (dims, depths, num_heads, attentions, layer_scales)}) != 1:
            raise OptionError("dims, depths, num_heads, attentions and layer_scales have one value a stage each.")
        if not set(attentions) <= set(ATTENTIONS):
            raise OptionError(f"A stage's attention is 'linear' or 'softmax'; got {tuple(attentions)}.")
        rates = drop_path_rates(drop_path, sum(depths))
        embeds: list[nn.Module] = []
        stages: list[list[nn.Module]] = []
        for stage, (width, depth) in enumerate(zip(dims, depths, strict=True)):
            if stage:
                embeds.append(_Convolved(nn.Conv2d(dims[stage - 1], width, 3, 2, 1), nn.BatchNorm2d(width)))
            else:
                embeds.append(_stem(in_channels, width))
            blocks: list[nn.Module] = []
            for _ in range(depth):
                attention = ATTENTIONS[attentions[stage]](width, num_heads[stage])
                blocks.append(OnTokens(RAVLTBlock(attention, mlp_ratio, rates.pop(0), layer_scales[stage])))
            stages.append(blocks)
        super().__init__(embeds, stages, projection, num_classes)
        self.projection = nn.Conv2d(dims[-1], projection, 1)
        self.norm = nn.BatchNorm2d(projection)  # type: ignore[assignment]
        self.apply(truncated_normal_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Projection, norm, swish, mean over the last map, linear head."""
        last = nn.functional.silu(self.norm(self.projection(self.maps(images)[-1])))
        logits: Tensor = self.head(last.mean((2, 3)))
        return logits
