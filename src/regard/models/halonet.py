"""HaloNet: a ResNet whose bottlenecks attend in blocks with halos where they convolved 3 x 3.

Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", 2021, arXiv 2103.12731,
section 3 (mechanism: :mod:`regard.local.halonet`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import OptionError
from regard.local.halonet import Border, HaloAttention

__all__ = ["HaloNet"]

STEM = 64


def _normed(convolution: nn.Module, channels: int, activation: bool = True) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), *([nn.ReLU(inplace=True)] if activation else []))


class _Bottleneck(nn.Module):
    """1 x 1 convolution, ``middle``, 1 x 1 convolution, each with batch norm, beside a skip that is projected where
    the shape changes. ``middle`` takes ``width`` channels to ``middle_width`` and the map ``stride`` times down."""

    def __init__(
        self, in_channels: int, width: int, middle: nn.Module, middle_width: int, out_channels: int, stride: int
    ) -> None:
        super().__init__()
        self.reduce = _normed(nn.Conv2d(in_channels, width, 1, bias=False), width)
        self.middle = _normed(middle, middle_width)
        self.expand = _normed(nn.Conv2d(middle_width, out_channels, 1, bias=False), out_channels, activation=False)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.skip = _normed(shortcut, out_channels, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.expand(self.middle(self.reduce(x)))
        return (self.skip(x) + branch).relu_()


class HaloNet(nn.Module):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; :meth:`maps` gives the stages.

    Stages of ``depths`` bottlenecks, ``widths`` wide inside and ``bottleneck`` times as wide outside, on maps of a
    quarter, an eighth, ... of the resolution. block, halo, head_dim, v_ratio, pad: of the attention. attention: which
    stages attend; the others convolve (the hybrid: only the last two attend). final_width: of a 1 x 1 convolution
    before the head, None for none. The paper's larger sizes grow the third depth, bottleneck, v_ratio and final_width.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "h0": {"depths": (3, 3, 7, 3), "bottleneck": 0.5},
        "h1": {"depths": (3, 3, 10, 3), "bottleneck": 1.0},
    }
    """The paper's two smallest sizes, of 5.5 and 8.1 million parameters."""

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 7, 3),
        bottleneck: float = 0.5,
        block: int = 8,
        halo: int = 3,
        v_ratio: float = 1.0,
        head_dim: int = 16,
        widths: Sequence[int] = (64, 128, 256, 512),
        attention: Sequence[bool] | None = None,
        final_width: int | None = None,
        pad: Border = "mask",
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        attends = (True,) * len(depths) if attention is None else tuple(attention)
        if not len(depths) == len(widths) == len(attends):
            raise OptionError(
                f"depths, widths and attention have one value a stage each; got {tuple(depths)}, {tuple(widths)} and "
                f"{attends}."
            )
        self.stem = nn.Sequential(
            _normed(nn.Conv2d(in_channels, STEM, 7, 2, 3, bias=False), STEM), nn.MaxPool2d(3, 2, 1)
        )
        channels, self.stages = STEM, nn.ModuleList()
        for stage, (depth, width, attend) in enumerate(zip(depths, widths, attends, strict=True)):
            out_channels, blocks = int(width * bottleneck), []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                middle: nn.Module = nn.Conv2d(width, width, 3, stride, 1, bias=False)
                middle_width = width
                if attend:
                    middle = HaloAttention(
                        width, head_dim=head_dim, block=block, halo=halo, stride=stride, v_ratio=v_ratio, pad=pad
                    )
                    middle_width = middle.out_channels
                blocks.append(_Bottleneck(channels, width, middle, middle_width, out_channels, stride))
                channels = out_channels
            self.stages.append(nn.Sequential(*blocks))
        self.final: nn.Module = nn.Identity()
        if final_width is not None:
            self.final = _normed(nn.Conv2d(channels, final_width, 1, bias=False), final_width)
            channels = final_width
        self.head = nn.Linear(channels, num_classes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> HaloNet:
        """A size of :attr:`presets`, with some arguments changed."""
        if name not in cls.presets:
            raise OptionError(f"There is no HaloNet preset {name!r}; there are {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[name], **changes})

    def maps(self, images: Tensor) -> list[Tensor]:
        """The output of each stage, ``(batch, channels, height, width)``."""
        found, x = [], self.stem(images)
        for blocks in self.stages:
            x = blocks(x)
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Mean over the last map, linear head."""
        logits: Tensor = self.head(self.final(self.maps(images)[-1]).mean((2, 3)))
        return logits
