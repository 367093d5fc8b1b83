"""CSWin backbone: four stages of blocks with cross-shaped windows, whose stripes widen as maps shrink.

Source: Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", 2021, arXiv
2107.00652, sections 3.1 and 3.4 (mechanism: :mod:`regard.local.cswin`). Patches overlap: a 7 x 7 convolution of stride
4 and padding 2 at the start, a 3 x 3 one of stride 2 between stages, which doubles the channels, each followed by a
LayerNorm. The last stage attends to its whole map; the head reads the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from regard.errors import OptionError
from regard.layers.drop_path import drop_path_rates
from regard.layers.maps import PatchEmbed
from regard.local.cswin import CrossShapedWindowAttention, Scope
from regard.models.pyramid import Pyramid, truncated_normal_linears
from regard.nn import TransformerBlock

__all__ = ["CSWin"]


class CSWin(Pyramid):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; ``maps`` gives the stages.

    depths, num_heads, stripes: one value a stage; the last stripe is not read, as the last stage attends to all. The
    other options are those of :class:`~regard.local.cswin.CrossShapedWindowAttention`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {},
        "small": {"depths": (2, 4, 32, 2), "drop_path": 0.3},
        "base": {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32), "drop_path": 0.5},
        "large": {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24), "drop_path": 0.5},
        "base-384": {
            "embed_dim": 96,
            "depths": (2, 4, 32, 2),
            "num_heads": (4, 8, 16, 32),
            "stripes": (1, 2, 12, 12),
            "drop_path": 0.5,
        },
        "large-384": {
            "embed_dim": 144,
            "depths": (2, 4, 32, 2),
            "num_heads": (6, 12, 24, 24),
            "stripes": (1, 2, 12, 12),
            "drop_path": 0.5,
        },
    }
    """For images of 224 pixels, and of 384 where the name says so."""

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripes: Sequence[int] = (1, 2, 7, 7),
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        lepe: bool = True,
        lepe_scope: Scope = "stripe",
        official: bool = False,
    ) -> None:
        if not len(depths) == len(num_heads) == len(stripes):
            raise OptionError(
                f"depths, num_heads and stripes have one value a stage each; got {tuple(depths)}, {tuple(num_heads)}, "
                f"{tuple(stripes)}."
            )
        rates = drop_path_rates(drop_path, sum(depths))
        embeds, stages = [], []
        channels = in_channels
        for stage, (depth, heads, stripe) in enumerate(zip(depths, num_heads, stripes, strict=True)):
            width = embed_dim * 2**stage
            embeds.append(PatchEmbed(channels, width, *((3, 2, 1) if stage else (7, 4, 2))))
            last = stage == len(depths) - 1
            stages.append(
                [
                    TransformerBlock(
                        width,
                        CrossShapedWindowAttention(
                            width, heads, stripe, lepe, full=last, lepe_scope=lepe_scope, official=official
                        ),
                        mlp_ratio,
                        drop_path=rates.pop(0),
                    )
                    for _ in range(depth)
                ]
            )
            channels = width
        super().__init__(embeds, stages, channels, num_classes)
        self.apply(truncated_normal_linears)
