"""RALA: linear attention of high rank, by weighing what enters its state and gating what is read from it.

Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", 2024, arXiv 2411.07635, section 3. With
``f = elu + 1``:

    g   = mean_i f(q_i)                                   the global query
    a_j = N softmax_j(g . f(k_j) / sqrt(d))               weights of tokens, which sum to N
    B   = sum_j a_j rope(f(k_j))^T v_j                    the augmented state
    y_i = rope(f(q_i)) B / (f(q_i) . sum_j a_j f(k_j))    what is read (rotary positions leave the divisor alone)
    out_i = W ((y_i + LePE(v)_i) * o_i)                   gated by o, a linear map of the input

The rank of ``y`` is at most that of ``B``, so at most ``d``, and in practice far below; the gate, a product by
elements, lifts it to as much as ``rank(y) rank(o)``. Weighing the tokens is to raise the rank of ``B`` itself in
trained models.

``(batch, heads, N, d)``; time ``O(N d^2)`` a head. Rotary positions: half of a head's channels by row and half by
column, neighbours as pairs. The global query sees the whole input, so there is no causal form. Backbone:
:class:`regard.models.ravlt.RAVLT`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, linear_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention, linear_attention, masked_softmax
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.layers.attention_stats import effective_rank, numerical_rank
from regard.layers.depthwise import DepthwiseConv
from regard.layers.maps import merge_heads, split_heads, tokens_of
from regard.layers.padding import per_head
from regard.mechanism import Feature, Mechanism, Request
from regard.registry import register

__all__ = [
    "RALA",
    "GatedAttention2d",
    "GatedSoftmax2d",
    "RankAugmented",
    "RankReport",
    "grid_rotary",
    "rank_augmented_linear_attention",
    "rank_report",
    "rotate_pairs",
    "token_weights",
]

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"elu1": lambda x: F.elu(x) + 1, "relu": torch.relu}
Rope = tuple[Tensor, Tensor]


def rank_augmented_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    rope: Rope | None = None,
    kernel: str = "elu1",
    augment_kv: bool = True,
    eps: float = 1e-6,
    *,
    local: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """query ``(batch, heads, N, d)``, key ``(batch, kv_heads, M, d)``, value ``(batch, kv_heads, M, d_v)`` to ``(batch,
    N, heads * d_v)``.

    gate ``(batch, N, heads * d_v)``: multiplies what is read, None for no gate; local, of the same shape, is added
    before. rope: cosines and sines ``(N, d)`` as :func:`grid_rotary` gives them, for self-attention. augment_kv: weigh
    the tokens, or take them as equals. Padding masks: True where a token is real; padded queries make no global query.
    """
    heads, _ = _read(query, key, value, rope, kernel, augment_kv, eps, key_padding_mask, query_padding_mask)
    out = merge_heads(heads)
    out = out if local is None else out + local
    return out if gate is None else out * gate


def token_weights(
    query: Tensor,
    key: Tensor,
    kernel: str = "elu1",
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """The weights ``a (batch, heads, M)``: positive, their sum the number of real keys."""
    work = accumulation_dtype(query.dtype)
    features = _features(query.to(work), kernel)
    mapped = _features(expand_groups(key, query.shape[1]).to(work), kernel)
    real = per_head(key_padding_mask)
    count = key.shape[2] if real is None else real.sum(-1, keepdim=True)
    return _shares(features, mapped, real, per_head(query_padding_mask)) * count


def _features(x: Tensor, kernel: str) -> Tensor:
    if kernel not in KERNELS:
        raise OptionError(f"kernel is one of {', '.join(KERNELS)}; got {kernel!r}.")
    return KERNELS[kernel](x)


def _shares(features: Tensor, mapped: Tensor, real: Tensor | None, taking: Tensor | None) -> Tensor:
    """``a / N``: a softmax over the keys."""
    if taking is None:
        mean = features.mean(2, keepdim=True)
    else:
        shown = taking[..., None]
        mean = features.masked_fill(~shown, 0).sum(2, keepdim=True) / shown.sum(2, keepdim=True).clamp_min(1)
    logits = (mean @ mapped.transpose(-1, -2))[..., 0, :] * mapped.shape[-1] ** -0.5
    return masked_softmax(logits, real)


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: Rope | None,
    kernel: str,
    augment_kv: bool,
    eps: float,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What each head reads ``(batch, heads, N, d_v)``, and the state ``B / N`` ``(batch, heads, d, d_v)``."""
    work, heads = accumulation_dtype(query.dtype), query.shape[1]
    features = _features(query.to(work), kernel)
    mapped = _features(expand_groups(key, heads).to(work), kernel)
    values, real = expand_groups(value, heads).to(work), per_head(key_padding_mask)
    if real is not None:
        values = values.masked_fill(~real[..., None], 0)
    if augment_kv:
        share = _shares(features, mapped, real, per_head(query_padding_mask))
    elif real is None:
        share = mapped.new_full((1, 1, key.shape[2]), 1 / key.shape[2])
    else:
        share = real / real.sum(-1, keepdim=True).clamp_min(1)
    weighted = mapped * share[..., None].to(work)
    divisor = (features * weighted.sum(2, keepdim=True)).sum(-1, keepdim=True) + eps
    if rope is not None:
        features, weighted = rotate_pairs(features, rope), rotate_pairs(weighted, rope)
    out, state = linear_attention(features, weighted, values)
    return (out / divisor).to(query.dtype), state.sum


def grid_rotary(
    grid: Sequence[int], head_dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Rope:
    """Cosines and sines ``(height * width, head_dim)``: of the first half of the channels by row, of the second by
    column, with angles ``10000^(-linspace(0, 1, head_dim / 4))`` for pairs of neighbours."""
    if len(grid) != 2 or head_dim % 4:
        raise OptionError(
            f"Rotary positions need grid=(height, width) and a head_dim that 4 divides; got {tuple(grid)} and "
            f"{head_dim}."
        )
    rates = 10000 ** -torch.linspace(0, 1, head_dim // 4, device=device, dtype=torch.float64)
    place = torch.cartesian_prod(*(torch.arange(side, device=device, dtype=torch.float64) for side in grid))
    angles = (place[:, :, None] * rates).flatten(1).repeat_interleave(2, -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_pairs(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of neighbouring channels of ``x (..., N, d)`` by its angle; norms stay."""
    cos, sin = (part.to(x.dtype) for part in rope)
    if cos.shape != x.shape[-2:]:
        raise ShapeError(f"rope of shape {tuple(cos.shape)} does not belong to tokens {tuple(x.shape)}.")
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-second, first), -1).flatten(-2) * sin


@register("rala")
class RankAugmented(Mechanism):
    """The attention alone, without gate, local term and projections (:class:`RALA` has them).

    kernel: ``"elu1"`` or ``"relu"``. augment_kv: weigh tokens by the global query. rotary: positions of both axes,
    which need a grid. mask_queries: where a key mask covers as many keys as there are queries it speaks of the tokens
    of self-attention, so that padding is no part of the global query; False where such a call is cross-attention.
    """

    patterns = frozenset({"self", "cross"})
    mask_support = "keys"
    needs_training = True
    growth = "N"

    def __init__(
        self,
        kernel: str = "elu1",
        augment_kv: bool = True,
        rotary: bool = False,
        eps: float = 1e-6,
        mask_queries: bool = True,
    ) -> None:
        super().__init__()
        _features(torch.zeros(()), kernel)
        self.kernel, self.augment_kv, self.rotary, self.eps = kernel, augment_kv, rotary, eps
        self.mask_queries = mask_queries
        if rotary:
            self.patterns = frozenset({"self"})  # type: ignore[misc]
            self.grid_axes, self.needs_grid = frozenset({2}), True  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, augment_kv={self.augment_kv}, rotary={self.rotary}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if request.scale is not None:
            query = query * request.scale
        rope = None
        if self.rotary:
            if request.grid is None:
                raise ShapeError(
                    "Rotary positions need grid=(height, width) with the call; or build with rotary=False."
                )
            rope = grid_rotary(request.grid, query.shape[-1], device=query.device, dtype=query.dtype)
        same = query.shape[2] == key.shape[2] and self.mask_queries
        taking = request.keys if same else None
        out, _ = _read(query, key, value, rope, self.kernel, self.augment_kv, self.eps, request.keys, taking)
        return out

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return None

    def cost(self, shape: AttentionShape) -> Cost:
        whole = linear_cost(shape)
        scores = 2 * shape.batch * shape.num_heads * shape.k_len * shape.head_dim if self.augment_kv else 0
        return Cost(whole.flops + scores, whole.bytes, whole.state_bytes, None)


class GatedAttention2d(Feature):
    """1 x 1 convolutions to queries, keys, values and the gate, a depthwise 5 x 5 convolution of the values (LePE),
    ``W ((read + LePE(v)) * o)``: ``(batch, channels, height, width)`` in and out. A subclass says what is read. Weights
    start from a normal of deviation 0.02 cut at two, biases at zero."""

    def __init__(self, channels: int, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads or channels // num_heads % 4:
            raise OptionError(
                f"num_heads {num_heads} must divide channels {channels} into heads of a multiple of 4 channels, which "
                "rotary positions of two axes need."
            )
        self.channels, self.num_heads = channels, num_heads
        self.qkvo = nn.Conv2d(channels, 4 * channels, 1)
        self.lepe = DepthwiseConv(channels, 5)
        self.proj = nn.Conv2d(channels, channels, 1)
        # As released: small weights, so that all tokens begin with almost equal weights.
        for conv in (self.qkvo, self.lepe.conv, self.proj):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(cast(Tensor, conv.bias))

    @abstractmethod
    def read(self, query: Tensor, key: Tensor, value: Tensor, rope: Rope) -> Tensor:
        """Attention itself: ``(batch, heads, N, head_dim)`` in and out."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Rope]:
        """Queries, keys and values ``(batch, heads, N, head_dim)``, the gate ``(batch, N, channels)``, positions."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ShapeError(f"Expected (batch, {self.channels}, height, width), got {tuple(x.shape)}.")
        tokens, grid = tokens_of(self.qkvo(x))
        query, key, value = split_heads(tokens[..., : -self.channels], self.num_heads, 3)
        rope = grid_rotary(grid, self.channels // self.num_heads, device=x.device, dtype=x.dtype)
        return query, key, value, tokens[..., -self.channels :], rope

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` in and out."""
        query, key, value, gate, rope = self.project(x)
        read = self.read(query, key, value, rope) + self.lepe(value, x.shape[2:])
        mixed: Tensor = self.proj((merge_heads(read) * gate).transpose(1, 2).reshape_as(x))
        return mixed


@register("rala_2d")
class RALA(GatedAttention2d):
    """The paper's module. kernel, augment_kv, eps: of the attention."""

    growth = "N"
    needs_training = True

    def __init__(
        self, channels: int, num_heads: int = 8, kernel: str = "elu1", augment_kv: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__(channels, num_heads)
        _features(torch.zeros(()), kernel)
        self.kernel, self.augment_kv, self.eps = kernel, augment_kv, eps

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel={self.kernel!r}, augment_kv={self.augment_kv}"

    def read(self, query: Tensor, key: Tensor, value: Tensor, rope: Rope) -> Tensor:
        return _read(query, key, value, rope, self.kernel, self.augment_kv, self.eps)[0]


class GatedSoftmax2d(GatedAttention2d):
    """The same with softmax attention, ``softmax(rope(q) rope(k)^T / sqrt(d)) v``, for maps that are small."""

    growth = "N^2"

    def read(self, query: Tensor, key: Tensor, value: Tensor, rope: Rope) -> Tensor:
        return dense_attention(rotate_pairs(query, rope), rotate_pairs(key, rope), value)


@dataclass(frozen=True)
class RankReport:
    """Ranks per head, averaged over batch and heads: of the state, of what is read (``N x d``), and of the gated output
    before the projection. ``numerical``: the same three, singular values above a tolerance counted."""

    state: float
    read: float
    output: float
    numerical: tuple[float, float, float]


@torch.no_grad()
def rank_report(module: RALA, x: Tensor, tol: float = 1e-6) -> RankReport:
    """Effective and numerical ranks inside a module for maps ``x (batch, channels, height, width)``."""
    query, key, value, gate, rope = module.project(x)
    read, state = _read(query, key, value, rope, module.kernel, module.augment_kv, module.eps)
    gated = (read + module.lepe(value, x.shape[2:])) * split_heads(gate, module.num_heads)[0]
    parts = (state, read, gated)
    effective = [float(effective_rank(part).mean()) for part in parts]
    counted = [float(numerical_rank(part, tol).double().mean()) for part in parts]
    return RankReport(effective[0], effective[1], effective[2], (counted[0], counted[1], counted[2]))
