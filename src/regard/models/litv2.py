"""LITv2: a pyramid that attends only in its later stages, with HiLo attention, and takes positions from a depthwise
convolution in its MLPs.

Source: Pan et al., "Fast Vision Transformers with HiLo Attention", 2022, arXiv 2205.13213, section 3.4 (mechanism:
:mod:`regard.local.hilo`). Stages are joined by strided convolutions; the paper's are deformable.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.maps import PatchEmbed, map_of
from regard.local.hilo import HiLoAttention
from regard.models.pyramid import Pyramid

__all__ = ["ConvMlp", "LITv2"]


class ConvMlp(nn.Module):
    """Linear, 3 x 3 depthwise convolution, GELU, linear, on ``(batch, length, channels)``; the zeros around the map
    tell positions."""

    def __init__(self, embed_dim: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.expand = nn.Linear(embed_dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.reduce = nn.Linear(hidden, embed_dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        maps = map_of(self.expand(x), grid)
        mixed = nn.functional.gelu(self.depthwise(maps)).flatten(2).transpose(1, 2)
        out: Tensor = self.reduce(mixed)
        return out


class _Block(nn.Module):
    """HiLo (where the stage attends) and the MLP, each behind a norm and beside a skip."""

    def __init__(self, embed_dim: int, attention: HiLoAttention | None, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = None if attention is None else nn.LayerNorm(embed_dim)
        self.mlp_norm, self.mlp = nn.LayerNorm(embed_dim), ConvMlp(embed_dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        if self.attention is not None and self.attention_norm is not None:
            x = x + self.drop_path(self.attention(self.attention_norm(x), grid=grid))
        out: Tensor = x + self.drop_path(self.mlp(self.mlp_norm(x), grid))
        return out


class LITv2(Pyramid):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; :meth:`maps` gives the stages.

    window: HiLo's window in each stage, 0 for a stage without attention.
    """

    presets: ClassVar = {
        "small": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
        "medium": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
        "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    }

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.2,
    ) -> None:
        if not len(depths) == len(num_heads) == len(window):
            raise OptionError("depths, num_heads and window have one value a stage each.")
        rates = drop_path_rates(drop_path, sum(depths))
        embeds, stages, channels = [], [], in_channels
        for stage, (depth, heads, side) in enumerate(zip(depths, num_heads, window, strict=True)):
            width = embed_dim * 2**stage
            embeds.append(PatchEmbed(channels, width, 2 if stage else patch_size, fill=False))
            attention = partial(HiLoAttention, width, heads, window=side, alpha=alpha)
            blocks = [_Block(width, attention() if side else None, mlp_ratio, rates.pop(0)) for _ in range(depth)]
            stages.append(blocks)
            channels = width
        super().__init__(embeds, stages, channels, num_classes)
