"""Shifted windows against dense attention under an independent mask, and the paper's counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import OptionError, ShapeError
from regard.layers.position_bias import RelativePositionBias, resize_rel_bias
from regard.local.swin import (
    PatchMerging,
    SwinAttention,
    SwinBlock,
    SwinMLPBlock,
    WindowAttention,
    global_attention_macs,
    shift_mask,
    window_attention_macs,
)
from regard.local.windows import (
    pad_to_windows,
    pool_windows,
    window_partition,
    window_plan,
    window_reverse,
)
from regard.masks import KeyPadding
from regard.models.swin import Swin, SwinMLP

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
CPU = torch.device("cpu")


def window_and_region(length: int, window: int, shift: int) -> Tensor:
    """Of each coordinate on one axis a number that two share iff they meet in a window without wrapping around."""
    filled = -(-length // window) * window
    return torch.tensor([((x - shift) % filled) // window * 2 + (x < shift) for x in range(length)])


def seen_by_hand(height: int, width: int, window: int, shift: int) -> Tensor:
    """'Same window after the shift and same region', pair by pair."""
    rows, columns = window_and_region(height, window, shift), window_and_region(width, window, shift)
    label = (rows[:, None] * 1000 + columns).flatten()
    return label[:, None] == label


def bias_by_hand(table: Tensor, height: int, width: int, window: int) -> Tensor:
    """``B[dy + w - 1, dx + w - 1]`` for all pairs of pixels, zero where the offset is outside the table."""
    side = 2 * window - 1
    out = table.new_zeros(table.shape[1], height * width, height * width)
    for i in range(height * width):
        for j in range(height * width):
            dy, dx = i // width - j // width + window - 1, i % width - j % width + window - 1
            if 0 <= dy < side and 0 <= dx < side:
                out[:, i, j] = table[dy * side + dx]
    return out


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def inputs(tokens: int, heads: int = 2, dim: int = 8, grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, heads, tokens, dim, dtype=torch.float64, requires_grad=grad) for _ in range(3)]


def double_block(embed_dim: int = 16, num_heads: int = 2, **options) -> SwinBlock:
    block = SwinBlock(embed_dim, num_heads, **options).double()
    torch.nn.init.normal_(block.attention.position_bias.table)
    return block


@pytest.mark.paper("swin")
@pytest.mark.parametrize("space", [(12,), (6, 8), (4, 6, 8)])
def test_partition_then_reverse_is_the_identity(space) -> None:
    x = torch.randn(3, *space, 5)
    windows = window_partition(x, 2)
    assert windows.shape == (3 * x[0, ..., 0].numel() // 2 ** len(space), *(2,) * len(space), 5)
    assert torch.equal(window_reverse(windows, 2, space), x)
    assert torch.equal(windows[1, ..., 0].flatten()[0], x[(0, *(0,) * (len(space) - 1), 2, 0)])


@pytest.mark.paper("swin")
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (5, 7), (8, 3)])
@pytest.mark.parametrize("shift", [0, 2])
def test_shifted_windows_equal_dense_attention_under_the_mask(size, shift) -> None:
    height, width = size
    tensors = inputs(height * width, grad=True)
    swin = SwinAttention(4, shift, num_heads=2).double()
    torch.nn.init.normal_(swin.position_bias.table)
    row = window_and_region(height, 4, shift if height > 4 else 0)
    column = window_and_region(width, 4, shift if width > 4 else 0)
    label = (row[:, None] * 1000 + column).flatten()
    expected = dense(*tensors, label[:, None] == label, bias_by_hand(swin.position_bias.table, height, width, 4))
    out = swin(*tensors, grid=size)
    torch.testing.assert_close(out, expected, **TIGHT)
    probe, wanted = torch.randn_like(out), [*tensors, swin.position_bias.table]
    for found, exact in zip(
        torch.autograd.grad(out, wanted, probe), torch.autograd.grad(expected, wanted, probe), strict=True
    ):
        torch.testing.assert_close(found, exact, **TIGHT)


@pytest.mark.paper("swin")
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (6, 6)])
@pytest.mark.parametrize("shift", [0, 2])
def test_block_equals_dense_attention_under_the_mask(size, shift) -> None:
    height, width = size
    block = double_block(window=4, shift=shift)
    x = torch.randn(2, height * width, 16, dtype=torch.float64)
    attention = block.attention
    q, k, v = (t.transpose(1, 2) for t in attention.qkv(block.attention_norm(x)).view(2, -1, 3, 2, 8).unbind(2))
    bias = bias_by_hand(attention.position_bias.table, height, width, 4)
    inner = dense(q, k, v, seen_by_hand(height, width, 4, shift), bias).transpose(1, 2).flatten(2)
    expected = x + attention.proj(inner)
    expected = expected + block.mlp(block.mlp_norm(expected))
    torch.testing.assert_close(block(x, grid=size), expected, **TIGHT)


@pytest.mark.paper("swin")
def test_window_of_the_whole_map_is_global_attention_with_bias() -> None:
    tensors = inputs(36)
    swin = SwinAttention(6, num_heads=2).double()
    torch.nn.init.normal_(swin.position_bias.table)
    bias = bias_by_hand(swin.position_bias.table, 6, 6, 6)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=bias[None])
    torch.testing.assert_close(swin(*tensors, grid=(6, 6)), expected, **TIGHT)
    # A window larger than the map, shifted, becomes the map.
    larger = SwinAttention(8, 4, num_heads=2, position_bias=None)
    torch.testing.assert_close(larger(*tensors, grid=(6, 6)), F.scaled_dot_product_attention(*tensors), **TIGHT)


@pytest.mark.paper("swin")
def test_nothing_leaks_across_the_wrap_around() -> None:
    block = double_block(window=4, shift=2)
    x = torch.randn(1, 64, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 0] += torch.randn(16, dtype=torch.float64)
    moved = (block(changed, grid=(8, 8)) - block(x, grid=(8, 8))).abs().sum(-1).view(8, 8) > 0
    assert moved[:2, :2].all()
    assert not moved[2:].any()
    assert not moved[:, 2:].any()


def test_the_released_code_leaks_a_little() -> None:
    exact, official = double_block(window=4, shift=2), double_block(window=4, shift=2, official=True)
    official.load_state_dict(exact.state_dict())
    x = torch.randn(1, 64, 16, dtype=torch.float64)
    torch.testing.assert_close(official(x, grid=(8, 8)), exact(x, grid=(8, 8)), **TIGHT)
    # -100 hides only what stays below it: large logits get through.
    loud = x.clone()
    exact.attention.qkv.weight.data.mul_(60)
    official.load_state_dict(exact.state_dict())
    assert not torch.allclose(official(loud, grid=(8, 8)), exact(loud, grid=(8, 8)), atol=1e-3)


def test_additive_masks_hide_with_infinity() -> None:
    tensors = inputs(8 * 8)
    seen = torch.rand(2, 2, 64, 64) < 0.5
    seen[0, 0, 3] = False
    exact, official = (SwinAttention(4, 2, position_bias=None, official=o) for o in (False, True))
    out = exact(*tensors, grid=(8, 8), mask=seen)
    torch.testing.assert_close(official(*tensors, grid=(8, 8), mask=seen)[0, 0, 3], torch.zeros(8).double())
    loose = seen & seen_by_hand(8, 8, 4, 2)
    torch.testing.assert_close(out, dense(*tensors, loose).nan_to_num(0), **TIGHT)
    additive = torch.zeros(3, 5, 5).masked_fill(torch.rand(3, 5, 5) < 0.5, -torch.inf)
    additive[1, 2] = -torch.inf
    attention = WindowAttention(8, (1, 5), 2)
    for impl in ("sdpa", "math", "flash_window"):
        attention.impl = impl
        windows = torch.randn(6, 5, 8)
        alone = attention(windows, additive)
        torch.testing.assert_close(alone, attention(windows, additive > -torch.inf))
        torch.testing.assert_close(alone[1, 2], attention.proj.bias)


def test_official_filling_is_visible() -> None:
    tensors = inputs(7 * 7)
    exact, official = (SwinAttention(4, 0, position_bias=None, official=o) for o in (False, True))
    filled = [F.pad(x.unflatten(2, (7, 7)), (0, 0, 0, 1, 0, 1)).flatten(2, 3) for x in tensors]
    wanted = exact(*filled, grid=(8, 8)).unflatten(2, (8, 8))[:, :, :7, :7].flatten(2, 3)
    torch.testing.assert_close(official(*tensors, grid=(7, 7)), wanted, **TIGHT)
    assert not torch.allclose(exact(*tensors, grid=(7, 7)), wanted)


@pytest.mark.paper("swin")
def test_tiny_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in Swin.preset(name).parameters()) for name in ("tiny", "small", "base")}
    assert counts == {"tiny": 28_288_354, "small": 49_606_258, "base": 87_768_224}


@pytest.mark.paper("swin")
def test_two_blocks_cross_a_window_border_one_does_not() -> None:
    plain, shifted = double_block(window=4), double_block(window=4, shift=2)
    x = torch.randn(1, 64, 16, dtype=torch.float64, requires_grad=True)
    left, right = 3, 4  # neighbours on both sides of a border in the first row
    (alone,) = torch.autograd.grad(plain(x, grid=(8, 8))[0, right].sum(), x)
    assert not alone[0, left].any()
    (both,) = torch.autograd.grad(shifted(plain(x, grid=(8, 8)), grid=(8, 8))[0, right].sum(), x)
    assert both[0, left].any()


@pytest.mark.paper("swin")
def test_cost_formulas_match_counted_products() -> None:
    height, width, channels, window = 8, 12, 24, 4
    attention = WindowAttention(channels, window, 3, qkv_bias=False, impl="math")
    windows = window_partition(torch.randn(1, height, width, channels), window).flatten(1, 2)
    with FlopCounterMode(display=False) as counter:
        attention(windows)
    assert counter.get_total_flops() == 2 * window_attention_macs(height, width, channels, window)
    everything = WindowAttention(channels, (height, width), 3, qkv_bias=False, impl="math")
    with FlopCounterMode(display=False) as counter:
        everything(torch.randn(1, height * width, channels))
    assert counter.get_total_flops() == 2 * global_attention_macs(height, width, channels)


def test_layers_alternate_between_plain_and_shifted_windows() -> None:
    shifts = [SwinAttention(7, layer_index=layer).shift for layer in range(3)]
    assert shifts == [(0, 0), (3, 3), (0, 0)]


@pytest.mark.parametrize("space", [(11,), (4, 5, 3)])
def test_other_numbers_of_axes(space) -> None:
    tokens = torch.Size(space).numel()
    tensors = inputs(tokens)
    swin = SwinAttention(3, 1, axes=len(space), num_heads=2, position_bias=None)
    labels = torch.zeros((), dtype=torch.int64)
    for length in space:
        labels = labels[..., None] * 1000 + window_and_region(length, 3, 1 if length > 3 else 0)
    expected = dense(*tensors, labels.flatten()[:, None] == labels.flatten())
    torch.testing.assert_close(swin(*tensors, grid=space), expected, **TIGHT)
    if len(space) == 1:
        torch.testing.assert_close(swin(*tensors), expected, **TIGHT)


def test_padded_keys_are_hidden_by_a_mask() -> None:
    tensors = inputs(40)
    real = torch.rand(2, 40) > 0.5
    swin = SwinAttention(3, 1, position_bias=None)
    seen = seen_by_hand(5, 8, 3, 1) & real[:, None, None]
    expected = dense(*tensors, seen).nan_to_num(0)
    torch.testing.assert_close(swin(*tensors, grid=(5, 8), mask=KeyPadding(real)), expected, **TIGHT)


def test_shift_mask_is_the_nine_regions() -> None:
    height, width, window, shift = 8, 12, 4, 2
    label = torch.zeros(1, height, width, 1)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        label[:, rows, columns] = number
    labels = window_partition(label, window).flatten(1)
    expected = (labels[:, :, None] != labels[:, None]).float() * -100
    assert torch.equal(shift_mask(height, width, window, shift), expected)


def test_patch_merging_takes_neighbours_in_order() -> None:
    merge = PatchMerging(1)
    merge.norm, merge.reduction = torch.nn.Identity(), torch.nn.Identity()
    out, grid = merge(torch.arange(8.0).view(1, 8, 1), (2, 4))
    assert grid == (1, 2)
    assert out[0].tolist() == [[0, 4, 1, 5], [2, 6, 3, 7]]
    odd, grid = merge(torch.arange(9.0).view(1, 9, 1), (3, 3))
    assert grid == (2, 2)
    assert odd[0, 3].tolist() == [8, 0, 0, 0]


def test_window_attention_forms_agree() -> None:
    attention = WindowAttention(16, (3, 4), 2).double()
    windows = torch.randn(6, 12, 16, dtype=torch.float64)
    mask = (torch.rand(3, 12, 12) > 0.3) | torch.eye(12, dtype=torch.bool)
    fused = attention(windows, mask)
    attention.impl = "math"
    torch.testing.assert_close(attention(windows, mask), fused, **TIGHT)
    additive = torch.zeros(3, 12, 12, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(attention(windows, additive), fused, **TIGHT)

    def own(query, key, value, bias, mask, scale):
        scores = (query * scale) @ key.transpose(-1, -2) + bias
        hidden = ~mask.repeat(len(query) // len(mask), 1, 1)[:, None]
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value

    attention.impl = own
    torch.testing.assert_close(attention(windows, mask), fused, **TIGHT)


def test_bias_table_counts_offsets_from_query_to_key() -> None:
    bias = RelativePositionBias((2, 3), 1)
    bias.table.data = torch.arange(15.0)[:, None]
    found = bias()[0]
    for i in range(6):
        for j in range(6):
            assert found[i, j] == (i // 3 - j // 3 + 1) * 5 + (i % 3 - j % 3 + 2)
    smaller = bias((1, 2))[0]
    assert smaller.tolist() == [[7, 6], [8, 7]]
    with pytest.raises(ShapeError):
        bias((3, 3))


def test_continuous_bias_is_a_network_of_log_spaced_offsets() -> None:
    tensors = inputs(5 * 7, grad=True)
    swin = SwinAttention(4, 2, position_bias="continuous", num_heads=2).double()
    first, second = swin.position_bias.network[0], swin.position_bias.network[2]
    bias = torch.zeros(2, 35, 35, dtype=torch.float64)
    for i in range(35):
        for j in range(35):
            steps = [8 * (i // 7 - j // 7) / 3, 8 * (i % 7 - j % 7) / 3]
            spaced = torch.tensor([math.copysign(math.log2(1 + abs(s)) / 3, s) for s in steps], dtype=torch.float64)
            hidden = (first.weight @ spaced + first.bias).relu()
            bias[:, i, j] = 16 * torch.sigmoid(second.weight @ hidden)
    expected = dense(*tensors, seen_by_hand(5, 7, 4, 2), bias)
    torch.testing.assert_close(swin(*tensors, grid=(5, 7)), expected, **TIGHT)
    swin(*tensors, grid=(5, 7)).square().sum().backward()
    assert first.weight.grad is not None and first.weight.grad.any()


def test_resizing_a_table_is_bicubic() -> None:
    table = torch.randn(13 * 13, 3)
    bigger = resize_rel_bias(table, (12, 12))
    expected = F.interpolate(table.T.view(1, 3, 13, 13), size=(23, 23), mode="bicubic", align_corners=True).view(3, -1)
    torch.testing.assert_close(bigger, expected.T)
    assert torch.equal(resize_rel_bias(table, (7, 7)), table)
    uneven = resize_rel_bias(torch.randn(3 * 5, 2), (4, 4), (2, 3))
    assert uneven.shape == (49, 2)
    ramp = torch.linspace(-1, 1, 9)[:, None]
    torch.testing.assert_close(resize_rel_bias(ramp, (9,))[[0, 8, 16], 0], torch.tensor([-1.0, 0.0, 1.0]))
    with pytest.raises(ShapeError):
        resize_rel_bias(torch.randn(12, 2), (4, 4))


def test_mean_of_windows_leaves_filling_out() -> None:
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    found = pool_windows(x, (2, 3)).view(2, 3, 3, 3)
    expected = F.avg_pool2d(x.permute(0, 3, 1, 2), (2, 3), ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1))
    with_zeros = F.avg_pool2d(F.pad(x.permute(0, 3, 1, 2), (0, 2, 0, 1)), (2, 3))
    torch.testing.assert_close(pool_windows(x, (2, 3), True).view(2, 3, 3, 3), with_zeros.permute(0, 2, 3, 1))


def test_filling_lies_at_the_end() -> None:
    x = torch.ones(1, 3, 5, 1)
    filled = pad_to_windows(x, (2, 4))
    assert filled.shape == (1, 4, 8, 1)
    assert filled[0, :3, :5].all()
    assert filled.sum() == 15
    plan = window_plan((3, 5), (2, 4), (1, 2), CPU)
    assert plan.valid.sum() == 15
    assert torch.equal(plan.token.flatten()[plan.inverse], torch.arange(15))


@pytest.mark.parametrize("kind", [Swin, SwinMLP])
def test_backbones_train_on_any_image_size(kind) -> None:
    model = kind(embed_dim=12, depths=(2, 2), num_heads=(2, 4), window=3, patch_size=2, num_classes=5)
    images = torch.randn(2, 3, 17, 22)
    maps = model.maps(images)
    assert [m.shape[1:] for m in maps] == [(12, 9, 11), (24, 5, 6)]
    model(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_mlp_blocks_cross_borders_only_when_shifted() -> None:
    x = torch.randn(1, 64, 8, requires_grad=True)
    for shift, crosses in ((0, False), (2, True)):
        block = SwinMLPBlock(8, 2, window=4, shift=shift)
        (grad,) = torch.autograd.grad(block(x, grid=(8, 8))[0, 4].sum(), x)
        assert bool(grad[0, 3].any()) is crosses


def test_bad_calls_teach() -> None:
    with pytest.raises(ShapeError, match="axes"):
        SwinAttention(4)(*inputs(16), grid=(16,))
    with pytest.raises(ShapeError, match="num_heads"):
        SwinAttention(4, num_heads=3)(*inputs(16), grid=(4, 4))
    with pytest.raises(OptionError, match="shift"):
        SwinAttention(4, 4)
    with pytest.raises(OptionError, match="'continuous'"):
        SwinAttention(4, position_bias=True)
    with pytest.raises(ShapeError, match="grid"):
        SwinBlock(8, 2)(torch.randn(1, 16, 8))
    with pytest.raises(ShapeError, match="pad_to_windows"):
        window_partition(torch.randn(1, 5, 6, 2), 2)
    with pytest.raises(OptionError, match="preset"):
        Swin.preset("huge")
