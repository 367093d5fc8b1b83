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
from regard.kernels import accumulation_dtype, dense_attention, expand_groups
from regard.layers.heads import head_sizes
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean, Causal, Mask
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


def head_load_balance_loss(probs: Tensor, mask: Tensor) -> Tensor:
    """``E sum_e P_e f_e`` of ``probs`` and 0/1 ``mask``, both ``(..., E)``: K when routing is uniform, more when
    not."""
    experts = probs.shape[-1]
    return experts * (probs.flatten(0, -2).mean(0) * mask.to(probs.dtype).flatten(0, -2).mean(0)).sum()


def _top_mask(probs: Tensor, k: int) -> Tensor:
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, probs.topk(k, -1).indices, True)


class HeadRouter(nn.Module):
    """Gates from the layer's input: ``x (batch, length, embed_dim)`` to gates ``(batch, length, shared +
    routed_total)``, routing probabilities and 0/1 mask ``(batch, length, routed_total)``. Linear maps without bias,
    zero at first.

    gate_scale: ``"count"`` or ``"none"`` (see the module's formula). renormalize: divide the chosen probabilities by
    their sum; the paper's own formula may be read without.
    """

    def __init__(
        self,
        embed_dim: int,
        shared: int,
        routed_total: int,
        k: int,
        gate_scale: Literal["count", "none"] = "count",
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= k <= routed_total or shared < 0 or shared + k < 1:
            raise OptionError(
                f"Need 0 <= k <= routed_total and a head that is on; got shared={shared}, "
                f"routed_total={routed_total}, k={k}."
            )
        if gate_scale not in ("count", "none"):
            raise OptionError(f"gate_scale is 'count' or 'none', got {gate_scale!r}.")
        self.shared, self.routed_total, self.k = shared, routed_total, k
        self.gate_scale, self.renormalize = gate_scale, renormalize

        def linear(width: int) -> nn.Linear:
            layer = nn.Linear(embed_dim, width, bias=False)
            nn.init.zeros_(layer.weight)
            return layer

        self.shared_logits = linear(shared) if shared > 1 else None
        self.routed_logits = linear(routed_total) if routed_total and k else None
        # With one kind of head alone there is nothing to weigh against.
        self.pair_logits = linear(2) if shared and k else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        count = self.gate_scale == "count"
        shared = x.new_ones(batch, length, self.shared)
        if self.shared_logits is not None:
            shared = self.shared_logits(x).softmax(-1)
        if count:
            shared = shared * self.shared
        if self.routed_logits is None:
            nothing = x.new_zeros(batch, length, self.routed_total)
            return torch.cat((shared, nothing), -1), nothing, nothing
        probs = self.routed_logits(x).softmax(-1)
        mask = _top_mask(probs, self.k)
        routed = probs * mask
        if self.renormalize:
            routed = routed / routed.sum(-1, keepdim=True)
        if count:
            routed = routed * self.k
        if self.pair_logits is not None:
            pair = self.pair_logits(x).softmax(-1) * (2 if count else 1)
            shared, routed = shared * pair[..., :1], routed * pair[..., 1:]
        return torch.cat((shared, routed), -1), probs, mask.to(x.dtype)


def norm_router(query: Tensor, shared: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The parameter-free router for pretrained weights: a head's score is the norm of its query vector.

    query ``(batch, num_heads, length, head_dim)``, before or after rotary positions (they keep norms). The norms are
    divided by their (unbiased) standard deviation over the routed heads; softmax; top-k. Gates are the binary mask,
    with a straight-through gradient ``mask + p - stopgrad(p)``. Returns gates ``(batch, length, num_heads)``,
    probabilities and mask ``(batch, length, num_heads - shared)``.
    """
    norms = query[:, shared:].to(accumulation_dtype(query.dtype)).norm(dim=-1).transpose(1, 2)
    middle = norms.mean(-1, keepdim=True)
    if norms.shape[-1] > 1:
        # Heads of equal norm have no spread to divide by, and one within rounding would send gradients to infinity.
        spread = norms.std(-1, keepdim=True)
        spread = torch.where(spread > torch.finfo(norms.dtype).eps * middle, spread, 1)
    else:
        spread = torch.ones_like(norms)
    # Less the mean, which softmax does not see, so that large equal norms keep their differences.
    probs = ((norms - middle) / spread).softmax(-1)
    mask = _top_mask(probs, k).to(probs.dtype)
    gates = mask + (probs - probs.detach())
    gates = torch.cat((gates.new_ones(*gates.shape[:2], shared), gates), -1)
    return gates.to(query.dtype), probs.to(query.dtype), mask.to(query.dtype)


def _split(num_heads: int, shared_fraction: float, active_fraction: float) -> tuple[int, int]:
    """Shared and routed heads for the fractions of heads shared and active in all."""
    shared = round(shared_fraction * num_heads)
    routed = round(active_fraction * num_heads) - shared
    if not 0 <= shared <= num_heads or not 0 <= routed <= num_heads - shared or shared + routed < 1:
        raise OptionError(
            f"Of {num_heads} heads, {shared_fraction} shared, {active_fraction} active leaves {routed} to route; need "
            "0 <= shared_fraction <= active_fraction <= 1 and a head that is on."
        )
    return shared, routed


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
        shared, routed = _split(mha.num_heads, shared_frac, active_frac)
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
            heads = _gathered(query, key, value, chosen, causal, rule)
        out: Tensor = self.out((heads * gates.transpose(1, 2)[..., None]).transpose(1, 2).flatten(2))
        return out, gates, self.balance_loss

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend. mask: a regard mask or a boolean tensor, True where visible."""
        return self.attend(x, causal, mask)[0]


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    causal: bool,
    mask: Mask | None,
    scale: float | None = None,
) -> Tensor:
    """Head outputs where only the rows ``chosen (batch, length, routed)`` of the last heads are computed, zeros
    elsewhere."""
    heads, length, routed = query.shape[1], query.shape[2], chosen.shape[-1]
    shared = heads - routed
    rule = mask if not causal else Causal() if mask is None else mask & Causal()
    visible = None if rule is None else rule.dense(length, key.shape[2], query.device)

    def part(tensor: Tensor, first: int, last: int) -> Tensor:
        return tensor if tensor.shape[1] == 1 and heads > 1 else tensor[:, first:last]

    key, value = expand_groups(key, heads), expand_groups(value, heads)
    parts = []
    if shared:
        q, k, v = (t[:, :shared] for t in (query, key, value))
        seen = None if mask is None or visible is None else Boolean(part(visible, 0, shared))
        parts.append(dense_attention(q, k, v, causal=causal and mask is None, mask=seen, scale=scale))
    if routed:
        on = chosen.transpose(1, 2) > 0
        # Heads have different numbers of rows; all are padded to the busiest head's, the padding sees nothing.
        count = max(int(on.sum(-1).max()), 1)
        rows = on.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :count]
        live = on.gather(-1, rows)[..., None]
        if visible is not None:
            spread = part(visible, shared, heads).expand(*rows.shape[:2], -1, -1)
            live = live & spread.gather(2, rows[..., None].expand(-1, -1, -1, key.shape[2]))
        index = rows[..., None].expand(-1, -1, -1, query.shape[3])
        out = dense_attention(
            query[:, shared:].gather(2, index), key[:, shared:], value[:, shared:], mask=Boolean(live), scale=scale
        )
        empty = out.new_zeros(*rows.shape[:2], length, out.shape[-1])
        parts.append(empty.scatter(2, rows[..., None].expand(-1, -1, -1, out.shape[-1]), out))
    return torch.cat(parts, 1)


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
        self.shared_heads, self.routed_heads = _split(num_heads, shared_fraction, active_fraction)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads, {self.shared_heads} shared, {self.routed_heads} routed"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if query.shape[1] != self.num_heads:
            raise ShapeError(f"This mixture was built for {self.num_heads} heads, got {query.shape[1]}.")
        gates, _, chosen = norm_router(query, self.shared_heads, self.routed_heads)
        if self.training:
            out = dense_attention(query, key, value, causal=request.causal, mask=request.mask, scale=request.scale)
        else:
            out = _gathered(query, key, value, chosen, request.causal, request.mask, request.scale)
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
