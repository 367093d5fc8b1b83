"""Criss-cross attention: every pixel attends to its row and its column; a second pass reaches the whole map.

With 1x1 convolutions ``q, k: C -> C / reduction`` and ``v: C -> C``, for pixel ``u`` and its cross ``P_u``, the
``H + W - 1`` pixels in its row or column (itself once):

    out_u = x_u + gamma sum_{p in P_u} A_up v_p,      A_u = softmax_{p in P_u} (q_u . k_p)

one softmax over the whole cross, without ``1 / sqrt(d)``; ``gamma`` is a learned number that starts at zero, so the
module starts as the identity. Passes ``R`` share their parameters: with ``R = 2`` any two pixels are joined by a path
through the corners of their rectangle. On ``(batch, channels, frames, height, width)`` the cross has a third line,
through time. A pass forms ``N (H + W)`` scores instead of the ``N^2`` of a non-local block.

Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", 2018, arXiv 1811.11721, sections 3.2
and 3.3. The segmentation head is :class:`regard.models.ccnet.RCCAHead`, the paper's auxiliary loss
:func:`regard.layers.losses.category_consistent_loss`. In the released three-dimensional module a pixel counts twice,
on its second and third line; here it counts once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, dense_attention
from regard.local.axes import axis_attention, axis_transport, axis_weights
from regard.mechanism import Feature
from regard.registry import register

__all__ = ["CrissCrossAttention", "NonLocalBlock2d", "RecurrentCrissCross"]


class _GatedAttention(Feature):
    """What criss-cross and non-local attention have in common: the projections, and ``x + gamma attended``."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        if reduction < 1 or channels < reduction:
            raise OptionError(f"reduction {reduction} leaves no channel for queries of {channels}; make it smaller.")
        self.channels = channels
        # One axis of flattened places, so that the same weights serve images and videos.
        self.query = nn.Conv1d(channels, channels // reduction, 1)
        self.key = nn.Conv1d(channels, channels // reduction, 1)
        self.value = nn.Conv1d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value on the map, each ``(batch, 1, *space, dim)``: one head."""
        if x.dim() - 2 not in self.grid_axes or x.shape[1] != self.channels:
            raise ShapeError(
                f"{type(self).__name__} takes (batch, {self.channels}, *space) with "
                f"{' or '.join(map(str, sorted(self.grid_axes)))} axes of space; got {tuple(x.shape)}."
            )
        flat, space = x.flatten(2), x.shape[2:]
        query, key, value = (
            part(flat).transpose(1, 2).unflatten(1, space)[:, None] for part in (self.query, self.key, self.value)
        )
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention on the map, shapes as :meth:`project` gives them."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *space)`` in and out."""
        attended = self.attend(*self.project(x))
        return x + self.gamma * attended[:, 0].movedim(-1, 1)


class CrissCrossAttention(_GatedAttention):
    """One pass. reduction: of the channels of queries and keys."""

    growth = "N^1.5"
    grid_axes = frozenset((2, 3))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return axis_attention(query, key, value, scale=1.0)

    @torch.no_grad()
    def attention_map(self, x: Tensor, position: Sequence[int]) -> Tensor:
        """Where the pixel at ``position`` looks, ``(batch, *space)``: its weights on its cross, zeros elsewhere."""
        return axis_transport(self.weights(x), _mark(x, position))[:, 0]

    def weights(self, x: Tensor) -> Tensor:
        """The attention of every pixel, line by line: ``(batch, 1, *space, sum of the sides)``, see
        :func:`~regard.local.axes.axis_weights`."""
        query, key, _ = self.project(x)
        return axis_weights(query, key, scale=1.0)


@register("ccnet")
class RecurrentCrissCross(Feature):
    """``recurrence`` passes of one :class:`CrissCrossAttention`, each on the output of the one before it.

    reduction: of the channels of queries and keys.
    """

    growth = "N^1.5"
    grid_axes = frozenset((2, 3))

    def __init__(self, channels: int, recurrence: int = 2, reduction: int = 8) -> None:
        super().__init__()
        if recurrence < 1:
            raise OptionError(f"recurrence counts passes, at least 1; got {recurrence}.")
        self.recurrence = recurrence
        self.attention = CrissCrossAttention(channels, reduction)

    def extra_repr(self) -> str:
        return f"recurrence={self.recurrence}"

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *space)`` in and out."""
        for _ in range(self.recurrence):
            x = self.attention(x)
        return x

    @torch.no_grad()
    def attention_map(self, x: Tensor, position: Sequence[int]) -> Tensor:
        """Where what the pixel at ``position`` attends to comes from, ``(batch, *space)``: the product of all passes'
        attention matrices, at its row (the skips around them left out). It sums to one, and with two passes it covers
        the map."""
        passes = []
        for _ in range(self.recurrence):
            passes.append(self.attention.weights(x))
            x = self.attention(x)
        mass = _mark(x, position)
        for weights in reversed(passes):
            mass = axis_transport(weights, mass)
        return mass[:, 0]


class NonLocalBlock2d(_GatedAttention):
    """The block that criss-cross attention thins out, with its projections and gate: every pixel attends to all.

    Wang et al., "Non-local Neural Networks", 2017, arXiv 1711.07971, in its embedded Gaussian form; there with a
    projection behind the attention in place of ``gamma``. ``(batch, channels, height, width)`` in and out.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = (t.flatten(2, -2) for t in (query, key, value))
        return dense_attention(*flat, scale=1.0).unflatten(2, query.shape[2:-1])


def _mark(x: Tensor, position: Sequence[int]) -> Tensor:
    """One at ``position`` of the map, zeros elsewhere: ``(batch, 1, *space)``."""
    space = x.shape[2:]
    if len(position) != len(space) or any(not 0 <= p < side for p, side in zip(position, space, strict=True)):
        raise ShapeError(f"position {tuple(position)} does not lie on a map of {tuple(space)}.")
    flat = 0
    for place, side in zip(position, space, strict=True):
        flat = flat * side + place
    mass = torch.zeros(len(x), 1, math.prod(space), dtype=accumulation_dtype(x.dtype), device=x.device)
    mass[:, :, flat] = 1
    return mass.unflatten(2, space)
