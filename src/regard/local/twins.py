"""Twins: local attention inside windows and global attention to a summary of each window, in turn.

On a map of ``H x W`` tokens (arXiv 2104.13840, section 3.3), *spatially separable self-attention* alternates

- LSA, locally-grouped self-attention: ``softmax(q k^T / sqrt(d)) v`` inside each ``k_1 x k_2`` window, then a
  projection; no shift, no relative bias, so nothing crosses a window;
- GSA, global sub-sampled attention: queries at every token; keys and values from a summary map, ``Linear(LayerNorm(
  Conv2d(x)))`` with kernel and stride ``sr_ratio``; then a projection. A summary stands for one cell of the map, and
  only through it does information cross windows, as in a depthwise and then a pointwise convolution.

Position comes from the positional encoding generator alone (Chu et al., 2021, arXiv 2102.10882), ``x + DWConv_3x3(x)``
with zeros around the map, once a stage behind its first block; so any size works.

A map that windows or cells do not divide is filled up at the bottom and right. Filling is never seen in a window; in a
cell it is zeros. With ``mask``, padded tokens are zeros to the summaries as well, and a summary that covers no real
token is hidden. (The released dense-prediction code marks filling by slices ``-pad:``; where one side needs none, its
slice marks the whole map, and nothing is hidden. Its GSA drops the rows and columns that fill no cell.)

Source: Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", 2021, arXiv 2104.13840.
The backbones are in :mod:`regard.models.twins`. Score products of a pair with cells as large as windows: ``k_1 k_2 H W
d + (H W)^2 d / (k_1 k_2)``, least at ``k_1 k_2 = sqrt(H W)``: ``O(H W sqrt(H W) d)``. ``(batch, length, channels)`` in
and out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from regard.errors import OptionError, UnsupportedMaskError
from regard.kernels import dense_attention
from regard.layers.depthwise import ConditionalPositionEncoding
from regard.layers.maps import PatchEmbed, map_of, merge_heads, space_of, split_heads
from regard.layers.padding import layer_keys
from regard.local.windows import pool_windows, window_plan, windowed_attention
from regard.masks import Boolean, Mask
from regard.mechanism import Layer, per_axis
from regard.registry import register

__all__ = [
    "GlobalSubsampledAttention",
    "LocallyGroupedSelfAttention",
    "PositionalEncodingGenerator",
    "SpatiallySeparableAttention",
    "optimal_window",
    "sssa_cost",
]


def sssa_cost(height: int, width: int, embed_dim: int, k1: int, k2: int) -> float:
    """Multiply-adds of the scores of LSA and GSA on a map, with windows and cells of ``k1 x k2`` (equation 3)."""
    tokens, inner = height * width, k1 * k2
    return inner * tokens * embed_dim + tokens**2 * embed_dim / inner


def optimal_window(height: int, width: int) -> int:
    """The side of the square window with the least :func:`sssa_cost`, the smaller of two equals: near ``(height *
    width) ** (1 / 4)``, where the continuous optimum lies."""
    side = max(math.floor((height * width) ** 0.25), 1)
    return min((side, side + 1), key=lambda k: sssa_cost(height, width, 1, k, k))


class LocallyGroupedSelfAttention(Layer):
    """LSA: attention inside windows. window: their side, or height and width; a side longer than the map's is cut."""

    patterns = frozenset(("self",))
    growth = "N w^2"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(
        self, embed_dim: int, num_heads: int = 8, window: int | Sequence[int] = 7, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        self.num_heads, self.window = num_heads, per_axis("window", window, 2)
        if min(self.window) < 1:
            raise OptionError(f"A window has sides of at least 1, got {self.window}.")
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}"

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None, mask: Mask | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width). mask: any, on the map's tokens."""
        space = space_of(x, grid)
        sides = tuple(min(window, side) for window, side in zip(self.window, space, strict=True))
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        plan = window_plan(space, sides, (0, 0), x.device)
        out = windowed_attention(query, key, value, plan, mask=None if mask is None else mask.to(x.device))
        merged: Tensor = self.proj(merge_heads(out))
        return merged


class GlobalSubsampledAttention(Layer):
    """GSA: every token attends to one summary a cell. sr_ratio: side of the cells; 1 is ordinary attention."""

    patterns = frozenset(("self",))
    growth = "N^2 / s^2"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(self, embed_dim: int, num_heads: int = 8, sr_ratio: int = 1, qkv_bias: bool = True) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        if sr_ratio < 1:
            raise OptionError(f"sr_ratio is the side of a cell, at least 1; got {sr_ratio}.")
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.query = nn.Linear(embed_dim, embed_dim, bias=qkv_bias)
        self.summary = PatchEmbed(embed_dim, embed_dim, sr_ratio) if sr_ratio > 1 else None
        self.key_value = nn.Linear(embed_dim, 2 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}"

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None, mask: Mask | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width). mask: of keys, the same for all heads
        (``KeyPadding``)."""
        space = space_of(x, grid)
        real = layer_keys(mask, x.shape[1], x.device, "GSA")
        if real is not None:
            if real.shape[1] != 1:
                raise UnsupportedMaskError("GSA has one summary for all heads; it hides a token from all or none.")
            real = real[:, 0, :, None]
        source = x
        if self.summary is not None:
            source, _ = self.summary(map_of(x if real is None else x.masked_fill(~real, 0), space))
            if real is not None:
                real = pool_windows(real.unflatten(1, space).to(x.dtype), (self.sr_ratio,) * 2) > 0
        (query,) = split_heads(self.query(x), self.num_heads)
        key, value = split_heads(self.key_value(source), self.num_heads, 2)
        rule = None if real is None else Boolean(real[:, None, None, :, 0])
        merged: Tensor = self.proj(merge_heads(dense_attention(query, key, value, mask=rule)))
        return merged


@register("twins")
class SpatiallySeparableAttention(Layer):
    """LSA in even layers and GSA in odd ones, so that a stack of these layers alternates as the paper's stages do.

    kind: ``"local"`` or ``"global"``, by default from ``layer_index``. window: side of LSA's windows. sr_ratio: side of
    GSA's cells, by default the window's, which gives one summary a window.
    """

    patterns = frozenset(("self",))
    growth = "N w^2 + N^2 / s^2"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        window: int = 7,
        sr_ratio: int | None = None,
        kind: Literal["local", "global"] | None = None,
        qkv_bias: bool = True,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        if kind not in (None, "local", "global"):
            raise OptionError(f"kind is 'local' (LSA), 'global' (GSA) or None (by layer_index), got {kind!r}.")
        self.kind = kind or ("global" if layer_index % 2 else "local")
        self.attention: Layer = (
            LocallyGroupedSelfAttention(embed_dim, num_heads, window, qkv_bias)
            if self.kind == "local"
            else GlobalSubsampledAttention(embed_dim, num_heads, window if sr_ratio is None else sr_ratio, qkv_bias)
        )

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None, mask: Mask | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width). mask: of keys (``KeyPadding``); local
        layers take any."""
        out: Tensor = self.attention(x, grid=grid, mask=mask)
        return out


class PositionalEncodingGenerator(ConditionalPositionEncoding):
    """PEG: ``x + DWConv(x)``; the zeros around the map tell each token where it stands."""


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if num_heads < 1 or embed_dim % num_heads:
        raise OptionError(f"num_heads {num_heads} must divide embed_dim {embed_dim}.")
