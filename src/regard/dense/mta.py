"""Multi-token attention: a weight depends on neighbouring queries, neighbouring keys and other heads.

Golovneva, Wang, Weston and Sukhbaatar, "Multi-Token Attention", 2025, arXiv 2504.00927, section 3. The score map of
each head is convolved with a small kernel of its own, then heads are mixed inside groups, before or after the softmax:

    S = q k^T / sqrt(d),  S'_ij = sum over a, b of w_ab S_{i - a, j + b}    a = 0 .. c_q - 1,  |b| <= (c_k - 1) / 2
    S''_h = sum over h' of u_hh' S'_h',  A = softmax(S'' + mask),  and likewise on A;  o = norm(A v) sigmoid(gate)

What a query does not see counts as zero before a convolution and is zero after it, so that the map stays causal. Rows
of a map that is changed after the softmax need not sum to one. All kernels begin as the identity: the layer begins as
multi-head attention with a norm and a gate per head. :mod:`regard.layers.score_maps` has the operations by themselves.

Cost: that of attention, ``2 c_q c_k`` FLOPs a pair and convolution and ``2 g`` a pair and mixture of groups of ``g``
heads; the whole map is kept, ``N^2`` memory. Extra parameters: ``heads * c_q * c_k`` a convolution, ``heads * g`` a
mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.cache import DynamicCache, EvictingCache, KeyValueCache
from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, expand_groups
from regard.kernels.dense import masked_softmax
from regard.layers.head_output import HeadGate, HeadNorm
from regard.layers.heads import head_sizes
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layers.score_maps import head_conv, identity_head_kernel, identity_kernel, key_query_conv
from regard.masks import Boolean, Causal, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["CONFIGS", "MTAConfig", "MTAState", "MultiTokenAttention"]

_SPREAD = 0.3


@dataclass(frozen=True)
class MTAState:
    """Decoding state: the cache of keys and values, and the queries ``(batch, num_heads, at most tail, head_dim)`` of
    the last tokens, whose rows the next ones are convolved with."""

    cache: KeyValueCache
    queries: Tensor


@register("mta")
class MultiTokenAttention(Layer):
    """``(batch, length, embed_dim)`` in and out.

    q_kernel, k_kernel: queries (the current and earlier ones) and keys (odd: from both sides) that a kernel spans.
    pre_softmax, post_softmax: where the map is convolved; neither leaves it as it is. head_group: heads mixed with one
    another (dividing num_heads), None for no mixing. head_mix: where they are, ``"pre"``, ``"post"`` or ``"both"``.
    group_norm: RMSNorm per head, with depth_scale times ``1 - lambda_init`` of the layer. gate: ``"scalar"`` or
    ``"vector"``, the sigmoid gate on each head's output, or None. init: of convolution kernels, ``"identity"``,
    ``"normal"`` or ``"constant"``, which the paper finds worse. rotary, rope_base: positions on queries and keys.
    dropout: of the final weights. Not causal, it still convolves with earlier queries alone.
    """

    patterns = frozenset(("self", "causal-self"))
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        q_kernel: int = 6,
        k_kernel: int = 11,
        pre_softmax: bool = True,
        post_softmax: bool = False,
        head_group: int | None = None,
        head_mix: Literal["pre", "post", "both"] = "post",
        group_norm: bool = True,
        depth_scale: bool = False,
        gate: Literal["scalar", "vector"] | None = "scalar",
        init: Literal["identity", "normal", "constant"] = "identity",
        rotary: bool = True,
        rope_base: float = 10000.0,
        dropout: float = 0.0,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        if head_mix not in ("pre", "post", "both") or init not in ("identity", "normal", "constant"):
            raise OptionError(
                "head_mix is 'pre', 'post' or 'both' and init 'identity', 'normal' or 'constant'; got "
                f"{head_mix!r} and {init!r}."
            )
        if depth_scale and not group_norm:
            raise OptionError("depth_scale is a factor of the norm per head; it needs group_norm=True.")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.rotary, self.rope_base = rotary, rope_base
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(embed_dim, width, bias=False)
        self.key, self.value = (nn.Linear(embed_dim, kv_width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, embed_dim, bias=False)
        self.norm = HeadNorm(self.head_dim, layer_index + 1 if depth_scale else None) if group_norm else None
        self.gate = None if gate is None else HeadGate(self.head_dim, gate)
        linears = [self.query, self.key, self.value, self.out]
        for linear in [*linears, self.gate.linear] if self.gate is not None else linears:
            nn.init.trunc_normal_(linear.weight, std=embed_dim**-0.5, a=-3 * embed_dim**-0.5, b=3 * embed_dim**-0.5)
        kernels: list[nn.Parameter | None] = []
        for wanted in (pre_softmax, post_softmax):
            kernel = identity_kernel(num_heads, q_kernel, k_kernel)
            if init == "normal":
                nn.init.trunc_normal_(kernel, std=_SPREAD, a=-3 * _SPREAD, b=3 * _SPREAD)
            elif init == "constant":
                kernel.fill_(_SPREAD)
            kernels.append(nn.Parameter(kernel) if wanted else None)
        self.pre_kernel, self.post_kernel = kernels
        self.pre_heads, self.post_heads = (
            nn.Parameter(identity_head_kernel(num_heads, head_group))
            if head_group is not None and head_mix in (place, "both")
            else None
            for place in ("pre", "post")
        )
        self.tail = (q_kernel - 1) * (pre_softmax + post_softmax)
        self.dropout = nn.Dropout(dropout)

    def extra_repr(self) -> str:
        parts = ("pre_kernel", "post_kernel", "pre_heads", "post_heads")
        shapes = (f"{name}={tuple(getattr(self, name).shape)}" for name in parts if getattr(self, name) is not None)
        return ", ".join(shapes)

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``(batch, num_heads, length, head_dim)``, key and value ``(batch, num_kv_heads, ...)`` of tokens from
        position ``start`` on."""
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"MultiTokenAttention takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if self.rotary:
            cos, sin = rotary_angles(
                x.shape[1], self.head_dim, base=self.rope_base, start=start, device=x.device, dtype=x.dtype
            )
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        return query, key, value

    def weights(self, query: Tensor, key: Tensor, visible: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """The map ``(batch, num_heads, q_len, k_len)`` of projected queries and keys, in the accumulation dtype.

        visible: boolean, broadcastable to it. rows: which queries take from which, as in
        :func:`~regard.layers.score_maps.key_query_conv`.
        """
        work = accumulation_dtype(query.dtype)
        keys = expand_groups(key, self.num_heads).to(work)
        scores = query.to(work) @ keys.transpose(-1, -2) * self.head_dim**-0.5
        if self.pre_kernel is not None:
            scores = key_query_conv(scores, self.pre_kernel, visible, rows)
        if self.pre_heads is not None:
            scores = head_conv(scores, self.pre_heads)
        weights = masked_softmax(scores, visible)
        if self.post_kernel is not None:
            weights = key_query_conv(weights, self.post_kernel, visible, rows)
        if self.post_heads is not None:
            weights = head_conv(weights, self.post_heads)
            if visible is not None and visible.shape[1] > 1:
                # Heads see different keys, and none is shown another's.
                weights = weights.masked_fill(~visible, 0)
        return weights

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend. mask: a regard mask or a boolean tensor, True where visible; where a token does not see an earlier
        one, it is not convolved with its row either, so that packed documents and padding stay apart."""
        query, key, value = self.project(x)
        rule = Boolean(mask) if isinstance(mask, Tensor) else mask
        rows = None if rule is None else rule.dense(x.shape[1], x.shape[1], x.device)
        if causal:
            rule = Causal() if rule is None else rule & Causal()
        visible = None if rule is None else rule.dense(x.shape[1], x.shape[1], x.device)
        return self._read(self.weights(query, key, visible, rows), value)

    def _read(self, weights: Tensor, value: Tensor) -> Tensor:
        heads = self.dropout(weights) @ expand_groups(value, self.num_heads).to(weights.dtype)
        heads = heads.to(value.dtype)
        if self.norm is not None:
            heads = self.norm(heads)
        if self.gate is not None:
            heads = self.gate(heads)
        out: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return out

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> MTAState:
        """The state before the first token, on ``like``'s device and in its dtype; cache: by default a
        :class:`~regard.cache.DynamicCache`. Raises OptionError for one that evicts."""
        if isinstance(cache, EvictingCache):
            raise OptionError("Neighbouring keys are convolved, so the cache has to keep all of them side by side.")
        queries = like.new_zeros(batch, self.num_heads, 0, self.head_dim)
        return MTAState(DynamicCache() if cache is None else cache, queries)

    def step(self, x: Tensor, state: MTAState) -> tuple[Tensor, MTAState]:
        """The next token or tokens ``(batch, tokens, embed_dim)``; gives the numbers of :meth:`forward`, causal.

        The cache is changed in place. Besides it the last ``q_kernel - 1`` queries are kept for each convolution.
        """
        query, key, value = self.project(x, state.cache.seen)
        kept = state.cache.append(key, value)
        query = torch.cat((state.queries, query), 2)
        visible = Causal().dense(query.shape[2], kept.key.shape[2], x.device)
        weights = self.weights(query, kept.key, visible)[:, :, -x.shape[1] :]
        last = query[:, :, max(query.shape[2] - self.tail, 0) :].clone()
        return self._read(weights, kept.value), MTAState(state.cache, last)


@dataclass(frozen=True)
class MTAConfig:
    """The sizes of a model and the options of its layers; ``convolved``: 0-based layers whose maps are convolved, None
    for all. ``options(i)`` suit :class:`MultiTokenAttention`, all of them ``SequenceModel(mechanism="mta")``."""

    depth: int
    embed_dim: int
    num_heads: int
    shared: Mapping[str, Any] = field(default_factory=dict)
    convolved: tuple[int, ...] | None = None

    def options(self, layer: int) -> dict[str, Any]:
        """Of the 0-based ``layer``."""
        if not 0 <= layer < self.depth:
            raise OptionError(f"Layers are 0 to {self.depth - 1}, got {layer}.")
        plain = self.convolved is not None and layer not in self.convolved
        return {**self.shared, **({"pre_softmax": False, "post_softmax": False} if plain else {})}


CONFIGS: dict[str, MTAConfig] = {
    "830m": MTAConfig(
        24,
        1536,
        16,
        {"q_kernel": 6, "k_kernel": 11, "post_softmax": True, "head_group": 16, "head_mix": "both", "rope_base": 1e5},
        (2, 6, 10, 14, 18, 22),
    ),
    "toy": MTAConfig(
        4, 256, 2, {"q_kernel": 2, "k_kernel": 9, "group_norm": False, "gate": None, "rope_base": 1e5, "dropout": 0.1}
    ),
}
"""The paper's models: the language model of 830M parameters, which convolves maps and mixes heads on both sides of the
softmax, and that of the block task. Their feed-forward layers are gated (SwiGLU) and their norms RMSNorm."""
