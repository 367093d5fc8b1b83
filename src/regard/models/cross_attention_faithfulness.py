"""TinyS2T: a speech-to-text transformer small enough to train while one waits, for looking at its cross-attention.

In the manner of the models of "Cross-Attention is Half Explanation in Speech-to-Text Models", 2025, arXiv 2509.18010:
a convolution shortens the spectrogram, an encoder mixes what it heard over time, and a decoder reads the encoder's
states by cross-attention, one token after another. Each encoder step stands for ``downsample`` frames that no other
step sees, so that saliency of frames and of steps can be compared; only attention in the encoder mixes them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from regard.errors import ShapeError
from regard.layers.sinusoids import sinusoids
from regard.nn import MultiHeadAttention, TransformerBlock

__all__ = ["DecoderBlock", "TinyS2T"]


class DecoderBlock(TransformerBlock):
    """A causal block that reads the encoder between its self-attention and its MLP."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float = 2.0) -> None:
        super().__init__(embed_dim, MultiHeadAttention(embed_dim, num_heads), mlp_ratio)
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.cross = MultiHeadAttention(embed_dim, num_heads)

    def read(self, x: Tensor, memory: Tensor) -> Tensor:
        """``(batch, T_out, embed_dim)`` in and out, over memory ``(batch, T_enc, embed_dim)``."""
        x = self.attend(x, causal=True)
        return self.feed_forward(x + self.cross(self.cross_norm(x), memory))


class TinyS2T(nn.Module):
    """Spectrograms ``(batch, T_in, num_features)`` and decoder inputs ``(batch, T_out)`` to logits ``(batch, T_out,
    vocab_size)`` of the next token; ``T_in`` is a multiple of ``downsample``.

    Cross-attention of a captured run: ``capture(model, layers=lambda path: ".cross" in path)``.
    """

    def __init__(
        self,
        vocab_size: int,
        num_features: int = 16,
        *,
        embed_dim: int = 64,
        num_heads: int = 4,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        downsample: int = 2,
        max_length: int = 256,
    ) -> None:
        super().__init__()
        self.num_features, self.downsample = num_features, downsample
        self.front = nn.Conv1d(num_features, embed_dim, downsample, stride=downsample)
        self.positions: Tensor
        self.register_buffer("positions", sinusoids(max_length, embed_dim), persistent=False)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.encoder = nn.ModuleList(
            TransformerBlock(embed_dim, MultiHeadAttention(embed_dim, num_heads), 2.0) for _ in range(encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(embed_dim)
        self.decoder = nn.ModuleList(DecoderBlock(embed_dim, num_heads) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size)

    def encode(self, x: Tensor) -> Tensor:
        """States ``(batch, T_in / downsample, embed_dim)``."""
        if x.dim() != 3 or x.shape[2] != self.num_features or x.shape[1] % self.downsample or x.shape[1] == 0:
            raise ShapeError(
                f"Spectrograms are (batch, frames, {self.num_features}) with a multiple of {self.downsample} frames; "
                f"got {tuple(x.shape)}. Pad them with silence."
            )
        states = self.front(x.transpose(1, 2)).transpose(1, 2)
        states = torch.nn.functional.gelu(states) + self.positions[: states.shape[1]]
        for block in self.encoder:
            states = block(states)
        return cast(Tensor, self.encoder_norm(states))

    def decode(self, memory: Tensor, inputs: Tensor) -> Tensor:
        """Logits from encoder states."""
        x = self.embedding(inputs) + self.positions[: inputs.shape[1]]
        for block in self.decoder:
            assert isinstance(block, DecoderBlock)
            x = block.read(x, memory)
        return cast(Tensor, self.head(self.norm(x)))

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Logits under forced decoding."""
        return self.decode(self.encode(x), inputs)
