"""L2ViT: blocks of softmax attention in windows alternate with blocks of linear attention to all, locally concentrated.

Source: Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv 2501.16182, section 3 and table of
configurations (mechanism: :mod:`regard.linear.l2vit`). Time ``O(N C^2)`` for a global block and ``O(N w^2 C)`` for a
local one. Windows neither shift nor have a position bias: convolutions give positions, and the other blocks connect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.depthwise import ConditionalPositionEncoding
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.maps import merge_heads, space_of, split_heads, tokens_of
from regard.layers.mlp import Mlp
from regard.linear.l2vit import LocalConcentration
from regard.local.windows import pad_to_windows, window_plan, windowed_attention
from regard.models.pyramid import Pyramid, truncated_normal_weights
from regard.nn import MultiHeadAttention

__all__ = ["L2ViT", "LGABlock", "LWABlock"]


class LGABlock(nn.Module):
    """Linear global attention: position encoding, attention, LCM and MLP, the last three behind norms and beside skips.
    ``(batch, length, channels)`` in and out.

    enhanced: with the LCM. denom_min: of the attention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        enhanced: bool = True,
        denom_min: float = 100.0,
    ) -> None:
        super().__init__()
        self.position = ConditionalPositionEncoding(embed_dim)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = MultiHeadAttention(embed_dim, num_heads, "l2vit", denom_min=denom_min)
        self.local_norm = nn.LayerNorm(embed_dim) if enhanced else None
        self.local = LocalConcentration(embed_dim) if enhanced else None
        self.mlp_norm, self.mlp = nn.LayerNorm(embed_dim), Mlp(embed_dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None) -> Tensor:
        """``grid`` = (height, width)."""
        x = self.position(x, grid=grid)
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        if self.local is not None and self.local_norm is not None:
            x = x + self.drop_path(self.local(self.local_norm(x), grid))
        out: Tensor = x + self.drop_path(self.mlp(self.mlp_norm(x)))
        return out


class LWABlock(nn.Module):
    """Local window attention: position encoding, softmax attention in windows, position encoding, MLP. ``(batch,
    length, channels)`` in and out.

    A map that windows do not divide is filled up at its bottom and right; filling is not seen, and a window over the
    map is global attention. official: filling stays visible, with the projections' biases as its keys and values, as
    released.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int = 7,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        official: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads or window < 1:
            raise OptionError(
                f"Need num_heads dividing embed_dim and window >= 1; got {num_heads}, {embed_dim}, {window}."
            )
        self.num_heads, self.window, self.official = num_heads, window, official
        self.positions = nn.ModuleList(ConditionalPositionEncoding(embed_dim) for _ in range(2))
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.qkv, self.proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)
        self.mlp_norm, self.mlp = nn.LayerNorm(embed_dim), Mlp(embed_dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None) -> Tensor:
        """``grid`` = (height, width)."""
        x = self.positions[0](x, grid=grid)
        x = x + self.drop_path(self.attend(self.attention_norm(x), space_of(x, grid)))
        x = self.positions[1](x, grid=grid)
        out: Tensor = x + self.drop_path(self.mlp(self.mlp_norm(x)))
        return out

    def attend(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        """Attention in windows with its projections."""
        sides = (self.window, self.window)
        extent = space
        if self.official:
            filled = pad_to_windows(x.unflatten(1, space), sides)
            extent = tuple(filled.shape[1:-1])
            x = filled.flatten(1, 2)
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        out = windowed_attention(query, key, value, window_plan(extent, sides, (0, 0), x.device))
        mixed: Tensor = self.proj(merge_heads(out))
        if extent == space:
            return mixed
        return mixed.unflatten(1, extent)[:, : space[0], : space[1]].flatten(1, 2)


class _Stem(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with BatchNorm, a ReLU between, then LayerNorm. Images are filled up with
    zeros to multiples of 4."""

    def __init__(self, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        half = embed_dim // 2
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, half, 3, 2, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, embed_dim, 3, 2, 1),
            nn.BatchNorm2d(embed_dim),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        tokens, grid = tokens_of(self.conv(_filled(images, 4)))
        return self.norm(tokens), grid


class _Merging(nn.Module):
    """LayerNorm, then 2 x 2 patches of a map, filled up with zeros where they do not divide it."""

    def __init__(self, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.conv = nn.Conv2d(in_channels, embed_dim, 2, 2)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        normed = self.norm(maps.movedim(1, -1)).movedim(-1, 1)
        return tokens_of(self.conv(_filled(normed, 2)))


def _filled(maps: Tensor, side: int) -> Tensor:
    return F.pad(maps, (0, -maps.shape[3] % side, 0, -maps.shape[2] % side))


class L2ViT(Pyramid):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; ``maps`` gives the stages.

    depths, dims, num_heads: one value a stage. Of each stage's blocks the first, third, ... are local, the others
    global. enhanced: global blocks with the LCM. denom_min, official: see the blocks.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {},
        "small": {"depths": (2, 2, 18, 2)},
        "base": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)},
        "base-384": {
            "depths": (2, 2, 18, 2),
            "dims": (128, 256, 512, 1024),
            "num_heads": (4, 8, 16, 32),
            "window": 12,
        },
    }

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        enhanced: bool = True,
        denom_min: float = 100.0,
        official: bool = False,
    ) -> None:
        if not len(depths) == len(dims) == len(num_heads):
            raise OptionError("depths, dims and num_heads have one value a stage each.")
        rates = drop_path_rates(drop_path, sum(depths))
        embeds: list[nn.Module] = []
        stages: list[list[nn.Module]] = []
        for stage, (depth, width, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            embeds.append(_Merging(dims[stage - 1], width) if stage else _Stem(in_channels, width))
            stages.append(
                [
                    LGABlock(width, heads, mlp_ratio, rates.pop(0), enhanced, denom_min)
                    if index % 2
                    else LWABlock(width, heads, window, mlp_ratio, rates.pop(0), official)
                    for index in range(depth)
                ]
            )
        super().__init__(embeds, stages, dims[-1], num_classes)
        self.apply(truncated_normal_weights)
