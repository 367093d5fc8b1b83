"""LongHeads against its text written as loops, and against full attention on the sequences that it makes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cache import QuantizedCache
from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import KeyPadding
from regard.sparse.longheads import LongHeads, chunk_features, head_coverage, longheads_attention, select_chunks

CHUNK, COUNT = 4, 4
ATTN = CHUNK * COUNT


def inputs(length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64)
    key = torch.randn(2, kv_heads, length, dim, generator=generator, dtype=torch.float64)
    return query, key, torch.randn(2, kv_heads, length, dim, generator=generator, dtype=torch.float64)


def rotated(x: Tensor, *positions: int) -> Tensor:
    """Rows ``(len(positions), dim)`` at these positions."""
    cos, sin = rotary_angles(max(positions) + 1, x.shape[-1], dtype=x.dtype)
    return apply_rotary(x, cos[list(positions)], sin[list(positions)])


def feature_by_the_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One chunk of one head, ``(tokens, dim)`` each."""
    places = range(len(query))
    q, k = rotated(query, *places), rotated(key, *places)
    out = [(q[i] @ k.T / math.sqrt(len(q[0]))).softmax(-1) @ value for i in places]
    asked = torch.stack(out).mean(0)
    return (asked @ k.T / math.sqrt(len(asked))).softmax(-1) @ k


def by_the_formula(
    query: Tensor, key: Tensor, value: Tensor, begin: int = ATTN
) -> tuple[Tensor, list[list[list[int]]]]:
    """One sequence, token by token and head by head: the output ``(heads, length, dim)`` and the chunks chosen."""
    heads, length, dim = query.shape
    out, chosen = torch.zeros_like(query), [[[] for _ in range(length)] for _ in range(heads)]
    for h in range(heads):
        q, k, v = query[h], key[h * len(key) // heads], value[h * len(key) // heads]
        features = [
            feature_by_the_formula(*(x[s : s + CHUNK] for x in (q, k, v))) for s in range(0, length - CHUNK + 1, CHUNK)
        ]
        for t in range(length):
            own = t // CHUNK
            if t < begin:
                tokens = list(range(t + 1))
            else:
                middle = sorted(range(1, own - 1), key=lambda c: -float(q[t] @ features[c]))[: COUNT - 3]
                chosen[h][t] = sorted([0, *middle, own - 1, own])
                tokens = [j for c in chosen[h][t] for j in range(c * CHUNK, (c + 1) * CHUNK) if j <= t]
            keys, asked = rotated(k[tokens], *range(len(tokens))), rotated(q[t : t + 1], len(tokens) - 1)
            out[h, t] = ((asked @ keys.T / math.sqrt(dim)).softmax(-1) @ v[tokens])[0]
    return out, chosen


@pytest.mark.paper("longheads")
@pytest.mark.parametrize("length", [43, 40, 17])
def test_equals_the_formula(length: int) -> None:
    """Prefill, chunk by chunk, against one token after the other."""
    query, key, value = inputs(length)
    out = longheads_attention(query, key, value, attn_length=ATTN, chunk=CHUNK)
    features = chunk_features(query, key, value, CHUNK)
    for b in range(2):
        expected, chosen = by_the_formula(query[b], key[b], value[b])
        torch.testing.assert_close(out[b], expected, rtol=1e-9, atol=1e-9)
        ids = LongHeads(ATTN, CHUNK).chosen(query[:, :, ATTN:], features, ATTN)
        assert ids[b].tolist() == [chosen[h][ATTN:] for h in range(4)]
        wanted = feature_by_the_formula(query[b, 3, 4:8], key[b, 1, 4:8], value[b, 1, 4:8])
        torch.testing.assert_close(features[b, 3, 1], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("longheads")
def test_up_to_attn_length_it_is_causal_attention() -> None:
    query, key, value = inputs(ATTN)
    places = range(ATTN)
    turned = (rotated(x, *places) for x in (query, key))
    expected = F.scaled_dot_product_attention(*turned, value, is_causal=True, enable_gqa=True)
    out = longheads_attention(query, key, value, attn_length=ATTN, chunk=CHUNK)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    query, key, value = inputs(40)
    later = longheads_attention(query, key, value, attn_length=ATTN, chunk=CHUNK, begin=40)
    turned = (rotated(x, *range(40)) for x in (query, key))
    expected = F.scaled_dot_product_attention(*turned, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(later, expected, rtol=1e-10, atol=1e-10)
    query, key, value = inputs(43)
    out, _ = by_the_formula(query[0], key[0], value[0], begin=28)
    module = LongHeads(ATTN, CHUNK, begin=28)
    torch.testing.assert_close(module(query, key, value, causal=True)[0], out, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("longheads")
@pytest.mark.parametrize("length", [23, 100, 260])
def test_distances_stay_below_attn_length(length: int) -> None:
    """With tables that end at ``attn_length`` nothing can be rotated further; with keys and queries that only know
    distance, the furthest is found."""
    query, key, value = inputs(length, dim=2)
    table = tuple(t.double() for t in rotary_angles(ATTN, 2, base=10000.0, dtype=torch.float64))
    module = LongHeads(ATTN, CHUNK, rope=table)  # type: ignore[arg-type]
    out = module(query, key, value, causal=True)
    torch.testing.assert_close(out, LongHeads(ATTN, CHUNK)(query, key, value, causal=True))
    # One pair of channels turning by 1 a token: q . k = cos(distance), so the logits tell the distances apart.
    asked, kept = torch.zeros_like(query), torch.zeros_like(key)
    asked[..., 0], kept[..., 0] = 2**0.5, 1.0
    features = chunk_features(asked, kept, value, CHUNK)
    weights = module.weights(asked, kept, value, causal=True)[0, 0, ATTN:]
    ids = module.chosen(asked[:, :, ATTN:], features, ATTN)[0, 0]
    for t, row, chunks in zip(range(ATTN, length), weights, ids.tolist(), strict=True):
        tokens = [j for c in chunks for j in range(c * CHUNK, (c + 1) * CHUNK) if j <= t]
        assert len(tokens) == ATTN - CHUNK + t % CHUNK + 1 <= ATTN
        distances = torch.arange(len(tokens) - 1, -1, -1, dtype=torch.float64)
        torch.testing.assert_close(row[tokens], distances.cos().softmax(-1), rtol=1e-9, atol=1e-9)
        assert int((row > 0).sum()) == len(tokens)


@pytest.mark.paper("longheads")
def test_what_a_selection_holds() -> None:
    query, key, value = inputs(90)
    features = chunk_features(query, key, value, CHUNK)
    own = torch.arange(ATTN, 90) // CHUNK
    for count in (3, 4):
        ids = select_chunks(query[:, :, ATTN:], features, count, own)
        assert ids.shape == (2, 4, 90 - ATTN, count)
        assert bool((ids.diff(dim=-1) > 0).all()), "distinct and ascending"
        assert bool((ids[..., 0] == 0).all())
        assert bool((ids[..., -1] == own).all()) and bool((ids[..., -2] == own - 1).all())
        covered = head_coverage(ids)
        for b, t in ((0, 0), (1, 40)):
            assert int(covered[b, t]) == len(set(ids[b, :, t].flatten().tolist()))
    assert float(head_coverage(select_chunks(query[:, :, ATTN:], features, 4, own)).double().mean()) > 4


@pytest.mark.paper("longheads")
def test_the_chosen_chunks_are_read_as_one_sequence() -> None:
    """Full rotary attention on the contiguous sequence made of the chosen chunks has the same last row, and a longer
    gap between two chunks changes nothing."""
    query, key, value = inputs(61)
    features = chunk_features(query, key, value, CHUNK)
    out = longheads_attention(query, key, value, attn_length=ATTN, chunk=CHUNK)
    for t in (20, 39, 60):
        ids = LongHeads(ATTN, CHUNK).chosen(query[:, :, t : t + 1], features, t)
        for b, h in ((0, 0), (1, 3)):
            tokens = [j for c in ids[b, h, 0].tolist() for j in range(c * CHUNK, (c + 1) * CHUNK) if j <= t]
            q, k, v = (x[b, index][tokens][None, None] for x, index in ((query, h), (key, h // 2), (value, h // 2)))
            turned = (rotated(x, *range(len(tokens))) for x in (q, k))
            full = F.scaled_dot_product_attention(*turned, v, is_causal=True)
            torch.testing.assert_close(out[b, h, t], full[0, 0, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.paper("longheads")
def test_the_future_changes_neither_choice_nor_output() -> None:
    query, key, value = inputs(60)
    out = longheads_attention(query, key, value, attn_length=ATTN, chunk=CHUNK)
    ids = LongHeads(ATTN, CHUNK).chosen(query[:, :, ATTN:], chunk_features(query, key, value, CHUNK), ATTN)
    for t in (18, 31, 40, 58):
        other = [torch.cat((x[:, :, : t + 1], 5 * torch.randn_like(x[:, :, t + 1 :])), 2) for x in (query, key, value)]
        changed = LongHeads(ATTN, CHUNK).chosen(other[0][:, :, ATTN:], chunk_features(*other, CHUNK), ATTN)
        assert torch.equal(changed[:, :, : t + 1 - ATTN], ids[:, :, : t + 1 - ATTN])
        after = longheads_attention(*other, attn_length=ATTN, chunk=CHUNK)
        torch.testing.assert_close(after[:, :, : t + 1], out[:, :, : t + 1])


@pytest.mark.paper("longheads")
def test_a_feature_is_a_convex_combination_of_its_keys() -> None:
    """A chunk of one key k0 has a feature among the mixtures of that key's rotated copies: with ``k0`` in one pair of
    channels, inside the polygon of its copies, and on no side outside of any of its edges."""
    torch.manual_seed(0)
    query, value = torch.randn(2, 1, 1, 8, 4, dtype=torch.float64)
    k0 = torch.tensor([1.5, 0.0, -0.5, 0.0], dtype=torch.float64)  # channels 0 and 2 are the pair that turns by 1
    feature = chunk_features(query, k0.expand(1, 1, 8, 4), value, 8)[0, 0, 0]
    copies = rotated(k0.expand(8, 4), *range(8))
    assert float(feature[[1, 3]].abs().max()) == 0
    points, point = copies[:, [0, 2]], feature[[0, 2]]
    # No direction in the plane separates the feature from all copies.
    angles = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    assert bool((directions @ point <= (directions @ points.T).amax(-1) + 1e-12).all())
    assert float(point.norm()) < float(k0.norm()) - 1e-3, "a true mixture, not one of the copies"
    # In general: solve for weights on the simplex that give the feature.
    query, key, value = inputs(12)
    feature = chunk_features(query, key, value, 12)[1, 2, 0]
    keys = rotated(key[1, 1], *range(12))
    assert float(((feature @ keys.T) - (keys @ keys.T).amax(-1)).max()) <= 1e-12


@pytest.mark.paper("longheads")
@pytest.mark.parametrize("pieces", [(1,) * 61, (30, 1, 1, 12, 1, 16)])
def test_decoding_equals_prefill(pieces: tuple[int, ...]) -> None:
    query, key, value = inputs(61)
    module = LongHeads(ATTN, CHUNK)
    state, outs = module.init_state(2, like=query), []
    for parts in zip(*(x.split(pieces, 2) for x in (query, key, value)), strict=True):
        out, state = module.step(*parts, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), module(query, key, value, causal=True), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.features, chunk_features(query, key, value, CHUNK), rtol=1e-9, atol=1e-9)
    assert state.queries.shape[2] == 61 % CHUNK, "only the queries of the running chunk are kept"
    torch.testing.assert_close(state.cache.read().key, key)  # as they came: not rotated
    short = module.init_state(2, like=query, cache=QuantizedCache(bits=8, group_size=8))
    assert module.step(query, key, value, short)[0].shape == query.shape


@pytest.mark.paper("longheads")
def test_padding_takes_no_part() -> None:
    """What stands at padded tokens changes nothing, their queries included; features are those of the others."""
    query, key, value = inputs(50)
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[0, :6], valid[1, 44:] = False, False
    shown = valid[:, None, :, None]
    other = [torch.where(shown, x, 7.0) for x in (query, key, value)]
    module = LongHeads(ATTN, CHUNK)
    out, changed = (module(*x, causal=True, mask=KeyPadding(valid)) for x in ((query, key, value), other))
    torch.testing.assert_close(out * shown, changed * shown)
    features = chunk_features(*other, CHUNK, keys=valid[:, None])
    wanted = feature_by_the_formula(query[1, 0, 40:44], key[1, 0, 40:44], value[1, 0, 40:44])
    torch.testing.assert_close(features[1, 0, 10], wanted)
    assert not bool(features[0, :, 0].any())


@pytest.mark.paper("longheads")
def test_gradients() -> None:
    """Prefill's hand-written ones against those of the gathered form."""
    tensors = [x.requires_grad_() for x in inputs(45)]
    module, weight = LongHeads(ATTN, CHUNK), torch.randn(2, 4, 45, 8, dtype=torch.float64)
    out = module(*tensors, causal=True)
    state, parts = module.init_state(2, like=tensors[0]), []
    for piece in zip(*(x.split(5, 2) for x in tensors), strict=True):
        part, state = module.step(*piece, state)
        parts.append(part)
    for ours, expected in zip(
        *(torch.autograd.grad((o * weight).sum(), tensors) for o in (out, torch.cat(parts, 2))), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("longheads")
def test_bad_input() -> None:
    query, key, value = inputs(40)
    for options in ({"attn_length": 10}, {"attn_length": 8}, {"chunk": 1}, {"begin": -1}):
        with pytest.raises(OptionError):
            longheads_attention(query, key, value, **{"attn_length": 16, "chunk": 4, **options})  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        chunk_features(query, key, value[..., :5], 4)
    with pytest.raises(ShapeError):
        LongHeads(16, 4, rope=rotary_angles(12, 8))(query, key, value, causal=True)
    with pytest.raises(OptionError):
        select_chunks(query, chunk_features(query, key, value, 4), 4, torch.arange(40) // 4)
    with pytest.raises(OptionError):
        select_chunks(query[:, :, 20:], chunk_features(query, key, value, 4), 2, torch.arange(20, 40) // 4)
    with pytest.raises(UnsupportedPatternError):
        LongHeads(16, 4).weights(query, key, causal=True)
    with pytest.raises(UnsupportedPatternError):
        LongHeads(16, 4)(query, key, value)
