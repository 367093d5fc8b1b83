from __future__ import annotations

import pytest
import torch

from regard.errors import OptionError
from regard.linear.rala import RALA, GatedSoftmax2d
from regard.models.ravlt import RAVLT, RAVLTBlock


@pytest.mark.paper("rala")
@pytest.mark.parametrize(("size", "millions"), [("tiny", 15), ("small", 26), ("base", 48), ("large", 95)])
def test_published_numbers_of_parameters(size, millions) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in RAVLT.preset(size).parameters())
    assert abs(count / 1e6 - millions) < 0.5


@pytest.mark.paper("rala")
def test_linear_on_large_maps_and_softmax_on_small_ones() -> None:
    with torch.device("meta"):
        model = RAVLT.preset("base")
    kinds = [{type(block.feature.attention) for block in blocks} for blocks in model.stages]
    assert kinds == [{RALA}, {RALA}, {GatedSoftmax2d}, {GatedSoftmax2d}]
    scales = RAVLT((8, 8), (1, 1), (1, 1), ("linear", "softmax"), (1.0, 1e-6))
    assert [float(blocks[0].feature.mlp_scale[0].detach()) for blocks in scales.stages] == pytest.approx([1.0, 1e-6])


def test_backbone_trains_and_takes_all_sizes() -> None:
    model = RAVLT((8, 16, 16), (1, 1, 1), (1, 2, 2), ("linear", "linear", "softmax"), (1.0,) * 3, num_classes=5)
    images = torch.randn(2, 3, 45, 60)
    assert [m.shape[1:] for m in model.maps(images)] == [(8, 12, 15), (16, 6, 8), (16, 3, 4)]
    assert model(images).shape == (2, 5)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    together = model(images)
    torch.testing.assert_close(model(images[:1]), together[:1], rtol=1e-4, atol=1e-5)


def test_block_is_positions_then_two_branches() -> None:
    block, x = RAVLTBlock(RALA(8, 2), layer_scale=0.5).double().eval(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    y = x + block.position(x)

    def normed(t):
        return torch.nn.functional.layer_norm(t.permute(0, 2, 3, 1), (8,), eps=1e-6).permute(0, 3, 1, 2)

    y = y + 0.5 * block.attention(normed(y))
    hidden = torch.nn.functional.gelu(block.expand(normed(y)))
    y = y + 0.5 * block.reduce(hidden + block.depthwise(hidden))
    torch.testing.assert_close(block(x), y, rtol=1e-10, atol=1e-11)


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="stage"):
        RAVLT(depths=(1, 1))
    with pytest.raises(OptionError, match="softmax"):
        RAVLT(attentions=("linear", "linear", "linear", "full"))
    with pytest.raises(OptionError, match="preset"):
        RAVLT.preset("huge")
