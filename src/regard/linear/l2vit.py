"""L2ViT's linear attention: ReLU features, a learned temperature, and a divisor that is kept from below.

Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv 2501.16182, section 3. With ``q, k``
rectified and a temperature ``t`` per head that starts at ``1 / sqrt(d)``:

    D_i = max(q_i . sum_j k_j, 100)
    out_i = t q_i (sum_j k_j^T v_j) / D_i

The lower bound keeps training stable: a query that finds little gives a small vector, not an average. Rectified
features keep all weights non-negative; what they lack beside softmax is *concentration*, since rows are almost flat.
The local concentration module (LCM) gives that back after attention: ``DW7x7(BN(GELU(DW7x7(x))))``, behind its own norm
and beside its own skip. :func:`concentration` measures both sides of this diagnosis.

``(batch, heads, N, d)``; time ``O(N d^2)`` a head. Blocks and backbone: :mod:`regard.models.l2vit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, linear_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import linear_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.layers.attention_stats import local_mass, row_entropy
from regard.layers.maps import map_of, space_of, tokens_of
from regard.layers.padding import per_head
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = ["Concentration", "LocalConcentration", "ReluLinear", "concentration", "relu_linear_attention"]


def relu_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | float | None = None,
    denom_min: float = 100.0,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """query ``(batch, heads, N, d)``, key ``(batch, kv_heads, M, d)``, value ``(batch, kv_heads, M, d_v)`` to ``(batch,
    heads, N, d_v)``.

    temperature: one number, or one a head ``(heads,)``; by default ``1 / sqrt(d)``. denom_min: lower bound of the
    divisor. key_padding_mask: True where a key is real, ``(batch, M)`` or broadcastable to ``(batch, heads, M)``.
    """
    if not denom_min > 0:
        raise OptionError(f"denom_min bounds the divisor away from zero, so it is positive; got {denom_min}.")
    work, heads = accumulation_dtype(query.dtype), query.shape[1]
    if temperature is None:
        temperature = query.shape[-1] ** -0.5
    if isinstance(temperature, Tensor) and temperature.dim():
        if temperature.shape not in ((1,), (heads,)):
            raise ShapeError(f"temperature has one value a head, ({heads},); got {tuple(temperature.shape)}.")
        temperature = temperature.to(work)[:, None, None]
    mapped, values = expand_groups(key, heads).to(work).relu(), expand_groups(value, heads).to(work)
    real = per_head(key_padding_mask)
    if real is not None:
        mapped, values = (t.masked_fill(~real[..., None], 0) for t in (mapped, values))
    # A last channel of ones sums the weights.
    both, _ = linear_attention(query.to(work).relu(), mapped, F.pad(values, (0, 1), value=1.0))
    return (both[..., :-1] * temperature / both[..., -1:].clamp_min(denom_min)).to(query.dtype)


@register("l2vit")
class ReluLinear(Mechanism):
    """One temperature a head is learned, starting at ``1 / sqrt(head_dim)`` (32 in the paper's models). denom_min:
    lower bound of the divisor; the paper's 100 is for maps of some hundred tokens and more."""

    patterns = frozenset({"self", "cross"})
    mask_support = "keys"
    needs_training = True
    growth = "N"

    def __init__(self, denom_min: float = 100.0, num_heads: int = 1, head_dim: int = 32) -> None:
        super().__init__()
        if not denom_min > 0:
            raise OptionError(f"denom_min bounds the divisor away from zero, so it is positive; got {denom_min}.")
        self.denom_min = denom_min
        self.temperature = nn.Parameter(torch.full((num_heads,), head_dim**-0.5))

    def extra_repr(self) -> str:
        return f"denom_min={self.denom_min}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        temperature = self.temperature if request.scale is None else request.scale
        return relu_linear_attention(query, key, value, temperature, self.denom_min, request.keys)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return None

    def cost(self, shape: AttentionShape) -> Cost:
        return linear_cost(shape)


class LocalConcentration(nn.Module):
    """LCM: depthwise convolution, GELU, BatchNorm, depthwise convolution. ``(batch, N, channels)`` in and out."""

    def __init__(self, embed_dim: int, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise OptionError(f"Need an odd kernel_size, so that the map keeps its size; got {kernel_size}.")
        self.spread, self.gather = (
            nn.Conv2d(embed_dim, embed_dim, kernel_size, padding=kernel_size // 2, groups=embed_dim) for _ in range(2)
        )
        self.norm = nn.BatchNorm2d(embed_dim)

    def forward(self, x: Tensor, grid: Sequence[int] | None) -> Tensor:
        """grid: (height, width) of the tokens."""
        maps = F.gelu(self.spread(map_of(x, space_of(x, grid))))
        return tokens_of(self.gather(self.norm(maps)))[0]


@dataclass(frozen=True)
class Concentration:
    """``local_mass``: mean share of a row's weight within ``radius`` of its query. ``entropy``: mean entropy of rows in
    nats; ``flat``: its largest value, ``log N``."""

    local_mass: float
    entropy: float
    flat: float


@torch.no_grad()
def concentration(attn: Tensor, grid: Sequence[int], radius: int = 1) -> Concentration:
    """How concentrated a map ``(..., N, N)`` of non-negative weights is. Rows without any weight do not count."""
    alive = attn.sum(-1) > 0
    mass, entropy = local_mass(attn, grid, radius), row_entropy(attn)
    count = alive.sum().clamp_min(1)
    flat = float(torch.tensor(float(attn.shape[-1])).log())
    return Concentration(float((mass * alive).sum() / count), float((entropy * alive).sum() / count), flat)
