"""Cross-shaped windows against dense attention under independent masks, their cost and their backbone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import OptionError, ShapeError, UnsupportedMaskError
from regard.local.cswin import CrossShapedWindowAttention, LePE, cswin_cost, stripe_attention
from regard.local.windows import window_plan
from regard.masks import Boolean, Causal, KeyPadding
from regard.models.cswin import CSWin

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
CHANNELS, HEADS = 16, 4


def layer(stripe: int = 2, **options) -> CrossShapedWindowAttention:
    return CrossShapedWindowAttention(CHANNELS, HEADS, stripe, **options).double()


def tokens(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, height * width, CHANNELS, dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def same_stripe(height: int, width: int, stripe: int) -> Tensor:
    """``(2, N, N)``: pairs in one vertical stripe, and in one horizontal stripe."""
    row = torch.arange(height)[:, None].expand(height, width).flatten() // stripe
    column = torch.arange(width).expand(height, width).flatten() // stripe
    return torch.stack([place[:, None] == place for place in (column, row)])


def dense(cswin: CrossShapedWindowAttention, x: Tensor, seen: Tensor) -> Tensor:
    """Heads ``(batch, heads, N, head_dim)`` and values of attention where ``seen`` ``(heads, N, N)``, no LePE."""
    query, key, value = (heads_of(t) for t in cswin.qkv(x).chunk(3, -1))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def encoded(cswin: CrossShapedWindowAttention, x: Tensor, size: tuple[int, int], seen: Tensor) -> Tensor:
    """LePE by its formula, ``(batch, N, channels)``: neighbours that ``seen`` ``(channels, N, N)`` admits."""
    value = cswin.qkv(x).chunk(3, -1)[2]
    weight = torch.cat([part.conv.conv.weight[:, 0] for part in cswin.lepe])
    out = torch.cat([part.conv.conv.bias for part in cswin.lepe]).expand_as(value).clone()
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            down, right = j // size[1] - i // size[1], j % size[1] - i % size[1]
            if abs(down) <= 1 and abs(right) <= 1:
                out[:, i] += weight[:, 1 + down, 1 + right] * value[:, j] * seen[:, i, j]
    return out


@pytest.mark.paper("cswin")
@pytest.mark.parametrize("size", [(5, 5), (4, 6)])
@pytest.mark.parametrize("options", [{"stripe": 6}, {"stripe": 1, "full": True}, {"stripe": 9}])
def test_one_stripe_is_global_attention_with_lepe(size, options) -> None:
    cswin, x = layer(**options), tokens(*size)
    query, key, value = (heads_of(t) for t in cswin.qkv(x).chunk(3, -1))
    merged = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    maps = value.transpose(2, 3).reshape(2, CHANNELS, *size)
    weight, bias = (torch.cat([getattr(p.conv.conv, n) for p in cswin.lepe]) for n in ("weight", "bias"))
    positions = F.conv2d(maps, weight, bias, padding=1, groups=CHANNELS).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cswin(x, grid=size), cswin.proj(merged + positions), **TIGHT)


@pytest.mark.paper("cswin")
@pytest.mark.parametrize("lepe", [True, False])
def test_stripes_of_one_are_columns_and_rows(lepe) -> None:
    cswin, size = layer(1, lepe=lepe), (5, 6)
    with torch.no_grad():  # heads side by side, as they are
        cswin.proj.weight.copy_(torch.eye(CHANNELS))
    x = tokens(*size, batch=1)
    at = torch.tensor([2, 3])
    changed = x.clone()
    changed[:, at[0] * size[1] + at[1]] += 1
    moved = (cswin(changed, grid=size) != cswin(x, grid=size)).view(*size, CHANNELS)
    column, row = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
    column[:, at[1]] = True
    row[at[0]] = True
    assert torch.equal(moved[..., : CHANNELS // 2].any(-1), column)
    assert torch.equal(moved[..., CHANNELS // 2 :].any(-1), row)


@pytest.mark.paper("cswin")
def test_two_layers_of_stripes_of_one_see_everything() -> None:
    first, second = layer(1), layer(1)
    size = (4, 5)

    def stack(x: Tensor) -> Tensor:
        return second(first(x, grid=size), grid=size)

    jacobian = torch.autograd.functional.jacobian(lambda x: stack(x).sum((0, 2)), tokens(*size, batch=1))
    assert (jacobian.abs().sum((1, 3)) > 0).all()
    once = torch.autograd.functional.jacobian(lambda x: first(x, grid=size).sum((0, 2)), tokens(*size, batch=1))
    column, row = same_stripe(*size, 1)
    assert torch.equal(once.abs().sum((1, 3)) > 0, column | row)


@pytest.mark.paper("cswin")
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 9), (4, 2)])
@pytest.mark.parametrize("stripe", [1, 2, 3])
def test_without_lepe_it_is_dense_attention_under_a_mask_per_group(size, stripe) -> None:
    cswin, x = layer(stripe, lepe=False), tokens(*size).requires_grad_()
    seen = same_stripe(*size, stripe).repeat_interleave(HEADS // 2, 0)
    expected = cswin.proj(dense(cswin, x, seen).transpose(1, 2).flatten(2))
    out, probe = cswin(x, grid=size), torch.randn_like(x)
    torch.testing.assert_close(out, expected, **TIGHT)
    parameters = [x, *cswin.parameters()]
    for found, exact in zip(
        torch.autograd.grad(out, parameters, probe), torch.autograd.grad(expected, parameters, probe), strict=True
    ):
        torch.testing.assert_close(found, exact, **TIGHT)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.parametrize("scope", ["stripe", "image"])
def test_lepe_ends_at_its_stripe_or_at_the_image(size, scope) -> None:
    cswin, x = layer(2, lepe_scope=scope), tokens(*size)
    stripes = same_stripe(*size, 2)
    merged = dense(cswin, x, stripes.repeat_interleave(HEADS // 2, 0)).transpose(1, 2).flatten(2)
    near = stripes.repeat_interleave(CHANNELS // 2, 0)
    positions = encoded(cswin, x, size, near if scope == "stripe" else torch.ones_like(near))
    torch.testing.assert_close(cswin(x, grid=size), cswin.proj(merged + positions), **TIGHT)


def test_lepe_has_ten_numbers_a_channel_and_goes_with_any_attention() -> None:
    lepe = LePE(CHANNELS, scope="stripe").double()
    assert sum(p.numel() for p in lepe.parameters()) == 10 * CHANNELS
    assert sum(p.numel() for p in layer().lepe.parameters()) == 10 * CHANNELS
    value = heads_of(tokens(6, 6))
    maps = value.transpose(2, 3).reshape(2, CHANNELS, 6, 6)
    whole = lepe.conv.conv(maps).reshape(2, HEADS, -1, 36).transpose(2, 3)
    torch.testing.assert_close(lepe(value, (6, 6)), whole, **TIGHT)
    windows = maps.unfold(2, 3, 3).unfold(3, 3, 3)  # (2, channels, 2, 2, 3, 3)
    each = lepe.conv.conv(windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)).view(2, 2, 2, CHANNELS, 3, 3)
    inside = each.permute(0, 3, 1, 4, 2, 5).reshape(2, HEADS, -1, 36).transpose(2, 3)
    plan = window_plan((6, 6), (3, 3), (0, 0), torch.device("cpu"))
    torch.testing.assert_close(lepe(value, (6, 6), plan), inside, **TIGHT)


@pytest.mark.paper("cswin")
@pytest.mark.parametrize(("size", "stripe"), [((6, 8), 2), ((4, 4), 1), ((9, 3), 3)])
def test_cost_equals_a_count_of_products(size, stripe) -> None:
    def counted(lepe: bool) -> int:
        cswin = CrossShapedWindowAttention(CHANNELS, HEADS, stripe, lepe=lepe)
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, math:
            cswin(torch.randn(1, size[0] * size[1], CHANNELS), grid=size)
        return counter.get_total_flops()

    cost = cswin_cost(*size, CHANNELS, stripe)
    assert counted(False) == 2 * cost
    assert counted(True) == 2 * (cost + 9 * size[0] * size[1] * CHANNELS)


@pytest.mark.paper("cswin")
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_transposing_the_map_swaps_the_groups(size) -> None:
    cswin = layer(2)
    other, half = copy.deepcopy(cswin), CHANNELS // 2

    def swapped(x: Tensor, axis: int = 0) -> Tensor:
        return x.roll(half, axis)

    with torch.no_grad():
        for name in ("weight", "bias"):
            mine, theirs = getattr(cswin.qkv, name), getattr(other.qkv, name)
            theirs.copy_(torch.cat([swapped(part) for part in mine.chunk(3)]))
        for own, across in zip(cswin.lepe, reversed(other.lepe), strict=True):
            across.conv.conv.weight.copy_(own.conv.conv.weight.transpose(2, 3))
            across.conv.conv.bias.copy_(own.conv.conv.bias)
        for module in (cswin, other):
            module.proj.weight.copy_(torch.eye(CHANNELS))
            module.proj.bias.zero_()
    x = tokens(*size)
    turned = x.unflatten(1, size).transpose(1, 2).flatten(1, 2)
    out = other(turned, grid=size[::-1]).unflatten(1, size[::-1]).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(swapped(out, -1), cswin(x, grid=size), **TIGHT)


@pytest.mark.parametrize("lepe", [True, False])
def test_official_filling_is_even_and_visible(lepe) -> None:
    """As the release: zeros behind the projection, half on either side, keys like any other."""
    official, exact, size = layer(4, official=True, lepe=lepe), layer(4, lepe=lepe), (6, 5)
    official.load_state_dict(exact.state_dict())
    x = tokens(*size)
    query, key, value = (t.unflatten(1, size) for t in exact.qkv(x).chunk(3, -1))
    parts = []
    for group, (top, left) in enumerate(((0, 1), (1, 0))):  # 5 columns -> 8: 1 and 2; 6 rows -> 8: 1 and 1
        extent = (6, 8) if group == 0 else (8, 5)
        own = slice(0, 8) if group == 0 else slice(8, 16)
        filled = []
        for t in (query, key, value):
            zeros = t.new_zeros(2, *extent, 8)
            zeros[:, top : top + 6, left : left + 5] = t[..., own]
            filled.append(zeros.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2))
        seen = same_stripe(*extent, 4)[group]
        out = F.scaled_dot_product_attention(*filled, attn_mask=seen)
        out = out.transpose(1, 2).flatten(2)
        if lepe:
            conv = exact.lepe[group].conv.conv
            maps = filled[2].transpose(2, 3).reshape(2, 8, *extent)
            pieces = [conv(piece) for piece in maps.split(4, 3 - group)]
            out = out + torch.cat(pieces, 3 - group).flatten(2).transpose(1, 2)
        parts.append(out.unflatten(1, extent)[:, top : top + 6, left : left + 5].flatten(1, 2))
    torch.testing.assert_close(official(x, grid=size), exact.proj(torch.cat(parts, -1)), **TIGHT)
    assert not torch.allclose(exact(x, grid=size), official(x, grid=size))
    divided = tokens(8, 4)
    torch.testing.assert_close(official(divided, grid=(8, 4)), exact(divided, grid=(8, 4)), **TIGHT)


@pytest.mark.parametrize("options", [{}, {"full": True}, {"official": True, "stripe": 4}])
def test_padding_reaches_nothing(options) -> None:
    """Neither through attention nor through the convolution."""
    cswin, size, padded = layer(**options), (6, 8), (8, 12)
    x = tokens(*size)
    wide = 3 * torch.randn(2, *padded, CHANNELS, dtype=torch.float64)
    wide[:, :6, :8] = x.unflatten(1, size)
    valid = torch.zeros(2, *padded, dtype=torch.bool)
    valid[:, :6, :8] = True
    mask = KeyPadding(valid.flatten(1))
    out = cswin(wide.flatten(1, 2), grid=padded, mask=mask).unflatten(1, padded)[:, :6, :8]
    expected = layer(**{**options, "official": False})
    expected.load_state_dict(cswin.state_dict())
    torch.testing.assert_close(out.flatten(1, 2), expected(x, grid=size), **TIGHT)
    per_head = Boolean(valid.flatten(1)[:, None, None].expand(-1, HEADS, -1, -1))
    again = cswin(wide.flatten(1, 2), grid=padded, mask=per_head).unflatten(1, padded)[:, :6, :8]
    torch.testing.assert_close(again, out, **TIGHT)


def test_stripe_attention_by_itself() -> None:
    query, key, value = (heads_of(tokens(6, 5)) for _ in range(3))
    for axis in (0, 1):
        seen = same_stripe(6, 5, 2)[axis]
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3)
        found = stripe_attention(query, key, value, 2, axis, grid=(6, 5), scale=0.3)
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("official", [False, True])
def test_backbone_takes_all_sizes(official) -> None:
    model = CSWin(16, (1, 1, 2, 1), (2, 2, 4, 4), stripes=(1, 2, 3, 3), num_classes=5, official=official)
    images = torch.randn(2, 3, 68, 100)
    assert [m.shape[1:] for m in model.maps(images)] == [(16, 17, 25), (32, 9, 13), (64, 5, 7), (128, 3, 4)]
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [m.shape[2:] for m in CSWin(16, (1, 1), (2, 2), (1, 2)).maps(torch.randn(1, 3, 224, 224))] == [
        (56, 56),
        (28, 28),
    ]
    assert model.stages[-1][0].attention.full and not model.stages[0][0].attention.full


@pytest.mark.parametrize(("size", "millions"), [("tiny", 23), ("small", 35), ("base", 78), ("large", 173)])
def test_published_numbers_of_parameters(size, millions) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in CSWin.preset(size).parameters())
    assert abs(count / 1e6 - millions) < 0.7


def test_larger_images_have_wider_stripes() -> None:
    with torch.device("meta"):
        model = CSWin.preset("base-384")
    assert [blocks[0].attention.stripe for blocks in model.stages[:3]] == [1, 2, 12]


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="even"):
        CrossShapedWindowAttention(15, 3)
    assert CrossShapedWindowAttention(15, 3, full=True)(torch.randn(1, 6, 15), grid=(2, 3)).shape == (1, 6, 15)
    with pytest.raises(OptionError, match="num_heads"):
        CrossShapedWindowAttention(10, 4)
    with pytest.raises(OptionError, match="stripe"):
        CrossShapedWindowAttention(16, 4, stripe=0)
    with pytest.raises(OptionError, match="scope"):
        LePE(16, scope="window")
    with pytest.raises(ShapeError, match="grid"):
        layer()(tokens(3, 4))
    with pytest.raises(UnsupportedMaskError, match="KeyPadding"):
        layer()(tokens(3, 4), grid=(3, 4), mask=Causal())
    query = heads_of(tokens(3, 4))
    with pytest.raises(OptionError, match="axis"):
        stripe_attention(query, query, query, 2, 2, grid=(3, 4))
    with pytest.raises(ShapeError, match="grid"):
        stripe_attention(query, query, query, 2, 0, grid=(3, 3))
    with pytest.raises(OptionError, match="stage"):
        CSWin(depths=(1, 1))
    with pytest.raises(OptionError, match="preset"):
        CSWin.preset("huge")
