"""The memory core of an agent: what it observes goes through blocks that remember it in chunks.

Lampinen et al., "Towards mental time travel", 2021, arXiv 2105.14039, section 2 and figure 1: observations are
encoded, pass through layers of hierarchical chunk attention, each with a memory of its own and, where asked for,
attention to the last few steps before it, and are decoded. Observations ``(batch, length, input_dim)`` (or tokens
``(batch, length)``) to ``(batch, length, num_outputs)``: the whole episode at once, as a learner reads it, or step by
step, as an actor lives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, UnsupportedPatternError
from regard.linear.hcam import HCAMBlock, HierarchicalMemory
from regard.nn import MultiHeadAttention

__all__ = ["CoreState", "HierarchicalMemoryAgentCore"]


@dataclass(frozen=True, eq=False)
class CoreState:
    """memories: one per layer; recent: the inputs of each layer's local attention ``(batch, window - 1, embed_dim)``;
    seen ``(batch,)``: steps of the episode so far."""

    memories: tuple[HierarchicalMemory, ...]
    recent: tuple[Tensor, ...]
    seen: Tensor

    def reset(self, mask: Tensor) -> CoreState:
        """Forget everything where ``mask (batch,)`` is True, so that nothing leaks from one episode into the next.
        Without a reset, memories are kept across episodes."""
        return CoreState(tuple(m.reset(mask) for m in self.memories), self.recent, self.seen.masked_fill(mask, 0))


class HierarchicalMemoryAgentCore(nn.Module):
    """Encoder, ``depth`` layers, norm, linear read-out.

    input_dim or vocab_size: observations are vectors or tokens. window: steps that local attention with rotary
    positions sees, the present one included, None for none. Other options as in :class:`~regard.linear.hcam.HCAM`.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        input_dim: int | None = None,
        vocab_size: int | None = None,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        chunk_size: int = 32,
        top_k: int = 4,
        window: int | None = None,
        slots: int | None = None,
        position: bool = True,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if (input_dim is None) == (vocab_size is None):
            raise OptionError("Give input_dim for vectors or vocab_size for tokens, one of the two.")
        if window is not None and window < 2:
            raise OptionError(f"Local attention needs a window of at least 2, or None; got {window}.")
        self.window = window
        self.encoder: nn.Module = (
            nn.Embedding(vocab_size, embed_dim) if vocab_size else nn.Linear(cast(int, input_dim), embed_dim)
        )
        self.local_norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(depth if window else 0))
        self.local = nn.ModuleList(
            MultiHeadAttention(embed_dim, num_heads, "sliding_window", rotary=True, window=window, sinks=0)
            for _ in range(depth if window else 0)
        )
        self.blocks = nn.ModuleList(
            HCAMBlock(embed_dim, num_heads, chunk_size, top_k, position, slots, mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_outputs)

    def forward(self, observations: Tensor, *, episode: Tensor | None = None) -> Tensor:
        """Outputs of every step. episode: numbers ``(batch, length)``; memories are not read across their changes."""
        if episode is not None and self.window:
            raise UnsupportedPatternError(
                "Several episodes in one sequence need a core without local attention; give it one episode at a time."
            )
        hidden = self.encoder(observations)
        for index, block in enumerate(self.blocks):
            if self.window:
                hidden = hidden + self.local[index](self.local_norms[index](hidden), causal=True)
            hidden = block(hidden, episode=episode)
        return cast(Tensor, self.head(self.norm(hidden)))

    def init_state(self, batch: int, *, like: Tensor) -> CoreState:
        """The state before the first step, in the dtype and on the device of ``like``."""
        memories = tuple(block.memory.init_state(batch, like=like) for block in self._blocks())
        width = self.norm.normalized_shape[0]
        recent = tuple(like.new_zeros(batch, cast(int, self.window) - 1, width) for _ in self.local)
        return CoreState(memories, recent, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def step(self, observations: Tensor, state: CoreState) -> tuple[Tensor, CoreState]:
        """The next steps ``(batch, length, ...)``, with the numbers of :meth:`forward` on the whole episode."""
        hidden = self.encoder(observations)
        length = hidden.shape[1]
        memories, recent = [], []
        for index, block in enumerate(self._blocks()):
            if self.window:
                both = torch.cat((state.recent[index], self.local_norms[index](hidden)), 1)
                age = torch.arange(both.shape[1], 0, -1, device=hidden.device)
                real = age <= state.seen[:, None] + length
                read = self.local[index](both, causal=True, key_padding=real)
                hidden = hidden + read[:, -length:]
                recent.append(both[:, length:])
            hidden, memory = block.step(hidden, state.memories[index])
            memories.append(memory)
        out: Tensor = self.head(self.norm(hidden))
        return out, CoreState(tuple(memories), tuple(recent), state.seen + length)

    def _blocks(self) -> list[HCAMBlock]:
        return cast(list[HCAMBlock], list(self.blocks))
