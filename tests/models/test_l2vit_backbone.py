from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.errors import OptionError
from regard.layers.maps import merge_heads, split_heads
from regard.models.l2vit import L2ViT, LGABlock, LWABlock

D = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.paper("l2vit")
@pytest.mark.parametrize(("size", "millions"), [("tiny", 29), ("small", 50), ("base", 89)])
def test_published_numbers_of_parameters(size, millions) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in L2ViT.preset(size).parameters())
    assert abs(count / 1e6 - millions) < 0.6


@pytest.mark.paper("l2vit")
def test_local_and_global_blocks_alternate() -> None:
    with torch.device("meta"):
        model = L2ViT.preset("base-384")
    for blocks in model.stages:
        assert [type(block) for block in blocks] == [LWABlock, LGABlock] * (len(blocks) // 2)
    assert model.stages[0][0].window == 12
    assert model.stages[3][1].attention.mechanism.temperature.shape == (32,)


@pytest.mark.paper("l2vit")
@pytest.mark.parametrize("window", [6, 9])
def test_a_window_over_the_map_is_global_softmax_attention(window) -> None:
    block, x = LWABlock(12, 3, window=window).double(), torch.randn(2, 30, 12, dtype=D)
    query, key, value = split_heads(block.qkv(x), 3, 3)
    expected = block.proj(merge_heads(F.scaled_dot_product_attention(query, key, value)))
    torch.testing.assert_close(block.attend(x, (5, 6)), expected, **TIGHT)


@pytest.mark.paper("l2vit")
@pytest.mark.parametrize("official", [False, True])
def test_a_window_does_not_depend_on_others(official) -> None:
    block, x = LWABlock(12, 3, window=4, official=official).double(), torch.randn(2, 7, 9, 12, dtype=D)
    other = x + torch.randn_like(x)
    other[:, :4, 4:8] = x[:, :4, 4:8]
    before, after = (block.attend(t.flatten(1, 2), (7, 9)).unflatten(1, (7, 9)) for t in (x, other))
    same = (before - after).abs().amax((0, 3)) < 1e-12
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[:4, 4:8] = True
    assert torch.equal(same, expected)


def test_filling_is_hidden_or_as_released_visible() -> None:
    """A piece at the edge attends to itself; as released also to zeros of the normed map."""
    block, x = LWABlock(12, 3, window=4).double(), torch.randn(2, 5, 4, 12, dtype=D)
    piece = x[:, 4:].flatten(1, 2)
    found = block.attend(x.flatten(1, 2), (5, 4)).unflatten(1, (5, 4))[:, 4:].flatten(1, 2)
    torch.testing.assert_close(found, block.attend(piece, (1, 4)), **TIGHT)
    block.official = True
    torch.nn.init.normal_(block.qkv.bias)
    found = block.attend(x.flatten(1, 2), (5, 4)).unflatten(1, (5, 4))[:, 4:].flatten(1, 2)
    whole = torch.cat((piece, torch.zeros(2, 12, 12, dtype=D)), 1)
    query, key, value = split_heads(block.qkv(whole), 3, 3)
    expected = block.proj(merge_heads(F.scaled_dot_product_attention(query, key, value)))[:, :4]
    torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.paper("l2vit")
def test_zero_second_convolution_switches_the_enhancement_off() -> None:
    block, plain = LGABlock(12, 3).double().eval(), LGABlock(12, 3, enhanced=False).double().eval()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("local")})
    x = torch.randn(2, 30, 12, dtype=D)
    assert not torch.allclose(block(x, grid=(5, 6)), plain(x, grid=(5, 6)))
    torch.nn.init.zeros_(block.local.gather.weight)
    torch.nn.init.zeros_(block.local.gather.bias)
    torch.testing.assert_close(block(x, grid=(5, 6)), plain(x, grid=(5, 6)), **TIGHT)


@pytest.mark.paper("l2vit")
def test_global_block_by_hand() -> None:
    block, x = LGABlock(12, 3, denom_min=2.0).double().eval(), torch.randn(2, 30, 12, dtype=D)
    conv = block.position.conv.conv
    y = x + F.conv2d(x.mT.unflatten(2, (5, 6)), conv.weight, conv.bias, padding=1, groups=12).flatten(2).mT
    host, normed = block.attention, F.layer_norm(y, (12,))
    q, k, v = (split_heads(part(normed), 3)[0] for part in (host.query, host.key, host.value))
    scores = q.relu() @ k.relu().mT
    rows = scores / scores.sum(-1, keepdim=True).clamp_min(2) * host.mechanism.temperature[:, None, None]
    y = y + host.out(merge_heads(rows @ v))
    y = y + block.local(F.layer_norm(y, (12,)), (5, 6))
    y = y + block.mlp(F.layer_norm(y, (12,)))
    torch.testing.assert_close(block(x, grid=(5, 6)), y, **TIGHT)
    torch.testing.assert_close(host.mechanism.temperature.detach(), torch.full((3,), 0.5, dtype=D), **TIGHT)


@pytest.mark.parametrize("official", [False, True])
def test_backbone_trains_and_takes_all_sizes(official) -> None:
    model = L2ViT((2, 2), (8, 16), (2, 2), window=3, num_classes=5, official=official)
    images = torch.randn(2, 3, 45, 62)
    assert [m.shape[1:] for m in model.maps(images)] == [(8, 12, 16), (16, 6, 8)]
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    together = model(images)
    torch.testing.assert_close(model(images[:1]), together[:1], rtol=1e-4, atol=1e-5)


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="stage"):
        L2ViT(depths=(2, 2))
    with pytest.raises(OptionError, match="window"):
        LWABlock(12, 3, window=0)
    with pytest.raises(OptionError, match="preset"):
        L2ViT.preset("huge")
