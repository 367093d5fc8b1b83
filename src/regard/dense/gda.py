"""Grouped differential attention: many signal heads share one noise head, whose map is subtracted from theirs.

Lim et al., "Grouped Differential Attention", 2025, arXiv 2510.06949, on top of Ye et al., "Differential Transformer",
2024, arXiv 2410.05258. Each of the groups has G signal query heads and one noise query head, a signal key head, a
noise key head and one value head twice as wide:

    A1 = softmax(q_signal k_signal^T / sqrt(d)),  A2 = softmax(q_noise k_noise^T / sqrt(d)),  out = (A1 - lam A2) v
    lam = exp(lq1 . lk1) - exp(lq2 . lk2) + lam_init,  lam_init = 0.8 - 0.6 exp(-0.3 (l - 1)),  l = 1, 2, ... the layer

then RMSNorm over each head's channels, times (1 - lam_init). ``num_noise_heads = num_heads / 2`` (G = 1), without
grouped queries, is the Differential Transformer. The noise output is computed once a group. Cost: two ordinary
attentions, ``num_heads`` score maps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, dense_attention
from regard.layers.head_output import differential_lambda, lambda_init
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = [
    "DifferentialAttention",
    "GroupedDifferentialAttention",
    "attention_noise_ratio",
    "grow_signal_heads",
    "lambda_init",
]


@register("gda")
class GroupedDifferentialAttention(Layer):
    """``(batch, length, embed_dim)`` in and out.

    num_heads: query heads in all, signal and noise; in the query projection each group's signal heads come before its
    noise head. num_noise_heads: of them (default: a quarter, the ratio 3:1 that the paper finds best; half where
    num_heads is no multiple of four, one where it is odd). num_kv_heads: groups of a signal key, a noise key and a
    value head, dividing num_noise_heads (default: equal; a host's larger count, of key/value heads against all query
    heads, comes down to the greatest common divisor). value_dim: per head (default: twice head_dim). layer_index:
    0-based; for weights of the public Motif port, which counts from one less, give ``layer_index - 1``. lambda_std: of
    the four lambda vectors' initialisation; 0.1 as in the Differential Transformer, 0 in the Motif port.
    """

    patterns = frozenset(("self", "causal-self"))
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_noise_heads: int | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        layer_index: int = 0,
        rotary: bool = True,
        lambda_std: float = 0.1,
    ) -> None:
        super().__init__()
        noise = num_noise_heads
        if noise is None:
            noise = num_heads // 4 if num_heads % 4 == 0 else num_heads // 2 if num_heads % 2 == 0 else 1
        if noise < 1 or num_heads % noise or num_heads <= noise:
            raise OptionError(
                f"num_heads {num_heads} must be G + 1 times num_noise_heads {noise} for a whole G >= 1; "
                "for the Differential Transformer give num_noise_heads = num_heads // 2."
            )
        if num_kv_heads is not None and num_kv_heads < noise and (num_kv_heads < 1 or noise % num_kv_heads):
            raise OptionError(f"num_kv_heads {num_kv_heads} must divide num_noise_heads {noise}.")
        if head_dim is None and embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim.")
        self.groups = noise if num_kv_heads is None else math.gcd(num_kv_heads, noise)
        self.num_heads, self.num_noise_heads = num_heads, noise
        self.ratio = num_heads // noise - 1
        self.head_dim = head_dim or embed_dim // num_heads
        self.value_dim = value_dim or 2 * self.head_dim
        self.rotary, self.layer_index, self.lambda_std = rotary, layer_index, lambda_std
        self.lambda_init = lambda_init(layer_index + 1)
        self.query = nn.Linear(embed_dim, num_heads * self.head_dim, bias=False)
        self.key = nn.Linear(embed_dim, 2 * self.groups * self.head_dim, bias=False)
        self.value = nn.Linear(embed_dim, self.groups * self.value_dim, bias=False)
        self.out = nn.Linear(noise * self.ratio * self.value_dim, embed_dim, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(self.head_dim) * lambda_std) for _ in range(4)
        )

    def extra_repr(self) -> str:
        return f"{self.num_noise_heads} x ({self.ratio} signal + 1 noise) heads, {self.groups} key/value groups"

    @property
    def lam(self) -> Tensor:
        """The weight of the noise map, a scalar in float32 at least."""
        vectors = (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        return differential_lambda(*vectors, self.lambda_init)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Signal and noise queries ``(batch, noise * G | noise, length, head_dim)``, signal and noise keys ``(batch,
        groups, ...)``, values ``(batch, groups, length, value_dim)``."""
        if x.dim() != 3 or x.shape[-1] != self.query.in_features:
            raise ShapeError(f"This layer takes (batch, length, {self.query.in_features}), got {tuple(x.shape)}.")
        query = self.query(x).unflatten(-1, (self.num_noise_heads, self.ratio + 1, self.head_dim))
        key = self.key(x).unflatten(-1, (self.groups, 2, self.head_dim))
        value = self.value(x).unflatten(-1, (self.groups, self.value_dim)).transpose(1, 2)
        signal, noise = query[:, :, :, :-1].flatten(2, 3), query[:, :, :, -1]
        parts = [t.transpose(1, 2) for t in (signal, noise, key[:, :, :, 0], key[:, :, :, 1])]
        if self.rotary:
            cos, sin = rotary_angles(x.shape[1], self.head_dim, device=x.device, dtype=x.dtype)
            parts = [apply_rotary(t, cos, sin) for t in parts]
        return parts[0], parts[1], parts[2], parts[3], value

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend. mask: a regard mask or a boolean tensor, True where visible; it holds in both maps."""
        signal_q, noise_q, signal_k, noise_k, value = self.project(x)
        difference = self._difference(signal_q, noise_q, signal_k, noise_k, value, causal, mask)
        weight = self.norm.weight.to(difference.dtype)
        normed = F.rms_norm(difference, (self.value_dim,), weight, self.norm.eps) * (1 - self.lambda_init)
        out: Tensor = self.out(normed.to(x.dtype).transpose(1, 2).flatten(2))
        return out

    def maps(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """The combined maps ``A1 - lam A2`` before the norm, ``(batch, noise * G, length, length)``; rows sum to
        ``1 - lam`` and entries may be negative."""
        signal_q, noise_q, signal_k, noise_k, _ = self.project(x)
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), self.groups, -1, -1)
        return self._difference(signal_q, noise_q, signal_k, noise_k, identity, causal, mask).to(x.dtype)

    def _difference(
        self,
        signal_q: Tensor,
        noise_q: Tensor,
        signal_k: Tensor,
        noise_k: Tensor,
        value: Tensor,
        causal: bool,
        mask: Mask | Tensor | None,
    ) -> Tensor:
        """``A1 V - lam A2 V`` in the accumulation dtype; the two may nearly cancel."""
        rule = Boolean(mask) if isinstance(mask, Tensor) else mask
        work = accumulation_dtype(value.dtype)
        signal = dense_attention(signal_q, signal_k, value, causal=causal, mask=rule).to(work)
        noise = dense_attention(noise_q, noise_k, value, causal=causal, mask=rule).to(work)
        return signal - self.lam.to(work) * noise.repeat_interleave(self.ratio, 1)


class DifferentialAttention(GroupedDifferentialAttention):
    """The Differential Transformer's attention (arXiv 2410.05258), a named setting: ``num_heads`` differential heads,
    each of one signal and one noise query head of ``head_dim`` channels (default: ``embed_dim / num_heads / 2``)."""

    def __init__(self, embed_dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(embed_dim, 2 * num_heads, num_heads, **options)


@torch.no_grad()
def grow_signal_heads(
    module: GroupedDifferentialAttention, factor: int, jitter: float = 0.0
) -> GroupedDifferentialAttention:
    """A wider module of the same function: every signal head ``factor`` times, its output columns divided by
    ``factor``.

    Noise heads, keys, values and lambda stay. ``jitter`` breaks the copies' symmetry for training on: noise on the
    signal queries of this share of their standard deviation.
    """
    if factor < 1:
        raise OptionError(f"factor must be at least 1, got {factor}.")
    noise, ratio, dim, value_dim = module.num_noise_heads, module.ratio, module.head_dim, module.value_dim
    grown = GroupedDifferentialAttention(
        module.query.in_features,
        noise * (ratio * factor + 1),
        noise,
        num_kv_heads=module.groups,
        head_dim=dim,
        value_dim=value_dim,
        layer_index=module.layer_index,
        rotary=module.rotary,
        lambda_std=module.lambda_std,
    ).to(module.query.weight.device, module.query.weight.dtype)
    state = module.state_dict()
    query = state["query.weight"].unflatten(0, (noise, ratio + 1, dim))
    signal = query[:, :-1].repeat_interleave(factor, 1)
    if jitter:
        signal = signal + jitter * signal.std() * torch.randn_like(signal)
    state["query.weight"] = torch.cat((signal, query[:, -1:]), 1).flatten(0, 2)
    columns = state["out.weight"].unflatten(1, (noise * ratio, value_dim))
    state["out.weight"] = columns.repeat_interleave(factor, 1).flatten(1) / factor
    grown.load_state_dict(state)
    return grown.train(module.training)


def attention_noise_ratio(weights: Tensor, relevant: Tensor) -> Tensor:
    """Share of the absolute attention mass that lies on irrelevant keys, ``(...)``.

    weights ``(..., k_len)``, of any sign; relevant: boolean, broadcastable to it.
    """
    mass = weights.abs().to(accumulation_dtype(weights.dtype))
    return (mass * ~relevant).sum(-1) / mass.sum(-1).clamp_min(torch.finfo(mass.dtype).tiny)
