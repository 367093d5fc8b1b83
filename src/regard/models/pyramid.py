"""What all pyramids have in common: stages of blocks on token maps, each behind an embedding that changes resolution.

A paper's backbone says which embeddings and blocks; this class runs them and gives every stage's map or the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.maps import map_of

__all__ = ["Pyramid", "fan_out_convolutions", "truncated_normal_linears", "truncated_normal_weights"]

P = TypeVar("P", bound="Pyramid")


class Pyramid(nn.Module):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; :meth:`maps` gives the stages.

    embeds: one a stage, ``(batch, channels, *space)`` -> tokens ``(batch, length, width)`` and their grid. stages: the
    blocks of each, called ``block(tokens, grid=grid)``. width: channels of the last stage.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The paper's sizes, by name."""

    def __init__(
        self, embeds: Sequence[nn.Module], stages: Sequence[Sequence[nn.Module]], width: int, num_classes: int
    ) -> None:
        super().__init__()
        if len(embeds) != len(stages):
            raise OptionError(f"One embedding a stage: got {len(embeds)} embeddings and {len(stages)} stages.")
        self.embeds = nn.ModuleList(embeds)
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    @classmethod
    def preset(cls: type[P], name: str, **changes: Any) -> P:
        """A size of :attr:`presets`, with some arguments changed."""
        if name not in cls.presets:
            raise OptionError(f"There is no {cls.__name__} preset {name!r}; there are {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[name], **changes})

    def maps(self, images: Tensor) -> list[Tensor]:
        """The output of each stage, ``(batch, channels, height, width)``."""
        found, x = [], images
        for embed, blocks in zip(self.embeds, self.stages, strict=True):
            tokens, grid = embed(x)
            for block in blocks:  # type: ignore[attr-defined]
                tokens = block(tokens, grid=grid)
            x = map_of(tokens, grid)
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Norm, mean over the last map, linear head."""
        last = self.maps(images)[-1].flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(last).mean(1))
        return logits


def truncated_normal_linears(module: nn.Module) -> None:
    """For ``nn.Module.apply``: linear weights from a normal of deviation 0.02 cut at two, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def truncated_normal_weights(module: nn.Module) -> None:
    """As :func:`truncated_normal_linears`, for 2-d convolutions too."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fan_out_convolutions(module: nn.Module) -> None:
    """For ``nn.Module.apply``: weights of 2-d convolutions from a normal of variance two over what a channel feeds,
    ``kernel area * out_channels / groups``; biases zero."""
    if isinstance(module, nn.Conv2d):
        fed = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fed))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
