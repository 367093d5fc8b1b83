"""CoSwin backbones: Swin's pyramid of blocks with a gated convolution branch, for small images.

Source: "CoSwin: Convolution Enhanced Hierarchical Shifted Window Attention For Small-Scale Vision", 2025, arXiv
2509.08959 (mechanism: :mod:`regard.local.coswin`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from regard.local.coswin import CoSwinBlock
from regard.models.swin import Swin

__all__ = ["CoSwin"]


class CoSwin(Swin):
    """Images ``(batch, in_channels, height, width)`` -> logits ``(batch, num_classes)``; :meth:`maps` gives stages."""

    presets: ClassVar = {"pixels_32": {"patch_size": 2}, "pixels_64": {"patch_size": 4, "num_classes": 200}}
    """One size, for images of 32 x 32 (CIFAR, SVHN) and of 64 x 64 (Tiny ImageNet)."""

    block = CoSwinBlock

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 6, 4),
        num_heads: Sequence[int] = (3, 6, 12),
        window: int = 4,
        patch_size: int = 2,
        in_channels: int = 3,
        num_classes: int = 10,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__(
            embed_dim,
            depths,
            num_heads,
            window=window,
            patch_size=patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )
