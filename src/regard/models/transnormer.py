"""TransNormerLLM: a language model on lightning attention.

Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", 2024,
arXiv 2405.17381, section 4; the architecture is that of "TransNormerLLM", 2023, arXiv 2307.14995. A block is
``x + TnlAttention(SRMSNorm(x))``, then ``x + SGLU(SRMSNorm(x))`` with ``SGLU(x) = (x Wv * x Wu) Wo``, a gated
unit without an activation. The first layer has rotations besides its decay, the others the decay alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from regard.layers.norms import SRMSNorm
from regard.linear.lightning_attention import TnlAttention, TnlState
from regard.models.stepwise import StepwiseLM

__all__ = ["SGLU", "TransNormerBlock", "TransNormerLLM"]


class SGLU(nn.Module):
    """``(x Wv * x Wu) Wo``: a simple gated linear unit. ``hidden`` defaults to ``8 / 3`` of the width, in
    steps of 8."""

    def __init__(self, embed_dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or -(-8 * embed_dim // 3 // 8) * 8
        self.value = nn.Linear(embed_dim, hidden, bias=False)
        self.gate = nn.Linear(embed_dim, hidden, bias=False)
        self.out = nn.Linear(hidden, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., embed_dim)`` in and out."""
        mixed: Tensor = self.out(self.value(x) * self.gate(x))
        return mixed


class TransNormerBlock(nn.Module):
    """Gated lightning attention and a simple gated linear unit, each behind an SRMSNorm and added to the
    stream."""

    def __init__(
        self, embed_dim: int, num_heads: int, layer_index: int, num_layers: int, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.norm = SRMSNorm()
        self.attention = TnlAttention(embed_dim, num_heads, layer_index, num_layers)
        self.glu = SGLU(embed_dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, embed_dim)`` in and out."""
        x = x + self.attention(self.norm(x))
        out: Tensor = x + self.glu(self.norm(x))
        return out

    def step(self, x: Tensor, state: TnlState) -> tuple[Tensor, TnlState]:
        """The next tokens and the new state."""
        mixed, state = self.attention.step(self.norm(x), state)
        x = x + mixed
        return x + self.glu(self.norm(x)), state


class TransNormerLLM(StepwiseLM):
    """Tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)``; decoding keeps one state per
    layer, whose size does not depend on how much was read."""

    def __init__(
        self, vocab_size: int, embed_dim: int, num_layers: int, num_heads: int, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(
            TransNormerBlock(embed_dim, num_heads, index, num_layers, hidden) for index in range(num_layers)
        )
        self.norm = SRMSNorm()
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)

    def init_state(self, batch: int) -> list[TnlState]:
        """The state before the first token, one per layer."""
        return [TnlState() for _ in self.blocks]
