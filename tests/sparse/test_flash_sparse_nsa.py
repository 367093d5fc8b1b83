"""Native sparse attention against its formulas written as loops, its limits, and its own step-by-step form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache import DynamicCache, EvictingCache, PagedCache, PagePool, StaticCache
from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.masks import Causal, KeyPadding
from regard.sparse.flash_sparse_nsa import (
    NativeSparseAttention,
    compressed_attention,
    compressed_to_block_scores,
    linear_compress,
    nsa_topk,
    padding_cost,
    selected_cost,
)

OPTIONS = {"kernel": 8, "stride": 4, "block_size": 8, "top_k": 4, "window": 10}


class Fixed(nn.Module):
    """A gate that shuts all branches but those given."""

    def __init__(self, *branches: int) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.full((*x.shape[:2], 3), -1e9, dtype=x.dtype)
        gate[..., list(self.branches)] = 1e9
        return gate


def layer(**options: object) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(32, 4, 2, **{**OPTIONS, **options}).double()  # type: ignore[arg-type]


def tokens(length: int = 61, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary positions as complex rotations of pairs (i, i + dim / 2)."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def by_the_formulas(m: NativeSparseAttention, x: Tensor, score_heads: int, window: int) -> Tensor:
    """Token by token and head by head, for one sequence ``(length, embed_dim)``; scores are summed over the first
    ``score_heads`` heads of a group."""
    kernel, stride, block, top_k = (OPTIONS[name] for name in ("kernel", "stride", "block_size", "top_k"))
    length, dim, group = len(x), m.head_dim, m.num_heads // m.num_kv_heads
    query, key, value = ((x @ linear.weight.T).view(length, -1, dim) for linear in (m.query, m.key, m.value))
    gate = (x @ m.gate.weight.T).sigmoid()
    out = torch.zeros(length, m.num_heads, dim, dtype=x.dtype)

    def attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
        if not keys:
            return torch.zeros(dim, dtype=x.dtype), torch.zeros(0, dtype=x.dtype)
        share = (torch.stack(keys) @ q / math.sqrt(dim)).softmax(0)
        return share @ torch.stack(values), share

    for kv in range(m.num_kv_heads):
        small_keys, small_values = [], []
        for start in range(0, length - kernel + 1, stride):
            tokens = key[start : start + kernel, kv] + m.window_position[kv]
            small_keys.append(turned(tokens.flatten() @ m.compress_key[kv], start))
            small_values.append(value[start : start + kernel, kv].flatten() @ m.compress_value[kv])
        keys, values = [turned(key[s, kv], s) for s in range(length)], list(value[:, kv])
        for t in range(length):
            queries = [turned(query[t, h], t) for h in range(kv * group, (kv + 1) * group)]
            count = max((t + 1 - kernel) // stride + 1, 0)
            small = [attend(q, small_keys[:count], small_values[:count]) for q in queries]
            scores = [0.0] * (t // block + 1)
            for _, share in small[:score_heads]:
                for j, p in enumerate(share.tolist()):
                    for piece in range(j, j + kernel // stride):  # each stride of a window counts where it lies
                        if piece * stride // block < len(scores):
                            scores[piece * stride // block] += p
            own = len(scores) - 1
            forced = {0, own, max(own - 1, 0)}
            others = sorted(set(range(own)) - forced, key=lambda b: -scores[b])
            chosen = [*forced, *others][: max(top_k, len(forced))]
            listed = [s for b in chosen for s in range(b * block, min((b + 1) * block, t + 1))]
            near = list(range(max(t - window + 1, 0), t + 1))
            for i, q in enumerate(queries):
                selected, _ = attend(q, [keys[s] for s in listed], [values[s] for s in listed])
                windowed, _ = attend(q, [keys[s] for s in near], [values[s] for s in near])
                out[t, kv * group + i] = gate[t, 0] * small[i][0] + gate[t, 1] * selected + gate[t, 2] * windowed
    return out.flatten(1) @ m.out.weight.T


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("official", [False, True])
def test_equals_the_formulas(official: bool) -> None:
    m, x = layer(official=official), tokens(50, batch=1)
    # The first choice needs more blocks than top_k: 50 tokens are 7 blocks.
    expected = by_the_formulas(m, x[0], 1 if official else 2, 11 if official else 10)
    torch.testing.assert_close(m(x)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("executor", ["query_major", "key_major", "reference"])
def test_executors_differ_in_speed_alone(executor: str) -> None:
    m, x = layer(), tokens()
    expected = torch.autograd.grad(m(x).sin().sum(), list(m.parameters()))
    m.executor = executor  # type: ignore[assignment]
    for ours, other in zip(torch.autograd.grad(m(x).sin().sum(), list(m.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("flash_sparse_nsa")
def test_selected_branch_with_all_blocks_is_full_attention() -> None:
    m, x = layer(top_k=8), tokens()
    m.gate = Fixed(1)  # type: ignore[assignment]
    query, key, value = (linear(x).unflatten(-1, (-1, 8)).transpose(1, 2) for linear in (m.query, m.key, m.value))
    query, key = (torch.stack([turned(t[:, :, s], s) for s in range(61)], 2) for t in (query, key))
    full = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(m(x), m.out(full.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-9)


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("start", [0, 19])
def test_lists_hold_the_first_own_and_previous_block(start: int) -> None:
    scores = torch.rand(2, 2, 45, 8, generator=torch.Generator().manual_seed(0))
    index = nsa_topk(scores, 4, block_size=8, start=start)
    assert index.shape == (2, 2, 45, 4)
    for t in range(45):
        own = (start + t) // 8
        for row in index[:, :, t].flatten(0, 1).tolist():
            real = [b for b in row if b >= 0]
            assert real == sorted(set(real)) and row == real + [-1] * (4 - len(real)), "rising, no block twice"
            assert {0, own, max(own - 1, 0)} <= set(real) and max(real) == own
            assert len(real) == min(own + 1, 4)
    # Of the others the best are taken.
    ranked = scores[0, 0, -1, 1 : (start + 44) // 8 - 1].argsort(descending=True) + 1
    assert set(ranked[:1].tolist()) <= set(index[0, 0, -1].tolist())


@pytest.mark.paper("flash_sparse_nsa")
def test_block_scores_weigh_five_windows_1_2_2_2_1() -> None:
    shares = torch.eye(15, dtype=torch.float64)  # one window each
    scores = compressed_to_block_scores(shares, kernel=32, stride=16, block_size=64)
    for b in range(1, 3):
        expected = torch.zeros(15, dtype=torch.float64)
        expected[4 * b - 1 : 4 * b + 4] = torch.tensor([1.0, 2, 2, 2, 1], dtype=torch.float64)
        assert torch.equal(scores[:, b], expected)
    # A window counts as often as it has strides: once for each of its two, wherever they lie.
    assert torch.equal(scores.sum(-1), torch.full((15,), 2.0, dtype=torch.float64))
    # Windows equal to blocks count once, in their own.
    assert torch.equal(compressed_to_block_scores(shares, 16, 16, 16), shares)


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("branch", [0, 1, 2])
def test_the_future_reaches_no_branch(branch: int) -> None:
    m, x = layer(), tokens()
    m.gate = Fixed(branch)  # type: ignore[assignment]
    out = m(x)
    assert bool(out[:, -1].any())
    for t in (0, 7, 8, 23, 40, 59):
        changed = torch.cat((x[:, : t + 1], 5 * tokens(seed=3)[:, t + 1 :]), 1)
        torch.testing.assert_close(m(changed)[:, : t + 1], out[:, : t + 1], rtol=1e-10, atol=1e-10)
        assert float((m(changed)[:, t + 1 :] - out[:, t + 1 :]).detach().abs().max()) > 1e-3


@pytest.mark.paper("flash_sparse_nsa")
def test_a_query_sees_a_window_from_its_last_token_on() -> None:
    query, small = torch.randn(1, 2, 20, 8), torch.randn(1, 1, 4, 8)
    out, shares = compressed_attention(query, small, small, 8, 4, start=3)
    for t in range(20):
        count = sum(j * 4 + 8 - 1 <= t + 3 for j in range(4))
        assert int((shares[0, 0, t] > 0).sum()) == count
        assert float(shares[0, 0, t].sum()) == pytest.approx(2.0 if count else 0.0, abs=1e-5)  # two query heads
        assert bool(out[0, :, t].any()) == (count > 0)


@pytest.mark.paper("flash_sparse_nsa")
def test_compression_is_a_product_per_window() -> None:
    x, weight, pe = torch.randn(2, 3, 21, 4), torch.randn(3, 6 * 4, 5), torch.randn(3, 6, 4)
    out = linear_compress(x, weight, 6, 3, pe)
    assert out.shape == (2, 3, (21 - 6) // 3 + 1, 5)
    for j in range(out.shape[2]):
        for h in range(3):
            flat = (x[:, h, 3 * j : 3 * j + 6] + pe[h]).flatten(1)
            torch.testing.assert_close(out[:, h, j], flat @ weight[h])
    assert linear_compress(x[:, :, :5], weight, 6, 3).shape == (2, 3, 0, 5)


@pytest.mark.paper("flash_sparse_nsa")
def test_the_choice_carries_no_gradient() -> None:
    m = layer()
    m.gate = Fixed(1)  # type: ignore[assignment]
    m(tokens()).sum().backward()
    assert m.key.weight.grad is not None and bool(m.key.weight.grad.any())
    for parameter in (m.compress_key, m.compress_value, m.window_position):
        assert parameter.grad is None or not bool(parameter.grad.any())


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("pieces", [(61,), (1,) * 61, (5, 1, 1, 20, 1, 33), (9, 9, 43)])
def test_decoding_gives_the_parallel_numbers(pieces: tuple[int, ...]) -> None:
    m, x = layer(), tokens()
    state, outs, at = m.init_state(2, like=x), [], 0
    for count in pieces:
        out, state = m.step(x[:, at : at + count], state)
        outs.append(out)
        at += count
    torch.testing.assert_close(torch.cat(outs, 1), m(x), rtol=1e-10, atol=1e-10)
    assert state.cache.seen == 61 and state.windows.seen == (61 - 8) // 4 + 1
    assert state.open_key.shape[2] < 8


@pytest.mark.paper("flash_sparse_nsa")
@pytest.mark.parametrize("grad", [False, True])
def test_any_cache_that_keeps_all_tokens_decodes(grad: bool) -> None:
    m, x = layer(), tokens(30)
    expected = m(x)
    for cache in (DynamicCache(), StaticCache(30), PagedCache(PagePool(8))):
        state, outs = m.init_state(2, like=x, cache=cache), []
        with torch.set_grad_enabled(grad):
            for piece in x.split(7, 1):
                out, state = m.step(piece, state)
                outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(OptionError, match="cannot evict"):
        m.init_state(2, like=x, cache=EvictingCache())


def test_a_copied_state_is_a_branch() -> None:
    m, x = layer(), tokens(30)
    with torch.no_grad():
        _, state = m.step(x[:, :20], m.init_state(2, like=x))
        branch = state.copy()
        m.step(5 * x[:, :10], branch)
        out, _ = m.step(x[:, 20:], state)
        torch.testing.assert_close(out, m(x)[:, 20:], rtol=1e-10, atol=1e-10)


def test_stretches_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = layer(), tokens(200)
    expected = m(x)
    monkeypatch.setattr("regard.sparse.flash_sparse_nsa._AREA", 1)
    torch.testing.assert_close(m(x), expected, rtol=1e-10, atol=1e-10)


def test_hidden_tokens_count_as_zeros_in_windows() -> None:
    m, x = layer(), tokens()
    valid = torch.ones(2, 61, dtype=torch.bool)
    valid[0, :20] = False
    m.gate = Fixed(0)  # type: ignore[assignment]
    out = m(x, mask=KeyPadding(valid))
    # Windows of hidden tokens alone are not seen: those that begin before token 13 end before token 20.
    assert not bool(out[0, :23].any()) and bool(out[0, 23].any())
    torch.testing.assert_close(out[1], m(x)[1])


@pytest.mark.paper("flash_sparse_nsa")
def test_padding_and_traffic_models() -> None:
    assert [padding_cost(g) for g in (1, 2, 4, 8, 16, 32)] == [16, 8, 4, 2, 1, 1]
    assert padding_cost(4, tile=8) == 2
    for group in (1, 4, 16):
        rows = selected_cost("query_major", 4096, 4 * group, 4), selected_cost("key_major", 4096, 4 * group, 4)
        assert rows[0].flops / rows[1].flops == padding_cost(group)
        listed = sum(min(t // 64 + 1, 16) for t in range(4096)) * 4
        assert rows[1].flops == 4 * 64 * 128 * group * listed
        assert rows[0].read > rows[1].read + rows[1].written, "keys are read again for every query"
        assert rows[0].buffer == 0 and rows[1].buffer >= listed * group * 128 * 4


def test_initial_bounds() -> None:
    """Xavier's bounds of one head's matrix; the released code takes those of the whole stack."""
    torch.manual_seed(0)
    ours, released = (NativeSparseAttention(64, 2, official=official) for official in (False, True))
    assert float(ours.compress_key.detach().abs().max()) == pytest.approx(math.sqrt(6 / (32 * 32 + 32)), rel=1e-2)
    assert float(released.compress_key.detach().abs().max()) == pytest.approx(
        math.sqrt(6 / (32 * 32 * 32 + 2 * 32)), rel=1e-2
    )
    assert (ours.window, released.window) == (512, 513)


def test_bad_input_is_refused() -> None:
    for options, match in (
        ({"num_heads": 5}, "num_heads 5"),
        ({"num_heads": 4, "num_kv_heads": 3}, "does not divide"),
        ({"num_heads": 4, "stride": 5}, "must divide"),
        ({"num_heads": 4, "top_k": 2}, "at least their sum"),
        ({"num_heads": 4, "executor": "fast"}, "executor"),
    ):
        with pytest.raises(OptionError, match=match):
            NativeSparseAttention(32, **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedPatternError):
        layer()(tokens(), causal=False)
    with pytest.raises(UnsupportedMaskError):
        layer()(tokens(), mask=Causal())
    with pytest.raises(ShapeError, match=r"\(batch, length, 32\)"):
        layer()(torch.randn(2, 5, 31, dtype=torch.float64))
    with pytest.raises(ShapeError, match="takes a weight"):
        linear_compress(torch.randn(1, 1, 9, 4), torch.randn(1, 8, 4), 4, 2)
    with pytest.raises(OptionError):
        padding_cost(0)
    with pytest.raises(OptionError):
        selected_cost("dense", 8, 1, 1)  # type: ignore[arg-type]
