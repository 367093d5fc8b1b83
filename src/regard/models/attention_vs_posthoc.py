"""A text classifier of one attention layer, read at its first token: small enough for closed forms.

"Attention Meets Post-hoc Interpretability: A Mathematical Perspective", 2024, arXiv 2402.03485, section 2::

    e_t = embedding(token_t) + sinusoids_t;   q_i = W_Q^i e_0,  k_t^i = W_K^i e_t,  v_t^i = W_V^i e_t
    alpha_t^i = softmax_t(q_i . k_t^i / sqrt(head_dim));   f_c(x) = (1/H) sum_i w_c^i . sum_t alpha_t^i v_t^i

No skip connection, no norm and no bias anywhere: outside the softmax the model is linear. Cost: one query, so linear in
the length: ``2 T embed_dim H (head_dim + value_dim)`` multiplications for the projections.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from regard.errors import ShapeError
from regard.layers.sinusoids import sinusoids

__all__ = ["CLSAttentionClassifier", "Reading"]


class Reading(NamedTuple):
    """What the heads see: ``query`` ``(batch, num_heads, head_dim)`` of the first token, ``key`` and ``value``
    ``(batch, num_heads, length, ...)``, ``weights`` ``(batch, num_heads, length)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor


class CLSAttentionClassifier(nn.Module):
    """Tokens ``(batch, length)`` int64, the first of them [CLS], to logits ``(batch, num_classes)``.

    Shorter documents of a batch are filled up with the unknown token, which is attended to like any other (as in the
    authors' code). Initialised as there: projections and class vectors uniform in [-0.1, 0.1], embeddings normal.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 128,
        head_dim: int = 64,
        value_dim: int = 64,
        num_heads: int = 6,
        max_length: int = 256,
        num_classes: int = 2,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_classes = num_heads, num_classes
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.positions: Tensor
        self.register_buffer("positions", sinusoids(max_length, embed_dim), persistent=False)
        self.query = nn.Linear(embed_dim, num_heads * head_dim, bias=False)
        self.key = nn.Linear(embed_dim, num_heads * head_dim, bias=False)
        self.value = nn.Linear(embed_dim, num_heads * value_dim, bias=False)
        self.class_vectors = nn.Parameter(torch.empty(num_classes, num_heads, value_dim))
        for weight in (self.query.weight, self.key.weight, self.value.weight, self.class_vectors):
            nn.init.uniform_(weight, -0.1, 0.1)

    def embed(self, tokens: Tensor) -> Tensor:
        """``e`` ``(batch, length, embed_dim)``: what gradients are taken of."""
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= len(self.positions):
            raise ShapeError(
                f"Tokens are (batch, length) with 1 to max_length {len(self.positions)} of them, [CLS] first; got "
                f"{tuple(tokens.shape)}. Build the model with a larger max_length, or cut the documents."
            )
        return cast(Tensor, self.embedding(tokens)) + self.positions[: tokens.shape[1]]

    def read(self, embedded: Tensor) -> Reading:
        """The heads' view of embedded documents."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = self.query(embedded[:, 0]).unflatten(-1, (self.num_heads, -1))
        key, value = heads(self.key(embedded)), heads(self.value(embedded))
        scores = (key @ query[..., None])[..., 0] / math.sqrt(query.shape[-1])
        return Reading(query, key, value, scores.softmax(-1))

    def classify(self, weights: Tensor, value: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of attention weights over values: what is linear in the values."""
        mixed = (weights[..., None, :] @ value)[..., 0, :]
        return torch.einsum("bhd,chd->bc", mixed, self.class_vectors) / self.num_heads

    def from_embedded(self, embedded: Tensor) -> Tensor:
        """Logits of embedded documents ``(batch, length, embed_dim)``."""
        reading = self.read(embedded)
        return self.classify(reading.weights, reading.value)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.from_embedded(self.embed(tokens))
