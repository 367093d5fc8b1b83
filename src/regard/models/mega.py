"""A language model of Mega blocks.

Ma et al., "Mega: Moving Average Equipped Gated Attention", 2022, arXiv 2209.10655. Tokens are embedded
with variance one; there are no positions besides those of the layers. With a ``chunk_size`` reading is linear in the
text's length, and decoding keeps a state of bounded size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import ShapeError
from regard.linear.mega import MegaBlock, MegaState

__all__ = ["MegaLM"]


class MegaLM(nn.Module):
    """Tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)`` of the next ones.

    prenorm: blocks norm their inputs, and what the last one gives is normed before the head. options: of
    :class:`~regard.linear.mega.MegaBlock`.
    """

    def __init__(
        self, vocab_size: int, embed_dim: int, num_layers: int, *, prenorm: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.blocks = nn.ModuleList(MegaBlock(embed_dim, prenorm=prenorm, **options) for _ in range(num_layers))
        self.norm = nn.LayerNorm(embed_dim) if prenorm else nn.Identity()
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=embed_dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at every position."""
        hidden = self._embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def init_state(self, batch: int) -> list[MegaState]:
        """The state before the first token, one per block."""
        blocks = (cast(MegaBlock, block) for block in self.blocks)
        return [block.layer.init_state(batch, like=self.embed.weight.detach()) for block in blocks]

    def step(self, tokens: Tensor, state: list[MegaState]) -> tuple[Tensor, list[MegaState]]:
        """Logits of the next tokens ``(batch, new)`` after all that ``state`` has seen, and the new state."""
        hidden, after = self._embed(tokens), []
        for block, before in zip(self.blocks, state, strict=True):
            hidden, now = cast(MegaBlock, block).step(hidden, before)
            after.append(now)
        logits: Tensor = self.head(self.norm(hidden))
        return logits, after

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ShapeError(f"Tokens are integers (batch, length), got {tokens.dtype} of shape {tuple(tokens.shape)}.")
        hidden: Tensor = self.embed(tokens)
        return hidden
