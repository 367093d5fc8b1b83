"""Titans: language models whose memory goes on learning while they read.

Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time", 2024, arXiv 2501.00663, section 4, in Llama's
macro architecture as in the proceedings (NeurIPS 2025, section 3.3): a block is ``x + mixer(RMSNorm(x))``, then ``x +
SwiGLU(RMSNorm(x))``. The mixer is memory as context, as gate or as layer (:mod:`regard.linear.titans_layers`), or the
memory alone (:class:`~regard.linear.titans.NeuralMemory`). The paper trains with 128 persistent tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.linear.titans import NeuralMemory
from regard.linear.titans_layers import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from regard.models.stepwise import StepwiseLM

__all__ = ["TitansBlock", "TitansLMM", "TitansMAC", "TitansMAG", "TitansMAL"]


class TitansBlock(nn.Module):
    """A mixer and a SwiGLU unit ``(SiLU(x Wg) * x Wv) Wo``, each behind an RMSNorm and added to the stream. hidden: its
    width, by default ``8 / 3`` of ``embed_dim`` in steps of 8."""

    def __init__(self, embed_dim: int, mixer: nn.Module, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or -(-8 * embed_dim // 3 // 8) * 8
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(embed_dim, eps=1e-6), nn.RMSNorm(embed_dim, eps=1e-6)
        self.mixer = mixer
        self.mlp_gate = nn.Linear(embed_dim, hidden, bias=False)
        self.mlp_value = nn.Linear(embed_dim, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, embed_dim)`` in and out."""
        return self._feed(x + self.mixer(self.mixer_norm(x)))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next tokens and the new state."""
        mixed, state = self.mixer.step(self.mixer_norm(x), state)  # type: ignore[operator]
        return self._feed(x + mixed), state

    def _feed(self, x: Tensor) -> Tensor:
        normed = self.mlp_norm(x)
        out: Tensor = x + self.mlp_out(F.silu(self.mlp_gate(normed)) * self.mlp_value(normed))
        return out


class _Titans(StepwiseLM):
    """Tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)``; decoding keeps one state per layer, whose
    size does not depend on how much was read."""

    def __init__(
        self, vocab_size: int, embed_dim: int, num_layers: int, hidden: int | None, mixer: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        if vocab_size < 1 or num_layers < 1:
            raise OptionError(f"Need vocab_size and num_layers of at least 1; got {vocab_size} and {num_layers}.")
        self.embed = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(TitansBlock(embed_dim, mixer(), hidden) for _ in range(num_layers))
        self.norm = nn.RMSNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)

    def init_state(self, batch: int) -> list[Any]:
        """The state before the first token, one per layer."""
        like = self.embed.weight
        return [block.mixer.init_state(batch, like=like) for block in self.blocks]  # type: ignore[operator, union-attr]


class TitansMAC(_Titans):
    """Memory as context: attention within segments of ``segment`` tokens, over what the memory recalls besides."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        segment: int = 64,
        persistent: int = 16,
        memory: Mapping[str, Any] | bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            embed_dim,
            num_layers,
            hidden,
            lambda: MemoryAsContext(embed_dim, num_heads, segment, persistent, memory),
        )


class TitansMAG(_Titans):
    """Memory as gate: sliding-window attention, gated by the memory."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        window: int = 64,
        persistent: int = 16,
        memory: Mapping[str, Any] | bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            embed_dim,
            num_layers,
            hidden,
            lambda: MemoryAsGate(embed_dim, num_heads, window, persistent, memory),
        )


class TitansMAL(_Titans):
    """Memory as layer: sliding-window attention over what the memory reads."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        window: int = 64,
        persistent: int = 16,
        memory: Mapping[str, Any] | bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            embed_dim,
            num_layers,
            hidden,
            lambda: MemoryAsLayer(embed_dim, num_heads, window, persistent, memory),
        )


class TitansLMM(_Titans):
    """The long-term memory alone; memory: options of :class:`~regard.linear.titans.NeuralMemory`."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        memory: Mapping[str, Any] | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            embed_dim,
            num_layers,
            hidden,
            lambda: NeuralMemory(embed_dim, **{"num_heads": num_heads, **(memory or {})}),
        )
