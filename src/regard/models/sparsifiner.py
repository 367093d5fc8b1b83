"""A vision transformer whose layers attend to predicted keys, and that may drop tokens on its way.

Attention: :mod:`regard.sparse.sparsifiner`. Tokens are pruned as in EViT: after the blocks ``prune_at`` those of
largest class-token attention, mean over heads, stay; the others are set to zero and hidden from then on. (The released
code hides them from patch tokens alone; the class token's softmax still counts them, with a logit of zero.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.masks import KeyPadding
from regard.models.vit import VisionTransformer
from regard.nn import MultiHeadAttention, TransformerBlock
from regard.sparse.selection import top_k_mask
from regard.sparse.sparsifiner import Mode, SparsifinerAttention

__all__ = ["SparsifinerViT"]


class SparsifinerViT(VisionTransformer):
    """Images to logits. By default Sparsifiner-S, on the sizes of DeiT-S.

    token_keep: share of patch tokens that each of the blocks ``prune_at`` keeps of those before it. attention: options
    of :class:`~regard.sparse.sparsifiner.SparsifinerAttention` besides ``tokens``. Other arguments as in
    :class:`~regard.models.vit.VisionTransformer`.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        token_keep: float = 1.0,
        prune_at: Sequence[int] = (3, 6, 9),
        attention: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        tokens = 1 + (sides[0] // patch_size) * (sides[1] // patch_size)
        if not 0 < token_keep <= 1:
            raise OptionError(f"token_keep is a share above 0 and up to 1, got {token_keep}.")
        super().__init__(
            image_size,
            patch_size,
            in_channels,
            num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mechanism="sparsifiner",
            options={"tokens": tokens, "reduce_n": 6, **(attention or {})},
            **options,
        )
        self.token_keep, self.prune_at = token_keep, tuple(prune_at)

    @property
    def layers(self) -> list[SparsifinerAttention]:
        """The attention of each block."""
        blocks = (cast(TransformerBlock, block).attention for block in self.blocks)
        return [cast(SparsifinerAttention, cast(MultiHeadAttention, host).mechanism) for host in blocks]

    def set_mode(self, mode: Mode) -> None:
        """``"dense"`` attention while the predictors learn, ``"sparse"`` afterwards."""
        for layer in self.layers:
            layer.mode = mode

    def load_dense(self, teacher: VisionTransformer) -> SparsifinerViT:
        """Take over the weights of a dense model of the same sizes; the predictors stay as they are."""
        missing, unexpected = self.load_state_dict(teacher.state_dict(), strict=False)
        wrong = [*unexpected, *(name for name in missing if ".predictor." not in name)]
        if wrong:
            raise OptionError(f"The dense model is another: {', '.join(wrong[:4])} do not match.")
        return self

    def prune(self, scores: Tensor, kept: Tensor | None, count: int) -> Tensor:
        """Boolean ``(batch, patches)``: the ``count`` tokens of largest score among those ``kept`` (None: all)."""
        return top_k_mask(scores if kept is None else scores.masked_fill(~kept, float("-inf")), count)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, patch tokens ``(batch, patches, embed_dim)`` behind the last norm, and which of them were kept
        ``(batch, patches)`` (None: all)."""
        tokens, kept, share = self.embed(images), None, 1.0
        patches = tokens.shape[1] - 1
        for index, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            mask = None if kept is None else KeyPadding(torch.cat((kept.new_ones(len(kept), 1), kept), 1))
            tokens = block(tokens, mask=mask)
            if self.token_keep < 1 and index in self.prune_at and layer.mode == "sparse":
                share *= self.token_keep
                assert layer.class_attention is not None
                kept = self.prune(layer.class_attention[..., 1:].mean(1), kept, math.ceil(share * patches))
            if kept is not None:
                tokens = torch.cat((tokens[:, :1], tokens[:, 1:] * kept[..., None]), 1)
        return self.classify(tokens), self.norm(tokens)[:, 1:], kept

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[0]
