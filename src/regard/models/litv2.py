"""LITv2: a pyramid that attends only in its later stages, with HiLo attention, and takes positions from a depthwise
convolution in its MLPs.

Source: Pan et al., "Fast Vision Transformers with HiLo Attention", 2022, arXiv 2205.13213, section 3.4 (mechanism:
:mod:`regard.local.hilo`). Stages are joined by strided convolutions; the paper's are deformable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.local.hilo import HiLoAttention

__all__ = ["PRESETS", "ConvMlp", "LITv2"]

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "medium": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
"""The paper's sizes."""


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
        maps = self.expand(x).transpose(1, 2).unflatten(2, tuple(grid))
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


class LITv2(nn.Module):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; :meth:`maps` gives the stages.

    window: HiLo's window in each stage, 0 for a stage without attention.
    """

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
        super().__init__()
        if not len(depths) == len(num_heads) == len(window):
            raise OptionError("depths, num_heads and window have one value a stage each.")
        rates = drop_path_rates(drop_path, sum(depths))
        self.embeds, self.norms, self.stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = in_channels
        for stage, (depth, heads, side) in enumerate(zip(depths, num_heads, window, strict=True)):
            width, step = embed_dim * 2**stage, 2 if stage else patch_size
            self.embeds.append(nn.Conv2d(channels, width, step, stride=step))
            self.norms.append(nn.LayerNorm(width))
            self.stages.append(
                nn.ModuleList(
                    _Block(
                        width,
                        HiLoAttention(width, heads, window=side, alpha=alpha) if side else None,
                        mlp_ratio,
                        rates.pop(0),
                    )
                    for _ in range(depth)
                )
            )
            channels = width
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_classes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LITv2:
        """A size of :data:`PRESETS`, with some arguments changed."""
        if name not in PRESETS:
            raise OptionError(f"There is no LITv2 preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    def maps(self, images: Tensor) -> list[Tensor]:
        """The output of each stage, ``(batch, channels, height, width)``."""
        found, x = [], images
        for embed, norm, blocks in zip(self.embeds, self.norms, self.stages, strict=True):
            maps = embed(x)
            grid = maps.shape[2:]
            tokens = norm(maps.flatten(2).transpose(1, 2))
            for block in blocks:  # type: ignore[attr-defined]
                tokens = block(tokens, grid)
            x = tokens.transpose(1, 2).unflatten(2, grid)
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        last = self.maps(images)[-1].flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(last).mean(1))
        return logits
