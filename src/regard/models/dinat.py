"""DiNAT and NAT: pyramids of neighborhood attention, dilated in every second block or nowhere.

Source: Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, arXiv 2209.15001, section 3.3, and Hassani
et al., "Neighborhood Attention Transformer", 2022, arXiv 2204.07143 (mechanism: :mod:`regard.local.dinat`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from regard.errors import OptionError
from regard.layers.drop_path import drop_path_rates
from regard.layers.maps import PatchEmbed
from regard.local.dinat import DilatedNeighborhoodAttention, Schedule, dilation_schedule
from regard.models.pyramid import Pyramid, truncated_normal_linears
from regard.nn import TransformerBlock

__all__ = ["NAT", "DiNAT"]

_TINY: dict[str, Any] = {"embed_dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_SMALL: dict[str, Any] = {"embed_dim": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}


class DiNAT(Pyramid):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; :meth:`maps` gives stages.

    Two 3 x 3 convolutions of stride 2 make tokens, one more stands between stages and doubles the width. resolution:
    side of the images that dilations are made for, by :func:`regard.local.dinat.dilation_schedule` and ``mode`` (by
    default :attr:`schedule`); other sizes work too. dilations: one for each block of each stage, in place of those.
    layer_scale: initial value of a learned scale per channel on each branch, None for none.
    """

    presets: ClassVar = {
        "mini": {**_TINY, "depths": (3, 4, 6, 5)},
        "tiny": _TINY,
        "small": {**_SMALL, "drop_path": 0.3},
        "base": {
            **_SMALL,
            "embed_dim": 128,
            "num_heads": (4, 8, 16, 32),
            "drop_path": 0.5,
            "layer_scale": 1e-5,
        },
        "large": {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48)},
    }
    """The papers' sizes, for windows of 7."""

    schedule: ClassVar[Schedule] = "alternate"
    """How dilations follow one another in a stage."""

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window: int = 7,
        resolution: int = 224,
        mode: Schedule | None = None,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.2,
        layer_scale: float | None = None,
        position_bias: bool = True,
    ) -> None:
        if len(depths) != len(num_heads) or embed_dim % 2:
            raise OptionError(
                f"Need one number of heads a stage and an even embed_dim; got depths {tuple(depths)}, num_heads "
                f"{tuple(num_heads)} and embed_dim {embed_dim}."
            )
        rates = drop_path_rates(drop_path, sum(depths))
        embeds: list[nn.Module] = []
        stages: list[list[nn.Module]] = []
        width = embed_dim
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            if stage:
                embeds.append(PatchEmbed(width, 2 * width, 3, 2, 1, bias=False))
                width *= 2
            else:
                first = nn.Conv2d(in_channels, embed_dim // 2, 3, 2, 1)
                embeds.append(nn.Sequential(first, PatchEmbed(embed_dim // 2, embed_dim, 3, 2, 1)))
            stages.append(
                [
                    TransformerBlock(
                        width,
                        DilatedNeighborhoodAttention(width, heads, window, position_bias=position_bias),
                        mlp_ratio,
                        drop_path=rates.pop(0),
                        layer_scale=layer_scale,
                    )
                    for _ in range(depth)
                ]
            )
        super().__init__(embeds, stages, width, num_classes)
        self.apply(truncated_normal_linears)
        if dilations is None:
            sides = [-(-resolution // 2 ** (stage + 2)) for stage in range(len(depths))]
            how = self.schedule if mode is None else mode
            dilations = [dilation_schedule(n, window, depth, how) for n, depth in zip(sides, depths, strict=True)]
        self.set_dilations(dilations)

    @property
    def dilations(self) -> list[list[int]]:
        """Of each block of each stage."""
        return [[layer.dilation[0] for layer in stage] for stage in self._layers()]

    def set_dilations(self, dilations: Sequence[Sequence[int]]) -> None:
        """Other dilations with the same weights."""
        layers = self._layers()
        if [len(stage) for stage in dilations] != [len(stage) for stage in layers]:
            raise OptionError(
                f"Stages of {[len(stage) for stage in layers]} blocks need as many dilations, got "
                f"{[list(stage) for stage in dilations]}."
            )
        for stage, rates in zip(layers, dilations, strict=True):
            for layer, rate in zip(stage, rates, strict=True):
                layer.set_dilation(rate)

    def _layers(self) -> list[list[DilatedNeighborhoodAttention]]:
        return [[m for m in blocks.modules() if isinstance(m, DilatedNeighborhoodAttention)] for blocks in self.stages]


class NAT(DiNAT):
    """The Neighborhood Attention Transformer: no dilation anywhere."""

    schedule = "local"
