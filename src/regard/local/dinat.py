"""Dilated neighborhood attention: each token sees its nearest neighbours among those ``D`` steps apart.

``rho_D(i)``: on each axis the ``w`` tokens nearest to ``i`` among those congruent to ``i`` modulo ``D``, moved inward
at the border so that there are always ``w`` of them. With a learned table ``B`` per head of ``2w - 1`` offsets an axis,

    out_i = sum_j softmax_j(q_i . k_j / sqrt(d) + B[(j - i) / D]) v_j,    j in rho_D(i).

Cost does not depend on ``D``: ``N w^n`` pairs on ``n`` axes. What a stack sees does: on one axis ``l`` layers without
dilation reach ``l (w - 1) + 1`` tokens, dilations ``1, w, w^2, ...`` reach ``w^l`` (:func:`receptive_field`). So layers
alternate between ``D = 1``, local detail, and the largest ``D = floor(n / w)`` that the map allows
(:func:`dilation_schedule`). The weights know nothing of ``D``; every ``D = 1`` is the Neighborhood Attention
Transformer (arXiv 2204.07143).

``w D`` must not exceed the resolution. A smaller map makes first the dilation and then the window as small as it needs;
``fit=False`` makes it an error. (The released code fills such maps up with zeros before it projects, so that filling
has the biases as keys and is seen.)

Source: Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, arXiv 2209.15001, section 3. The backbone
is :class:`regard.models.dinat.DiNAT`. ``(batch, length, channels)`` in and out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.maps import merge_heads, space_of, split_heads
from regard.layers.position_bias import RelativePositionBias
from regard.local.neighborhood import bias_table, fitted_neighborhood, neighborhood_plan
from regard.masks import Neighborhood, axis_windows
from regard.mechanism import Layer, per_axis
from regard.registry import register

__all__ = ["DilatedNeighborhoodAttention", "dilation_schedule", "receptive_field"]

Schedule = Literal["alternate", "gradual", "local", "global"]


def dilation_schedule(resolution: int, window: int, depth: int, mode: Schedule = "alternate") -> list[int]:
    """Dilations of ``depth`` layers on maps of side ``resolution``; the largest is ``D = floor(resolution / window)``,
    at least 1.

    alternate: 1, D, 1, D, ... (the paper's). gradual: evenly from 1 to D, rounded. local: all 1. global: all D.
    """
    if min(resolution, window) < 1 or depth < 0:
        raise OptionError(
            f"Need resolution and window of at least 1 and no negative depth, got {resolution}, {window}, {depth}."
        )
    largest = max(resolution // window, 1)
    if mode == "alternate":
        return [largest if index % 2 else 1 for index in range(depth)]
    if mode == "gradual":
        return [1 + round((largest - 1) * index / max(depth - 1, 1)) for index in range(depth)]
    if mode in ("local", "global"):
        return [1 if mode == "local" else largest] * depth
    raise OptionError(f"mode is 'alternate', 'gradual', 'local' or 'global', got {mode!r}.")


def receptive_field(schedule: Sequence[int], window: int, length: int, position: int | None = None) -> int:
    """How many tokens of an axis reach the output of ``position`` (by default the middle) through layers of these
    dilations, the first layer first."""
    place = length // 2 if position is None else position
    if not 0 <= place < length:
        raise OptionError(f"Position {place} is not on an axis of length {length}.")
    reached = {place}
    for dilation in reversed(schedule):
        Neighborhood.of((length,), window, 1, dilation)
        start, stop = (bound.tolist() for bound in axis_windows(length, window, 1, dilation, False))
        reached = {key for query in reached for key in range(start[query], stop[query], dilation)}
    return len(reached)


@register("dinat")
class DilatedNeighborhoodAttention(Layer):
    """window, dilation: one value or one for height and width. position_bias: learn a bias per head and offset (key
    minus query, in steps of the dilation). qkv_bias: biases of query, key and value. fit: let a map that is too small
    shrink dilation and window (False: ShapeError or OptionError)."""

    patterns = frozenset(("self",))
    growth = "N w^2"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        window: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        position_bias: bool = True,
        qkv_bias: bool = True,
        fit: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}.")
        self.num_heads, self.window, self.fit = num_heads, per_axis("window", window, 2), fit
        if min(self.window) < 1:
            raise OptionError(f"A window holds at least one token per axis, got {self.window}.")
        self.set_dilation(dilation)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.position_bias = RelativePositionBias(self.window, num_heads) if position_bias else None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}, dilation={self.dilation}"

    def set_dilation(self, dilation: int | Sequence[int]) -> None:
        """Another dilation with the same weights."""
        rates = per_axis("dilation", dilation, 2)
        if min(rates) < 1:
            raise OptionError(f"A dilation is at least 1 on every axis, got {rates}.")
        self.dilation = rates

    def rule(self, grid: Sequence[int]) -> Neighborhood:
        """The neighbourhood on ``grid``."""
        if self.fit:
            return fitted_neighborhood(grid, self.window, 1, self.dilation)
        return Neighborhood.of(grid, self.window, 1, self.dilation)

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width)."""
        rule = self.rule(space_of(x, grid))
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        table = None if self.position_bias is None else bias_table(self.position_bias, rule)
        attended, _ = neighborhood_plan(rule, x.device).run(query, key, value, table=table)
        out: Tensor = self.proj(merge_heads(attended))
        return out
