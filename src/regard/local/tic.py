"""TiC: a convolution whose input is first mixed by attention over the same k x k neighbourhood.

Source: "TiC: Exploring Vision Transformer in Convolution", 2023, arXiv 2310.04134, and its released operator. With
``q, k, v`` from a 1x1 convolution and ``o`` running over the (dilated) stencil around pixel ``p``, per head:

    s_o = d^-0.5 q_p . k_{p+o},   a = dropout(softmax over o),   y_p = sum_o a_o v_{p+o} + x_p,   out = ReLU(Conv(y))

Outside the map ``k = v = 0``: such a position has logit 0 and takes its share of the softmax, as zero padding does.
Positions are not embedded; the convolution and the border tell them, so any size works. Per pixel and operator
``k^2 C`` multiplications.

Two ways to see farther. Cyclic shift: groups of channels are rolled in different directions before the attention and
back after it, so that one pixel holds channels of pixels ``step`` apart (of opposite groups, ``2 step``). Over layers
this adds up because the dense convolution mixes the groups where they belong. Inter-pooling: a second layer works on
the pooled map and is added. The operator alone is released; the two ways, heads, and the depthwise convolution follow
the paper's description. The released code has one head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import Neighbors, neighbor_mix, neighbor_scores
from regard.layers.maps import map_of, tokens_of
from regard.mechanism import Feature, per_axis
from regard.registry import register

__all__ = [
    "InterPooling",
    "MSAConv2d",
    "local_mix",
    "local_scores",
    "multi_directional_shift",
    "multi_directional_unshift",
]

# North, south, west, east, then the diagonals: rows down, columns to the right.
_COMPASS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def _stencil(maps: Tensor, kernel: int | Sequence[int], dilation: int | Sequence[int]) -> Neighbors:
    """Neighbours of each pixel, row by row of the kernel."""
    sides, rates = per_axis("kernel", kernel, 2), per_axis("dilation", dilation, 2)
    if min(sides) < 1 or min(rates) < 1 or not all(side % 2 for side in sides):
        raise OptionError(f"A kernel has odd sides around its pixel and a dilation of 1 or more; got {sides}, {rates}.")
    steps = [range(-(side // 2) * rate, side // 2 * rate + 1, rate) for side, rate in zip(sides, rates, strict=True)]
    return Neighbors.stencil(maps.shape[2:], list(itertools.product(*steps)), device=maps.device)


def _rows(maps: Tensor) -> Tensor:
    """``(batch, channels, height, width)`` -> ``(batch, 1, pixels, channels)``, one pixel's channels in a row."""
    return tokens_of(maps)[0][:, None].contiguous()


def local_scores(
    q: Tensor,
    k: Tensor,
    kernel: int | Sequence[int] = 3,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """``q_p . k_{p+o}`` of two maps ``(batch, channels, height, width)``: ``(batch, kh * kw, height, width)``, 0
    outside the map, in float32 or better. No scale is applied. Kernel sides are odd."""
    if q.dim() != 4 or q.shape != k.shape:
        raise ShapeError(
            f"Two maps (batch, channels, height, width) of one shape are needed; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}."
        )
    scores = neighbor_scores(_rows(q), _rows(k), _stencil(q, kernel, dilation), backend=backend)
    return map_of(scores[:, 0], q.shape[2:])


def local_mix(
    weights: Tensor,
    v: Tensor,
    kernel: int | Sequence[int] = 3,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """``sum_o a_o(p) v_{p+o}``, with weights ``(batch, kh * kw, height, width)`` as :func:`local_scores` orders them
    and ``v (batch, channels, height, width)``; zeros outside the map."""
    if weights.dim() != 4 or v.dim() != 4 or weights.shape[0] != v.shape[0] or weights.shape[2:] != v.shape[2:]:
        raise ShapeError(
            f"Weights (batch, kh * kw, height, width) of the map's own space are needed: {tuple(weights.shape)} for "
            f"a map {tuple(v.shape)}."
        )
    mixed = neighbor_mix(tokens_of(weights)[0][:, None], _rows(v), _stencil(v, kernel, dilation), backend=backend)
    return map_of(mixed[:, 0], v.shape[2:])


def _directions(directions: int | Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    given = directions if not isinstance(directions, int) else _COMPASS[:directions] if directions in (4, 8) else ()
    found = tuple(tuple(direction) for direction in given)
    if not found or any(len(direction) != 2 for direction in found):
        raise OptionError(f"directions is 4, 8, or pairs (down, right); got {directions!r}.")
    return found


def multi_directional_shift(x: Tensor, step: int = 1, directions: int | Sequence[Sequence[int]] = 4) -> Tensor:
    """Roll groups of channels of ``x (batch, channels, height, width)``, each ``step`` pixels in a direction of its
    own; the first group stays.

    directions: 4 or 8 of the compass, or pairs (down, right). Channels are split as evenly as they can.
    """
    if x.dim() != 4:
        raise ShapeError(f"A map (batch, channels, height, width) is shifted, got {tuple(x.shape)}.")
    ways = _directions(directions)
    still, *groups = x.tensor_split(len(ways) + 1, 1)
    rolled = (
        group.roll((step * down, step * right), (2, 3)) for group, (down, right) in zip(groups, ways, strict=True)
    )
    return torch.cat((still, *rolled), 1)


def multi_directional_unshift(x: Tensor, step: int = 1, directions: int | Sequence[Sequence[int]] = 4) -> Tensor:
    """The inverse of :func:`multi_directional_shift`."""
    return multi_directional_shift(x, -step, directions)


@register("tic")
class MSAConv2d(Feature):
    """``(batch, channels, height, width)`` -> ``(batch, out_channels, ...)``, in the place of a ``Conv2d``.

    out_channels: as many as ``channels`` by default. kernel: odd sides of both the neighbourhood and the convolution;
    dilation: of the neighbourhood. stride, padding (default: the map keeps its size), bias: of the convolution, which
    works channel by channel with ``depthwise``. dropout: of attention weights, in training. shift: roll channels so
    far, in ``directions`` (4, 8 or pairs), around the attention; 0 for none.
    """

    patterns = frozenset({"self"})
    needs_training = True
    growth = "N"

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        num_heads: int = 1,
        depthwise: bool = False,
        dropout: float = 0.1,
        padding: int | Sequence[int] | None = None,
        bias: bool = False,
        shift: int = 0,
        directions: int | Sequence[Sequence[int]] = 4,
    ) -> None:
        super().__init__()
        wide = channels if out_channels is None else out_channels
        if channels % num_heads:
            raise OptionError(f"channels {channels} is no multiple of num_heads {num_heads}; choose another.")
        if depthwise and wide % channels:
            raise OptionError(f"A depthwise convolution has a multiple of channels {channels} at its end, got {wide}.")
        if not 0 <= dropout < 1 or shift < 0:
            raise OptionError(f"Need 0 <= dropout < 1 and shift >= 0, got {dropout} and {shift}.")
        self.channels, self.num_heads, self.dropout = channels, num_heads, dropout
        self.kernel, self.dilation = per_axis("kernel", kernel, 2), per_axis("dilation", dilation, 2)
        _stencil(torch.empty(1, 1, 1, 1), self.kernel, self.dilation)
        self.shift, self.directions = shift, _directions(directions)
        border = tuple(side // 2 for side in self.kernel) if padding is None else per_axis("padding", padding, 2)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.conv = nn.Conv2d(
            channels,
            wide,
            self.kernel,  # type: ignore[arg-type]
            per_axis("stride", stride, 2),  # type: ignore[arg-type]
            border,  # type: ignore[arg-type]
            groups=channels if depthwise else 1,
            bias=bias,
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dilation={self.dilation}, dropout={self.dropout}, shift={self.shift}"

    def attend(self, x: Tensor) -> Tensor:
        """The attention alone, ``sum_o a_o v_{p+o}``: before the residual and the convolution, shift included."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ShapeError(f"This MSAConv2d takes (batch, {self.channels}, height, width), got {tuple(x.shape)}.")
        moved = multi_directional_shift(x, self.shift, self.directions) if self.shift else x
        # Heads are independent maps of fewer channels.
        q, k, v = (t.unflatten(1, (self.num_heads, -1)).flatten(0, 1) for t in self.qkv(moved).chunk(3, 1))
        logits = local_scores(q, k, self.kernel, self.dilation) * (self.channels // self.num_heads) ** -0.5
        weights = F.dropout(logits.softmax(1), self.dropout, self.training)
        mixed = local_mix(weights, v, self.kernel, self.dilation).unflatten(0, (-1, self.num_heads)).flatten(1, 2)
        return multi_directional_unshift(mixed, self.shift, self.directions) if self.shift else mixed

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.attend(x) + x)
        return out.relu()


class InterPooling(nn.Module):
    """``x + upsample(layer(pool(x)))``: between two layers of a block, the second works at ``1 / kernel`` of the size.

    kernel: side of the pooled cells; those that stick out are pooled over their real pixels. pool: 'avg' or 'max'.
    Upsampling repeats pixels.
    """

    def __init__(self, kernel: int = 2, pool: Literal["avg", "max"] = "avg") -> None:
        super().__init__()
        if kernel < 1 or pool not in ("avg", "max"):
            raise OptionError(f"kernel is at least 1 and pool 'avg' or 'max', got {kernel} and {pool!r}.")
        self.kernel, self.pool = kernel, pool

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, pool={self.pool!r}"

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """``x (batch, channels, height, width)``; ``layer`` keeps the shape of the maps it is given."""
        reduce = F.avg_pool2d if self.pool == "avg" else F.max_pool2d
        coarse = layer(reduce(x, self.kernel, ceil_mode=True))
        fine = coarse.repeat_interleave(self.kernel, 2).repeat_interleave(self.kernel, 3)
        return x + fine[:, :, : x.shape[2], : x.shape[3]]
