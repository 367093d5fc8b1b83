"""The vision transformer: patches and a class token through blocks whose attention is any mechanism or layer.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, arXiv 2010.11929, section 3.1: patches are projected, a
learned class token stands before them, learned positions are added, pre-norm blocks follow, and the head reads the
class token. Images ``(batch, in_channels, height, width)``; tokens ``(batch, 1 + patches, embed_dim)``, the class
token first, then the patches row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.drop_path import drop_path_rates
from regard.layers.maps import PatchEmbed
from regard.nn import MultiHeadAttention, TransformerBlock, make_attention

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """Images to logits ``(batch, num_classes)``.

    image_size: a side, or height and width, in pixels; patch_size divides both. mechanism: one name for all blocks, or
    one per block. options: of the mechanism (one mapping for all, or per block). position_std: deviation of the initial
    positions; small models on few images learn faster from a larger one.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        mechanism: str | Sequence[str] = "full",
        options: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        drop_path: float = 0.0,
        position_std: float = 0.02,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise OptionError(f"patch_size {patch_size} does not divide images of {height} x {width} pixels.")
        names = [mechanism] * depth if isinstance(mechanism, str) else list(mechanism)
        settings = [options or {}] * depth if options is None or isinstance(options, dict) else list(options)
        if len(names) != depth or len(settings) != depth:
            raise OptionError(f"Need one mechanism and one options mapping per block ({depth}).")
        self.image_size, self.grid = (height, width), (height // patch_size, width // patch_size)
        self.patches = PatchEmbed(in_channels, embed_dim, patch_size, norm=False)
        self.class_token = nn.Parameter(torch.zeros(embed_dim))
        self.positions = nn.Parameter(torch.zeros(1 + self.grid[0] * self.grid[1], embed_dim))
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embed_dim,
                make_attention(name, embed_dim, num_heads, **{"layer_index": i, "num_layers": depth, **setting}),
                mlp_ratio,
                drop_path=rates[i],
            )
            for i, (name, setting) in enumerate(zip(names, settings, strict=True))
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        for block in self.blocks:
            _initialise(block)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.positions, std=position_std)

    def embed(self, images: Tensor) -> Tensor:
        """Images to the tokens that enter the first block."""
        if images.dim() != 4 or images.shape[2:] != self.image_size:
            raise ShapeError(
                f"This model takes images (batch, channels, {self.image_size[0]}, {self.image_size[1]}); "
                f"got {tuple(images.shape)}."
            )
        tokens, _ = self.patches(images)
        return torch.cat((self.class_token.expand(len(images), 1, -1), tokens), 1) + self.positions

    def encode(self, tokens: Tensor, first: int = 0, last: int | None = None, **call: Any) -> Tensor:
        """Tokens through the blocks ``first`` to ``last`` (excluded); keywords go to the attention (mask)."""
        for block in list(self.blocks)[first:last]:
            tokens = block(tokens, **call)
        return tokens

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits from the class token, the first one."""
        return cast(Tensor, self.head(self.norm(tokens[:, 0])))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.classify(self.encode(self.embed(images)))

    def attention_weights(self, tokens: Tensor, layer: int) -> Tensor:
        """What block ``layer`` attends to when ``tokens`` enter it: ``(batch, num_heads, tokens, tokens)``."""
        block = cast(TransformerBlock, self.blocks[layer])
        if not isinstance(block.attention, MultiHeadAttention):
            raise OptionError("Weights are read from blocks around a mechanism; this one is a layer of its own.")
        query, key, value = block.attention.project(block.attention_norm(tokens))
        return block.attention.mechanism.weights(query, key, value)


def _initialise(block: nn.Module) -> None:
    """Xavier's uniform weights and zero biases, as the released code begins; what a mechanism owns stays as it is."""
    assert isinstance(block, TransformerBlock)
    host = block.attention
    own = [host.query, host.key, host.value, host.out] if isinstance(host, MultiHeadAttention) else []
    for linear in [*own, *(layer for layer in block.mlp if isinstance(layer, nn.Linear))]:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
