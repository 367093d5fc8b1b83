"""Sentence matching with combined attention (arXiv 2412.07220): encoder layer, pair classifier, adapter.

A pair is read as one sequence ``[a ; sep ; b]`` by one encoder, so that every token meets the other sentence's. As
weights do not sum to 1, each block ends in a LayerNorm: ``x = norm(x + attention(x))``, ``x = norm(x + mlp(x))``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.mlp import Mlp
from regard.masks import KeyPadding
from regard.nn import MultiHeadAttention

__all__ = ["ComateAdapter", "ComateEncoderLayer", "ComateMatcher"]


class ComateEncoderLayer(nn.Module):
    """``(batch, length, embed_dim)`` in and out, norms after the residuals.

    mechanism: any name, combined attention by default; options: of it.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_ratio: float = 4.0, mechanism: str = "comateformer", **options: Any
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(embed_dim, num_heads, mechanism, **options)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, mlp_ratio)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_padding: Tensor | None = None) -> Tensor:
        """Within ``x``, or from ``x`` to ``context (batch, k_len, embed_dim)``. key_padding: boolean ``(batch,
        k_len)``, True for real tokens."""
        mask = None if key_padding is None else KeyPadding(key_padding)
        x = self.attention_norm(x + self.attention(x, context, mask=mask))
        return cast(Tensor, self.mlp_norm(x + self.mlp(x)))


def _pooled(hidden: Tensor, real: Tensor) -> Tensor:
    """The mean over real tokens."""
    share = real / real.sum(-1, keepdim=True).clamp_min(1)
    return (hidden * share[..., None].to(hidden.dtype)).sum(1)


class ComateMatcher(nn.Module):
    """Pairs ``[a ; sep ; b]`` of token ids ``(batch, length)`` to logits ``(batch, num_classes)``.

    Learned embeddings of tokens, positions and sentences (what follows the first ``separator`` is the second), one
    stack of :class:`ComateEncoderLayer`, the mean over real tokens, a linear classifier. padding: an id that is no
    token. mechanism, options: as in the layer.
    """

    def __init__(
        self,
        vocab_size: int,
        separator: int,
        num_classes: int = 2,
        *,
        padding: int | None = None,
        embed_dim: int = 64,
        num_heads: int = 4,
        depth: int = 1,
        max_length: int = 512,
        mlp_ratio: float = 4.0,
        mechanism: str = "comateformer",
        **options: Any,
    ) -> None:
        super().__init__()
        if not 0 <= separator < vocab_size or separator == padding:
            raise OptionError(f"The separator is one of {vocab_size} tokens and not padding, got {separator}.")
        self.separator, self.padding = separator, padding
        self.tokens = nn.Embedding(vocab_size, embed_dim)
        self.positions, self.sentences = nn.Embedding(max_length, embed_dim), nn.Embedding(2, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.layers = nn.ModuleList(
            ComateEncoderLayer(embed_dim, num_heads, mlp_ratio, mechanism, **options) for _ in range(depth)
        )
        self.head = nn.Linear(embed_dim, num_classes)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """``[a ; sep ; b]`` of ids ``(batch, length)`` each."""
        return torch.cat((first, torch.full_like(first[:, :1], self.separator), second), 1)

    def forward(self, pair: Tensor) -> Tensor:
        """Logits of joined pairs."""
        if pair.dim() != 2 or pair.shape[1] > self.positions.num_embeddings:
            raise ShapeError(
                f"Pairs are ids (batch, length) of at most {self.positions.num_embeddings} tokens, got "
                f"{tuple(pair.shape)}."
            )
        real = torch.ones_like(pair, dtype=torch.bool) if self.padding is None else pair != self.padding
        before = (pair == self.separator).long().cumsum(1)
        # The separator itself belongs to the first sentence.
        sentence = (before - (pair == self.separator).long()).clamp_max(1)
        places = torch.arange(pair.shape[1], device=pair.device)
        hidden = self.norm(self.tokens(pair) + self.positions(places) + self.sentences(sentence))
        for layer in self.layers:
            hidden = layer(hidden, key_padding=None if self.padding is None else real)
        return cast(Tensor, self.head(_pooled(hidden, real)))


class ComateAdapter(nn.Module):
    """Combined attention on top of a pretrained encoder, and a classifier over the mean of its real tokens.

    encoder: gives ``(batch, length, embed_dim)``, or an output whose ``last_hidden_state`` is that, as models of
    transformers do; frozen unless ``train_encoder``. options: of :class:`ComateEncoderLayer`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embed_dim: int,
        num_heads: int,
        num_classes: int = 2,
        *,
        depth: int = 1,
        train_encoder: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        if not train_encoder:
            encoder.requires_grad_(False)
        self.layers = nn.ModuleList(ComateEncoderLayer(embed_dim, num_heads, **options) for _ in range(depth))
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, *inputs: Any, key_padding: Tensor | None = None, **keywords: Any) -> Tensor:
        """Logits ``(batch, num_classes)``; what is not ``key_padding (batch, length)`` goes to the encoder."""
        out = self.encoder(*inputs, **keywords)
        hidden: Tensor = out if isinstance(out, Tensor) else out.last_hidden_state
        for layer in self.layers:
            hidden = layer(hidden, key_padding=key_padding)
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if key_padding is None else key_padding
        return cast(Tensor, self.head(_pooled(hidden, real)))
