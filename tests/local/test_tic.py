"""MSA-Conv against unfold, dense attention and its own symmetries; shift, pooling and the classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.local.gna import na2d
from regard.local.tic import (
    InterPooling,
    MSAConv2d,
    local_mix,
    local_scores,
    multi_directional_shift,
    multi_directional_unshift,
)
from regard.models.tic import TiC, TiCBlock
from regard.nn import OnTokens

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def maps(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def module(channels: int = 6, *positional: Any, **options: Any) -> MSAConv2d:
    return MSAConv2d(channels, *positional, **options).double().eval()


def heads_of(made: MSAConv2d, x: Tensor) -> list[Tensor]:
    """q, k, v ``(batch, heads, pixels, head_dim)``."""
    return [t.unflatten(1, (made.num_heads, -1)).flatten(3).transpose(2, 3) for t in made.qkv(x).chunk(3, 1)]


def dense(made: MSAConv2d, x: Tensor) -> Tensor:
    """Attention of every pixel to all places of the map with its border of zeros, those of its stencil visible."""
    batch, channels, height, width = x.shape
    reach = [side // 2 * rate for side, rate in zip(made.kernel, made.dilation, strict=True)]
    tall, wide = height + 2 * reach[0], width + 2 * reach[1]
    visible = torch.zeros(height, width, tall, wide, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            rows = slice(row, row + 2 * reach[0] + 1, made.dilation[0])
            visible[row, column, rows, column : column + 2 * reach[1] + 1 : made.dilation[1]] = True
    q, k, v = heads_of(made, x)
    border = (reach[1], reach[1], reach[0], reach[0])
    k, v = (F.pad(t.transpose(2, 3).unflatten(3, (height, width)), border).flatten(3).transpose(2, 3) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.view(height * width, tall * wide))
    return out.transpose(2, 3).reshape(batch, channels, height, width)


def unfolded(x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """``(batch, channels, kh * kw, height, width)``."""
    padding = [side // 2 * rate for side, rate in zip(kernel, dilation, strict=True)]
    columns = F.unfold(x, kernel, dilation, padding)
    return columns.view(*x.shape[:2], -1, *x.shape[2:])


@pytest.mark.paper("tic")
def test_kernel_one_adds_the_values() -> None:
    made, x = module(kernel=1), maps(2, 6, 5, 7)
    torch.testing.assert_close(made.attend(x) + x, made.qkv(x)[:, 12:] + x, **TIGHT)
    torch.testing.assert_close(made(x), made.conv(made.qkv(x)[:, 12:] + x).relu(), **TIGHT)


@pytest.mark.paper("tic")
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kernel", [3, 5])
def test_interior_is_neighbourhood_attention(kernel: int, heads: int) -> None:
    made, x, edge = module(kernel=kernel, num_heads=heads), maps(2, 6, 9, 10), kernel // 2
    q, k, v = (t.unflatten(2, (9, 10)) for t in heads_of(made, x))
    near = na2d(q, k, v, kernel).permute(0, 1, 4, 2, 3).flatten(1, 2)
    inside = (..., slice(edge, -edge), slice(edge, -edge))
    torch.testing.assert_close(made.attend(x)[inside], near[inside], **TIGHT)


@pytest.mark.paper("tic")
@pytest.mark.parametrize("size", [(5, 6), (1, 1), (2, 9)])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), ((1, 5), 1), ((3, 5), (2, 1))])
def test_border_is_dense_attention_to_zeros(size, kernel, dilation) -> None:
    made, x = module(kernel=kernel, dilation=dilation, num_heads=2), maps(2, 6, *size)
    torch.testing.assert_close(made.attend(x), dense(made, x), **TIGHT)


@pytest.mark.paper("tic")
def test_dilation_is_attention_on_residue_grids() -> None:
    made, plain, x = module(dilation=3), module(), maps(2, 6, 11, 13)
    plain.load_state_dict(made.state_dict())
    out = made.attend(x)
    for row in range(3):
        for column in range(3):
            part = (..., slice(row, None, 3), slice(column, None, 3))
            torch.testing.assert_close(out[part], plain.attend(x[part]), **TIGHT)


@pytest.mark.paper("tic")
@pytest.mark.parametrize("directions", [4, 8, ((2, -1),)])
@pytest.mark.parametrize("channels", [3, 10, 18])
def test_unshift_is_the_inverse(channels, directions) -> None:
    x = maps(2, channels, 5, 7)
    moved = multi_directional_shift(x, 2, directions)
    assert torch.equal(multi_directional_unshift(moved, 2, directions), x)
    assert not torch.equal(moved, x)


def test_shift_moves_each_group_its_own_way() -> None:
    x = torch.zeros(1, 10, 7, 7)
    x[:, :, 3, 3] = 1
    places = [tuple(channel.nonzero()[0].tolist()) for channel in multi_directional_shift(x, 2)[0]]
    assert places == [p for p in ((3, 3), (1, 3), (5, 3), (3, 1), (3, 5)) for _ in range(2)]


def reach(function: Any, x: Tensor, channels: slice, place: int) -> int:
    """Largest distance, along an axis, of a pixel on which ``channels`` of the output at a place depend."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x)[:, channels, place, place].sum(), x)
    rows, columns = gradient.abs().sum((0, 1)).nonzero().T
    return int(torch.maximum((rows - place).abs(), (columns - place).abs()).max())


@pytest.mark.paper("tic")
@pytest.mark.parametrize("step", [2, 3])
def test_the_shift_carries_farther(step: int) -> None:
    """From 1 pixel a layer to step + 1; what was itself shifted sees the opposite group step pixels farther."""
    x = maps(1, 10, 33, 33)
    plain, shifted = module(10), module(10, shift=step)
    assert reach(plain.attend, x, slice(0, 10), 16) == 1
    assert reach(shifted.attend, x, slice(0, 2), 16) == step + 1
    assert reach(shifted.attend, x, slice(2, 10), 16) == 2 * step + 1
    one_sided = module(10, shift=step, directions=((0, 1), (1, 0), (1, 1)))
    assert reach(one_sided.attend, x, slice(0, 10), 16) == step + 1
    # Layer by layer; the convolution adds its own pixel.
    for made, each in ((plain, 1), (module(10, shift=step, directions=((0, 1),)), step + 1)):
        twice = reach(lambda t, made=made: made.conv(made.attend(made.conv(made.attend(t)))), x, slice(0, 10), 16)
        assert twice == 2 * (each + 1)


@pytest.mark.paper("tic")
def test_any_size_and_translation() -> None:
    made = module(num_heads=2)
    small, large = maps(1, 6, 32, 32), maps(1, 6, 48, 40)
    large[..., 7:39, 5:37] = small
    assert made(large).shape == large.shape
    # The stencil and the convolution each reach one pixel.
    inner = made(large)[..., 9:37, 7:35]
    torch.testing.assert_close(inner, made(small)[..., 2:-2, 2:-2], rtol=0, atol=1e-14)


@pytest.mark.paper("tic")
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), (1, 1)), ((1, 3), (1, 2)), ((5, 3), (1, 1))])
@pytest.mark.parametrize("form", ["reference", "loop", "gemm"])
def test_operators_are_those_of_unfold(kernel, dilation, form) -> None:
    q, k, v = (maps(2, 3, 4, 5, grad=True) for _ in range(3))
    weights = maps(2, kernel[0] * kernel[1], 4, 5, grad=True)
    arguments = {"kernel": kernel, "dilation": dilation, "backend": form}
    for actual, expected, inputs in (
        (local_scores(q, k, **arguments), torch.einsum("bchw,bcnhw->bnhw", q, unfolded(k, kernel, dilation)), (q, k)),
        (
            local_mix(weights, v, **arguments),
            torch.einsum("bnhw,bcnhw->bchw", weights, unfolded(v, kernel, dilation)),
            (weights, v),
        ),
    ):
        torch.testing.assert_close(actual, expected, **TIGHT)
        seed = torch.randn_like(actual)
        pairs = zip(torch.autograd.grad(actual, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True)
        for grad, own in pairs:
            torch.testing.assert_close(grad, own, **TIGHT)
    assert torch.autograd.gradcheck(lambda a, b: local_scores(a, b, **arguments), (q, k), fast_mode=True)
    assert torch.autograd.gradcheck(lambda a, b: local_mix(a, b, **arguments), (weights, v), fast_mode=True)


def test_in_the_place_of_a_convolution() -> None:
    x = maps(2, 6, 9, 8)
    for options in ({}, {"stride": 2}, {"kernel": 5, "padding": 0}, {"depthwise": True, "bias": True}):
        made = module(6, 12, **options)
        side, stride = options.get("kernel", 3), options.get("stride", 1)
        plain = torch.nn.Conv2d(6, 12, side, stride, options.get("padding", side // 2)).double()
        assert made(x).shape == plain(x).shape
        assert (made(x) >= 0).all()
    assert module(depthwise=True).conv.weight.shape == (6, 1, 3, 3)
    parameters = sum(p.numel() for p in MSAConv2d(6, 12).parameters())
    assert parameters == 3 * 6 * 6 + 3 * 6 + 9 * 6 * 12


def test_dropout_is_of_weights_and_in_training() -> None:
    made, x = module(dropout=0.5, kernel=1), maps(1, 6, 40, 40)
    assert torch.equal(made.attend(x), made.attend(x))
    share = made.train().attend(x) / made.qkv(x)[:, 12:]
    torch.testing.assert_close(share, share.round())
    assert set(share.detach().round().unique().tolist()) == {0.0, 2.0}
    assert torch.equal(share[:, 0].round(), share[:, 5].round())
    assert 0.45 < float(share[:, 0].detach().mean() / 2) < 0.55


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_inter_pooling_is_a_loop(size, pool) -> None:
    x = maps(2, 3, *size)
    out, expected = InterPooling(2, pool)(x, torch.exp), x.clone()
    for row in range(size[0]):
        for column in range(size[1]):
            cell = x[:, :, row // 2 * 2 : row // 2 * 2 + 2, column // 2 * 2 : column // 2 * 2 + 2]
            expected[:, :, row, column] += (cell.mean((2, 3)) if pool == "avg" else cell.amax((2, 3))).exp()
    torch.testing.assert_close(out, expected)


def test_classifier() -> None:
    model = TiC(8, num_heads=(1, 1, 2, 2), num_classes=5)
    images = torch.randn(2, 3, 70, 64)
    assert [m.shape[1:] for m in model.maps(images)] == [(8, 18, 16), (16, 9, 8), (32, 5, 4), (64, 3, 2)]
    assert model(images).shape == (2, 5)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    block = TiCBlock(4, pooling=1).eval()
    x = torch.randn(1, 4, 5, 6)
    first = block.first(x)
    torch.testing.assert_close(block(x), first + block.second(first))
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(OnTokens(block)(tokens, grid=(5, 6)), block(x).flatten(2).transpose(1, 2))


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="odd"):
        MSAConv2d(8, kernel=4)
    with pytest.raises(OptionError, match="num_heads"):
        MSAConv2d(10, num_heads=4)
    with pytest.raises(OptionError, match="multiple of channels"):
        MSAConv2d(8, 12, depthwise=True)
    with pytest.raises(OptionError, match="dropout"):
        MSAConv2d(8, dropout=1.0)
    with pytest.raises(OptionError, match="directions"):
        MSAConv2d(8, directions=3)
    with pytest.raises(ShapeError, match=r"\(batch, 8, height, width\)"):
        MSAConv2d(8)(torch.randn(1, 6, 4, 4))
    with pytest.raises(ShapeError, match="one shape"):
        local_scores(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 4))
    with pytest.raises(ShapeError, match="own space"):
        local_mix(torch.randn(1, 9, 3, 3), torch.randn(1, 2, 3, 4))
    with pytest.raises(ShapeError, match="9 slots"):
        local_mix(torch.randn(1, 5, 3, 3), torch.randn(1, 2, 3, 3))
    with pytest.raises(OptionError, match="pool"):
        InterPooling(2, "mean")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="stage"):
        TiC(8, depths=(1, 1))
