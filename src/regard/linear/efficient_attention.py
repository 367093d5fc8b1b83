"""Efficient attention: queries read a few global summaries of the values instead of every value.

Shen et al., "Efficient Attention: Attention with Linear Complexities", 2018, arXiv 1812.01243, section 3.

    E(Q, K, V) = rho_q(Q) (rho_k(K)^T V)

softmax: ``rho_q`` is a softmax over the channels of each query, ``rho_k`` a softmax over the positions of
each key channel. Each of the ``d`` key channels is then a *global context map* over the input, ``rho_k(K)^T
V`` holds one summary of the values per map, and a query's channel softmax mixes the summaries. Rows of the
implied matrix are distributions, but not those of ``softmax(Q K^T)``; its rank is at most ``d``. scaling:
both maps divide by ``sqrt(M)``, and E is exactly ``(Q K^T / M) V`` for ``M`` keys. The paper has no ``1 /
sqrt(d)``: ``scale`` multiplies the queries, by default with 1.

Time ``O((N + M) d d_v)``, memory ``O(d d_v)`` beside input and output, for ``N`` queries. The paper defines
no causal form: ``causal_extension`` replaces the softmax over positions by one over the positions so far
(this library's extension).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, linear_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import linear_attention, masked_softmax
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.layers.padding import per_head
from regard.mechanism import Feature, Mechanism, Request
from regard.registry import register

__all__ = [
    "EfficientAttention",
    "EfficientAttention2d",
    "IntermediateCost",
    "causal_efficient_attention",
    "cost",
    "efficient_attention",
    "global_context_maps",
]

NORMALIZERS = ("softmax", "scaling")


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: str = "softmax",
    key_padding_mask: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """query ``(batch, heads, N, d)``, key ``(batch, kv_heads, M, d)``, value ``(batch, kv_heads, M, d_v)`` to
    ``(batch, heads, N, d_v)``.

    key_padding_mask: True where a key is real, ``(batch, M)`` or broadcastable to ``(batch, heads, M)``. A
    sequence without a real key gives zeros.
    """
    _check_normalizer(normalizer)
    work = accumulation_dtype(query.dtype)
    q, k = query.to(work) * scale, expand_groups(key, query.shape[1]).to(work)
    v = expand_groups(value, query.shape[1]).to(work)
    real = per_head(key_padding_mask)
    if normalizer == "softmax":
        features, maps = q.softmax(-1), global_context_maps(k, real)
    else:
        count = k.shape[2] if real is None else real.sum(-1)[..., None, None].clamp_min(1)
        features, maps = q / count, k.transpose(-1, -2)
        maps = maps if real is None else maps.masked_fill(~real[..., None, :], 0)
    out, _ = linear_attention(features, maps.transpose(-1, -2), v)
    return out.to(query.dtype)


def global_context_maps(key: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    """The ``d`` global attention maps ``(batch, heads, d, M)``: softmax of each key channel over the
    positions."""
    real = per_head(key_padding_mask)
    maps = key.to(accumulation_dtype(key.dtype)).transpose(-1, -2)
    return masked_softmax(maps, None if real is None else real[..., None, :]).to(key.dtype)


def causal_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """An extension of this library: the softmax over positions runs over those so far.

    With ``L_t`` the running log-sum-exp of a key channel this is a linear recurrence whose decay
    ``exp(L_{t-1} - L_t)`` and added key ``exp(k_t - L_t)`` never exceed one.
    """
    work, heads = accumulation_dtype(query.dtype), query.shape[1]
    q, k = (query.to(work) * scale).softmax(-1), expand_groups(key, heads).to(work)
    v, real = expand_groups(value, heads).to(work), per_head(key_padding_mask)
    # A finite floor, not -inf: the running log-sum-exp and its gradient stay numbers before the first real key.
    floor = torch.finfo(work).min / 4
    k = k if real is None else k.masked_fill(~real[..., None], floor)
    total = k.logcumsumexp(2)
    before = torch.cat((torch.full_like(total[:, :, :1], floor), total[:, :, :-1]), 2)
    decay = torch.where(before > floor / 2, before - total, 0).clamp_max(0)
    added = (k - total).exp()
    added = added if real is None else added.masked_fill(~real[..., None], 0)
    out, _ = linear_attention(q, added, v, causal=True, log_decay=decay)
    return out.to(query.dtype)


@dataclass(frozen=True)
class IntermediateCost:
    """``multiply_adds`` of one head, and ``bytes`` of what stands between input and output."""

    multiply_adds: int
    bytes: int


def cost(
    length: int, key_dim: int, value_dim: int, kind: str = "efficient", *, element_size: int = 4
) -> IntermediateCost:
    """One head of self-attention over ``length`` tokens: ``kind`` is ``"efficient"`` (its intermediate is the
    ``d x d_v`` context) or ``"dot_product"`` (the ``N x N`` map)."""
    if kind == "efficient":
        return IntermediateCost(2 * length * key_dim * value_dim, key_dim * value_dim * element_size)
    if kind == "dot_product":
        return IntermediateCost(length * length * (key_dim + value_dim), length * length * element_size)
    raise OptionError(f"kind is 'efficient' or 'dot_product', got {kind!r}.")


@register("efficient_attention")
class EfficientAttention(Mechanism):
    """normalizer: ``"softmax"`` or ``"scaling"``. causal_extension: also take ``causal=True``, with the
    softmax over the positions so far; the paper does not define it, so it is off by default."""

    patterns = frozenset({"self", "cross"})
    mask_support = "keys"
    needs_training = True
    growth = "N"

    def __init__(self, normalizer: str = "softmax", causal_extension: bool = False) -> None:
        super().__init__()
        _check_normalizer(normalizer)
        if causal_extension:
            if normalizer != "softmax":
                raise OptionError("causal_extension is defined for normalizer='softmax' alone.")
            self.patterns = frozenset({"self", "cross", "causal-self"})  # type: ignore[misc]
        self.normalizer, self.causal_extension = normalizer, causal_extension

    def extra_repr(self) -> str:
        return f"normalizer={self.normalizer!r}, causal_extension={self.causal_extension}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        scale = 1.0 if request.scale is None else request.scale
        if request.causal:
            return causal_efficient_attention(query, key, value, request.keys, scale=scale)
        return efficient_attention(query, key, value, self.normalizer, request.keys, scale=scale)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return None

    def cost(self, shape: AttentionShape) -> Cost:
        return linear_cost(shape, chunk=64 if shape.causal else None)


@register("efficient_attention_2d")
class EfficientAttention2d(Feature):
    """The paper's module, in place of a non-local block: 1x1 convolutions to queries, keys and values,
    efficient attention per head, a 1x1 reprojection, and the input added. ``(batch, channels, *space)`` in
    and out.

    key_channels, value_channels: of all heads together (default: ``channels // 2``, as non-local blocks do).
    """

    grid_axes = frozenset({1, 2, 3})
    growth = "N"

    def __init__(
        self,
        channels: int,
        key_channels: int | None = None,
        value_channels: int | None = None,
        num_heads: int = 1,
        normalizer: str = "softmax",
    ) -> None:
        super().__init__()
        _check_normalizer(normalizer)
        half = max(channels // 2, num_heads)
        key_channels, value_channels = key_channels or half, value_channels or half
        if key_channels % num_heads or value_channels % num_heads:
            raise OptionError(
                f"num_heads {num_heads} must divide key_channels {key_channels} and value_channels {value_channels}."
            )
        self.channels, self.num_heads, self.normalizer = channels, num_heads, normalizer
        self.query = nn.Conv1d(channels, key_channels, 1)
        self.key = nn.Conv1d(channels, key_channels, 1)
        self.value = nn.Conv1d(channels, value_channels, 1)
        self.reprojection = nn.Conv1d(value_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *space)`` in and out."""
        if x.dim() < 3 or x.shape[1] != self.channels:
            raise ShapeError(f"Expected (batch, {self.channels}, *space), got {tuple(x.shape)}.")
        tokens = x.flatten(2)
        query, key, value = (self._heads(project(tokens)) for project in (self.query, self.key, self.value))
        out = efficient_attention(query, key, value, self.normalizer)
        mixed: Tensor = self.reprojection(out.transpose(2, 3).flatten(1, 2))
        return x + mixed.view_as(x)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.num_heads, -1)).transpose(2, 3)


def _check_normalizer(normalizer: str) -> None:
    if normalizer not in NORMALIZERS:
        raise OptionError(f"normalizer is 'softmax' or 'scaling', got {normalizer!r}.")
