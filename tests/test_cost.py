"""Costs agree with torch's own FLOP counter on what is really run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.cost import AttentionShape, cache_bytes, dense_cost, linear_cost, linear_layer_flops
from regard.kernels import block_sparse_attention, dense_attention, linear_attention, use_backend
from regard.layout import BlockLayout


def counted(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops()


def tensors(shape: AttentionShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(shape.batch, shape.num_heads, shape.q_len, shape.head_dim),
        torch.randn(shape.batch, shape.kv_heads, shape.k_len, shape.head_dim),
        torch.randn(shape.batch, shape.kv_heads, shape.k_len, shape.v_dim),
    )


SHAPES = [
    AttentionShape(32, 32, 2, 16),
    AttentionShape(24, 40, 4, 8, batch=3, num_kv_heads=2, value_dim=12),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape: AttentionShape) -> None:
    """Of the reference form: the counter does not see inside the fused kernel of a CPU."""
    query, key, value = tensors(shape)
    assert dense_cost(shape).flops == counted(lambda: dense_attention(query, key, value, backend="reference"))


@pytest.mark.parametrize("shape", SHAPES)
def test_block_sparse(shape: AttentionShape) -> None:
    """The gathered form computes the visited blocks and no others."""
    query, key, value = tensors(shape)
    chosen = torch.rand(shape.batch, shape.num_heads, shape.q_len // 8, shape.k_len // 8) < 0.5
    chosen[..., 0] = True
    count = chosen[:, :, :1].sum(-1, keepdim=True)
    chosen[:] = torch.arange(shape.k_len // 8) < count[:1, :1]  # equal counts: no slot is filled up
    layout = BlockLayout.of(None, shape.q_len, shape.k_len, 8, 8).only(chosen)
    cost = dense_cost(shape, layout.density())
    assert cost.flops == counted(lambda: block_sparse_attention(query, key, value, layout, backend="gather"))


@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape: AttentionShape) -> None:
    query, key, value = tensors(shape)
    assert linear_cost(shape).flops == counted(lambda: linear_attention(query, key, value))


def test_chunked_linear_is_counted_with_its_squares() -> None:
    shape = AttentionShape(64, 64, 2, 16)
    query, key, value = tensors(shape)
    run = counted(lambda: linear_attention(query, key, value, causal=True, chunk_size=16, backend="chunked"))
    assert linear_cost(shape, chunk=16).flops == run


def test_linear_layer() -> None:
    layer, x = torch.nn.Linear(12, 20), torch.randn(2, 7, 12)
    assert linear_layer_flops(14, 12, 20) == counted(lambda: layer(x))


def test_bytes() -> None:
    """Every input once, every output once; the cache holds keys and values of the key-value heads."""
    shape = AttentionShape(24, 40, 4, 8, batch=3, num_kv_heads=2, value_dim=12, element_size=2)
    inputs = sum(t.numel() for t in tensors(shape))
    assert dense_cost(shape).bytes == 2 * (inputs + 3 * 4 * 24 * 12)
    assert cache_bytes(shape) == 2 * 3 * 2 * 40 * (8 + 12)
    assert cache_bytes(shape, 16) == cache_bytes(shape) * 16 // 40
    assert cache_bytes(shape, 99) == cache_bytes(shape)


def test_linear_state_does_not_grow() -> None:
    costs = [linear_cost(AttentionShape(n, n, 4, 8)) for n in (100, 1000)]
    assert costs[0].state_bytes == costs[1].state_bytes == 4 * 8 * 9 * 4
    assert costs[0].pairs is None
    assert costs[1].flops == 10 * costs[0].flops


def test_full_attention_declares_what_it_runs() -> None:
    shape = AttentionShape(16, 16, 2, 8)
    mechanism, inputs = regard.create("full"), tensors(shape)
    with use_backend("reference"):
        assert mechanism.cost(shape).flops == counted(lambda: mechanism(*inputs))
