"""Twins backbones: pyramids without shifted windows, whose positions come from a convolution in each stage.

Source: Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", 2021, arXiv 2104.13840,
section 3 and table of configurations (mechanisms: :mod:`regard.local.twins`). Patches of 4 x 4, then of 2 x 2 between
stages, do not overlap; behind the first block of each stage stands a positional encoding generator; the head reads the
mean. Maps that patches, windows or cells do not divide are filled up, so one set of weights serves all image sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from regard.errors import OptionError
from regard.layers.drop_path import drop_path_rates
from regard.layers.maps import PatchEmbed
from regard.local.twins import GlobalSubsampledAttention, PositionalEncodingGenerator, SpatiallySeparableAttention
from regard.models.pyramid import Pyramid, fan_out_convolutions, truncated_normal_linears
from regard.nn import TransformerBlock

__all__ = ["TwinsPCPVT", "TwinsSVT"]


class _Twins(Pyramid):
    """Embeddings, blocks and positions of both kinds; ``attention(stage, index)`` gives a block's attention."""

    def __init__(
        self,
        attention: Callable[[int, int], nn.Module],
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float],
        patch_size: int,
        in_channels: int,
        num_classes: int,
        drop_path: float,
        **per_stage: Sequence[int],
    ) -> None:
        given = {"dims": dims, "depths": depths, "mlp_ratios": mlp_ratios, **per_stage}
        if len({len(values) for values in given.values()}) != 1 or min(depths) < 1:
            raise OptionError(f"Twins takes one value a stage, and depths of at least 1; got {given}.")
        rates = drop_path_rates(drop_path, sum(depths))
        embeds, stages = [], []
        channels = in_channels
        for stage, (width, depth, ratio) in enumerate(zip(dims, depths, mlp_ratios, strict=True)):
            embeds.append(PatchEmbed(channels, width, 2 if stage else patch_size))
            blocks: list[nn.Module] = [
                TransformerBlock(width, attention(stage, index), ratio, drop_path=rates.pop(0))
                for index in range(depth)
            ]
            stages.append([blocks[0], PositionalEncodingGenerator(width), *blocks[1:]])
            channels = width
        super().__init__(embeds, stages, channels, num_classes)
        self.apply(truncated_normal_linears)
        self.apply(fan_out_convolutions)


class TwinsSVT(_Twins):
    """Blocks alternate attention in windows (LSA) and attention to summaries (GSA).

    num_heads, depths, windows, sr_ratios: one value a stage; windows and cells are square.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "base": {
            "dims": (96, 192, 384, 768),
            "num_heads": (3, 6, 12, 24),
            "depths": (2, 2, 18, 2),
            "drop_path": 0.3,
        },
        "large": {
            "dims": (128, 256, 512, 1024),
            "num_heads": (4, 8, 16, 32),
            "depths": (2, 2, 18, 2),
            "drop_path": 0.5,
        },
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        depths: Sequence[int] = (2, 2, 10, 4),
        windows: Sequence[int] = (7, 7, 7, 7),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.2,
    ) -> None:
        super().__init__(
            lambda stage, index: SpatiallySeparableAttention(
                dims[stage], num_heads[stage], windows[stage], sr_ratios[stage], layer_index=index
            ),
            dims,
            depths,
            mlp_ratios,
            patch_size,
            in_channels,
            num_classes,
            drop_path,
            num_heads=num_heads,
            windows=windows,
            sr_ratios=sr_ratios,
        )


class TwinsPCPVT(_Twins):
    """All blocks attend to summaries (GSA): a pyramid vision transformer with positions from convolutions.

    num_heads, depths, sr_ratios: one value a stage.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "base": {"depths": (3, 4, 18, 3), "drop_path": 0.3},
        "large": {"depths": (3, 8, 27, 3), "drop_path": 0.5},
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.2,
    ) -> None:
        super().__init__(
            lambda stage, index: GlobalSubsampledAttention(dims[stage], num_heads[stage], sr_ratios[stage]),
            dims,
            depths,
            mlp_ratios,
            patch_size,
            in_channels,
            num_classes,
            drop_path,
            num_heads=num_heads,
            sr_ratios=sr_ratios,
        )
