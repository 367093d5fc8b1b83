"""Routing Transformer: tokens are clustered by online k-means, and attend within their cluster.

Queries and keys are brought to one sphere by a layer norm without gain and bias, so that the nearest of the
centroids ``mu_c`` (per head, no gradient) is the one of largest dot product. Each cluster takes the ``window``
queries and the ``window`` keys of largest affinity ``mu_c . x_i`` (balanced clusters: a token may be in several or
in none) and does softmax attention inside, masked by the original positions; a query's own key is always admissible.
A token in several clusters gets the mean of its results, a token in none gets zero. In training the centroids move:

    mu_c <- running mean of the tokens nearest to c      (decay 0.999)

Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", 2020, arXiv 2003.05997, section 4.
Query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads, k_len, ...). Time ``O(N k d + N^2 d /
k)`` with ``k`` clusters of ``N / k`` tokens, ``O(N^1.5 d)`` at ``k = sqrt N``.

``arithmetic="official"`` (default) is the released TensorFlow code's: logits ``q . k`` of normed vectors without ``1
/ sqrt(d)``, centroids as the ratio of running sums and running counts, not renormalised. (Its output divides by the
number of clusters plus 0.01; here that is ``count_eps``, by default 0, a true mean.) ``arithmetic="port"`` is that
of a widely used PyTorch port: vectors of unit root mean square without centring, logits over ``sqrt(d)``, a token
with shared query and key sees itself only when nothing else is there, centroids renormalised.

The top-``window`` of a cluster looks at the whole sequence: later tokens can push an earlier one out of its cluster.
Values never leak, membership does. ``strict=True`` assigns each token to its nearest centroid, clusters without
bound, which is causal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import (
    accumulation_dtype,
    block_sparse_attention,
    expand_groups,
    merge_attentions,
)
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layout import BlockLayout
from regard.masks import Bounds, Causal, Mask, MaskMod, SlidingWindow
from regard.mechanism import Layer, Mechanism, Request
from regard.registry import register
from regard.sparse.selection import settle_mask

__all__ = [
    "OnlineKMeans",
    "RoutingAttention",
    "RoutingReport",
    "RoutingTransformerAttention",
    "routing_attention",
    "routing_report",
    "to_sphere",
]

Arithmetic = Literal["official", "port"]

# What a token's own logit becomes where it is to be used only when alone.
_ALONE = -5e4


def to_sphere(x: Tensor, arithmetic: Arithmetic = "official") -> Tensor:
    """Vectors of norm ``sqrt(dim)``, in the accumulation dtype: layer norm (``"official"``) or without centring."""
    x = x.to(accumulation_dtype(x.dtype))
    if arithmetic == "official":
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class OnlineKMeans(nn.Module):
    """Centroids ``(num_heads, clusters, head_dim)`` that follow the data by an exponential moving average.

    They start as random points of the sphere, the same for the same ``seed``, so that routing works at once (as a
    random hash would) and equally everywhere; :meth:`init` fits them to data. Inputs ``(batch, num_heads, length,
    head_dim)`` are normed here.
    """

    centroids: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        clusters: int,
        decay: float = 0.999,
        arithmetic: Arithmetic = "official",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if clusters < 1 or not 0 <= decay < 1:
            raise OptionError(f"Need clusters >= 1 and 0 <= decay < 1; got {clusters} and {decay}.")
        if arithmetic not in ("official", "port"):
            raise OptionError(f"arithmetic is 'official' or 'port', not {arithmetic!r}.")
        self.decay, self.arithmetic = decay, arithmetic
        generator = torch.Generator().manual_seed(seed)
        start = to_sphere(torch.randn(num_heads, clusters, head_dim, generator=generator), arithmetic)
        self.register_buffer("centroids", start)
        self.register_buffer("counts", torch.zeros(num_heads, clusters))
        self.register_buffer("sums", start.clone())

    def scores(self, x: Tensor) -> Tensor:
        """Affinity of each token to each centroid, ``(batch, num_heads, length, clusters)``."""
        point = to_sphere(x, self.arithmetic)
        return point @ self.centroids.to(point.dtype).mT

    def assign(self, x: Tensor) -> Tensor:
        """The nearest centroid of each token, ``(batch, num_heads, length)``."""
        return self.scores(x).argmax(-1)

    @torch.no_grad()
    def update(self, query: Tensor, key: Tensor | None = None) -> None:
        """Move the centroids towards the means of the tokens nearest to them (queries, and keys if they are others).

        Clusters without tokens keep their centroid.
        """
        x = query if key is None else torch.cat((query, key), 2)
        total, count = self._sums(x)
        if self.arithmetic == "official":
            self.counts.lerp_(count.to(self.counts.dtype), 1 - self.decay)
            self.sums.lerp_(total.to(self.sums.dtype), 1 - self.decay)
            whole, eps = self.counts.sum(-1, keepdim=True), 1e-5
            share = (self.counts + eps) / (whole + self.counts.shape[-1] * eps) * whole
            self._replace(self.sums / share[..., None], self.counts > 0)
        else:
            moved = self.decay * self.centroids + (1 - self.decay) / (1 if key is None else 2) * total
            self._replace(to_sphere(moved, "port"), count > 0)

    @torch.no_grad()
    def init(self, x: Tensor, iters: int = 10, seed: int = 0) -> None:
        """Fit to the tokens of ``x``: ``iters`` rounds of spherical k-means from randomly drawn tokens."""
        heads, clusters, dim = self.centroids.shape
        points = to_sphere(x, self.arithmetic).transpose(0, 1).reshape(heads, -1, dim)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(heads, points.shape[1], generator=generator).argsort(-1)[:, :clusters].to(x.device)
        drawn = drawn.gather(1, torch.arange(clusters, device=x.device).expand(heads, -1) % drawn.shape[1])
        self.centroids.copy_(points.gather(1, drawn[..., None].expand(-1, -1, dim)))
        for _ in range(iters):
            total, count = self._sums(x)
            self._replace(to_sphere(total, "port"), count > 0)
        total, count = self._sums(x)
        self.counts.copy_(count)
        self.sums.copy_(self.centroids * count[..., None])

    def commitment_loss(self, x: Tensor, weight: float = 1e-4) -> Tensor:
        """``weight`` times the mean squared distance of the normed tokens to their (fixed) centroids."""
        point = to_sphere(x, self.arithmetic)
        nearest = self.assign(x.detach())[..., None].expand(-1, -1, -1, point.shape[-1])
        target = self.centroids.to(point.dtype).expand(len(x), -1, -1, -1).gather(2, nearest)
        return weight * (point - target).square().mean()

    def _sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of the tokens nearest to each centroid."""
        nearest = F.one_hot(self.assign(x), self.centroids.shape[1]).to(self.centroids.dtype)
        point = to_sphere(x, self.arithmetic).to(self.centroids.dtype)
        return torch.einsum("bhnc,bhnd->hcd", nearest, point), nearest.sum((0, 2))

    def _replace(self, new: Tensor, where: Tensor) -> None:
        self.centroids.copy_(torch.where(where[..., None], new.to(self.centroids.dtype), self.centroids))


def _members(affinity: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The ``window`` tokens of largest affinity of each cluster, in order of position, and whether each counts.

    ``affinity`` ``(batch, heads, clusters, length)``, ``-inf`` for what must not be routed. Returns ``(batch, heads,
    clusters, window)`` twice.
    """
    best = affinity.topk(min(window, affinity.shape[3]), dim=-1, sorted=False)
    index, order = best.indices.sort(-1)
    return index, best.values.gather(-1, order) > float("-inf")


def _flat(index: Tensor, length: int) -> Tensor:
    """Where token indices ``(batch, heads, clusters, window)`` stand among all ``(batch, heads, length)``, flat."""
    batch, heads = index.shape[:2]
    lanes = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * length
    return (index + lanes).flatten()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``(batch, heads, length, dim)`` at ``(batch, heads, clusters, window)`` -> ``(..., window, dim)``."""
    return x.flatten(0, 2).index_select(0, _flat(index, x.shape[2])).view(*index.shape, x.shape[-1])


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    window: int | None = None,
    causal: bool = True,
    *,
    shared_qk: bool = False,
    strict: bool = False,
    arithmetic: Arithmetic = "official",
    count_eps: float = 0.0,
    visible: Mask | None = None,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention inside clusters; ``(batch, num_heads, q_len, value_dim)``.

    centroids ``(num_heads, clusters, head_dim)``. window: tokens a cluster takes (default: the length over the number
    of clusters, rounded up; for queries and keys each). shared_qk: ``key`` is ``query``, and both are routed at once.
    strict: nearest centroid instead of the best ``window``. visible: who may see whom (default: by ``causal``), keys:
    keys that may be routed.
    """
    heads, q_len, k_len = query.shape[1], query.shape[2], key.shape[2]
    if centroids.shape[0] != heads or centroids.shape[2] != query.shape[3]:
        raise ShapeError(f"Centroids {tuple(centroids.shape)} do not fit {heads} heads of {query.shape[3]}.")
    visible = Causal() if visible is None and causal else visible
    q, k = to_sphere(query, arithmetic), to_sphere(expand_groups(key, heads), arithmetic)
    v = expand_groups(value, heads).to(q.dtype)
    scale = (1.0 if arithmetic == "official" else q.shape[-1] ** -0.5) if scale is None else scale
    with torch.no_grad():
        mu = centroids.to(q.dtype)
        to_q, to_k = mu @ q.mT, mu @ k.mT
    # With causality the own key is taken out of the clusters and put in again by its logit, so that no query is
    # without a key and none has it twice.
    own = causal or shared_qk
    alone = shared_qk and arithmetic == "port"
    options = (visible, keys, scale, own, alone)
    if strict:
        out = _strict(q, k, v, to_q, to_k, *options)
    else:
        count = centroids.shape[1]
        spans = [-(-length // count) if window is None else window for length in (q_len, k_len)]
        out = _balanced(q, k, v, to_q, to_k, spans, shared_qk, count_eps, *options)
    return out.to(value.dtype)


def _own_part(q: Tensor, k: Tensor, v: Tensor, scale: float, alone: bool) -> tuple[Tensor, Tensor]:
    """The part of the attention that is the query's own key: its value and its logit (any, before the first key)."""
    q_len, k_len = q.shape[2], k.shape[2]
    if q_len != k_len:
        at = torch.arange(k_len - q_len, k_len, device=q.device).clamp_min(0)
        k, v = k[:, :, at], v[:, :, at]
    logit = (q * k).sum(-1) * scale
    return v, torch.full_like(logit, _ALONE) if alone else logit


def _balanced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    to_q: Tensor,
    to_k: Tensor,
    spans: Sequence[int],
    shared: bool,
    count_eps: float,
    visible: Mask | None,
    keys: Tensor | None,
    scale: float,
    own: bool,
    alone: bool,
) -> Tensor:
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    with torch.no_grad():
        if keys is not None:
            to_k = to_k.masked_fill(~keys[:, :, None], float("-inf"))
        k_index, k_valid = _members(to_k, spans[1])
        q_index, q_valid = (k_index, k_valid) if shared else _members(to_q, spans[0])
        rows, columns = q_index[..., None], k_index[..., None, :]
        position = q_index + (k_len - q_len)
        hidden = columns == position[..., None] if own else torch.zeros_like(rows == columns)
        if visible is not None:
            hidden |= ~visible.at(rows, columns, q_len, k_len)
        if keys is not None:
            hidden |= ~k_valid[..., None, :] | ~q_valid[..., None]
    scores = (_rows(q * scale, q_index) @ _rows(k, k_index).mT).masked_fill(hidden, float("-inf"))
    top = scores.detach().amax(-1)
    if own:
        own_value, logit = _own_part(q, k, v, scale, alone)
        self_seen = (position >= 0) & q_valid
        if visible is not None:
            self_seen = self_seen & visible.at(rows, position.clamp_min(0)[..., None], q_len, k_len)[..., 0]
        logit = _rows(logit[..., None], q_index)[..., 0].masked_fill(~self_seen, float("-inf"))
        top = torch.maximum(top, logit.detach())
    top = torch.where(top.isfinite(), top, 0)
    weights = (scores - top[..., None]).exp()
    total, flat = weights.sum(-1), _flat(q_index, q_len)
    if own:
        share = (logit - top).exp()
        total = total + share
    there = total > 0
    safe = torch.where(there, total, 1)
    out = (weights @ _rows(v, k_index)) / safe[..., None]
    mean = out.new_zeros(batch * heads * q_len, v.shape[-1]).index_add(0, flat, out.flatten(0, 3))
    if own:
        # A token's own value is the same in all its clusters: its shares are added up, and the value taken once.
        shares = out.new_zeros(batch * heads * q_len).index_add(0, flat, (share / safe).flatten())
        mean = mean + shares[:, None] * own_value.flatten(0, 2)
    counts = out.new_zeros(batch * heads * q_len).index_add(0, flat, there.flatten().to(out.dtype))
    return (mean / torch.where(counts > 0, counts + count_eps, 1)[:, None]).view(batch, heads, q_len, -1)


@dataclass(frozen=True, eq=False)
class _Routed(Mask):
    """Tokens sorted by cluster: same cluster, not the own key (where asked), and what the base rule says of the
    original places. All tensors ``(rows, length)`` with one row per batch and head; the batch of the rule is rows."""

    base: Mask | None
    heads_inside: int
    q_cluster: Tensor
    k_cluster: Tensor
    q_place: Tensor
    k_place: Tensor
    skip_own: bool

    @property
    def batch(self) -> int:
        return self.q_cluster.shape[0]

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        base = None if self.base is None else self.base.mod(q_len, k_len)
        one_batch, one_head = (True, True) if self.base is None else (self.base.batch == 1, self.base.heads == 1)
        shift = k_len - q_len

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            i, j = self.q_place[b, q], self.k_place[b, k]
            seen = self.q_cluster[b, q] == self.k_cluster[b, k]
            if self.skip_own:
                seen = seen & (j != i + shift)
            if base is not None:
                sequence, head = b.div(self.heads_inside, rounding_mode="floor"), b % self.heads_inside
                seen = seen & base(sequence * 0 if one_batch else sequence, head * 0 if one_head else head, i, j)
            return seen

        return rule

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        q_some, k_some = self.q_cluster[:, q_blocks], self.k_cluster[:, k_blocks]
        possible = (q_some.amin(-1)[..., None] <= k_some.amax(-1)[:, None]) & (
            k_some.amin(-1)[:, None] <= q_some.amax(-1)[..., None]
        )
        if isinstance(self.base, Causal):
            first, last = self.k_place[:, k_blocks].amin(-1)[:, None], self.q_place[:, q_blocks].amax(-1)[..., None]
            possible = possible & (first <= last + (k_len - q_len))
        return possible[:, None], torch.zeros_like(possible)[:, None]


def _strict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    to_q: Tensor,
    to_k: Tensor,
    visible: Mask | None,
    keys: Tensor | None,
    scale: float,
    own: bool,
    alone: bool,
) -> Tensor:
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    q_cluster, q_order = to_q.argmax(2).flatten(0, 1).sort(dim=-1, stable=True)
    k_cluster, k_order = to_k.argmax(2).flatten(0, 1).sort(dim=-1, stable=True)

    def sort(x: Tensor, order: Tensor) -> Tensor:
        return x.flatten(0, 1).gather(1, order[..., None].expand(-1, -1, x.shape[-1]))[:, None]

    rule = _Routed(visible, heads, q_cluster, k_cluster, q_order, k_order, own)
    layout = BlockLayout.of(rule, q_len, k_len, 32, 32, q.device)
    found = block_sparse_attention(
        sort(q, q_order), sort(k, k_order), sort(v, k_order), layout, scale=scale, return_lse=True
    )
    back = q_order.argsort(-1)
    out = found[0][:, 0].gather(1, back[..., None].expand(-1, -1, v.shape[-1])).view(batch, heads, q_len, -1)
    if not own:
        return out
    lse = found[1][:, 0].gather(1, back).view(batch, heads, q_len)
    position = torch.arange(k_len - q_len, k_len, device=q.device)
    at = position.clamp_min(0)
    own_value, own_lse = _own_part(q, k, v, scale, alone)
    self_seen = (position >= 0).expand(1, 1, -1)
    if visible is not None:
        rows = torch.arange(q_len, device=q.device)[None, None]
        self_seen = self_seen & visible.at(rows, at[None, None], q_len, k_len)
    merged, _ = merge_attentions((out, own_value), (lse, own_lse.masked_fill(~self_seen, float("-inf"))))
    return merged


@register("routing_transformer")
class RoutingTransformerAttention(Mechanism):
    """clusters: centroids a head, by default ``round(sqrt(length))`` for the ``length`` that is expected. window:
    tokens a cluster takes, by default the actual length over ``clusters``.

    decay: of the centroids' moving average, which runs at each call in training mode (as batch norm's statistics do).
    strict, arithmetic, count_eps, shared_qk: as in :func:`routing_attention`. Untrained centroids are random points,
    the same in every build; :meth:`init` fits them to queries and keys.
    """

    needs_training = True
    growth = "N^1.5"

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        clusters: int | None = None,
        window: int | None = None,
        *,
        length: int = 4096,
        decay: float = 0.999,
        strict: bool = False,
        arithmetic: Arithmetic = "official",
        count_eps: float = 0.0,
        shared_qk: bool = False,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise OptionError(f"window must be at least 1, got {window}.")
        clusters = max(round(math.sqrt(length)), 1) if clusters is None else clusters
        self.kmeans = OnlineKMeans(num_heads, head_dim, clusters, decay, arithmetic, seed=layer_index)
        self.clusters, self.window, self.strict, self.arithmetic = clusters, window, strict, arithmetic
        self.count_eps, self.shared_qk = count_eps, shared_qk

    @property
    def strictly_causal(self) -> bool:
        """Only with ``strict``: otherwise later tokens compete for the places in a cluster."""
        return self.strict

    def extra_repr(self) -> str:
        return f"clusters={self.clusters}, window={self.window}, strict={self.strict}, arithmetic={self.arithmetic!r}"

    def init(self, query: Tensor, key: Tensor | None = None, iters: int = 10) -> None:
        """Fit the centroids to queries (and keys) ``(batch, heads, length, head_dim)``."""
        if key is not None:
            query = torch.cat((query, expand_groups(key, query.shape[1])), 2)
        self.kmeans.init(query, iters)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        visible, keys = settle_mask(request, query.shape[2], key.shape[2])
        out = routing_attention(
            query,
            key,
            value,
            self.kmeans.centroids,
            self.window,
            request.causal,
            shared_qk=self.shared_qk,
            strict=self.strict,
            arithmetic=self.arithmetic,
            count_eps=self.count_eps,
            visible=visible,
            keys=keys,
            scale=request.scale,
        )
        if self.training:
            self.kmeans.update(query.detach(), None if self.shared_qk else expand_groups(key.detach(), query.shape[1]))
        return out

    def _pairs(self, q_len: int, k_len: int) -> float:
        spans = [
            min(-(-length // self.clusters) if self.window is None else self.window, length)
            for length in (q_len, k_len)
        ]
        return min(self.clusters * spans[0] * spans[1] / (q_len * k_len), 1.0)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        """Of the balanced form; with ``strict``, of clusters of equal size."""
        return self._pairs(query.shape[2], key.shape[2])

    def cost(self, shape: AttentionShape) -> Cost:
        tokens = shape.q_len if self.shared_qk else shape.q_len + shape.k_len
        routing = 2 * shape.batch * shape.num_heads * tokens * self.clusters * shape.head_dim
        return dense_cost(shape, self._pairs(shape.q_len, shape.k_len), routing)


class RoutingAttention(Layer):
    """The paper's layer: ``local_heads`` heads of local-window attention next to heads that route.

    local_heads: default half of the heads. local_window: keys a local head sees on each side (causal: up to itself).
    shared_qk: routing heads take their keys from the query projection, as the paper's language models do. rotary:
    rotary positions in the local heads. The other options are those of :class:`RoutingTransformerAttention`.
    """

    patterns = frozenset(("self", "causal-self"))
    needs_training = True
    growth = "N^1.5"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        local_heads: int | None = None,
        clusters: int | None = None,
        window: int | None = None,
        shared_qk: bool = True,
        *,
        local_window: int = 256,
        length: int = 4096,
        decay: float = 0.999,
        strict: bool = False,
        arithmetic: Arithmetic = "official",
        rotary: bool = False,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        local_heads = num_heads // 2 if local_heads is None else local_heads
        if embed_dim % num_heads or not 0 <= local_heads <= num_heads:
            raise OptionError(
                f"num_heads {num_heads} must divide embed_dim {embed_dim}, and local_heads {local_heads} lie between 0 "
                f"and num_heads."
            )
        self.num_heads, self.local_heads, self.head_dim = num_heads, local_heads, embed_dim // num_heads
        self.local_window, self.shared_qk, self.rotary = local_window, shared_qk, rotary
        self.query = nn.Linear(embed_dim, embed_dim, bias=False)
        key_heads = local_heads if shared_qk else num_heads
        self.key = nn.Linear(embed_dim, key_heads * self.head_dim, bias=False) if key_heads else None
        self.value = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False)
        self.routing = (
            RoutingTransformerAttention(
                num_heads - local_heads,
                self.head_dim,
                clusters,
                window,
                length=length,
                decay=decay,
                strict=strict,
                arithmetic=arithmetic,
                shared_qk=shared_qk,
                layer_index=layer_index,
            )
            if local_heads < num_heads
            else None
        )

    @property
    def strictly_causal(self) -> bool:
        """As its routing heads."""
        return self.routing is None or self.routing.strictly_causal

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(batch, length, embed_dim)``."""
        local = self.local_heads

        def heads(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query, value = heads(self.query(x)), heads(self.value(x))
        key = query[:, :0] if self.key is None else heads(self.key(x))
        if self.shared_qk:
            key = torch.cat((key, query[:, local:]), 1)
        parts = []
        if local:
            q, k = query[:, :local], key[:, :local]
            if self.rotary:
                angles = rotary_angles(x.shape[1], self.head_dim, device=x.device, dtype=x.dtype)
                q, k = apply_rotary(q, *angles), apply_rotary(k, *angles)
            near: Mask = SlidingWindow(self.local_window)
            near = near & Causal() if causal else near
            layout = BlockLayout.of(near if mask is None else near & mask, x.shape[1], x.shape[1], 64, 64, x.device)
            parts.append(block_sparse_attention(q, k, value[:, :local], layout))
        if self.routing is not None:
            parts.append(self.routing(query[:, local:], key[:, local:], value[:, local:], causal=causal, mask=mask))
        return cast(Tensor, self.out(torch.cat(parts, 1).transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class RoutingReport:
    """How tokens spread over clusters. ``unrouted``, ``multiple``: shares of tokens in no cluster and in several;
    ``entropy``: of the sizes of nearest-centroid clusters over its largest value, 1 where all are equal."""

    unrouted: float
    multiple: float
    entropy: float


@torch.no_grad()
def routing_report(x: Tensor, centroids: Tensor, window: int, arithmetic: Arithmetic = "official") -> RoutingReport:
    """What routing makes of queries or keys ``x`` ``(batch, num_heads, length, head_dim)``."""
    affinity = to_sphere(x, arithmetic) @ centroids.to(accumulation_dtype(x.dtype)).mT
    index, _ = _members(affinity.mT, window)
    ones = torch.ones_like(index.flatten(2), dtype=torch.float32)
    member = torch.zeros(x.shape[:3], device=x.device).scatter_add_(2, index.flatten(2), ones)
    sizes = F.one_hot(affinity.argmax(-1), centroids.shape[1]).sum((0, 2)).to(torch.float64)
    shares = sizes / sizes.sum(-1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum(-1).mean() / max(math.log(centroids.shape[1]), 1e-300)
    return RoutingReport(float((member == 0).float().mean()), float((member > 1).float().mean()), float(entropy))
