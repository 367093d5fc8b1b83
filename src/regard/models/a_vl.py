"""A small vision-language decoder: image patches, then text, through causal blocks, and its answer token by token.

As in LLaVA (Liu et al., 2023, arXiv 2304.08485) patches are projected to the width of the text's embeddings by one
linear layer and stand before the text; everything behind them is a causal language model. Positions are learned and
added before the first block, so cached keys carry theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from regard.errors import ShapeError
from regard.nn import MultiHeadAttention, TransformerBlock

__all__ = ["Attend", "VisionLanguageDecoder"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, query, key, value of the newest tokens to what their queries read; past tokens are its own affair."""


class VisionLanguageDecoder(nn.Module):
    """Patches ``(batch, num_patches, patch_dim)`` and text ``(batch, length)`` to logits of the next text token,
    ``(batch, length, vocab_size)``."""

    def __init__(
        self,
        num_patches: int,
        patch_dim: int,
        vocab_size: int,
        *,
        max_text: int = 64,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.num_patches, self.patch_dim, self.max_text = num_patches, patch_dim, max_text
        self.patches = nn.Linear(patch_dim, embed_dim)
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.positions = nn.Parameter(torch.empty(num_patches + max_text, embed_dim))
        nn.init.normal_(self.positions, std=0.5)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, MultiHeadAttention(embed_dim, num_heads, num_kv_heads=num_kv_heads), mlp_ratio)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Logits at every text token, everything at once."""
        hidden = self.prompt(*inputs)
        for block in self.blocks:
            hidden = block(hidden, causal=True)
        return self._logits(hidden[:, self.num_patches :])

    def prompt(self, patches: Tensor, text: Tensor) -> Tensor:
        """What enters the first block."""
        if patches.shape[1:] != (self.num_patches, self.patch_dim) or text.shape[1] > self.max_text:
            raise ShapeError(
                f"This model takes {self.num_patches} patches of {self.patch_dim} numbers and at most {self.max_text} "
                f"text tokens; got patches {tuple(patches.shape)} and text {tuple(text.shape)}."
            )
        tokens = torch.cat((self.patches(patches), self.embed(text)), 1)
        return tokens + self.positions[: tokens.shape[1]]

    def through(self, hidden: Tensor, attend: Attend) -> Tensor:
        """New tokens through all blocks; ``attend`` holds what came before. Logits of the last."""
        for index, layer in enumerate(self.blocks):
            block = cast(TransformerBlock, layer)
            host = cast(MultiHeadAttention, block.attention)
            out = attend(index, *host.project(block.attention_norm(hidden)))
            hidden = hidden + host.out(out.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp(block.mlp_norm(hidden))
        return self._logits(hidden[:, -1])

    @torch.no_grad()
    def generate(self, patches: Tensor, text: Tensor, steps: int, attend: Attend) -> Tensor:
        """The likeliest continuation of the prompt, token by token: ``(batch, steps)``."""
        logits, out = self.through(self.prompt(patches, text), attend), []
        for step in range(steps):
            out.append(logits.argmax(-1))
            if step + 1 < steps:
                place = self.num_patches + text.shape[1] + step
                logits = self.through(self.embed(out[-1])[:, None] + self.positions[place], attend)
        return torch.stack(out, 1)

    def _logits(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.norm(hidden)))
