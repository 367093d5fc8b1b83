"""The vision-language decoder: token by token it says what it says in parallel."""

from __future__ import annotations

import pytest
import torch

from regard.cache import DynamicCache
from regard.decode.a_vl import AVLPolicy
from regard.errors import ShapeError
from regard.models.a_vl import VisionLanguageDecoder
from regard.reproduce.a_vl import stepping


def model() -> VisionLanguageDecoder:
    torch.manual_seed(0)
    return VisionLanguageDecoder(12, 4, 9, max_text=20, embed_dim=32, num_kv_heads=2).double().eval()


@pytest.mark.paper("a_vl")
def test_decoding_equals_the_parallel_form_with_a_full_cache_and_with_a_whole_budget() -> None:
    decoder = model()
    patches, text = torch.randn(3, 12, 4, dtype=torch.float64), torch.randint(9, (3, 2))
    whole = AVLPolicy((0, 12), secondary=1.0, core=1.0, text_recent=None, refresh=2)
    for caches in ([DynamicCache() for _ in range(2)], whole.caches(2)):
        written = decoder.generate(patches, text, 10, stepping(caches))
        sequence = torch.cat((text, written), 1)
        with torch.no_grad():
            parallel = decoder((patches, sequence[:, :-1]))
        assert torch.equal(parallel[:, 1:].argmax(-1), written)


def test_text_reaches_no_earlier_logits() -> None:
    decoder, patches = model(), torch.randn(1, 12, 4, dtype=torch.float64)
    text = torch.randint(9, (1, 8))
    before = decoder((patches, text))
    text[0, 5] = (text[0, 5] + 1) % 9
    change = (decoder((patches, text)) - before).abs().amax((0, 2))
    assert change[:5].max() == 0 and change[5:].min() > 0


def test_wrong_input_is_explained() -> None:
    with pytest.raises(ShapeError, match="12 patches"):
        model()((torch.randn(1, 11, 4, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64)))
    with pytest.raises(ShapeError, match="at most 20"):
        model()((torch.randn(1, 12, 4, dtype=torch.float64), torch.zeros(1, 21, dtype=torch.int64)))
