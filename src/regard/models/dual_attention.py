"""Dual Attention Transformers: an encoder, a causal language model and a vision model whose blocks share their symbols.

Altabaa and Lafferty, 2024, arXiv 2405.16727 (layer: :mod:`regard.dense.dual_attention`). Before each block one
retriever makes symbols from what enters the block; ``relational_heads=0`` is the ordinary Transformer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.dense.dual_attention import DualAttention, DualState, RelationalAttention
from regard.errors import OptionError, ShapeError
from regard.layers.symbols import symbol_retriever
from regard.masks import Mask
from regard.nn import TransformerBlock

__all__ = ["DATDecoderLM", "DATEncoder", "ViDAT"]


class DATEncoder(nn.Module):
    """Blocks of dual attention and an MLP, ``(batch, length, embed_dim)`` in and out.

    relational_heads: of ``num_heads`` (default: half). symbols, symbol_options: the retriever. shared_symbols: one for
    all blocks, else one each. attention: further options of :class:`~regard.dense.dual_attention.DualAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        relational_heads: int | None = None,
        *,
        causal: bool = False,
        mlp_ratio: float = 4.0,
        symbols: str = "symbolic",
        symbol_options: Mapping[str, int] | None = None,
        shared_symbols: bool = True,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embed_dim, DualAttention(embed_dim, num_heads, relational_heads, symbols=None, **attention), mlp_ratio
            )
            for _ in range(depth)
        )
        relational = num_heads // 2 if relational_heads is None else relational_heads
        count = 0 if not relational else 1 if shared_symbols else depth
        self.symbols = nn.ModuleList(
            symbol_retriever(symbols, embed_dim, **(symbol_options or {})) for _ in range(count)
        )

    def forward(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """Encode. mask: a regard mask or a boolean tensor, True where visible."""
        for index, block in enumerate(self.blocks):
            x = block(x, symbols=self._symbols(x, index), causal=self.causal, mask=mask)
        return x

    def init_state(self, batch: int, *, like: Tensor) -> list[DualState]:
        """The decoding state before the first token, one a block."""
        return [self._attention(block).init_state(batch, like=like) for block in self.blocks]

    def step(self, x: Tensor, state: list[DualState]) -> Tensor:
        """The next tokens ``(batch, new, embed_dim)`` of a causal encoder; the state is changed in place."""
        if not self.causal:
            raise OptionError("Only a causal encoder decodes step by step; build it with causal=True.")
        for index, (each, kept) in enumerate(zip(self.blocks, state, strict=True)):
            block = cast(TransformerBlock, each)
            symbols = self._symbols(x, index, kept.seen)
            out, _ = self._attention(block).step(block.attention_norm(x), kept, symbols=symbols)
            x = x + out
            x = x + block.mlp(block.mlp_norm(x))
        return x

    @staticmethod
    def _attention(block: nn.Module) -> DualAttention:
        return cast(DualAttention, cast(TransformerBlock, block).attention)

    def _symbols(self, x: Tensor, index: int, start: int = 0) -> Tensor | None:
        if not len(self.symbols):
            return None
        return cast(Tensor, self.symbols[min(index, len(self.symbols) - 1)](x, start))


class DATDecoderLM(nn.Module):
    """Tokens ``(batch, length)`` int64 to logits ``(batch, length, vocab_size)``: tied embedding and head, rotary
    positions, weights N(0, 0.02), those that end a branch divided by ``sqrt(2 depth)``. options: of
    :class:`DATEncoder`."""

    def __init__(
        self,
        vocab_size: int,
        *,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        relational_heads: int | None = None,
        rotary: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.encoder = DATEncoder(embed_dim, depth, num_heads, relational_heads, causal=True, rotary=rotary, **options)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RelationalAttention):
                nn.init.normal_(module.rel_out, std=0.02)
        for block in self.encoder.blocks:
            for name, parameter in block.named_parameters():
                if name.endswith("out.weight") or name == "mlp.2.weight":
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each place."""
        return cast(Tensor, self.head(self.norm(self.encoder(self.embed(tokens)))))

    def init_state(self, batch: int, *, like: Tensor) -> list[DualState]:
        """The decoding state before the first token."""
        return self.encoder.init_state(batch, like=like)

    def step(self, tokens: Tensor, state: list[DualState]) -> tuple[Tensor, list[DualState]]:
        """Logits after the next tokens ``(batch, new)``, and the state, which is changed in place."""
        return self.head(self.norm(self.encoder.step(self.embed(tokens), state))), state


class ViDAT(nn.Module):
    """Images ``(batch, in_channels, height, width)`` to logits: patches (with norms before and after their projection),
    a class token first, learned positions, blocks with symmetric relations and symbols by offset, as released.

    image_size: height and width, multiples of patch_size. pool: ``"cls"`` or ``"mean"``. options: of
    :class:`DATEncoder`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        relational_heads: int | None = None,
        symmetric: bool = True,
        symbols: str = "relative",
        symbol_options: Mapping[str, int] | None = None,
        pool: str = "cls",
        **options: Any,
    ) -> None:
        super().__init__()
        height, width = image_size
        if height % patch_size or width % patch_size:
            raise OptionError(f"patch_size {patch_size} does not divide images of {height} x {width} pixels.")
        if pool not in ("cls", "mean"):
            raise OptionError(f"pool is 'cls' or 'mean', got {pool!r}.")
        count = 1 + (height // patch_size) * (width // patch_size)
        if symbols == "relative":
            symbol_options = {"max_rel_pos": count, **(symbol_options or {})}
        self.image_size, self.patch_size, self.pool = (height, width), patch_size, pool
        pixels = in_channels * patch_size**2
        self.patches = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, embed_dim), nn.LayerNorm(embed_dim))
        self.class_token = nn.Parameter(torch.randn(embed_dim))
        self.positions = nn.Parameter(torch.randn(count, embed_dim))
        self.encoder = DATEncoder(
            embed_dim,
            depth,
            num_heads,
            relational_heads,
            symmetric=symmetric,
            symbols=symbols,
            symbol_options=symbol_options,
            **options,
        )
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)``."""
        if images.dim() != 4 or tuple(images.shape[2:]) != self.image_size:
            raise ShapeError(f"Expected images (batch, channels, {self.image_size}), got {tuple(images.shape)}.")
        pixels = nn.functional.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(images), 1, -1), self.patches(pixels)), 1) + self.positions
        hidden = self.encoder(tokens)
        return cast(Tensor, self.head(hidden[:, 0] if self.pool == "cls" else hidden.mean(1)))
