"""What language models share that read token by token with one state per block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import ShapeError

__all__ = ["StepwiseLM"]


class StepwiseLM(nn.Module):
    """Tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)``. A subclass makes ``embed``, ``blocks``
    (whose ``step`` takes and gives a state), ``norm`` and ``head``."""

    embed: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        hidden = self._embed(tokens)
        for block in self.blocks:
            hidden = self._read(block, hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def step(self, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Logits of the next tokens ``(batch, new)`` after all that ``state`` has seen, and the new state."""
        hidden, after = self._embed(tokens), []
        for block, before in zip(self.blocks, state, strict=True):
            hidden, now = block.step(hidden, before)  # type: ignore[operator]
            after.append(now)
        logits: Tensor = self.head(self.norm(hidden))
        return logits, after

    def _read(self, block: nn.Module, hidden: Tensor) -> Tensor:
        out: Tensor = block(hidden)
        return out

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ShapeError(f"Tokens are integers (batch, length), got {tokens.dtype} of shape {tuple(tokens.shape)}.")
        hidden: Tensor = self.embed(tokens)
        return hidden
