"""Mixture of heads: each token uses a few of its heads, chosen by a router, as experts are.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, arXiv 2410.11842. With the head outputs
H_i and the rows W_O^i of the output projection,

    y_t = sum_i g_i(t) H_i(t) W_O^i

where the first ``shared_heads`` heads are always on and ``routed_heads`` of the others are on per token:
shared  g_i = 2 a1 S softmax(W_s x)_i,   routed  g_i = 2 a2 K p_i / sum_{T} p  for i in T = top-K of p = softmax(W_r x),
(a1, a2) = softmax(W_h x). Where there is only one kind of head, 2 a is left out. The counts make zero-initialised
routers give gates of 1 (the released code); ``gate_scale="none"`` leaves them out (the paper's formula). Keys and
values are formed for all tokens, so scores and read-out shrink to ``(S + K) / num_heads``. Balance loss: ``E sum_e P_e
f_e`` over the E routed heads (the paper weighs it by 0.01).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention
from regard.layers.head_routing import (
    HeadRouter,
    head_load_balance_loss,
    norm_router,
    routed_attention,
    shared_and_routed,
)
from regard.layers.heads import head_sizes
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean, Mask
from regard.mechanism import Layer, Mechanism, Request
from regard.registry import register

__all__ = [
    "HeadRouter",
    "MixtureOfHeads",
    "NormRoutedHeads",
    "active_head_flops",
    "head_load_balance_loss",
    "head_usage",
    "norm_router",
]


@register("moh")
class MixtureOfHeads(Layer):
    """``(batch, length, embed_dim)`` in and out; a drop-in for multi-head attention.

    shared_heads: always on (default: a quarter). routed_heads: of the others, on per token (default: half of all
    heads, so that three quarters are active). num_kv_heads: key/value heads, dividing ``num_heads`` (default: equal).
    executor: ``"masked"`` computes all heads and multiplies by the gates, ``"gathered"`` computes only the chosen
    (token, head) pairs. router: ``"learned"``, or ``"norm"`` for pretrained weights, whose straight-through gradient
    needs the outputs of all heads: in training it is always masked. rotary: rotary positions on queries and keys.
    After a forward pass ``balance_loss`` holds that pass's load-balance loss, to be added to the task's (times 0.01).
    """

    patterns = frozenset(("self", "causal-self"))
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        rotary: bool = False,
        gate_scale: Literal["count", "none"] = "count",
        renormalize: bool = True,
        router: Literal["learned", "norm"] = "learned",
        executor: Literal["masked", "gathered"] = "masked",
    ) -> None:
        super().__init__()
        shared = max(num_heads // 4, 1) if shared_heads is None else shared_heads
        routed = min(num_heads // 2, num_heads - shared) if routed_heads is None else routed_heads
        if executor not in ("masked", "gathered") or router not in ("learned", "norm"):
            raise OptionError(
                f"executor is 'masked' or 'gathered' and router 'learned' or 'norm'; got {executor!r} and {router!r}."
            )
        if not 0 <= shared <= num_heads or not 0 <= routed <= num_heads - shared or shared + routed < 1:
            raise OptionError(
                f"{shared} shared and {routed} routed heads do not fit into {num_heads} heads; need at least one that "
                "is on, and shared_heads + routed_heads <= num_heads."
            )
        self.num_heads = num_heads
        self.num_kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.shared_heads, self.routed_heads = shared, routed
        self.executor, self.rotary = executor, rotary
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(embed_dim, width, bias=bias)
        self.key, self.value = (nn.Linear(embed_dim, kv_width, bias=bias) for _ in range(2))
        self.out = nn.Linear(width, embed_dim, bias=bias)
        self.router = (
            HeadRouter(embed_dim, shared, num_heads - shared, routed, gate_scale, renormalize)
            if router == "learned"
            else None
        )
        self.balance_loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The loss is part of one pass's graph: it can be neither copied nor pickled.
        return {**self.__dict__, "balance_loss": None}

    @classmethod
    def from_pretrained(
        cls, mha: nn.MultiheadAttention, shared_frac: float = 0.5, active_frac: float = 0.75
    ) -> MixtureOfHeads:
        """The weights of a trained ``nn.MultiheadAttention`` with the parameter-free router, for tuning on.

        The fractions are those of MoH-LLaMA3-8B: 16 of 32 heads shared, 8 of the other 16 routed.
        """
        if mha.in_proj_weight is None or mha.bias_k is not None or mha.add_zero_attn:
            raise OptionError("Needs a plain self-attention module: one embed_dim, no add_bias_kv, no add_zero_attn.")
        shared, routed = shared_and_routed(mha.num_heads, shared_frac, active_frac)
        has_bias = mha.in_proj_bias is not None
        layer = cls(mha.embed_dim, mha.num_heads, shared, routed, bias=has_bias, router="norm")
        layer.to(mha.out_proj.weight.device, mha.out_proj.weight.dtype)
        with torch.no_grad():
            for linear, weight in zip((layer.query, layer.key, layer.value), mha.in_proj_weight.chunk(3), strict=True):
                linear.weight.copy_(weight)
            layer.out.weight.copy_(mha.out_proj.weight)
            if has_bias:
                biases = mha.in_proj_bias.chunk(3)
                for linear, bias in zip((layer.query, layer.key, layer.value), biases, strict=True):
                    linear.bias.copy_(bias)
                layer.out.bias.copy_(mha.out_proj.bias)
        return layer.train(mha.training)

    def route(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates ``(batch, length, num_heads)``, routing probabilities and mask ``(batch, length, routed)``."""
        if self.router is not None:
            gates: tuple[Tensor, Tensor, Tensor] = self.router(x)
            return gates
        return norm_router(query, self.shared_heads, self.routed_heads)

    def attend(
        self, x: Tensor, causal: bool = False, mask: Mask | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, gates ``(batch, length, num_heads)`` and load-balance loss."""
        if x.dim() != 3 or x.shape[-1] != self.query.in_features:
            raise ShapeError(f"MixtureOfHeads takes (batch, length, {self.query.in_features}), got {tuple(x.shape)}.")
        rule = Boolean(mask) if isinstance(mask, Tensor) else mask
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        gates, probs, chosen = self.route(x, query)
        self.balance_loss = head_load_balance_loss(probs, chosen) if chosen.shape[-1] else x.new_zeros(())
        if self.rotary:
            cos, sin = rotary_angles(x.shape[1], self.head_dim, device=x.device, dtype=x.dtype)
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if self.executor == "masked" or (self.training and self.router is None):
            heads = dense_attention(query, key, value, causal=causal, mask=rule)
        else:
            heads = routed_attention(query, key, value, chosen, causal, rule)
        out: Tensor = self.out((heads * gates.transpose(1, 2)[..., None]).transpose(1, 2).flatten(2))
        return out, gates, self.balance_loss

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend. mask: a regard mask or a boolean tensor, True where visible."""
        return self.attend(x, causal, mask)[0]


@register("moh_norm")
class NormRoutedHeads(Mechanism):
    """MoH for a trained model, on (query, key, value): heads gated per token by the norms of their queries.

    shared_fraction: of the heads, always on (the first ones). active_fraction: of the heads, on in all. It is where the
    paper's continued training of LLaMA3 starts from; untrained it drops heads that the model relies on. Training
    computes all heads, for the straight-through gradient; evaluation only the chosen (token, head) pairs.
    """

    needs_training = True
    decodes = True
    true_gradient = False

    def __init__(self, num_heads: int, shared_fraction: float = 0.5, active_fraction: float = 0.75) -> None:
        super().__init__()
        self.num_heads, self.active_fraction = num_heads, active_fraction
        self.shared_heads, self.routed_heads = shared_and_routed(num_heads, shared_fraction, active_fraction)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads, {self.shared_heads} shared, {self.routed_heads} routed"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if query.shape[1] != self.num_heads:
            raise ShapeError(f"This mixture was built for {self.num_heads} heads, got {query.shape[1]}.")
        gates, _, chosen = norm_router(query, self.shared_heads, self.routed_heads)
        if self.training:
            out = dense_attention(query, key, value, causal=request.causal, mask=request.mask, scale=request.scale)
        else:
            out = routed_attention(query, key, value, chosen, request.causal, request.mask, request.scale)
        return out * gates.transpose(1, 2)[..., None]

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        every = super().computed_pairs(query, key, value, request)
        return None if every is None else every * (self.shared_heads + self.routed_heads) / self.num_heads

    def cost(self, shape: AttentionShape) -> Cost:
        return dense_cost(shape, (self.shared_heads + self.routed_heads) / self.num_heads)


def active_head_flops(length: int, embed_dim: int, num_heads: int, active: float) -> int:
    """FLOPs of scores and read-out for ``length`` tokens when ``active`` of the ``num_heads`` heads (on average) are
    on per token."""
    return round(4 * length * length * embed_dim * active / num_heads)


def head_usage(gates: Tensor) -> dict[str, Any]:
    """How gates ``(batch, length, num_heads)`` use the heads: ``share`` of tokens that use each head, ``mean_gate``
    where on, ``active`` heads per token."""
    on = gates != 0
    share = on.float().mean((0, 1))
    mean = gates.float().sum((0, 1)) / on.sum((0, 1)).clamp_min(1)
    return {"share": share.tolist(), "mean_gate": mean.tolist(), "active": float(on.float().sum(-1).mean())}
