"""Alternating attention over several views, as in VGGT: within each frame, then over all frames, layer by layer.

Each frame's patches come with a camera token and registers, learned, of the first frame apart from the others': it
stands for the world's origin. Queries and keys are normed per head and turned by rotary positions of both axes (base
100; half of a head's dimensions each; special tokens at position 0, patches from 1 on), so frames are told apart by
content alone. Source: Wang et al., "VGGT: Visual Geometry Grounded Transformer", 2025, arXiv 2503.11651, section 3.2,
as the host that :mod:`regard.sparse.sparse_vggt` makes sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.nn import MultiHeadAttention, TransformerBlock

__all__ = ["AlternatingAttention", "ViewAttention"]


class ViewAttention(MultiHeadAttention):
    """A multi-head host that norms queries and keys per head and turns them by the positions that it is given."""

    def __init__(self, embed_dim: int, num_heads: int, mechanism: str = "full", **options: Any) -> None:
        super().__init__(embed_dim, num_heads, mechanism, **options)
        if self.head_dim % 4:
            raise OptionError(f"Rotary positions of two axes need a head_dim that 4 divides, got {self.head_dim}.")
        self.query_norm, self.key_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, *, turn: tuple[Tensor, Tensor], grid: Sequence[int] | None = None
    ) -> Tensor:
        """``(batch, length, embed_dim)`` in and out. turn: cosines and sines ``(length, 2, head_dim / 2)``."""
        query, key, value = self.project(x)
        query, key = (
            apply_rotary(t.unflatten(-1, (2, -1)), *turn).flatten(-2)
            for t in (self.query_norm(query), self.key_norm(key))
        )
        out = self.mechanism(query, key, value, grid=grid)
        return cast(Tensor, self.out(self.dropout(out.transpose(1, 2).flatten(2))))


class AlternatingAttention(nn.Module):
    """Patches ``(batch, frames, height * width, embed_dim)`` -> tokens ``(batch, frames, special + height * width,
    embed_dim)``, special ones first.

    depth: pairs of a block within frames and a global one. special: camera token and registers of a frame. mechanism:
    of the global blocks, called with ``grid=(frames, tokens a frame)``; its options follow. To make a trained model
    sparse: ``regard.retrofit(model, "sparse_vggt", layers=lambda path: "global_blocks" in path, frames=8)``.
    """

    def __init__(
        self,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        special: int = 5,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 0.01,
        mechanism: str = "full",
        **options: Any,
    ) -> None:
        super().__init__()
        if special < 0 or depth < 1:
            raise OptionError(f"Need depth >= 1 and special >= 0, got {depth} and {special}.")
        self.head_dim = embed_dim // num_heads
        # The first frame's, and those of all others.
        self.special = nn.Parameter(1e-6 * torch.randn(2, special, embed_dim))

        def blocks(mechanism: str, **options: Any) -> nn.ModuleList:
            return nn.ModuleList(
                TransformerBlock(
                    embed_dim,
                    ViewAttention(embed_dim, num_heads, mechanism, layer_index=index, num_layers=depth, **options),
                    mlp_ratio,
                    layer_scale=layer_scale,
                )
                for index in range(depth)
            )

        self.frame_blocks, self.global_blocks = blocks("full"), blocks(mechanism, **options)

    def turn(self, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a frame's tokens, ``(special + height * width, 2, head_dim / 2)``."""
        parts = rotary_angles(
            max(height, width) + 1, self.head_dim // 2, base=100.0, device=like.device, dtype=like.dtype
        )
        place = torch.cartesian_prod(*(torch.arange(1, n + 1, device=like.device) for n in (height, width)))
        place = torch.cat((place.new_zeros(self.special.shape[1], 2), place))
        cos, sin = (part[place] for part in parts)
        return cos, sin

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """grid: (height, width) of a frame's patches."""
        if x.dim() != 4 or len(grid) != 2 or x.shape[2] != grid[0] * grid[1]:
            raise ShapeError(
                f"Need patches (batch, frames, height * width, embed_dim) on grid=(height, width); got "
                f"{tuple(x.shape)} and {tuple(grid)}."
            )
        batch, frames = x.shape[:2]
        which = torch.arange(frames, device=x.device).clamp_max(1)
        x = torch.cat((self.special[which].to(x.dtype).expand(batch, -1, -1, -1), x), 2)
        tokens = x.shape[2]
        within = self.turn(grid[0], grid[1], x)
        across = within[0].repeat(frames, 1, 1), within[1].repeat(frames, 1, 1)
        x = x.flatten(0, 1)
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame_block(x, turn=within).view(batch, frames * tokens, -1)
            x = global_block(x, turn=across, grid=(frames, tokens)).view(batch * frames, tokens, -1)
        return x.view(batch, frames, tokens, -1)
