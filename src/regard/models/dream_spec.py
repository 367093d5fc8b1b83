"""DREAM's draft model: three layers that read the target's own features by gated cross-attention.

Hu et al., "DREAM: Drafting with Refined Target Features and Entropy-Adaptive Cross-Attention Fusion for Multimodal
Speculative Decoding", 2025, arXiv 2505.19201, section 3. On embeddings ``x`` of tokens (and of kept image tokens) with
the target's last hidden states ``h``:

- layer 0: self-attention without a norm before it, then a gated MLP;
- layer 1: ``q_i = RMSNorm(W_q x_i)`` per head, ``k_j = RMSNorm(W_k h_j)``, ``v_j = W_v h_j`` for ``j < i``;
  ``x += tanh(g_1) attention``, ``x += tanh(g_2) MLP(x)``, both gates 0 at first;
- layer 2: self-attention; a last RMSNorm; logits by the target's frozen head.

Where drafting runs ahead of the target, the draft's own hidden states take the place of ``h``. How it drafts and is
verified: :mod:`regard.decode.dream_spec`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.cache import DynamicCache
from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention
from regard.layers.maps import merge_heads
from regard.layers.mlp import GatedMlp
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean

__all__ = ["DraftCache", "DraftOutput", "DreamDraft", "previous_features"]


class DraftOutput(NamedTuple):
    """``hidden (batch, length, dim)``, ready for the target's head, and ``fused``, what the cross-attention layer gave,
    which training binds to a feature of the target."""

    hidden: Tensor
    fused: Tensor


class DraftCache:
    """What drafting keeps of the tokens read so far: keys and values of the three layers."""

    def __init__(self) -> None:
        self.layers = [DynamicCache() for _ in range(3)]

    @property
    def seen(self) -> int:
        """Tokens read."""
        return self.layers[0].seen

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        for layer in self.layers:
            layer.crop(length)


def previous_features(features: Tensor, first: Tensor | None = None) -> Tensor:
    """Features ``(batch, length, dim)`` moved on by one place: at each token that of the token before it. ``first``
    ``(batch, dim)`` comes before all; without it zeros, which nobody reads."""
    head = torch.zeros_like(features[:, :1]) if first is None else first[:, None]
    return torch.cat((head, features[:, :-1]), 1)


class _Projections(nn.Module):
    """Queries of one sequence, keys and values of another (or the same), and the way back."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class _SelfLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, norm: bool) -> None:
        super().__init__()
        self.attention, self.mlp = _Projections(dim, num_heads), GatedMlp(dim, hidden)
        self.before: nn.Module = nn.RMSNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.between = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: DynamicCache) -> Tensor:
        at, y = self.attention, self.before(x)
        query, key = (apply_rotary(at.split(project(y)), *angles) for project in (at.query, at.key))
        kept = cache.append(key, at.split(at.value(y)))
        x = x + at.out(merge_heads(dense_attention(query, kept.key, kept.value, mask=Boolean(mask[None, None]))))
        out: Tensor = x + self.mlp(self.between(x))
        return out


class _CrossLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.mlp = _Projections(dim, num_heads), GatedMlp(dim, hidden)
        self.query_norm, self.key_norm = (nn.RMSNorm(dim // num_heads, eps=1e-6) for _ in range(2))
        self.before, self.between = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Tensor, features: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        at = self.attention
        query = self.query_norm(at.split(at.query(self.before(x))))
        kept = cache.append(self.key_norm(at.split(at.key(features))), at.split(at.value(features)))
        # Slot 0 stands for what comes before the first token.
        known = mask.clone()
        known[:, 0] = False
        read = at.out(merge_heads(dense_attention(query, kept.key, kept.value, mask=Boolean(known[None, None]))))
        x = x + self.attention_gate.tanh() * read
        out: Tensor = x + self.mlp_gate.tanh() * self.mlp(self.between(x))
        return out


class DreamDraft(nn.Module):
    """dim: width of the target's embeddings and hidden states. num_heads: of attention. hidden: width of the MLPs (by
    default 8/3 of ``dim``). rotary_base: of the self-attention's positions."""

    def __init__(self, dim: int, num_heads: int, hidden: int | None = None, *, rotary_base: float = 10000.0) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads or dim // num_heads % 2:
            raise OptionError(f"dim must be num_heads heads of even width; got {dim} and {num_heads}.")
        width = 8 * dim // 3 if hidden is None else hidden
        self.dim, self.num_heads, self.rotary_base = dim, num_heads, rotary_base
        self.first = _SelfLayer(dim, num_heads, width, norm=False)
        self.cross = _CrossLayer(dim, num_heads, width)
        self.last = _SelfLayer(dim, num_heads, width, norm=True)
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(
        self,
        embeds: Tensor,
        target_feats: Tensor,
        mask: Tensor | None = None,
        cache: DraftCache | None = None,
        positions: Tensor | None = None,
    ) -> DraftOutput:
        """Read tokens ``(batch, length, dim)`` behind those in ``cache``.

        target_feats ``(batch, length, dim)``: at each token the target's last hidden state of the token *before* it
        (:func:`previous_features`), so that a token reads what the target made of all earlier ones. mask: boolean
        ``(length, earlier + length)``, who sees whom, itself included (None: causal; a tree's in drafting); it holds
        for tokens and features alike. positions: ``(length,)``, by default one after the other.
        """
        if embeds.shape != target_feats.shape or embeds.shape[-1] != self.dim:
            raise ShapeError(
                f"Embeddings and features are (batch, length, {self.dim}) of the same tokens; got "
                f"{tuple(embeds.shape)} and {tuple(target_feats.shape)}."
            )
        cache = DraftCache() if cache is None else cache
        past, new = cache.seen, embeds.shape[1]
        device = embeds.device
        if mask is None:
            mask = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)
        if mask.shape != (new, past + new):
            raise ShapeError(f"The mask is ({new}, {past + new}), one column a token; got {tuple(mask.shape)}.")
        if positions is None:
            positions = torch.arange(past, past + new, device=device)
        cos, sin = rotary_angles(
            int(positions.max()) + 1, self.dim // self.num_heads, base=self.rotary_base, device=device,
            dtype=embeds.dtype,
        )  # fmt: skip
        angles = cos[positions], sin[positions]
        x = self.first(embeds, angles, mask, cache.layers[0])
        fused = self.cross(x, target_feats, mask, cache.layers[1])
        return DraftOutput(self.norm(self.last(fused, angles, mask, cache.layers[2])), fused)
