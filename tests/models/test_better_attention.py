"""The encoder classifier is a plain encoder with the attention that was asked for."""

from __future__ import annotations

import pytest
import torch

from regard.dense.better_attention import EfficientAttention, OptimisedAttention, SuperAttention
from regard.errors import OptionError, ShapeError
from regard.masks import KeyPadding
from regard.models.better_attention import TinyEncoderClassifier
from regard.nn import MultiHeadAttention

CLASSES = {
    "standard": MultiHeadAttention,
    "optimised": OptimisedAttention,
    "efficient": EfficientAttention,
    "super": SuperAttention,
}


@pytest.mark.paper("better_attention")
@pytest.mark.parametrize("kind", CLASSES)
def test_kinds_on_texts_and_patches(kind: str) -> None:
    text = TinyEncoderClassifier(2, kind, max_len=12, vocab_size=30, embed_dim=16, depth=2)  # type: ignore[arg-type]
    assert all(type(block.get_submodule("attention")) is CLASSES[kind] for block in text.blocks)
    tokens = torch.randint(30, (3, 12))
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[1, 7:] = False
    out = text(tokens, mask=KeyPadding(valid))
    other = torch.where(valid, tokens, (tokens + 1) % 30)
    torch.testing.assert_close(text(other, mask=KeyPadding(valid)), out)
    torch.testing.assert_close(text(tokens[1:2, :7]), out[1:2])
    images = TinyEncoderClassifier(10, kind, max_len=16, input_dim=4, embed_dim=16)  # type: ignore[arg-type]
    assert images(torch.randn(2, 16, 4)).shape == (2, 10)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="one of"):
        TinyEncoderClassifier(2, "best", max_len=4, vocab_size=3)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="exceed"):
        TinyEncoderClassifier(2, max_len=4, vocab_size=3)(torch.zeros(1, 5, dtype=torch.int64))
