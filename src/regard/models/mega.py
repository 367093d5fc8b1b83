"""A language model of Mega blocks.

Ma et al., "Mega: Moving Average Equipped Gated Attention", 2022, arXiv 2209.10655. Tokens are embedded
with variance one; there are no positions besides those of the layers. With a ``chunk_size`` reading is linear in the
text's length, and decoding keeps a state of bounded size.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from regard.linear.mega import MegaBlock, MegaState
from regard.models.stepwise import StepwiseLM

__all__ = ["MegaLM"]


class MegaLM(StepwiseLM):
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

    def init_state(self, batch: int) -> list[MegaState]:
        """The state before the first token, one per block."""
        blocks = (cast(MegaBlock, block) for block in self.blocks)
        return [block.layer.init_state(batch, like=self.embed.weight.detach()) for block in blocks]

    def _read(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return cast(Tensor, block(hidden, causal=True))
