"""A layer on tokens as one on maps, for callers with channels first or last, and a module on maps as one on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from regard.layers.maps import map_of, tokens_of
from regard.mechanism import Layer

__all__ = ["OnMap", "OnTokens"]


class OnMap(nn.Module):
    """``layer`` on ``(batch, channels, *space)``, or with ``channels_last`` on ``(batch, *space, channels)``.

    The space is given to the layer as its ``grid``; the output has the input's layout.
    """

    def __init__(self, layer: Layer, channels_last: bool = False) -> None:
        super().__init__()
        self.layer, self.channels_last = layer, channels_last

    def forward(self, maps: Tensor, **call: Any) -> Tensor:
        """Keywords go to the layer (causal, mask)."""
        if self.channels_last:
            out: Tensor = self.layer(maps.flatten(1, -2), grid=tuple(maps.shape[1:-1]), **call)
            return out.unflatten(1, maps.shape[1:-1])
        tokens, grid = tokens_of(maps)
        return map_of(self.layer(tokens, grid=grid, **call), grid)


class OnTokens(nn.Module):
    """``feature`` on maps as a block on tokens ``(batch, length, channels)`` with their ``grid``, as pyramids call it.

    The feature keeps the map's space.
    """

    def __init__(self, feature: nn.Module) -> None:
        super().__init__()
        self.feature = feature

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return tokens_of(self.feature(map_of(x, grid)))[0]
