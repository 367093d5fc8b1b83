"""HiLo: some heads look at fine detail inside small windows (Hi-Fi), the others at the whole map through window means
(Lo-Fi).

Of ``heads`` heads of width ``d = C / heads``, ``l = int(alpha heads)`` are low, the others high:

- Hi-Fi: the map is cut into ``s x s`` windows, ``softmax(q k^T / sqrt(d)) v`` inside each, and a projection of its own;
- Lo-Fi: queries at every position; keys and values from the mean of each ``s x s`` window, ``N / s^2`` of them, seen by
  all; and a projection of its own;
- output: both side by side along the channels, without a joint projection.

``s = 1`` is ordinary multi-head attention. A map that windows do not divide is filled up at the bottom and right;
filling is neither seen nor averaged (the released code does both; ``official=True`` reproduces it).

Source: Pan et al., "Fast Vision Transformers with HiLo Attention", 2022, arXiv 2205.13213, sections 3.2 and 3.3. The
backbone is :class:`regard.models.litv2.LITv2`. Multiply-adds at an equal split: Hi-Fi ``7/4 N C^2 + s^2 N C``, Lo-Fi
``(3/4 + 1/s^2) N C^2 + N^2 C / s^2``. ``(batch, length, channels)`` in and out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.kernels import dense_attention
from regard.layers.linear import TokenLinear
from regard.layers.maps import map_of, merge_heads, space_of, split_heads
from regard.local.windows import pad_to_windows, pool_windows, window_plan, windowed_attention
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["HiLoAttention"]


@register("hilo")
class HiLoAttention(Layer):
    """window: side of the windows. alpha: share of the heads that are low. qkv_bias: biases of query, key and value.
    official: leave filling visible, as released."""

    patterns = frozenset(("self",))
    growth = "N^2 / s^2"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        window: int = 2,
        alpha: float = 0.9,
        qkv_bias: bool = True,
        official: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads or window < 1 or not 0 <= alpha <= 1:
            raise OptionError(
                f"Need num_heads dividing embed_dim, window >= 1 and alpha in [0, 1]; got {num_heads}, {embed_dim}, "
                f"{window}, {alpha}."
            )
        self.embed_dim, self.head_dim, self.window, self.official = embed_dim, embed_dim // num_heads, window, official
        # Windows of one pixel hold nothing to see: all heads then look at the whole map.
        self.lo_heads = num_heads if window == 1 else int(alpha * num_heads)
        self.hi_heads = num_heads - self.lo_heads
        self.hi_dim, self.lo_dim = self.hi_heads * self.head_dim, self.lo_heads * self.head_dim
        if self.hi_heads:
            self.hi_qkv = TokenLinear(embed_dim, 3 * self.hi_dim, bias=qkv_bias)
            self.hi_proj = TokenLinear(self.hi_dim, self.hi_dim)
        if self.lo_heads:
            self.lo_query = TokenLinear(embed_dim, self.lo_dim, bias=qkv_bias)
            self.lo_key_value = TokenLinear(embed_dim, 2 * self.lo_dim, bias=qkv_bias)
            self.lo_proj = TokenLinear(self.lo_dim, self.lo_dim)

    def extra_repr(self) -> str:
        return f"hi_heads={self.hi_heads}, lo_heads={self.lo_heads}, window={self.window}"

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None) -> Tensor:
        """``(batch, length, channels)`` in and out, ``grid`` = (height, width)."""
        parts = [part(x, grid) for part, heads in ((self.hifi, self.hi_heads), (self.lofi, self.lo_heads)) if heads]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def hifi(self, x: Tensor, grid: Sequence[int] | None) -> Tensor:
        """The fine branch, ``(batch, length, hi_dim)``."""
        height, width = space_of(x, grid)
        sides = (self.window, self.window)
        image = x.unflatten(1, (height, width))
        if self.official:
            # The release fills the map up before it projects, so filling has the biases as query, key and value.
            image = pad_to_windows(image, sides)
        extent = (image.shape[1], image.shape[2])
        query, key, value = split_heads(self.hi_qkv(image.flatten(1, 2)), self.hi_heads, 3)
        out = windowed_attention(query, key, value, window_plan(extent, sides, (0, 0), x.device))
        kept = merge_heads(out).unflatten(1, extent)[:, :height, :width]
        merged: Tensor = self.hi_proj(kept.flatten(1, 2))
        return merged

    def lofi(self, x: Tensor, grid: Sequence[int] | None) -> Tensor:
        """The coarse branch, ``(batch, length, lo_dim)``."""
        space = space_of(x, grid)
        pooled = x if self.window == 1 else pool_windows(x.unflatten(1, space), (self.window,) * 2, self.official)
        (query,) = split_heads(self.lo_query(x), self.lo_heads)
        key, value = split_heads(self.lo_key_value(pooled), self.lo_heads, 2)
        out = dense_attention(query, key, value)
        merged: Tensor = self.lo_proj(merge_heads(out))
        return merged

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds on a map of this size; filling counts where windows do not divide it."""
        s, channels = self.window, self.embed_dim
        tokens, cells = height * width, -(-height // s) * -(-width // s)
        filled = cells * s * s
        hi = tokens * (3 * channels * self.hi_dim + self.hi_dim**2) + 2 * filled * s * s * self.hi_dim
        if self.official:
            hi += (filled - tokens) * 3 * channels * self.hi_dim
        lo = tokens * (channels * self.lo_dim + self.lo_dim**2) + cells * (2 * channels * self.lo_dim)
        return hi + lo + 2 * tokens * cells * self.lo_dim

    @torch.no_grad()
    def frequency_profile(self, x: Tensor, *, grid: Sequence[int]) -> dict[str, Tensor]:
        """Log-amplitude of the 2-D Fourier transform of each branch's output, ``(height, width)``, zero frequency in
        the middle, averaged over examples and channels; keys ``"hi"`` and ``"lo"`` as far as there are such heads."""
        found = {}
        for name, part, heads in (("hi", self.hifi, self.hi_heads), ("lo", self.lofi, self.lo_heads)):
            if heads:
                maps = map_of(part(x, grid), space_of(x, grid))
                spectrum = torch.fft.fft2(maps.to(torch.float64)).abs().mean((0, 1))
                found[name] = torch.fft.fftshift(spectrum.clamp_min(torch.finfo(torch.float64).tiny).log())
        return found
