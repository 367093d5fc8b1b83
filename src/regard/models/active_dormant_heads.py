"""The small transformers in which heads learn to rest: one to three layers, with softmax or with ReLU attention.

"Active-Dormant Attention Heads", 2024, arXiv 2410.13835, section 2: token plus learned position embeddings, pre-norm
blocks of attention and a ReLU MLP of four times the width, a last norm and a linear head; no biases outside the norms.
``attn="relu"`` weighs keys by ``relu(score) / t`` at the ``t``-th position, so that a row may be all zeros.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.nn.attention import MultiHeadAttention

__all__ = ["BackcopyTransformer"]

_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("full", {}),
    "relu": ("dense_attention", {"normalizer": "relu"}),
}


class _Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + W_2 relu(W_1 norm(x))``."""

    def __init__(self, embed_dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim, bias=False), nn.ReLU(), nn.Linear(4 * embed_dim, embed_dim, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), causal=True)
        return cast(Tensor, x + self.mlp(self.mlp_norm(x)))


class BackcopyTransformer(nn.Module):
    """Tokens ``(batch, length)`` int64 to logits ``(batch, length, vocab_size)``; ``vocab_size`` counts the start
    token. attn: ``"softmax"`` or ``"relu"``. Width 256, one layer and one head by default, as in the paper's runs."""

    def __init__(
        self,
        vocab_size: int,
        *,
        attn: Literal["softmax", "relu"] = "softmax",
        embed_dim: int = 256,
        depth: int = 1,
        num_heads: int = 1,
        max_length: int = 256,
    ) -> None:
        super().__init__()
        if attn not in _ATTENTION:
            raise OptionError(f"attn is 'softmax' or 'relu', got {attn!r}.")
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.positions = nn.Embedding(max_length, embed_dim)
        name, options = _ATTENTION[attn]
        self.blocks = nn.ModuleList(
            _Block(embed_dim, MultiHeadAttention(embed_dim, num_heads, name, bias=False, **options))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next token at each position."""
        if x.shape[1] > self.positions.num_embeddings:
            raise ShapeError(f"{x.shape[1]} tokens exceed max_length {self.positions.num_embeddings}.")
        hidden = self.embed(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        return cast(Tensor, self.head(self.norm(hidden)))
