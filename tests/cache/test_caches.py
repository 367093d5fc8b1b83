"""Caches against the plain list of all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.cache import (
    Cached,
    DynamicCache,
    EvictingCache,
    HeavyHitters,
    KeyValueCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    Recent,
    StaticCache,
)
from regard.dense.full import FullAttention
from regard.errors import OptionError, ShapeError
from regard.linear.flow_attention import Flow
from regard.sparse.moba import MoBAAttention

PIECES = (13, 1, 1, 6, 1, 20)


def tokens(length: int = sum(PIECES), heads: int = 2, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, length, 8, generator=g), torch.randn(batch, heads, length, 6, generator=g)


def makers() -> dict[str, KeyValueCache]:
    return {
        "dynamic": DynamicCache(),
        "static": StaticCache(64),
        "paged": PagedCache(PagePool(64, 4)),
        "evicting": EvictingCache(),
        "all in residual": QuantizedCache(residual=64),
    }


KINDS = list(makers())


def fill(cache: KeyValueCache, key: Tensor, value: Tensor, pieces: tuple[int, ...] = PIECES) -> Cached:
    for k, v in zip(key.split(pieces, 2), value.split(pieces, 2), strict=True):
        kept = cache.append(k, v)
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_every_token_in_order(kind: str) -> None:
    cache, (key, value) = makers()[kind], tokens()
    with pytest.raises(ShapeError, match="empty"):
        cache.read()
    kept = fill(cache, key, value)
    assert torch.equal(kept.key, key) and torch.equal(kept.value, value) and cache.seen == key.shape[2]
    assert kept.full and cache.nbytes() >= key.nbytes + value.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_crop_and_go_on(kind: str) -> None:
    """A rejected draft is forgotten, and others take its place."""
    cache, (key, value), (other_key, other_value) = makers()[kind], tokens(), tokens(seed=1)
    fill(cache, key, value)
    cache.crop(17)
    kept = cache.append(other_key[:, :, :9], other_value[:, :, :9])
    assert torch.equal(kept.key, torch.cat((key[:, :, :17], other_key[:, :, :9]), 2)) and cache.seen == 26
    for wrong in (-1, 27):
        with pytest.raises(OptionError, match="seen 26"):
            cache.crop(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_branches_are_independent_and_rows_can_be_chosen(kind: str) -> None:
    cache, (key, value) = makers()[kind], tokens()
    fill(cache, key, value)
    branch = cache.copy()
    branch.select(torch.tensor([1, 1]))
    more = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 6)
    kept = branch.append(*more)
    assert torch.equal(kept.key, torch.cat((key[[1, 1]], more[0]), 2))
    assert torch.equal(kept.value, torch.cat((value[[1, 1]], more[1]), 2))
    assert torch.equal(cache.read().key, key) and torch.equal(cache.read().value, value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    cache, (key, value) = makers()[kind], tokens()
    fill(cache, key, value)
    for k, v in (
        (key[:1], value[:1]),
        (key[..., :4], value),
        (key.double(), value),
        (key[:, :, :2], value[:, :, :3]),
        (key[0], value[0]),
    ):
        with pytest.raises(ShapeError):
            cache.append(k, v)
    assert torch.equal(cache.read().key, key)


def test_a_growing_cache_passes_gradients_and_copies_seldom() -> None:
    key, value = (t.double().requires_grad_() for t in tokens(6))
    cache = DynamicCache()
    for at in range(6):
        kept = cache.append(key[:, :, at : at + 1], value[:, :, at : at + 1])
    weight = torch.randn_like(kept.key)
    (grad,) = torch.autograd.grad((kept.key * weight).sum(), key)
    assert torch.equal(grad, weight)
    cache, plain = DynamicCache(), torch.randn(1, 1, 1, 4)
    places = {cache.append(plain, plain).key.data_ptr() for _ in range(1000)}
    assert len(places) <= 8, "the room doubles"


def test_a_static_cache_stays_in_place_and_says_when_it_is_full() -> None:
    key, value = tokens(16)
    cache = StaticCache(16)
    first = cache.append(key[:, :, :3], value[:, :, :3]).key.data_ptr()
    assert cache.append(key[:, :, 3:], value[:, :, 3:]).key.data_ptr() == first
    with pytest.raises(OptionError, match="room for 16"):
        cache.append(key[:, :, :1], value[:, :, :1])
    assert cache.seen == 16
    with pytest.raises(OptionError, match="at least 1"):
        StaticCache(0)


def test_pages_are_shared_copied_on_writing_and_given_back() -> None:
    key, value = tokens(10, batch=1)
    pool = PagePool(8, 4)
    prompt = PagedCache(pool)
    prompt.append(key, value)
    assert pool.free_pages == 5
    answers = [prompt.copy() for _ in range(3)]
    assert pool.free_pages == 5, "a common prompt lies there once"
    for number, answer in enumerate(answers):
        kept = answer.append(key[:, :, :1] + number, value[:, :, :1])
        assert torch.equal(kept.key[:, :, :10], key) and torch.equal(kept.key[:, :, 10:], key[:, :, :1] + number)
    assert torch.equal(prompt.read().key, key)
    assert pool.free_pages == 2, "only the page that was written to was copied"
    other = PagedCache(pool)
    with pytest.raises(OptionError, match="3 pages of 4 tokens are needed and 2 of 8"):
        other.append(key, value)
    for cache in (*answers, prompt):
        cache.release()
    assert pool.free_pages == 8
    assert torch.equal(other.append(key, value).key, key)


def test_paged_sequences_of_different_lengths_do_not_mix() -> None:
    pool, caches, texts = PagePool(64, 4), [], []
    for seed, length in enumerate((3, 17, 8)):
        caches.append(PagedCache(pool))
        texts.append(tokens(length, seed=seed, batch=1))
    for at in range(17):
        for cache, (key, value) in zip(caches, texts, strict=True):
            if at < key.shape[2]:
                cache.append(key[:, :, at : at + 1], value[:, :, at : at + 1])
    for cache, (key, value) in zip(caches, texts, strict=True):
        assert torch.equal(cache.read().key, key) and torch.equal(cache.read().value, value)
    caches[1].crop(5)
    assert pool.free_pages == 64 - 1 - 2 - 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_stays_within_half_a_step(bits: int) -> None:
    """Keys by channel over a group of tokens, values by token over a group of channels; recent tokens untouched."""
    key, value = tokens(100)
    cache = QuantizedCache(bits, group_size=16, residual=10)
    kept = fill(cache, key, value, (37, 1, 62))
    rounded = 80
    assert torch.equal(kept.key[:, :, rounded:], key[:, :, rounded:])
    assert torch.equal(kept.value[:, :, rounded:], value[:, :, rounded:])
    groups = key[:, :, :rounded].unflatten(2, (-1, 16))
    step = (groups.amax(3, keepdim=True) - groups.amin(3, keepdim=True)) / (2**bits - 1)
    error = (kept.key[:, :, :rounded].unflatten(2, (-1, 16)) - groups).abs()
    assert bool((error <= step / 2 + 1e-5).all()) and float(error.max()) > 0
    step = (value.amax(-1, keepdim=True) - value.amin(-1, keepdim=True)) / (2**bits - 1)
    error = (kept.value - value).abs()[:, :, :rounded]
    assert bool((error <= step[:, :, :rounded] / 2 + 1e-5).all()) and float(error.max()) > 0


def test_few_bits_take_little_room() -> None:
    g = torch.Generator().manual_seed(0)
    key = value = torch.randn(1, 2, 2048, 64, generator=g)
    cache = QuantizedCache(4, group_size=32, residual=32)
    cache.append(key, value)
    assert cache.nbytes() < 0.26 * (key.nbytes + value.nbytes)


def test_cropping_into_rounded_tokens() -> None:
    key, value = tokens(70)
    cache = QuantizedCache(8, group_size=16, residual=0)
    kept = fill(cache, key, value, (70,))
    before = kept.key.clone()
    cache.crop(37)
    assert torch.equal(cache.read().key, before[:, :, :37])
    again = cache.append(key[:, :, 37:], value[:, :, 37:])
    torch.testing.assert_close(again.key, key, atol=0.05, rtol=0)


def test_heads_may_keep_different_tokens() -> None:
    """Tokens and their numbers stay together; attention reads what is left as if the rest had been masked."""
    key, value = tokens(20)
    cache, score = EvictingCache(), torch.arange(20.0).expand(2, 2, 20)
    cache.append(key[:, :, :12], value[:, :, :12], score=score[:, :, :12])
    keep = torch.rand(2, 2, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    cache.retain(keep)
    kept = cache.append(key[:, :, 12:], value[:, :, 12:], score=score[:, :, 12:])
    assert torch.equal(cache.counts(), keep.sum(-1) + 8) and not kept.full
    held = cache.positions >= 0
    assert torch.equal(cache.extra["score"][held], cache.positions[held].float())
    places = cache.positions.clamp_min(0)[..., None]
    torch.testing.assert_close(kept.key[held], key.gather(2, places.expand(-1, -1, -1, 8))[held])
    query = torch.randn(2, 4, 8, 8)
    full = FullAttention()
    out = full(query, kept.key, kept.value, mask=kept.visible(20, 8, 4))
    seen = (
        torch.cat((keep, torch.ones(2, 2, 8, dtype=torch.bool)), 2)[:, :, None] & torch.ones(20, 20).tril()[12:].bool()
    )
    expected = full(query, key, value, mask=seen.repeat_interleave(2, 1))
    torch.testing.assert_close(out, expected)
    with pytest.raises(ShapeError, match="carries"):
        cache.append(key, value)
    with pytest.raises(ShapeError, match="score must be"):
        cache.append(key, value, score=score[:, :1])


def test_recent_tokens_and_sinks() -> None:
    key, value = tokens(20)
    full, query = FullAttention(), torch.randn(2, 2, 20, 8)
    state, outs = full.init_state(2, like=key, cache=EvictingCache(Recent(5, 2))), []
    for at in range(20):
        now = slice(at, at + 1)
        out, state = full.step(query[:, :, now], key[:, :, now], value[:, :, now], state)
        outs.append(out)
        assert int(state.counts()) == min(at + 1, 7)
    # A query sees its own token beside the five before it.
    place = torch.arange(20)
    seen = (place[None] <= place[:, None]) & ((place[:, None] - place[None] <= 5) | (place[None] < 2))
    torch.testing.assert_close(torch.cat(outs, 2), full(query, key, value, mask=seen[None, None]))


def test_heavy_hitters_by_a_loop() -> None:
    """H2O written out for one head at a time."""
    key, value = tokens(24)
    query = torch.randn(2, 4, 24, 8, generator=torch.Generator().manual_seed(5))
    full, policy = FullAttention(), HeavyHitters(budget=8, recent=3, sinks=1)
    state = full.init_state(2, like=key, cache=EvictingCache(policy))
    outs = []
    for at in range(24):
        now = slice(at, at + 1)
        out, state = full.step(query[:, :, now], key[:, :, now], value[:, :, now], state)
        outs.append(out)
    for row in range(2):
        for head in range(2):
            mass: dict[int, float] = {}
            for at in range(24):
                mass[at] = 0.0
                alive = sorted(mass)
                for q in (2 * head, 2 * head + 1):
                    weight = (query[row, q, at] @ key[row, head, alive].T / 8**0.5).softmax(-1)
                    torch.testing.assert_close(outs[at][row, q, 0], weight @ value[row, head, alive])
                    for place, share in zip(alive, weight.tolist(), strict=True):
                        mass[place] += share
                while len(mass) > 8:
                    free = [place for place in mass if 1 <= place <= at - 3]
                    del mass[min(free, key=lambda place: mass[place])]
            assert sorted(mass) == [p for p in state.positions[row, head].tolist() if p >= 0]


def test_policies_check_their_numbers() -> None:
    for wrong in (lambda: Recent(-1), lambda: HeavyHitters(4, recent=5), lambda: QuantizedCache(3)):
        with pytest.raises(OptionError):
            wrong()
    with pytest.raises(OptionError, match="whole bytes"):
        QuantizedCache(2, group_size=3)
    with pytest.raises(OptionError, match="at least 1"):
        PagePool(0)
    with pytest.raises(OptionError, match="place in the sequence"):
        MoBAAttention().init_state(1, like=torch.zeros(1), cache=EvictingCache())
    with pytest.raises(OptionError, match="state of its own"):
        Flow().init_state(1, like=torch.zeros(1), cache=DynamicCache())
