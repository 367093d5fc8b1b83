"""Prism: block means are judged in two bands of rotary frequencies, because the mean of rotated keys loses the fast
ones.

The mean over a block of ``B`` consecutive keys multiplies rotary pair ``i``, of angle ``theta_i`` a token, by

    (1 / B) sum_{n < B} exp(i n theta_i),    of magnitude  | sin(B theta_i / 2) / (B sin(theta_i / 2)) |:

near 0 for fast pairs, which carry relative position, near 1 for slow ones, which carry content. Scores of means are
thus blind to patterns of position (a slash: "so many tokens back"), and content alone rules their softmax. Prism scores
block means ``qbar, kbar`` twice: by the fastest pairs (``high`` dimensions) and by the slowest (``low`` dimensions; the
bands overlap),

    logits_band = qbar_band kbar_band^T / (sqrt(d_band) t_band),
    t_band = sqrt(d_band / d) * rms(qbar_band) / rms(qbar) * rms(kbar_band) / rms(kbar),

so that a band whose energy the mean took away is sharpened back. In each band a block of queries keeps the largest
shares of the softmax over the key blocks that it sees, as long as those before them sum to less than ``p_band``; it
attends, exactly, to the union of both, to the first block and to its own. No parameters, no training.

"Prism: Spectral-Aware Block-Sparse Attention", 2026, arXiv 2602.08426. Query (batch, num_heads, q_len,
head_dim) and key (batch, num_kv_heads, k_len, head_dim) are those after rotary positions in the layout of
:mod:`regard.layers.rotary`: pair ``i`` is dimensions ``i`` and ``i + head_dim / 2``, the fastest first. Time: ``O((N /
B)^2 d)`` to choose, and the share of blocks kept, of dense. It is for prefill: a single query, as in decoding, attends
to all keys. Causal: the means of a block of queries hold its later tokens, but nothing behind it; the temperatures are
those of the blocks up to its own. The released code takes them over the whole sequence, and its ``p = 1`` keeps blocks
of the future.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.kernels import expand_groups
from regard.layout import num_blocks
from regard.registry import register
from regard.sparse.frame import BlockSelector
from regard.sparse.scoring import BlockView, grouped_scores, per_kv_head, pool_blocks
from regard.sparse.selection import TopP

__all__ = [
    "PrismAttention",
    "band_temperature",
    "prism_attention",
    "prism_block_mask",
    "rope_pool_attenuation",
    "split_band",
]


def rope_pool_attenuation(head_dim: int, block_size: int, base: float = 10000.0) -> Tensor:
    """What the mean over a block of rotated vectors leaves of each rotary pair, ``(head_dim / 2,)`` in float64."""
    if head_dim % 2 or block_size < 1:
        raise OptionError(f"Need an even head_dim and block_size >= 1, got {head_dim} and {block_size}.")
    half = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / 2
    return ((block_size * half).sin() / (block_size * half.sin())).abs()


def split_band(x: Tensor, high: int | None = None, low: int | None = None) -> tuple[Tensor, Tensor]:
    """The fastest rotary pairs, ``high`` dimensions in all, and the slowest, ``low`` dimensions, of ``x (...,
    head_dim)``.

    By default half and three quarters of head_dim (64 and 96 of 128). Each band is in half-rotated layout itself.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ShapeError(f"Rotary pairs need an even head_dim, got {dim}.")
    fast, slow = _pairs(dim, high, low)
    first, second = x.chunk(2, -1)
    start = dim // 2 - slow
    return (
        torch.cat((first[..., :fast], second[..., :fast]), -1),
        torch.cat((first[..., start:], second[..., start:]), -1),
    )


def _pairs(dim: int, high: int | None, low: int | None) -> tuple[int, int]:
    """Rotary pairs of both bands."""
    pairs = (max(dim // 4, 1) if high is None else high // 2), (max(3 * dim // 8, 1) if low is None else low // 2)
    if not all(1 <= count <= dim // 2 for count in pairs):
        raise OptionError(f"high={high} and low={low} count dimensions of a head, so at most its head_dim, {dim}.")
    return pairs


def band_temperature(
    query: Tensor, key: Tensor, query_band: Tensor, key_band: Tensor, up_to: Tensor | None = None
) -> Tensor:
    """The temperature ``t`` of a band, ``(batch, num_heads, num_q_blocks | 1)``.

    From block means ``query (batch, num_heads, num_q_blocks, head_dim)`` and ``key (batch, kv_heads, num_k_blocks,
    head_dim)`` and their parts in the band. up_to: last key block ``(num_q_blocks,)`` that each block of queries sees;
    its temperature then knows only the means up to itself and to that block (default: one temperature from all means).
    """
    queries = _energy_share(query, query_band, up_to is not None)
    keys = expand_groups(_energy_share(key, key_band, up_to is not None), query.shape[1])
    keys = keys if up_to is None else keys[..., up_to]
    # Of all that is in t, sqrt(d_band / d) * sqrt(d / d_band)^2 * sqrt(shares of the energy), this is left:
    return ((queries + keys) / 2).exp() * (query.shape[-1] / query_band.shape[-1]) ** 0.5


def _energy_share(means: Tensor, band: Tensor, running: bool) -> Tensor:
    """Logarithm of the share of squares that lies in the band, of all blocks ``(batch, heads, 1)`` or of those up to
    each ``(batch, heads, num_blocks)``."""

    def energy(x: Tensor) -> Tensor:
        # In logarithms, so that squares of huge and of tiny numbers stay numbers.
        each = (2 * x.abs().log()).logsumexp(-1)
        return each.logcumsumexp(-1) if running else each.logsumexp(-1, keepdim=True)

    share = energy(band) - energy(means)
    # An empty band scores zero at any temperature.
    return torch.where(share.isfinite(), share, 0)


def prism_block_mask(query: Tensor, key: Tensor, block_size: int = 128, causal: bool = True, **options: Any) -> Tensor:
    """The blocks that Prism computes, boolean ``(batch, num_heads, num_q_blocks, num_k_blocks)``; options as in
    :class:`PrismAttention`."""
    module = PrismAttention(block_size, **options)
    visit = module.select(query, key, module.request(query, key, key, causal=causal)).visit
    return visit.expand(*query.shape[:2], -1, -1)


def prism_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True, scale: float | None = None, **options: Any
) -> Tensor:
    """Prism as a function; options as in :class:`PrismAttention`."""
    return PrismAttention(**options)(query, key, value, causal=causal, scale=scale)


@register("prism")
class PrismAttention(BlockSelector):
    """block_size: tokens a block, of queries and of keys. high, low: dimensions of the bands (see :func:`split_band`).
    p_high, p_low: share of each band's softmax to keep; 1 keeps every block. calibrate: temperatures as above,
    or none (``t = 1``). sink, recent: the first block, and the block of the queries themselves, are always kept."""

    def __init__(
        self,
        block_size: int = 128,
        high: int | None = None,
        low: int | None = None,
        p_high: float = 0.95,
        p_low: float = 0.95,
        *,
        calibrate: bool = True,
        sink: bool = True,
        recent: bool = True,
    ) -> None:
        super().__init__(block_size, block_size)
        for name, band in (("high", high), ("low", low)):
            if band is not None and (band < 2 or band % 2):
                raise OptionError(f"{name} counts dimensions of whole rotary pairs, so it is even; got {band}.")
        if not (0 < p_high <= 1 and 0 < p_low <= 1):
            raise OptionError(f"p_high and p_low are shares, above 0 and at most 1; got {p_high} and {p_low}.")
        self.high, self.low, self.p_high, self.p_low = high, low, p_high, p_low
        self.calibrate, self.sink, self.recent = calibrate, sink, recent

    def extra_repr(self) -> str:
        return f"block_size={self.block_q}, p_high={self.p_high}, p_low={self.p_low}, calibrate={self.calibrate}"

    def choose(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        if query.shape[2] == 1 or max(self.p_high, self.p_low) == 1:
            return view.seen
        q_means = pool_blocks(query, view.block_q)
        k_means = pool_blocks(per_kv_head(key, view.keys), view.block_k, view.keys)
        own = view.nearest(1)
        last = (own * torch.arange(own.shape[-1], device=own.device)).amax(-1) if view.causal else None
        q_bands, k_bands = (split_band(means, self.high, self.low) for means in (q_means, k_means))
        chosen = own if self.recent else own & False
        if self.sink:
            chosen = chosen | view.first(1)
        for q_band, k_band, share in zip(q_bands, k_bands, (self.p_high, self.p_low), strict=True):
            scores = grouped_scores(q_band, k_band) * (view.scale * (query.shape[-1] / q_band.shape[-1]) ** 0.5)
            if self.calibrate:
                scores = scores / band_temperature(q_means, k_means, q_band, k_band, last)[..., None]
            chosen = chosen | TopP(share)(scores.masked_fill(~view.seen, float("-inf")))
        return chosen

    def scoring_flops(self, shape: AttentionShape) -> int:
        pairs = num_blocks(shape.q_len, self.block_q) * num_blocks(shape.k_len, self.block_k)
        return 2 * shape.batch * shape.num_heads * pairs * 2 * sum(_pairs(shape.head_dim, self.high, self.low))
