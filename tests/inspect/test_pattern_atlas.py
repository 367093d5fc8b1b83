"""The atlas of patterns: its pictures, codes and box against loops, planted patterns told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.inspect.pattern_atlas import (
    PatternDecoder,
    PatternEmbedding,
    PatternEncoder,
    attention_pattern_embedding,
    sample_grid,
)


def patterned() -> Tensor:
    """Diagonals, class-token columns and even maps, each with noise: ``(3, 4, 2, 16, 16)``, one kind a layer."""
    torch.manual_seed(4)
    column = torch.zeros(16, 16)
    column[:, 0] = 1
    kinds = torch.stack((torch.eye(16), column, torch.full((16, 16), 1 / 16)))
    noisy = 0.9 * kinds[:, None, None] + 0.1 * torch.rand(3, 4, 2, 16, 16).softmax(-1)
    return noisy / noisy.sum(-1, keepdim=True)


@pytest.mark.paper("vit_head_analytics")
def test_autoencoder_tells_patterns_apart_and_draws_them() -> None:
    attn = patterned()
    found = attention_pattern_embedding(attn, size=16, clusters=3, steps=250, batch_size=16)
    assert found.codes.shape == (3, 4, 2, 2) and found.prototypes.shape == (3, 16, 16)
    assert found.error < 0.25 * found.spread
    clusters = [set(found.assignment[kind].flatten().tolist()) for kind in range(3)]
    assert all(len(names) == 1 for names in clusters) and len(set.union(*clusters)) == 3
    diagonal, column, even = (found.prototypes[int(found.head_clusters()[kind, 0])] for kind in range(3))
    assert float(diagonal.diagonal().mean()) > 0.5 > 0.3 > float(diagonal[:4, 8:].mean())
    assert float(column[:, 0].mean()) > 0.5 > 0.3 > float(column[:, 8:].mean())
    assert float(even.mean()) > 0.6
    first, again = (attention_pattern_embedding(attn, size=16, clusters=3, steps=3) for _ in range(2))
    assert torch.equal(first.codes, again.codes)


@pytest.mark.paper("vit_head_analytics")
def test_atlas_covers_the_box_of_codes() -> None:
    torch.manual_seed(0)
    decoder = PatternDecoder(2, 16)
    decoder.low.copy_(torch.tensor([-1.0, 2.0]))
    decoder.high.copy_(torch.tensor([3.0, 5.0]))
    atlas = sample_grid(decoder, 3)
    assert atlas.shape == (3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(atlas[0, 0], decoder(torch.tensor([[-1.0, 5.0]]))[0])
        torch.testing.assert_close(atlas[2, 0], decoder(torch.tensor([[-1.0, 2.0]]))[0])
        torch.testing.assert_close(atlas[1, 2], decoder(torch.tensor([[3.0, 3.5]]))[0])
    with pytest.raises(OptionError, match="2 codes"):
        sample_grid(PatternDecoder(3, 16))


@pytest.mark.paper("vit_head_analytics")
def test_codes_error_and_box_are_those_of_maps_over_their_rows_maxima() -> None:
    attn = patterned().double()
    found = attention_pattern_embedding(attn, size=16, clusters=3, steps=20)
    pictures, codes, rebuilt = [], [], []
    for layer in range(3):
        for image in range(4):
            for head in range(2):
                whole = attn[layer, image, head]
                picture = torch.stack([row / row.max() for row in whole]).float()
                with torch.no_grad():
                    code = found.encoder(picture[None])
                    rebuilt.append(found.decoder(code)[0].numpy())
                torch.testing.assert_close(found.codes[layer, image, head], code[0], rtol=1e-4, atol=1e-5)
                pictures.append(picture.numpy())
                codes.append(code[0].numpy())
    drawn, coded = np.stack(pictures).astype(np.float64), np.stack(codes)
    assert found.error == pytest.approx(float(((np.stack(rebuilt) - drawn) ** 2).mean()), rel=1e-4)
    assert found.spread == pytest.approx(float(((drawn - drawn.mean(0)) ** 2).mean()), rel=1e-4)
    np.testing.assert_allclose(found.decoder.low.numpy(), coded.min(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.decoder.high.numpy(), coded.max(0), rtol=1e-4, atol=1e-5)
    cluster = int(found.assignment[0, 0, 0])
    middle = torch.from_numpy(coded[(found.assignment == cluster).flatten().numpy()].mean(0, keepdims=True))
    with torch.no_grad():
        torch.testing.assert_close(found.prototypes[cluster], found.decoder(middle)[0], rtol=1e-3, atol=1e-4)


def test_maps_of_another_size_are_resized_and_empty_rows_stay_empty() -> None:
    even, nothing = torch.full((5, 5), 0.2), torch.zeros(5, 5)
    found = attention_pattern_embedding(torch.stack((even, nothing))[None, None], size=16, clusters=2, steps=2)
    with torch.no_grad():
        expected = found.encoder(torch.stack((torch.ones(16, 16), torch.zeros(16, 16))))
    torch.testing.assert_close(found.codes[0, 0], expected)


def test_a_heads_cluster_is_that_of_most_images() -> None:
    assignment = torch.tensor([[[0, 1], [2, 1], [2, 0], [1, 0]]])
    empty = PatternEmbedding(
        torch.empty(1, 4, 2, 2), assignment, torch.empty(3, 8, 8), PatternEncoder(), PatternDecoder(), 0.0, 0.0
    )
    # Of head 1 two images each are in clusters 0 and 1.
    assert empty.head_clusters().tolist() == [[2, 0]]


def test_bad_input_is_explained() -> None:
    maps = torch.rand(1, 1, 2, 4, 4)
    with pytest.raises(ShapeError, match="layers, batch, heads"):
        attention_pattern_embedding(maps[0, 0])
    with pytest.raises(OptionError, match="clusters"):
        attention_pattern_embedding(maps, clusters=3)
    with pytest.raises(OptionError, match="8 divides"):
        attention_pattern_embedding(maps, clusters=1, size=20)
    with pytest.raises(OptionError, match="batch of at least 2"):
        attention_pattern_embedding(maps, clusters=1, batch_size=1)
    for bad in (torch.full((1, 2, 4, 4, 4), torch.nan), torch.rand(1, 0, 4, 4, 4)):
        with pytest.raises(OptionError, match="not finite"):
            attention_pattern_embedding(bad)
