"""Swin backbones: four stages of windowed blocks, resolution halved and channels doubled between them.

Source: Liu et al., "Swin Transformer", 2021, arXiv 2103.14030, section 3 (mechanism: :mod:`regard.local.swin`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.drop_path import drop_path_rates
from regard.layers.maps import PatchEmbed, tokens_of
from regard.local.swin import PatchMerging, SwinBlock, SwinMLPBlock
from regard.models.pyramid import Pyramid, truncated_normal_linears

__all__ = ["Swin", "SwinMLP"]


class Swin(Pyramid):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; :meth:`maps` gives stages.

    shifted: whether every second block shifts its windows (False: the paper's ablation).
    """

    presets: ClassVar = {
        "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path": 0.2},
        "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path": 0.3},
        "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path": 0.5},
        "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "drop_path": 0.2},
    }
    """The paper's sizes, for windows of 7 at 224 pixels (12 at 384)."""

    block: ClassVar[type[SwinBlock] | type[SwinMLPBlock]] = SwinBlock

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.2,
        shifted: bool = True,
        official: bool = False,
    ) -> None:
        if len(depths) != len(num_heads):
            raise OptionError(f"One number of heads a stage: got depths {tuple(depths)}, num_heads {tuple(num_heads)}.")
        rates = drop_path_rates(drop_path, sum(depths))
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, **({"official": True} if official else {})}
        embeds: list[nn.Module] = []
        stages: list[list[nn.Module]] = []
        width = embed_dim
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            embeds.append(_MergedMap(width) if stage else PatchEmbed(in_channels, embed_dim, patch_size))
            width = embed_dim * 2**stage
            shifts = [window // 2 if shifted and index % 2 else 0 for index in range(depth)]
            blocks = [
                self.block(width, heads, window=window, shift=shift, drop_path=rates.pop(0), **options)
                for shift in shifts
            ]
            stages.append(list(blocks))
        super().__init__(embeds, stages, width, num_classes)
        self.apply(truncated_normal_linears)


class SwinMLP(Swin):
    """The variant whose blocks mix a window's tokens by a fixed grouped linear map."""

    block = SwinMLPBlock


class _MergedMap(nn.Module):
    """Patch merging as a pyramid's embedding: from the map of a stage to the tokens of the next."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.merging = PatchMerging(embed_dim)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        merged: tuple[Tensor, tuple[int, ...]] = self.merging(*tokens_of(maps))
        return merged
