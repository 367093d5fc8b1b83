"""CSWin: half of the heads attend along vertical stripes and half along horizontal ones, so that each token sees a
cross.

With stripes of width ``s`` on a map of ``H x W`` tokens (arXiv 2107.00652, section 3.2):

- the first half of the heads attends inside stripes of ``H x s`` tokens, the second half inside stripes of ``s x W``,
  both in parallel: ``softmax(q k^T / sqrt(d)) v + LePE(v)``; their outputs side by side go through one projection. A
  token sees a cross of about ``s (H + W - s)`` tokens in one layer, and the whole map in two;
- LePE, locally-enhanced positional encoding, is a 3 x 3 depthwise convolution of the values, added to the output and
  not to the logits: ten numbers a channel, whatever the resolution. As released, it runs inside each stripe with zeros
  around it (``lepe_scope="stripe"``); ``"image"`` runs it over the whole map;
- ``full``: one group of all heads over the whole map, as in the last stage.

A map that stripes do not divide is filled up at the bottom or right, and filling is never seen; a stripe wider than the
map is cut. (The released dense-prediction code fills up evenly on both sides after projecting and leaves filling
visible, as keys and values of zeros; ``official=True`` reproduces it.)

Source: Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", 2021, arXiv
2107.00652. The backbone is :class:`regard.models.cswin.CSWin`. Multiply-adds: ``H W C (4 C + s H + s W)``, and ``9 H W
C`` for LePE. ``(batch, length, channels)`` in and out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention
from regard.layers.depthwise import DepthwiseConv
from regard.layers.maps import merge_heads, space_of, split_heads
from regard.layers.padding import layer_keys
from regard.local.windows import WindowPlan, window_plan, windowed_attention
from regard.masks import Boolean, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["CrossShapedWindowAttention", "LePE", "cswin_cost", "stripe_attention"]

Scope = Literal["stripe", "image"]


def cswin_cost(height: int, width: int, channels: int, stripe: int) -> int:
    """Multiply-adds of a layer with its projections, LePE apart, on a map that stripes divide (equation 4)."""
    return height * width * channels * (4 * channels + stripe * height + stripe * width)


class LePE(nn.Module):
    """A depthwise convolution of the values, to be added to the output of any attention.

    scope: ``"stripe"`` runs it inside each window of the plan that it is given, zeros around, ``"image"`` over the map.
    """

    def __init__(self, channels: int, kernel_size: int = 3, scope: Scope = "stripe") -> None:
        super().__init__()
        if scope not in ("stripe", "image"):
            raise OptionError(f"The scope of LePE is 'stripe' or 'image', got {scope!r}.")
        self.scope, self.conv = scope, DepthwiseConv(channels, kernel_size)

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}"

    def forward(self, value: Tensor, grid: Sequence[int], plan: WindowPlan | None = None) -> Tensor:
        """``(batch, heads, length, head_dim)`` in and out. plan: the windows of the attention, None for the map."""
        if plan is None or self.scope == "image":
            out: Tensor = self.conv(value, grid)
            return out
        return plan.undo(self.conv(plan.apply(value), plan.window))


def stripe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stripe: int,
    axis: int,
    lepe: LePE | None = None,
    *,
    grid: Sequence[int],
    keys: Tensor | None = None,
    scale: float | None = None,
    official: bool = False,
) -> Tensor:
    """Attention inside stripes: ``(batch, heads, length, head_dim)`` in and out.

    axis: the one that a stripe spans, 0 for full height and width ``stripe``, 1 for full width. lepe: added to the
    output. keys: boolean ``(batch | 1, heads | 1, length)``, True for tokens that may be seen; others are zeros to
    LePE. official: even, visible filling.
    """
    if axis not in (0, 1) or stripe < 1:
        raise OptionError(f"A stripe spans axis 0 or 1 and is at least 1 wide, got axis {axis} and stripe {stripe}.")
    if len(grid) != 2 or grid[0] * grid[1] != query.shape[2]:
        raise ShapeError(f"grid=(height, width) of {query.shape[2]} tokens in all is needed, got {tuple(grid)}.")
    space = list(grid)
    across = 1 - axis
    before = 0
    if keys is not None:
        value = value.masked_fill(~keys[..., None], 0)
    if official:
        missing = -space[across] % stripe
        before = missing // 2
        border = [(0, 0), (0, 0)]
        border[across] = (before, missing - before)
        fill = (*border[1], *border[0])
        query, key, value = (F.pad(t.unflatten(2, grid), (0, 0, *fill)).flatten(2, 3) for t in (query, key, value))
        keys = None if keys is None else F.pad(keys.unflatten(2, grid), fill, value=True).flatten(2, 3)
        space[across] += missing
    sides = list(space)
    sides[across] = min(stripe, space[across])
    plan = window_plan((space[0], space[1]), (sides[0], sides[1]), (0, 0), query.device)
    rule = None if keys is None else Boolean(keys[:, :, None])
    out = windowed_attention(query, key, value, plan, mask=rule, scale=scale)
    if lepe is not None:
        out = out + lepe(value, space, plan)
    if space[across] == grid[across]:
        return out
    return out.unflatten(2, space).narrow(2 + across, before, grid[across]).flatten(2, 3)


@register("cswin")
class CrossShapedWindowAttention(Layer):
    """stripe: width of the stripes. lepe: positional encoding on the values. full: attend to the whole map instead.
    qkv_bias: biases of query, key and value. lepe_scope: where LePE's convolution ends, at the stripe or the image.
    official: leave filling visible, as released."""

    patterns = frozenset(("self",))
    growth = "N^1.5"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        stripe: int = 7,
        lepe: bool = True,
        full: bool = False,
        qkv_bias: bool = True,
        lepe_scope: Scope = "stripe",
        official: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads or stripe < 1:
            raise OptionError(
                f"Need num_heads dividing embed_dim and stripe >= 1; got {num_heads}, {embed_dim}, {stripe}."
            )
        if num_heads % 2 and not full:
            raise OptionError(
                f"Half of the heads take vertical stripes and half horizontal ones: num_heads must be even, got "
                f"{num_heads}. With full=True any number works."
            )
        self.num_heads, self.stripe, self.full, self.official = num_heads, stripe, full, official
        groups = 1 if full else 2
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        encodings = [LePE(embed_dim // groups, scope=lepe_scope) for _ in range(groups)]
        self.lepe = nn.ModuleList(encodings) if lepe else None
        self.proj = nn.Linear(embed_dim, embed_dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, stripe={self.stripe}, full={self.full}, official={self.official}"

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None, mask: Mask | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width). mask: of keys (``KeyPadding``)."""
        space = space_of(x, grid)
        keys = layer_keys(mask, x.shape[1], x.device, "cswin")
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        if self.full:
            if keys is not None:
                value = value.masked_fill(~keys[..., None], 0)
            out = dense_attention(query, key, value, mask=None if keys is None else Boolean(keys[:, :, None]))
            out = out if self.lepe is None else out + self.lepe[0](value, space)
        else:
            half = self.num_heads // 2
            parts = []
            for axis, own in enumerate((slice(None, half), slice(half, None))):
                seen = keys if keys is None or keys.shape[1] == 1 else keys[:, own]
                lepe = None if self.lepe is None else cast(LePE, self.lepe[axis])
                q, k, v = (t[:, own] for t in (query, key, value))
                parts.append(
                    stripe_attention(q, k, v, self.stripe, axis, lepe, grid=space, keys=seen, official=self.official)
                )
            out = torch.cat(parts, 1)
        merged: Tensor = self.proj(merge_heads(out))
        return merged
