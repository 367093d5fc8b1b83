"""Swin backbones: four stages of windowed blocks, resolution halved and channels doubled between them.

Source: Liu et al., "Swin Transformer", 2021, arXiv 2103.14030, section 3 (mechanism: :mod:`regard.local.swin`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.drop_path import drop_path_rates
from regard.local.swin import PatchMerging, SwinBlock, SwinMLPBlock

__all__ = ["PRESETS", "Swin", "SwinMLP"]

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path": 0.2},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path": 0.3},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path": 0.5},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "drop_path": 0.2},
}
"""The paper's sizes, for windows of 7 at 224 pixels (12 at 384)."""


class Swin(nn.Module):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; :meth:`maps` gives stages."""

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
        """shifted: whether every second block shifts its windows (False: the paper's ablation)."""
        super().__init__()
        if len(depths) != len(num_heads):
            raise OptionError(f"One number of heads a stage: got depths {tuple(depths)}, num_heads {tuple(num_heads)}.")
        self.patch = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.patch_norm = nn.LayerNorm(embed_dim)
        self.patch_size = patch_size
        rates = drop_path_rates(drop_path, sum(depths))
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, **({"official": True} if official else {})}
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            width = embed_dim * 2**stage
            blocks = [
                self.block(
                    width,
                    heads,
                    window=window,
                    shift=window // 2 if shifted and index % 2 else 0,
                    drop_path=rates.pop(0),
                    **options,
                )
                for index in range(depth)
            ]
            self.stages.append(nn.ModuleList(blocks))
            if stage < len(depths) - 1:
                self.merges.append(PatchMerging(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(_init)

    block: type[SwinBlock] | type[SwinMLPBlock] = SwinBlock

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Swin:
        """A size of :data:`PRESETS`, with some arguments changed."""
        if name not in PRESETS:
            raise OptionError(f"There is no Swin preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    def maps(self, images: Tensor) -> list[Tensor]:
        """The output of each stage, ``(batch, channels, height, width)``, before it is merged."""
        short = [-side % self.patch_size for side in images.shape[:-3:-1]]
        patches = self.patch(nn.functional.pad(images, (0, short[0], 0, short[1])))
        grid: tuple[int, int] = (patches.shape[2], patches.shape[3])
        x = self.patch_norm(patches.flatten(2).transpose(1, 2))
        found = []
        for stage, blocks in enumerate(self.stages):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, grid=grid)
            found.append(x.transpose(1, 2).unflatten(2, grid))
            if stage < len(self.merges):
                x, grid = self.merges[stage](x, grid)
        return found

    def forward(self, images: Tensor) -> Tensor:
        last = self.maps(images)[-1].flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(last).mean(1))
        return logits


class SwinMLP(Swin):
    """The variant whose blocks mix a window's tokens by a fixed grouped linear map."""

    block = SwinMLPBlock


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
