"""The sliding window with attention sinks: against the rule written out, and against full attention."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.cost import AttentionShape
from regard.errors import OptionError
from regard.local.sliding_window import SlidingWindowAttention


def tensors(length: int, kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))  # type: ignore[return-value]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "sinks", "block_size"), [(6, 2, 4), (1, 0, 8), (5, 3, 7)])
def test_each_query_sees_its_window_and_the_sinks(causal: bool, window: int, sinks: int, block_size: int) -> None:
    query, key, value = tensors(23)
    mechanism = SlidingWindowAttention(window, sinks, block_size)
    out, weights = mechanism(query, key, value, causal=causal), mechanism.weights(query, key, causal=causal)
    for i in range(23):
        seen = [j for j in range(23) if (abs(i - j) < window or j < sinks) and (not causal or j <= i)]
        scores = (query[:, :, i, None] * key[:, :, seen]).sum(-1) / 8**0.5
        torch.testing.assert_close(weights[:, :, i, seen], scores.softmax(-1))
        torch.testing.assert_close(weights[:, :, i].sum(-1), weights[:, :, i, seen].sum(-1))
        torch.testing.assert_close(out[:, :, i], (scores.softmax(-1)[..., None] * value[:, :, seen]).sum(2))


def test_a_window_over_everything_is_full_attention() -> None:
    query, key, value = tensors(19, 2)
    for causal in (False, True):
        out = SlidingWindowAttention(window=19, sinks=0)(query, key, value, causal=causal)
        torch.testing.assert_close(out, regard.attention(query, key, value, causal=causal))


def test_the_smallest_window_copies_the_values() -> None:
    query, key, value = tensors(11)
    torch.testing.assert_close(SlidingWindowAttention(window=1, sinks=0)(query, key, value), value)


def test_block_size_does_not_change_the_result() -> None:
    query, key, value = tensors(37)
    outs = [SlidingWindowAttention(6, 2, block)(query, key, value, causal=True) for block in (1, 4, 16, 64)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_the_decoding_state_stays_small() -> None:
    """However long the text, no more is kept than a later token can see, and the numbers stay the parallel form's."""
    query, key, value = tensors(40, 2)
    mechanism = SlidingWindowAttention(window=6, sinks=2, block_size=4)
    expected = mechanism(query, key, value, causal=True)
    state, outs = mechanism.init_state(2, like=query), []
    for start, size in ((0, 17), (17, 1), (18, 1), (19, 9), (28, 1), (29, 11)):
        now = slice(start, start + size)
        out, state = mechanism.step(query[:, :, now], key[:, :, now], value[:, :, now], state)
        outs.append(out)
        assert state.read().key.shape == (2, 2, min(start + size, 2 + 5), 8)
    torch.testing.assert_close(torch.cat(outs, 2), expected)


def test_cost_grows_with_the_window_and_not_with_the_square() -> None:
    mechanism = SlidingWindowAttention(window=64, sinks=4)
    flops = [mechanism.cost(AttentionShape(n, n, 4, 8, causal=True)).flops for n in (1024, 2048)]
    assert flops[1] == 2 * flops[0] == 2 * (2 * 4 * 1024 * 68 * 16)
    assert mechanism.cost(AttentionShape(1, 4096, 4, 8, causal=True)).state_bytes == 4 * 68 * 16 * 4
    short = AttentionShape(16, 16, 4, 8)
    assert mechanism.cost(short).flops == regard.create("full").cost(short).flops


def test_share_of_pairs_is_that_of_the_blocks() -> None:
    query, key, _ = tensors(64)
    share = SlidingWindowAttention(window=8, sinks=4, block_size=8).pairs(query, key, causal=True)
    assert share == pytest.approx((1 + 2 + 6 * 3) / 64), "the diagonal, its neighbour and the sinks' block"


def test_options_are_checked() -> None:
    for wrong in ({"window": 0}, {"sinks": -1}, {"block_size": 0}):
        with pytest.raises(OptionError, match="Need window >= 1"):
            SlidingWindowAttention(**wrong)
