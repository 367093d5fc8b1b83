from __future__ import annotations

import pytest
import torch

from regard.errors import OptionError
from regard.linear.inline_attention import InLineAttention
from regard.models.inline import (
    InLineCrossShapedAttention,
    InLineCSwin,
    InLineDeiT,
    InLinePVT,
    InLineSwin,
    InLineSwinBlock,
)

D = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.paper("inline_attention")
@pytest.mark.parametrize(
    ("model", "size", "millions"),
    [
        (InLineDeiT, "tiny", 6.5),
        (InLineDeiT, "small", 16.7),
        (InLineDeiT, "base", 23.8),
        (InLinePVT, "tiny", 12.0),
        (InLinePVT, "small", 21.6),
        (InLinePVT, "medium", 37.6),
        (InLineSwin, "tiny", 29.7),
    ],
)
def test_published_numbers_of_parameters(model, size, millions) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in model.preset(size).parameters())
    assert abs(count / 1e6 - millions) < 0.06


@pytest.mark.parametrize("phi", ["identity", "relu"])
def test_deit_trains_on_other_shapes_of_images(phi) -> None:
    model = InLineDeiT((8, 12), 2, 1, 5, embed_dim=12, depth=2, num_heads=3, phi=phi)
    images = torch.randn(2, 1, 8, 12)
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "model",
    [
        lambda: InLinePVT((8, 16), (2, 2), (1, 1), (2, 2), image_size=32, num_classes=5),
        lambda: InLineSwin(8, (2, 2), (2, 2), window=4, num_classes=5),
        lambda: InLineCSwin(8, (2, 1), (2, 2), stripes=(2, None), num_classes=5),
    ],
)
def test_pyramids_take_all_sizes(model) -> None:
    built = model()
    images = torch.randn(2, 3, 37, 52)
    assert built(images).shape == (2, 5)
    built(images).sum().backward()
    assert all(p.grad is not None for p in built.parameters())
    built.eval()
    together = built(images)
    torch.testing.assert_close(built(images[1:]), together[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.paper("inline_attention")
def test_a_window_over_the_map_is_the_layer_itself() -> None:
    block, x = InLineSwinBlock(12, 3, window=56, shift=28).double().eval(), torch.randn(2, 30, 12, dtype=D)
    found = block.mix(x, (5, 6))
    torch.testing.assert_close(found, block.attention(block.attention_norm(x), grid=(5, 6)), **TIGHT)


@pytest.mark.parametrize("shift", [0, 2])
def test_each_window_attends_to_itself_alone(shift) -> None:
    """Windows of 4 on a map of 10 x 7, cut at multiples of 4 from the shift on: each piece by itself."""
    block, x = InLineSwinBlock(12, 3, window=4, shift=shift).double().eval(), torch.randn(2, 10, 7, 12, dtype=D)
    found = block.mix(x.flatten(1, 2), (10, 7)).unflatten(1, (10, 7))
    normed = block.attention_norm(x)
    cuts = [[0, *range(shift or 4, length, 4), length] for length in (10, 7)]
    for top, bottom in zip(cuts[0], cuts[0][1:], strict=False):
        for left, right in zip(cuts[1], cuts[1][1:], strict=False):
            piece = normed[:, top:bottom, left:right]
            alone = block.attention(piece.flatten(1, 2), grid=piece.shape[1:3]).view_as(piece)
            torch.testing.assert_close(found[:, top:bottom, left:right], alone, **TIGHT)


def test_stripes_as_wide_as_the_map_are_no_stripes() -> None:
    """Two halves on the whole map are one layer: heads do not mix before the projection."""
    striped, whole = InLineCrossShapedAttention(16, 4, stripe=9).double(), InLineCrossShapedAttention(16, 4).double()
    whole.qkv.load_state_dict(striped.qkv.state_dict())
    whole.proj.load_state_dict(striped.proj.state_dict())
    for name in ("residuals", "lepe"):
        halves = [part.state_dict() for part in getattr(striped, name)]
        getattr(whole, name)[0].load_state_dict({k: torch.cat([h[k] for h in halves]) for k in halves[0]})
    x = torch.randn(2, 30, 16, dtype=D)
    torch.testing.assert_close(striped(x, grid=(5, 6)), whole(x, grid=(5, 6)), **TIGHT)


def test_stripes_do_not_see_one_another() -> None:
    layer, x = InLineCrossShapedAttention(16, 4, stripe=2).double(), torch.randn(1, 5, 7, 16, dtype=D)
    other = x.clone()
    other[:, 4, 6] += 1
    before, after = (layer(t.flatten(1, 2), grid=(5, 7)).unflatten(1, (5, 7)) for t in (x, other))
    changed = (before - after).abs().amax(-1)[0] > 1e-9
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[:, 6] = True  # its vertical stripe holds column 6 alone
    expected[4] = True
    assert torch.equal(changed, expected)


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="preset"):
        InLineDeiT.preset("huge")
    with pytest.raises(OptionError, match="stage"):
        InLinePVT(depths=(1, 1))
    with pytest.raises(OptionError, match="stage"):
        InLineCSwin(stripes=(1, 1))
    with pytest.raises(OptionError, match="even"):
        InLineCrossShapedAttention(15, 3, stripe=2)
    assert isinstance(InLineSwinBlock(8, 2).attention, InLineAttention)
