"""Backbones with InLine attention: DeiT, PVT, Swin with windows as large as the map, and CSwin likewise.

Source: Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", 2024, arXiv 2412.06590, section 5
and appendix (mechanism: :mod:`regard.linear.inline_attention`). Since cost is linear in length, PVT reads its keys at
full resolution, and windows and stripes grow to the whole map at no extra cost. Where a window is smaller than the map,
it attends to itself alone; Swin's shift moves the borders of windows, and what is left at the map's edge is a smaller
window (the released code rolls the map and lets both of its sides see one another). The kernels of the local residual
are computed from the tokens that attend to one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.drop_path import drop_path_rates
from regard.layers.maps import PatchEmbed, merge_heads, space_of, split_heads
from regard.layers.mlp import Mlp
from regard.linear.inline_attention import InLineAttention, LocalResidual, inline_attention
from regard.local.cswin import LePE
from regard.local.swin import WindowBlock, fit_window
from regard.local.windows import pad_to_windows, window_partition, window_reverse
from regard.masks import KeyPadding
from regard.models.pyramid import Pyramid, truncated_normal_linears
from regard.models.swin import Swin
from regard.models.vit import VisionTransformer
from regard.nn import TransformerBlock

__all__ = ["InLineCSwin", "InLineCrossShapedAttention", "InLineDeiT", "InLinePVT", "InLineSwin", "InLineSwinBlock"]


class InLineDeiT(VisionTransformer):
    """A vision transformer with InLine attention. phi, local: of the attention; the rest as the base class."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"embed_dim": 192, "num_heads": 6},
        "small": {"image_size": 288, "embed_dim": 320, "num_heads": 10},
        "base": {"image_size": 448, "embed_dim": 384, "num_heads": 12},
    }
    """The paper's sizes: narrower than DeiT's and, from small on, for larger images."""

    def __init__(
        self, *sizes: Any, num_heads: int = 6, phi: str = "identity", local: bool = True, **model: Any
    ) -> None:
        options = {"class_tokens": 1, "phi": phi, "local": local}
        super().__init__(*sizes, num_heads=num_heads, mechanism="inline_attention_layer", options=options, **model)
        self.apply(truncated_normal_linears)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> InLineDeiT:
        """A size of :attr:`presets`, with some arguments changed."""
        if name not in cls.presets:
            raise OptionError(f"There is no InLineDeiT preset {name!r}; there are {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[name], **changes})

    def encode(self, tokens: Tensor, first: int = 0, last: int | None = None, **call: Any) -> Tensor:
        """Tokens through the blocks, on the model's grid."""
        return super().encode(tokens, first, last, **{"grid": self.grid, **call})


class _PositionedPatches(nn.Module):
    """Patches, their norm, and learned positions, resized bilinearly to the map's grid."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int, side: int) -> None:
        super().__init__()
        self.patches = PatchEmbed(in_channels, embed_dim, patch_size)
        self.positions = nn.Parameter(torch.empty(1, embed_dim, side, side))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        tokens, grid = self.patches(maps)
        positions: Tensor = self.positions
        if grid != tuple(positions.shape[2:]):
            positions = F.interpolate(positions, size=grid, mode="bilinear", align_corners=False)
        return tokens + positions.flatten(2).transpose(1, 2), grid


class InLinePVT(Pyramid):
    """PVT without spatial reduction. Images ``(batch, in_channels, height, width)`` -> logits; ``maps`` gives stages.

    dims, num_heads, depths, mlp_ratios: one value a stage. image_size: for which positions are made; other sizes
    resize them. The head reads the mean of the last map as it is.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"depths": (2, 2, 2, 2)},
        "small": {},
        "medium": {"depths": (3, 4, 18, 3)},
        "large": {"depths": (3, 8, 27, 3)},
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        depths: Sequence[int] = (3, 4, 6, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        image_size: int = 224,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.1,
        phi: str = "identity",
        local: bool = True,
    ) -> None:
        if not len(dims) == len(num_heads) == len(depths) == len(mlp_ratios):
            raise OptionError("dims, num_heads, depths and mlp_ratios have one value a stage each.")
        rates = drop_path_rates(drop_path, sum(depths))
        embeds, stages = [], []
        channels, side = in_channels, image_size
        for stage, (width, heads, depth, ratio) in enumerate(zip(dims, num_heads, depths, mlp_ratios, strict=True)):
            patch = 2 if stage else patch_size
            side = -(-side // patch)
            embeds.append(_PositionedPatches(channels, width, patch, side))
            stages.append(
                [
                    TransformerBlock(width, InLineAttention(width, heads, phi, local), ratio, drop_path=rates.pop(0))
                    for _ in range(depth)
                ]
            )
            channels = width
        super().__init__(embeds, stages, channels, num_classes)
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.apply(truncated_normal_linears)


class InLineSwinBlock(WindowBlock):
    """Swin's block with InLine attention inside windows; filling at the border is not attended to."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int = 56,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        phi: str = "identity",
        local: bool = True,
    ) -> None:
        super().__init__(window, shift, drop_path)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = InLineAttention(embed_dim, num_heads, phi, local)
        self.mlp_norm, self.mlp = nn.LayerNorm(embed_dim), Mlp(embed_dim, mlp_ratio)

    def mix(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        sides, moves = fit_window(space, (self.window,) * 2, (self.shift,) * 2)
        x = self.attention_norm(x)
        before = [side - move if move else 0 for side, move in zip(sides, moves, strict=True)]
        image = F.pad(x.unflatten(1, space), (0, 0, before[1], 0, before[0], 0))
        filled = pad_to_windows(image, sides)
        extent = tuple(filled.shape[1:-1])
        mask = None
        if extent != tuple(space):
            real = F.pad(x.new_ones(1, *space, 1), (0, 0, before[1], 0, before[0], 0))
            valid = window_partition(pad_to_windows(real, sides), sides).flatten(1) > 0
            mask = KeyPadding(valid.repeat(len(x), 1))
        out = self.attention(window_partition(filled, sides).flatten(1, 2), grid=sides, mask=mask)
        out = window_reverse(out.unflatten(1, sides), sides, extent)
        return out[:, before[0] : before[0] + space[0], before[1] : before[1] + space[1]].flatten(1, 2)


class InLineSwin(Swin):
    """Swin with InLine attention and enlarged windows: 56, so that every stage attends to its whole map at 224 pixels.

    Arguments as :class:`~regard.models.swin.Swin`. All stages have InLine attention; the parameters that the paper
    lists for small and base (50 and 88 million, here 52.5 and 91.7) fit models whose last two stages keep softmax.
    """

    block = InLineSwinBlock  # type: ignore[assignment]
    presets: ClassVar = {
        "tiny": {"window": 56, "drop_path": 0.2},
        "small": {"window": 56, "depths": (2, 2, 18, 2), "drop_path": 0.3},
        "base": {
            "window": 56,
            "embed_dim": 128,
            "depths": (2, 2, 18, 2),
            "num_heads": (4, 8, 16, 32),
            "drop_path": 0.5,
        },
    }


class InLineCrossShapedAttention(nn.Module):
    """InLine attention inside stripes, half of the heads in vertical and half in horizontal ones, with a local residual
    and LePE for each half; ``(batch, length, channels)`` in and out.

    stripe: width of the stripes, None for the whole map, where one set of heads does all.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, stripe: int | None = None, phi: str = "identity", qkv_bias: bool = True
    ) -> None:
        super().__init__()
        groups = 1 if stripe is None else 2
        if num_heads < 1 or num_heads % groups or embed_dim % num_heads or (stripe is not None and stripe < 1):
            raise OptionError(
                f"Need num_heads dividing embed_dim, an even number of them with stripes, and stripe >= 1; got "
                f"{num_heads}, {embed_dim}, {stripe}."
            )
        self.num_heads, self.stripe, self.phi = num_heads // groups, stripe, phi
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        width = embed_dim // groups
        self.residuals = nn.ModuleList(LocalResidual(width, self.num_heads) for _ in range(groups))
        self.lepe = nn.ModuleList(LePE(width) for _ in range(groups))
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width)."""
        space = space_of(x, grid)
        groups = len(self.residuals)
        parts = [t.chunk(groups, -1) for t in (x, *self.qkv(x).chunk(3, -1))]
        outs = []
        for axis, (own, *qkv) in enumerate(zip(*parts, strict=True)):
            sides = list(space)
            if self.stripe is not None:
                sides[1 - axis] = min(self.stripe, space[1 - axis])
            outs.append(self._inside(axis, own, qkv, space, sides))
        mixed: Tensor = self.proj(torch.cat(outs, -1))
        return mixed

    def _inside(self, which: int, x: Tensor, qkv: list[Tensor], space: tuple[int, ...], sides: list[int]) -> Tensor:
        """One half inside its stripes; a map that they do not divide is filled up at its end, unseen."""

        def cut(tokens: Tensor) -> Tensor:
            return window_partition(pad_to_windows(tokens.unflatten(1, space), sides), sides).flatten(1, 2)

        real = None
        extent = [-(-n // side) * side for n, side in zip(space, sides, strict=True)]
        if tuple(extent) != space:
            real = cut(x.new_ones(1, x.shape[1], 1))[..., 0].repeat(len(x), 1) > 0
        own, query, key, value = (cut(t) for t in (x, *qkv))
        q, k, v = (split_heads(t, self.num_heads)[0] for t in (query, key, value))
        lepe = merge_heads(self.lepe[which](v, sides))
        out = merge_heads(inline_attention(q, k, v, self.phi, key_padding_mask=real))
        out = out + self.residuals[which](own, value, sides, real) + lepe
        whole = window_reverse(out.unflatten(1, sides), sides, extent)
        return whole[:, : space[0], : space[1]].flatten(1, 2)


class InLineCSwin(Pyramid):
    """CSwin with InLine attention. Images ``(batch, in_channels, height, width)`` -> logits; ``maps`` gives stages.

    stripes: one a stage, None for the whole map (the paper's models). Depths and widths are those of the released
    functions, which give 22, 36 and 77 million parameters where the paper lists 25, 43 and 96.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {},
        "small": {"depths": (3, 6, 29, 2), "drop_path": 0.4},
        "base": {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32), "drop_path": 0.5},
    }

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripes: Sequence[int | None] | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        phi: str = "identity",
    ) -> None:
        widths = [None] * len(depths) if stripes is None else list(stripes)
        if not len(depths) == len(num_heads) == len(widths):
            raise OptionError("depths, num_heads and stripes have one value a stage each.")
        rates = drop_path_rates(drop_path, sum(depths))
        embeds, stages = [], []
        channels = in_channels
        for stage, (depth, heads, stripe) in enumerate(zip(depths, num_heads, widths, strict=True)):
            width = embed_dim * 2**stage
            embeds.append(PatchEmbed(channels, width, *((3, 2, 1) if stage else (7, 4, 2))))
            stages.append(
                [
                    TransformerBlock(
                        width,
                        InLineCrossShapedAttention(width, heads, stripe, phi),
                        mlp_ratio,
                        drop_path=rates.pop(0),
                    )
                    for _ in range(depth)
                ]
            )
            channels = width
        super().__init__(embeds, stages, channels, num_classes)
        self.apply(truncated_normal_linears)
