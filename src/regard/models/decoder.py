"""A small language model with the parts of nano, whose attention is any mechanism or layer.

What :mod:`regard.models.nano` takes from Llama (Touvron et al., 2023, arXiv 2302.13971): RMSNorm before each half of a
block, gated MLPs with SiLU, rotary positions, no biases, one matrix for embedding and read-out. With ``full`` it is
that model. Where attention takes no rotary positions, a learned vector for each position is added to the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from regard.layers.mlp import GatedMlp
from regard.mechanism import Layer, Mechanism
from regard.models.sequence import SequenceModel
from regard.nn import TransformerBlock
from regard.registry import get
from regard.registry import options as known_options

__all__ = ["Decoder", "positions_of"]

_EPS = 1e-5
# Of the embedding, as in transformers' Llama.
_SPREAD = 0.02


def positions_of(mechanism: str, options: Mapping[str, Any] | None = None) -> str:
    """How a decoder with this attention knows positions: ``"rotary"``, ``"none"`` where it turns queries and keys by
    itself, or ``"learned"`` where it cannot have them rotated or its options say ``rotary=False``."""
    cls = cast(type[Layer | Mechanism], get(mechanism))
    if cls.applies_rotary:
        return "none"
    rotates = issubclass(cls, Mechanism) or "rotary" in known_options(mechanism)
    return "rotary" if rotates and (options or {}).get("rotary", True) else "learned"


class Decoder(SequenceModel):
    """Tokens ``(batch, length)`` to the logits of the next, ``(batch, length, vocab_size)``.

    hidden: of the gated MLPs. max_length: of inputs, where positions are learned. options: of the mechanism, whose
    weights begin as it has them itself; all others begin as nano's do.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        *,
        embed_dim: int = 96,
        depth: int = 2,
        num_heads: int = 4,
        hidden: int = 352,
        mechanism: str = "full",
        options: Mapping[str, Any] | None = None,
        max_length: int = 256,
    ) -> None:
        own: dict[str, Any] = {} if issubclass(get(mechanism), Layer) else {"bias": False}
        super().__init__(
            vocab_size,
            vocab_size=vocab_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mechanism=mechanism,
            options={**own, **(options or {})},
            positions=positions_of(mechanism, options),
            max_length=max_length,
        )
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            block.attention_norm, block.mlp_norm = (nn.RMSNorm(embed_dim, _EPS) for _ in range(2))
            mlp = GatedMlp(embed_dim, hidden)
            block.mlp = mlp  # type: ignore[assignment]
            for linear in (mlp.gate, mlp.up):
                nn.init.normal_(linear.weight, std=embed_dim**-0.5 / 2)
            nn.init.zeros_(mlp.down.weight)
        self.norm = nn.RMSNorm(embed_dim, _EPS)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=_SPREAD)
        embed = nn.Embedding(vocab_size, embed_dim)
        embed.weight = self.head.weight
        self.embed = embed
