"""Both loop orders of attention to listed blocks against the dense form, and the inverse index against a loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import BackendError, OptionError, ShapeError
from regard.kernels import selected_blocks
from regard.kernels.selected_blocks import inverse_index, selected_attention
from regard.layout import num_blocks
from regard.sparse.flash_sparse_nsa import padding_cost, selected_cost

ORDERS = ("query_major", "key_major")


def inputs(
    q_len: int,
    k_len: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    block: int = 8,
    slots: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and random lists of blocks up to the own one, the own one mostly among them."""
    k_len = q_len if k_len is None else k_len
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, q_len, 8), (2, kv_heads, k_len, 8), (2, kv_heads, k_len, 5)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    blocks = num_blocks(k_len, block)
    own = torch.arange(k_len - q_len, k_len).div(block, rounding_mode="floor")[:, None]
    ranks = torch.rand(2, kv_heads, q_len, blocks, generator=generator)
    ranks = ranks + (torch.arange(blocks) == own) * 0.6
    best = ranks.masked_fill(torch.arange(blocks) > own, -1).topk(min(slots, blocks), -1)
    return tensors, best.indices.masked_fill(best.values < 0, -1)


def value_and_gradients(
    tensors: list[Tensor], index: Tensor, block: int, backend: str, **options: object
) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of a generic scalar of both."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, lse = selected_attention(*leaves, index, block, return_lse=True, backend=backend, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    total = (out * weight).sum() + torch.where(lse.isfinite(), lse, 0).sin().sum()
    return [out, lse, *torch.autograd.grad(total, leaves)]


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("bounds", [None, 300], ids=["whole", "cut"])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("lengths", [(45, 45), (64, 64), (21, 50), (50, 21), (3, 3), (1, 1), (1, 29)])
@pytest.mark.parametrize("hide", [False, True])
def test_both_orders_equal_the_dense_form(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int], heads: int, hide: bool, bounds: int | None
) -> None:
    if bounds is not None:
        for name in ("_GROUP", "_PARTS", "_TOKENS"):
            monkeypatch.setattr(selected_blocks, name, bounds)
    tensors, index = inputs(*lengths, heads=heads)
    keys = torch.rand(2, 1, lengths[1], generator=torch.Generator().manual_seed(5)) < 0.7 if hide else None
    expected = value_and_gradients(tensors, index, 8, "reference", keys=keys)
    for order in ORDERS:
        for ours, other in zip(value_and_gradients(tensors, index, 8, order, keys=keys, tile=4), expected, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_single_precision_agrees_to_1e_5(heads: int) -> None:
    tensors, index = inputs(150, heads=heads, kv_heads=1, block=16, slots=4, dtype=torch.float32)
    expected = value_and_gradients(tensors, index, 16, "reference")
    for order in ORDERS:
        for ours, other in zip(value_and_gradients(tensors, index, 16, order), expected, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("order", ORDERS)
def test_all_blocks_is_causal_attention(order: str) -> None:
    tensors, index = inputs(45, slots=6)
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(selected_attention(*tensors, index, 8, backend=order), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_empty_lists_give_zeros(order: str) -> None:
    tensors, index = inputs(20)
    index[:, 1] = -1
    out, lse, *gradients = value_and_gradients(tensors, index, 8, order)
    assert not bool(out[:, 2:].any()) and bool((lse[:, 2:] == float("-inf")).all())
    assert all(bool(g.isfinite().all()) for g in gradients) and not bool(gradients[1][:, 1].any())
    # Lists without any slot at all.
    assert not bool(torch.as_tensor(selected_attention(*tensors, index[..., :0], 8, backend=order)).any())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_single(order: str, dtype: torch.dtype) -> None:
    tensors, index = inputs(70, block=16, dtype=dtype)
    exact = selected_attention(*(t.double() for t in tensors), index, 16, backend="reference")
    ours = torch.as_tensor(selected_attention(*tensors, index, 16, backend=order))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), torch.as_tensor(exact), rtol=2 * torch.finfo(dtype).eps, atol=2e-3)


@pytest.mark.paper("flash_sparse_nsa")
def test_the_inverse_index_lists_who_lists_what() -> None:
    number = torch.randint(0, 8, (200,), generator=torch.Generator().manual_seed(0))
    order, offsets = inverse_index(number, 7)  # 7 stands for nothing
    for block in range(7):
        expected = [entry for entry in range(200) if number[entry] == block]
        assert order[offsets[block] : offsets[block + 1]].tolist() == expected
    assert int(offsets[-1]) == int((number < 7).sum())


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32])
def test_counted_operations_follow_the_padding_model(group: int) -> None:
    """Query-major in tiles of 16 rows computes tile / g times as much, and key-major what is needed and little more."""
    length, block, slots = 256, 16, 4
    tensors, index = inputs(length, heads=group, kv_heads=1, block=block, slots=slots)
    key, value = tensors[1], tensors[1]

    def counted(order: str, tile: int = 1) -> int:
        with FlopCounterMode(display=False) as counter:
            selected_attention(tensors[0], key, value, index, block, tile=tile, backend=order)
        return counter.get_total_flops()

    assert counted("query_major", 16) / counted("query_major") == pytest.approx(padding_cost(group, 16))
    listed = int((index >= 0).sum())
    needed = 4 * group * block * 8 * listed
    assert needed <= counted("key_major") <= 1.3 * needed
    padded, exact = (selected_cost(o, length, group, 1, 8, block_size=block, top_k=slots) for o in ORDERS)  # type: ignore[arg-type]
    assert padded.flops / exact.flops == pytest.approx(padding_cost(group, 16))


def test_bad_input_is_refused() -> None:
    tensors, index = inputs(20)
    with pytest.raises(ShapeError, match="one list for all query heads"):
        selected_attention(*tensors, index.expand(2, 2, 20, -1).repeat(1, 2, 1, 1), 8)
    with pytest.raises(ShapeError, match="int64"):
        selected_attention(*tensors, index.int(), 8)
    with pytest.raises(ShapeError, match="True for visible"):
        selected_attention(*tensors, index, 8, keys=torch.ones(2, 1, 19, dtype=torch.bool))
    with pytest.raises(OptionError, match="at least 1"):
        selected_attention(*tensors, index, 0)
    with pytest.raises(BackendError, match="query_major"):
        selected_attention(*tensors, index, 8, backend="sdpa")
