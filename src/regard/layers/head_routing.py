"""Routing of heads: which of a mixture's heads each token uses, with what weight, and attention of those alone.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, arXiv 2410.11842, sections 3.2 to 3.4. The
first ``shared`` heads are always on, ``k`` of the others per token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.kernels import accumulation_dtype, dense_attention, expand_groups
from regard.masks import Boolean, Causal, Mask

__all__ = ["HeadRouter", "head_load_balance_loss", "norm_router", "routed_attention", "shared_and_routed"]


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
        self.width, self.shared, self.routed_total, self.k = embed_dim, shared, routed_total, k
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


def shared_and_routed(num_heads: int, shared_fraction: float, active_fraction: float) -> tuple[int, int]:
    """Shared and routed heads for the fractions of heads shared and active in all."""
    shared = round(shared_fraction * num_heads)
    routed = round(active_fraction * num_heads) - shared
    if not 0 <= shared <= num_heads or not 0 <= routed <= num_heads - shared or shared + routed < 1:
        raise OptionError(
            f"Of {num_heads} heads, {shared_fraction} shared, {active_fraction} active leaves {routed} to route; need "
            "0 <= shared_fraction <= active_fraction <= 1 and a head that is on."
        )
    return shared, routed


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    causal: bool,
    mask: Mask | None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention ``(batch, num_heads, length, value_dim)`` where of the last heads only the rows ``chosen
    (batch, length, routed)`` are computed, zeros elsewhere."""
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
