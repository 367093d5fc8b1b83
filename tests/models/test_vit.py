"""The vision transformer: its parts in order, any mechanism inside, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.errors import OptionError, ShapeError
from regard.models.vit import VisionTransformer


def model(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depth": 3, "num_heads": 2, **options}
    return VisionTransformer((8, 12), 4, 2, 5, **sizes).double()  # type: ignore[arg-type]


def test_tokens_are_a_class_token_and_projected_patches_with_positions() -> None:
    vit, images = model(), torch.randn(3, 2, 8, 12, dtype=torch.float64)
    tokens = vit.embed(images)
    assert vit.grid == (2, 3) and tokens.shape == (3, 7, 12)
    torch.testing.assert_close(tokens[:, 0], (vit.class_token + vit.positions[0]).expand(3, -1))
    patch = images[1, :, 4:8, 8:12].flatten()
    conv = vit.patches.conv
    assert conv.bias is not None
    torch.testing.assert_close(tokens[1, 6], conv.weight.flatten(1) @ patch + conv.bias + vit.positions[6])


def test_the_blocks_are_pre_norm_and_the_head_reads_the_class_token() -> None:
    vit, images = model(), torch.randn(2, 2, 8, 12, dtype=torch.float64)
    x = vit.embed(images)
    for block in vit.blocks:
        normed = block.attention_norm(x)  # type: ignore[operator]
        q, k, v = block.attention.project(normed)  # type: ignore[union-attr, operator]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + block.attention.out(mixed)  # type: ignore[union-attr, operator]
        x = x + block.mlp(block.mlp_norm(x))  # type: ignore[operator]
    torch.testing.assert_close(vit.encode(vit.embed(images)), x)
    torch.testing.assert_close(vit(images), vit.head(vit.norm(x[:, 0])))
    halfway = vit.encode(vit.embed(images), last=2)
    torch.testing.assert_close(vit.classify(vit.encode(halfway, first=2)), vit(images))


def test_weights_are_those_of_the_block() -> None:
    vit, images = model(), torch.randn(2, 2, 8, 12, dtype=torch.float64)
    tokens = vit.encode(vit.embed(images), last=1)
    block = vit.blocks[1]
    q, k, _ = block.attention.project(block.attention_norm(tokens))  # type: ignore[union-attr, operator]
    expected = (q @ k.mT / 6**0.5).softmax(-1)
    torch.testing.assert_close(vit.attention_weights(tokens, 1), expected)


def test_each_block_may_have_its_own_mechanism() -> None:
    vit = model(mechanism=["full", "dare", "full"], options=[{}, {"top_k": 2}, {}])
    assert (vit.attention_weights(vit.embed(torch.randn(1, 2, 8, 12).double()), 1) > 0).sum(-1).eq(2).all()
    assert vit(torch.randn(1, 2, 8, 12).double()).shape == (1, 5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="patch_size 5"):
        VisionTransformer(16, 5)
    with pytest.raises(OptionError, match="per block"):
        model(mechanism=["full"])
    with pytest.raises(ShapeError, match="8, 12"):
        model()(torch.randn(1, 2, 8, 8).double())
