"""InLine: linear attention whose rows are normalised by subtraction, so that different queries see different weights.

Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", 2024, arXiv 2412.06590, sections 3 and 4.

    InL_K(q)_j = s/N (phi(q) . phi(k_j) - mean_s phi(q) . phi(k_s)) + 1/N

Rows sum to 1 for all queries and keys; weights may be negative. In linear time ``out_i = s/N phi(q_i) sum_j (phi(k_j) -
kbar)^T v_j + vbar``, with the means ``kbar`` of ``phi(k)`` and ``vbar`` of the values, and ``s = 1 / sqrt(d)``, which
the paper takes into ``phi(q)`` and the released code writes out.

Linear attention that divides, ``phi(q) . phi(k_j) / sum``, is not injective: queries with collinear features (``q`` and
``c q`` with ReLU) get the same row, and every continuous feature map into ``R^d`` has such pairs. InLine is injective
where ``phi`` is and the centred ``phi(K)`` has full column rank; softmax where ``[K, 1]`` has. The second difference
that the paper finds, local modelling, is added as a residual: a 3 x 3 depthwise convolution of the values, one kernel a
channel, computed from the input as ``MLP(mean_i x_i)`` (grouped by heads).

``(batch, heads, N, d)``; time ``O(N d^2)`` a head, and ``9 N C`` for the residual. There is no causal form. Backbones:
:mod:`regard.models.inline`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, linear_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import linear_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups, score_scale
from regard.layers.attention_stats import neighbourhood
from regard.layers.maps import merge_heads, space_of, split_heads
from regard.layers.padding import layer_keys, per_head
from regard.masks import Mask
from regard.mechanism import Layer, Mechanism, Request
from regard.registry import register

__all__ = [
    "FEATURES",
    "InLine",
    "InLineAttention",
    "Injectivity",
    "LocalResidual",
    "injectivity_report",
    "inline_attention",
    "inline_weights",
    "visible_without",
]

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}
"""Feature maps ``phi`` by name. ``exp`` is ``exp(0.2 x)``, as in the released code."""


def inline_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: str = "identity",
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """query ``(batch, heads, N, d)``, key ``(batch, kv_heads, M, d)``, value ``(batch, kv_heads, M, d_v)`` to ``(batch,
    heads, N, d_v)``.

    scale: by default ``1 / sqrt(d)``. key_padding_mask: True where a key is real, ``(batch, M)`` or broadcastable to
    ``(batch, heads, M)``; sums and means run over real keys, and a sequence without any gives zeros.
    """
    work, heads = accumulation_dtype(query.dtype), query.shape[1]
    features = _features(query.to(work), phi)
    mapped = _features(expand_groups(key, heads).to(work), phi)
    values, real = expand_groups(value, heads).to(work), per_head(key_padding_mask)
    centred, mean_value = mapped - _mean(mapped, real), _mean(values, real)
    if real is None:
        centred = centred / key.shape[2]
    else:
        centred = centred.masked_fill(~real[..., None], 0) / _count(real)
        values = values.masked_fill(~real[..., None], 0)
    mixed, _ = linear_attention(features, centred, values, scale=score_scale(query, scale))
    return (mixed + mean_value).to(query.dtype)


def inline_weights(query: Tensor, key: Tensor, phi: str = "identity", scale: float | None = None) -> Tensor:
    """The map ``(batch, heads, N, M)`` written out, for inspection: quadratic in length."""
    mapped = _features(expand_groups(key, query.shape[1]), phi)
    scores = _features(query, phi) @ mapped.transpose(-1, -2) * (score_scale(query, scale) / key.shape[2])
    return scores - scores.mean(-1, keepdim=True) + 1 / key.shape[2]


def _features(x: Tensor, phi: str) -> Tensor:
    if phi not in FEATURES:
        raise OptionError(f"phi is one of {', '.join(FEATURES)}; got {phi!r}.")
    return FEATURES[phi](x)


def _count(real: Tensor) -> Tensor:
    return real.sum(-1)[..., None, None].clamp_min(1)


def _mean(x: Tensor, real: Tensor | None) -> Tensor:
    """Over the tokens, or the real ones: zeros where there is none."""
    if real is None:
        return x.mean(2, keepdim=True)
    return x.masked_fill(~real[..., None], 0).sum(2, keepdim=True) / _count(real)


class LocalResidual(nn.Module):
    """A 3 x 3 depthwise convolution of the values, its kernels computed from the mean of the input: ``x (batch, N,
    channels)`` and values of the same shape to ``(batch, N, channels)``.

    Two 1 x 1 convolutions grouped by heads, ``channels -> channels -> 9 channels`` with a GELU between, give one kernel
    per channel and image; the map is zero outside. class_tokens: tokens in front that stand on no grid; they count in
    the mean and get zeros.
    """

    def __init__(self, embed_dim: int, num_heads: int, class_tokens: int = 0) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        self.class_tokens = class_tokens
        self.kernels = nn.Sequential(
            nn.Conv1d(embed_dim, embed_dim, 1, groups=num_heads),
            nn.GELU(),
            nn.Conv1d(embed_dim, 9 * embed_dim, 1, groups=num_heads),
        )

    def forward(self, x: Tensor, value: Tensor, grid: Sequence[int], real: Tensor | None = None) -> Tensor:
        """grid: of the tokens behind the class tokens. real: boolean ``(batch | 1, N)``; padding counts nowhere."""
        batch, _, channels = x.shape
        if value.shape != x.shape:
            raise ShapeError(f"Values have the input's shape {tuple(x.shape)}; got {tuple(value.shape)}.")
        if real is None:
            mean = x.mean(1)
        else:
            shown = real[..., None]
            mean = x.masked_fill(~shown, 0).sum(1) / shown.sum(1).clamp_min(1)
            value = value.masked_fill(~shown, 0)
        space = space_of(value[:, self.class_tokens :], grid)
        kernels = self.kernels(mean[..., None]).reshape(batch * channels, 1, 3, 3)
        maps = value[:, self.class_tokens :].transpose(1, 2).reshape(1, batch * channels, *space)
        local = F.conv2d(maps, kernels, padding=1, groups=batch * channels).view(batch, channels, -1).transpose(1, 2)
        return F.pad(local, (0, 0, self.class_tokens, 0))


@register("inline_attention")
class InLine(Mechanism):
    """phi: the feature map, a name of :data:`FEATURES`; the paper's models use ``"identity"``."""

    patterns = frozenset({"self", "cross"})
    mask_support = "keys"
    needs_training = True
    growth = "N"

    def __init__(self, phi: str = "identity") -> None:
        super().__init__()
        _features(torch.zeros(()), phi)
        self.phi = phi

    def extra_repr(self) -> str:
        return f"phi={self.phi!r}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return inline_attention(query, key, value, self.phi, request.scale, request.keys)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return None

    def cost(self, shape: AttentionShape) -> Cost:
        return linear_cost(shape)


@register("inline_attention_layer")
class InLineAttention(Layer):
    """Projections, InLine attention and the local residual, in place of self-attention in vision transformers.

    phi: the feature map. local: the residual, or not. class_tokens: tokens in front that stand on no grid. qkv_bias:
    biases of query, key and value.
    """

    patterns = frozenset({"self"})
    growth = "N"
    grid_axes = frozenset({2})
    needs_grid = True
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        phi: str = "identity",
        local: bool = True,
        class_tokens: int = 0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        _features(torch.zeros(()), phi)
        self.num_heads, self.phi = num_heads, phi
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.residual = LocalResidual(embed_dim, num_heads, class_tokens) if local else None
        self.proj = nn.Linear(embed_dim, embed_dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, phi={self.phi!r}"

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None, mask: Mask | None = None) -> Tensor:
        """``(batch, [class tokens +] height * width, channels)`` in and out; grid is read by the residual alone. mask:
        of keys (``KeyPadding``)."""
        keys = layer_keys(mask, x.shape[1], x.device, "inline_attention_layer")
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        out = merge_heads(inline_attention(query, key, value, self.phi, key_padding_mask=keys))
        if self.residual is not None:
            if grid is None:
                raise ShapeError("The local residual needs grid=(height, width); without it build with local=False.")
            real = None if keys is None else keys.any(1)
            out = out + self.residual(x, merge_heads(value), grid, real)
        mixed: Tensor = self.proj(out)
        return mixed


@dataclass(frozen=True)
class Injectivity:
    """``smallest``: least distance between the rows of two distinct queries. ``redundant``: rows that lie within
    ``tol`` of the row of an earlier, distinct query."""

    smallest: float
    redundant: int
    tol: float


@torch.no_grad()
def injectivity_report(
    attn_fn: Callable[[Tensor, Tensor], Tensor], key: Tensor, queries: Tensor, tol: float = 1e-6
) -> Injectivity:
    """Do different queries get different rows? attn_fn: ``(queries (n, d), key (N, d))`` to rows ``(n, N)``, compared
    by Euclidean distance."""
    rows = attn_fn(queries, key)
    if queries.dim() != 2 or len(queries) < 2 or rows.shape != (len(queries), len(key)):
        raise ShapeError(
            f"Need at least two queries (n, d) and rows (n, N) from attn_fn; got {tuple(queries.shape)} and "
            f"{tuple(rows.shape)} for {len(key)} keys."
        )
    # Differences themselves, not their expansion in products: distances near zero are the ones that matter.
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    same = torch.cdist(queries, queries, compute_mode="donot_use_mm_for_euclid_dist") == 0
    earlier = apart.masked_fill(same, math.inf).masked_fill(torch.ones_like(same).triu(), math.inf)
    nearest = earlier.amin(1)
    return Injectivity(float(nearest.min()), int((nearest <= tol).sum()), tol)


def visible_without(
    grid: Sequence[int],
    which: str,
    radius: int = 1,
    class_tokens: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mask of the paper's test of locality (section 4.2): boolean ``(N, N)``, True for keys that stay visible.

    which: ``"local"`` hides from each query the keys within ``radius`` of it, itself included; ``"random"`` hides as
    many of its keys drawn at random. class_tokens: tokens in front, which are hidden from none and see all.
    """
    if which not in ("local", "random"):
        raise OptionError(f"which is 'local' or 'random', got {which!r}.")
    hidden = neighbourhood(grid, radius)
    if which == "random":
        order = torch.rand(hidden.shape, generator=generator).argsort(-1).argsort(-1)
        hidden = order < hidden.sum(-1, keepdim=True)
    return F.pad(~hidden, (class_tokens, 0, class_tokens, 0), value=True)


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if num_heads < 1 or embed_dim % num_heads:
        raise OptionError(f"num_heads {num_heads} must divide embed_dim {embed_dim}.")
