"""MoBA against its limits, its formula written as a loop, and its own promise that nothing later reaches back."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, UnsupportedPatternError
from regard.layout import num_blocks
from regard.masks import KeyPadding
from regard.registry import build
from regard.sparse.moba import MoBAAttention, hybrid_schedule, moba_attention, moba_gate, moba_select

EXECUTORS = ("merged", "masked", "rows")


def inputs(
    length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64)
    key = torch.randn(2, kv_heads, length, dim, generator=generator, dtype=torch.float64)
    return query, key, torch.randn(2, kv_heads, length, dim, generator=generator, dtype=torch.float64)


def by_the_formula(query: Tensor, key: Tensor, value: Tensor, block: int, top_k: int) -> Tensor:
    """Query by query: rank the complete past blocks by q . mean(k), take top_k - 1 of them and the own block."""
    out = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            k, v = key[b, h // group], value[b, h // group]
            for t in range(query.shape[2]):
                own = t // block
                gates = [float(query[b, h, t] @ k[i * block : (i + 1) * block].mean(0)) for i in range(own)]
                best = sorted(range(own), key=lambda i: -gates[i])[: top_k - 1]
                tokens = [j for i in best for j in range(i * block, (i + 1) * block)] + list(range(own * block, t + 1))
                weights = (query[b, h, t] @ k[tokens].T / math.sqrt(query.shape[3])).softmax(-1)
                out[b, h, t] = weights @ v[tokens]
    return out


@pytest.mark.paper("moba")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_equals_the_formula(executor: str) -> None:
    query, key, value = inputs(45)
    out = moba_attention(query, key, value, 8, 3, executor)
    torch.testing.assert_close(out, by_the_formula(query, key, value, 8, 3), rtol=1e-10, atol=1e-10)


@pytest.mark.paper("moba")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_all_blocks_is_causal_attention(executor: str) -> None:
    query, key, value = inputs(45)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for top_k in (6, 50):
        torch.testing.assert_close(
            moba_attention(query, key, value, 8, top_k, executor), expected, rtol=1e-10, atol=1e-10
        )


@pytest.mark.paper("moba")
def test_one_block_is_block_diagonal() -> None:
    query, key, value = inputs(45)
    out = moba_attention(query, key, value, 8, 1)
    for start in range(0, 45, 8):
        piece = slice(start, start + 8)
        own = F.scaled_dot_product_attention(
            query[:, :, piece], key[:, :, piece], value[:, :, piece], is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[:, :, piece], own, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("moba")
@pytest.mark.parametrize("length", [64, 61, 7, 1])
def test_merged_equals_masked_with_gradients(length: int) -> None:
    tensors = [t.to(torch.float32).requires_grad_() for t in inputs(length)]
    weight = torch.randn(2, 4, length, 8, generator=torch.Generator().manual_seed(9))
    results = []
    for executor in ("merged", "masked"):
        out = moba_attention(*tensors, 8, 3, executor)
        results.append((out, *torch.autograd.grad((out * weight).sum(), tensors)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.paper("moba")
def test_the_future_changes_neither_selection_nor_output() -> None:
    query, key, value = inputs(45)
    gate, out = moba_gate(query, key, 8), moba_attention(query, key, value, 8, 3)
    for t in (3, 15, 16, 30):
        changed = [
            torch.cat((x[:, :, : t + 1], 5 * torch.randn_like(x[:, :, t + 1 :])), 2) for x in (query, key, value)
        ]
        chosen = moba_select(moba_gate(changed[0], changed[1], 8), 3)
        assert torch.equal(chosen[:, :, : t + 1], moba_select(gate, 3)[:, :, : t + 1])
        torch.testing.assert_close(moba_attention(*changed, 8, 3)[:, :, : t + 1], out[:, :, : t + 1])


@pytest.mark.paper("moba")
@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_number_of_blocks_a_query(top_k: int) -> None:
    query, key, _ = inputs(45)
    chosen = moba_select(moba_gate(query, key, 8), top_k)
    own = torch.arange(45) // 8
    assert torch.equal(chosen.sum(-1), (own + 1).clamp_max(top_k).expand(2, 4, 45))
    assert bool(chosen.gather(-1, own.view(1, 1, -1, 1).expand(2, 4, -1, 1)).all()), "the own block is always chosen"
    assert not bool((chosen & (torch.arange(num_blocks(45, 8)) > own[:, None])).any())


@pytest.mark.paper("moba")
def test_switching_the_mode_needs_no_weights() -> None:
    query, key, value = inputs(45)
    mechanism = MoBAAttention(8, 2)
    assert list(mechanism.parameters()) == [] and list(mechanism.state_dict()) == []
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    sparse = mechanism(query, key, value, causal=True)
    mechanism.mode = "full"
    torch.testing.assert_close(mechanism(query, key, value, causal=True), expected)
    assert mechanism.pairs(query, key, causal=True) is not None
    mechanism.mode = "moba"
    assert torch.equal(mechanism(query, key, value, causal=True), sparse)
    assert float((sparse - expected).abs().max()) > 1e-3


@pytest.mark.paper("moba")
def test_decoding_reads_cached_means() -> None:
    query, key, value = inputs(45)
    mechanism = MoBAAttention(8, 3)
    expected, state, outs = mechanism(query, key, value, causal=True), mechanism.init_state(2, like=query), []
    for piece in (5, 1, 1, 20, 1, 17):
        at = sum(o.shape[2] for o in outs)
        out, state = mechanism.step(*(x[:, :, at : at + piece] for x in (query, key, value)), state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-9, atol=1e-9)
    assert state.means is not None and state.means.shape[2] == 5


def test_full_layers_and_schedule() -> None:
    layers = [build("moba", {"full_layers": 2}, layer_index=i, num_layers=5) for i in range(5)]
    assert [layer.mode for layer in layers] == ["moba"] * 3 + ["full"] * 2
    assert [hybrid_schedule(step, 10) for step in range(10)] == ["moba"] * 9 + ["full"]


def test_padding_does_not_move_the_gate() -> None:
    query, key, value = inputs(40)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 10:20] = False
    mechanism, mask = MoBAAttention(8, 2), KeyPadding(valid)
    out = mechanism(query, key, value, causal=True, mask=mask)
    noise = torch.where(valid[:, None, :, None], key, 100.0)
    torch.testing.assert_close(mechanism(query, noise, value, causal=True, mask=mask), out)


def test_errors_teach() -> None:
    with pytest.raises(OptionError):
        MoBAAttention(0)
    with pytest.raises(OptionError):
        MoBAAttention(executor="fast")  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        MoBAAttention().mode = "dense"  # type: ignore[assignment]
    with pytest.raises(UnsupportedPatternError):
        MoBAAttention(8, 2)(*inputs(16))


def test_cost_counts_the_blocks_seen() -> None:
    from regard.cost import AttentionShape

    query, key, _ = inputs(64)
    mechanism = MoBAAttention(8, 3)
    cost = mechanism.cost(AttentionShape(64, 64, 4, 8, batch=2, num_kv_heads=2, causal=True))
    assert cost.pairs == pytest.approx(mechanism.pairs(query, key, causal=True))
