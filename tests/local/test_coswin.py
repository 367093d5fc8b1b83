"""CoSwin's gated convolutions beside shifted windows, against Swin and torch's own convolution."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.local.coswin import CoSwinBlock, GatedConvAttention, GatedLocalBranch, LocalFeatureBranch, gate_values
from regard.local.swin import SwinBlock
from regard.models.coswin import CoSwin
from regard.nn import MultiHeadAttention

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def block(**options) -> CoSwinBlock:
    return CoSwinBlock(16, 2, **options).double()


def tokens(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, height * width, 16, dtype=torch.float64)


def without_branch(coswin: CoSwinBlock, **options) -> SwinBlock:
    swin = SwinBlock(16, 2, mlp_ratio=2.0, **options).double()
    swin.load_state_dict({k: v for k, v in coswin.state_dict().items() if not k.startswith("local.")})
    return swin


def by_torch(branch: LocalFeatureBranch, x: Tensor, height: int, width: int) -> Tensor:
    image = x.view(len(x), height, width, -1).permute(0, 3, 1, 2)
    inner = F.relu(F.conv2d(image, branch.widen.weight, branch.widen.bias, padding=1))
    out = F.conv2d(inner, branch.narrow.weight, branch.narrow.bias, padding=1)
    return out.permute(0, 2, 3, 1).reshape(len(x), height * width, -1)


@pytest.mark.paper("coswin")
@pytest.mark.parametrize("size", [(8, 12), (9, 6), (3, 3)])
@pytest.mark.parametrize("shift", [0, 2])
def test_a_closed_gate_leaves_swin(size, shift) -> None:
    coswin, x = block(window=4, shift=shift, init=-1000.0), tokens(*size)
    swin = without_branch(coswin, window=4, shift=shift)
    torch.testing.assert_close(coswin(x, grid=size), swin(x, grid=size), **TIGHT)


@pytest.mark.parametrize("size", [(8, 12), (9, 6)])
def test_block_is_its_formula(size) -> None:
    coswin, x = block(shift=2, init=0.25), tokens(*size)
    swin = without_branch(coswin, window=4, shift=2)
    attended = swin.mix(x, size)  # of the normed tokens
    gate = 1 / (1 + math.exp(-0.25))
    middle = x + attended + gate * by_torch(coswin.local, x, *size)
    torch.testing.assert_close(coswin(x, grid=size), middle + coswin.mlp(coswin.mlp_norm(middle)), **TIGHT)


@pytest.mark.paper("coswin")
def test_backbone_has_the_papers_number_of_parameters() -> None:
    def conv(a: int, b: int) -> int:
        return 9 * a * b + b

    expected = 3 * 2 * 2 * 96 + 96 + 2 * 96  # patches and their norm
    for stage, (depth, heads) in enumerate(((2, 3), (6, 6), (4, 12))):
        c = 96 * 2**stage
        attention = 3 * c * c + 3 * c + c * c + c + 7 * 7 * heads
        mlp = c * 2 * c + 2 * c + 2 * c * c + c
        branch = conv(c, int(1.1 * c)) + conv(int(1.1 * c), c) + 1
        expected += depth * (attention + mlp + branch + 2 * 2 * c)
        if stage:
            expected += 2 * c * c + 2 * 2 * c  # merging: C / 2 in, 2 C normed, C out
    expected += 2 * 384 + 384 * 10 + 10
    with torch.device("meta"):
        counted = sum(p.numel() for p in CoSwin.preset("pixels_32").parameters())
        larger = CoSwin.preset("pixels_64")
    assert counted == expected == 23_460_300
    assert larger.embeds[0].stride == 4


@pytest.mark.paper("coswin")
def test_the_first_block_sees_across_window_borders() -> None:
    x = tokens(8, 8, batch=1).requires_grad_()
    coswin = block(window=4)
    left, right = 3, 4  # neighbours on both sides of a border in the first row
    (seen,) = torch.autograd.grad(coswin(x, grid=(8, 8))[0, right].sum(), x)
    assert seen[0, left].any()
    assert not seen[0, 4 * 8].any()  # two convolutions reach two pixels
    (unseen,) = torch.autograd.grad(without_branch(coswin, window=4)(x, grid=(8, 8))[0, right].sum(), x)
    assert not unseen[0, left].any()


@pytest.mark.paper("coswin")
def test_translation_by_a_window_translates_the_interior() -> None:
    coswin, here, there = block(window=4), torch.zeros(1, 16, 16, 16).double(), torch.zeros(1, 16, 16, 16).double()
    pattern = torch.randn(4, 4, 16, dtype=torch.float64)
    here[0, 4:8, 4:8], there[0, 8:12, 4:8] = pattern, pattern
    moved, out = (coswin(x.flatten(1, 2), grid=(16, 16)).view(16, 16, 16) for x in (there, here))
    # All that the pattern reaches: its window and two pixels around it, which the map's own border must not touch.
    torch.testing.assert_close(moved[6:14, 2:10], out[2:10, 2:10], **TIGHT)
    assert not torch.allclose(moved[6:14, 2:10], out[6:14, 2:10])


@pytest.mark.paper("coswin")
def test_gates_open_a_little_over_half_and_learn() -> None:
    model = CoSwin(embed_dim=8, depths=(2, 1), num_heads=(1, 2), patch_size=1)
    gates = gate_values(model)
    assert len(gates) == 3
    assert all(round(value, 4) == 0.6225 for value in gates.values())
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for module in model.modules():
        if isinstance(module, GatedLocalBranch):
            assert module.gate.grad is not None and module.gate.grad != 0
    branch = next(m for m in model.modules() if isinstance(m, GatedLocalBranch))
    branch.gate.data.fill_(0.0)
    assert gate_values(model)["stages.0.0.local"] == 0.5


@pytest.mark.parametrize("name", ["swin", "full", "gna"])
def test_the_branch_goes_beside_any_attention(name: str) -> None:
    options = {"swin": {"window": 4}, "full": {}, "gna": {"window": 3}}[name]
    attention = MultiHeadAttention(16, 2, name, **options)
    gated = GatedConvAttention(attention, 16).double()
    x = tokens(6, 8)
    gate = 1 / (1 + math.exp(-0.5))
    expected = attention(gated.norm(x), grid=(6, 8)) + gate * by_torch(gated.local, x, 6, 8)
    torch.testing.assert_close(gated(x, grid=(6, 8)), expected, **TIGHT)
    plain = GatedConvAttention(attention, 16, init=-1000.0, norm=False).double()
    torch.testing.assert_close(plain(x, grid=(6, 8)), attention(x, grid=(6, 8)), **TIGHT)


def test_backbone_trains_on_any_image_size() -> None:
    model = CoSwin(embed_dim=8, depths=(2, 2), num_heads=(1, 2), num_classes=5)
    images = torch.randn(2, 3, 17, 22)
    assert [m.shape[1:] for m in model.maps(images)] == [(8, 9, 11), (16, 5, 6)]
    model(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="kernel_size"):
        LocalFeatureBranch(8, kernel_size=2)
    with pytest.raises(OptionError, match="channel"):
        LocalFeatureBranch(8, expand=0.1)
    with pytest.raises(ShapeError, match="grid"):
        GatedConvAttention(torch.nn.Identity(), 16)(torch.randn(1, 12, 16))
    with pytest.raises(OptionError, match="shift"):
        CoSwinBlock(16, 2, window=4, shift=4)
    with pytest.raises(OptionError, match="pixels_32"):
        CoSwin.preset("tiny")
