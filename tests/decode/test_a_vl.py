"""A-VL against the full cache, against explicit loops over its rules, and against its budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.decode.a_vl import AVLCache, AVLPolicy, ppci, vision_importance
from regard.errors import OptionError, ShapeError

IMAGE = (3, 23)
PROMPT, HEADS, KV_HEADS, DIM = 28, 4, 2, 8


def tokens(length: int, seed: int = 0, batch: int = 2, sharp: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = sharp * torch.randn(batch, HEADS, length, DIM, generator=g, dtype=torch.float64)
    key = torch.randn(batch, KV_HEADS, length, DIM, generator=g, dtype=torch.float64)
    return query, key, torch.randn(batch, KV_HEADS, length, DIM, generator=g, dtype=torch.float64)


def begin(cache: AVLCache, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = (t[:, :, :PROMPT] for t in qkv)
    cache.prefill(key, value, query=query)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query ``(head_dim,)`` over keys, by the formula."""
    weights = (key @ query / DIM**0.5).softmax(-1)
    return weights @ value


@pytest.mark.paper("a_vl")
@pytest.mark.parametrize("refresh", [1, 3])
def test_with_everything_kept_it_is_the_full_cache(refresh: int) -> None:
    qkv = query, key, value = tokens(PROMPT + 10)
    cache = AVLCache(IMAGE, secondary=1, core=1, text_recent=None, refresh=refresh)
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    first = cache.step(*(t[:, :, :PROMPT] for t in qkv))
    assert torch.allclose(first, full[:, :, :PROMPT], atol=1e-12)
    for t in range(PROMPT, PROMPT + 10, 2):  # two tokens at a time, as a draft would be verified
        out = cache.step(*(x[:, :, t : t + 2] for x in qkv))
        assert torch.allclose(out, full[:, :, t : t + 2], atol=1e-12)
    assert cache.stored == (20, 18)


@pytest.mark.paper("a_vl")
@pytest.mark.parametrize("delayed", [True, False])
def test_core_stays_within_secondary_and_nothing_comes_back(delayed: bool) -> None:
    qkv = query, key, value = tokens(PROMPT + 40)
    cache = AVLCache(IMAGE, 0.5, 0.2, text_recent=6, text_heavy=3, refresh=3, delayed=delayed)
    begin(cache, qkv)
    policy, alive, cores = cache.policy, None, set()
    for t in range(PROMPT, PROMPT + 40):
        cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1])
        cache.attend(query[:, :, t : t + 1])
        places = cache.positions
        now = [[set(head.tolist()) for head in row] for row in places]
        if alive is not None:
            for before_row, row in zip(alive, now, strict=True):
                for before, head in zip(before_row, row, strict=True):
                    assert head - {t} <= before, "an evicted token came back"
        alive = now
        assert bool((policy.is_vision(places) | ~cache.core).all()), "the core is made of stored image tokens"
        assert cache.core.sum(-1).unique().tolist() == [4]
        assert policy.is_vision(places).sum(-1).unique().tolist() == [10]
        assert (~policy.is_vision(places)).sum(-1).unique().tolist() == [9]
        assert cache.stored == (10, 9) and bool((places >= 0).all())
        cores.add(tuple(places[cache.core].tolist()))
    assert len(cores) > 3, "the core drifts"


@pytest.mark.paper("a_vl")
def test_budgets_of_image_and_text_are_apart() -> None:
    for generated in (0, 5, 30):
        for stop in (13, 23):
            query, key, value = tokens(PROMPT + generated)
            cache = AVLCache((3, stop), 0.5, 0.1, text_recent=0.5, text_heavy=2)
            begin(cache, (query, key, value))
            for t in range(PROMPT, PROMPT + generated):
                cache.step(*(x[:, :, t : t + 1] for x in (query, key, value)))
            text = PROMPT - (stop - 3) + generated
            assert cache.stored == ((stop - 3) // 2, -(-text // 2) + 2)


@pytest.mark.paper("a_vl")
def test_ppci_of_equal_and_of_independent_scores() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 400, 1000, generator=g)
    for p in (0.1, 0.3):
        assert (ppci(a, a, p) == 1).all()
        assert torch.equal(ppci(a, b, p), ppci(b, a, p))
        # Mean of 400 draws; one has a deviation of about sqrt(p (1 - p) / (1000 p)) (1 - p)**0.5.
        assert abs(float(ppci(a, b, p).mean()) - p) < 0.005
    assert float(ppci(torch.tensor([4.0, 3, 2, 1]), torch.tensor([4.0, 1, 2, 3]), 0.5)) == 0.5


@pytest.mark.paper("a_vl")
@pytest.mark.parametrize("delayed", [True, False])
def test_refreshed_every_step_it_takes_the_best_of_the_secondary(delayed: bool) -> None:
    """An explicit loop: rank by the last prompt queries, keep ten, then the best four of them by a step's own scores
    (or by the scores of the step before, where a choice counts from the next step on)."""
    steps, last = 9, 5
    qkv = query, key, value = tokens(PROMPT + steps)
    cache = AVLCache(IMAGE, 0.5, 0.2, text_recent=None, refresh=1, last=last, delayed=delayed)
    begin(cache, qkv)
    group = HEADS // KV_HEADS
    image, text = torch.arange(*IMAGE), [i for i in range(PROMPT + steps) if not IMAGE[0] <= i < IMAGE[1]]
    for t in range(PROMPT, PROMPT + steps):
        out = cache.step(*(x[:, :, t : t + 1] for x in qkv))
        for b in range(2):
            for h in range(KV_HEADS):

                def scores(at: int, seen: list[int], b: int = b, h: int = h) -> Tensor:
                    own = query[b, h * group : (h + 1) * group, at]
                    weights = (own @ key[b, h, seen].T / DIM**0.5).softmax(-1).mean(0)
                    return torch.zeros(PROMPT + steps, dtype=torch.float64).index_put((torch.tensor(seen),), weights)

                prompt = sum(scores(at, list(range(at + 1))) for at in range(PROMPT - last, PROMPT))
                stored = image[prompt[image].topk(10).indices]  # type: ignore[index]
                chooser = t - 1 if delayed else t
                seen = [i for i in [*stored.tolist(), *text] if i <= chooser]
                ranked = prompt if delayed and t == PROMPT else scores(chooser, seen)
                core = stored[ranked[stored].topk(4).indices].tolist()  # type: ignore[index]
                computed = [*core, *(i for i in text if i <= t)]
                for head in range(h * group, (h + 1) * group):
                    expected = attention(query[b, head, t], key[b, h, computed], value[b, h, computed])
                    assert torch.allclose(out[b, head, 0], expected, atol=1e-12)


@pytest.mark.paper("a_vl")
def test_order_of_image_tokens_is_irrelevant() -> None:
    query, key, value = tokens(PROMPT + 12)
    weights = torch.rand(2, HEADS, 6, PROMPT, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    order = torch.arange(PROMPT)
    order[IMAGE[0] : IMAGE[1]] = IMAGE[0] + torch.randperm(IMAGE[1] - IMAGE[0])
    outs = []
    for index in (torch.arange(PROMPT), order):
        cache = AVLCache(IMAGE, 0.4, 0.2, text_recent=5, text_heavy=2, refresh=2)
        cache.prefill(key[:, :, index], value[:, :, index], weights=weights[..., index])
        steps = range(PROMPT, PROMPT + 12)
        outs.append([cache.step(*(x[:, :, t : t + 1] for x in (query, key, value))) for t in steps])
    assert torch.allclose(torch.stack(outs[0]), torch.stack(outs[1]), atol=1e-12)


@pytest.mark.paper("a_vl")
def test_text_keeps_the_newest_and_the_heaviest() -> None:
    """Accumulated attention by an explicit loop, over a prompt without a minor image token."""
    steps, recent, heavy = 10, 4, 3
    query, key, value = (t[:1, :1] for t in tokens(PROMPT + steps))
    cache = AVLCache(IMAGE, 1.0, 1.0, text_recent=recent, text_heavy=heavy)
    begin(cache, (query, key, value))
    mass = torch.zeros(PROMPT + steps, dtype=torch.float64)
    kept = list(range(PROMPT))
    for at in range(PROMPT + steps):
        if at >= PROMPT:
            kept.append(at)
        seen = [i for i in kept if i <= at]
        mass[seen] += (key[0, 0, seen] @ query[0, 0, at] / DIM**0.5).softmax(-1)
        if at < PROMPT - 1:
            continue
        if at >= PROMPT:
            cache.step(*(x[:, :, at : at + 1] for x in (query, key, value)))
        text = [i for i in kept if not IMAGE[0] <= i < IMAGE[1]]
        old = sorted(text[:-recent], key=lambda i: -float(mass[i]))[:heavy]
        kept = sorted([*range(*IMAGE), *old, *text[-recent:]])
        assert cache.positions[0, 0].tolist() == kept


def test_importance_is_the_attention_of_the_last_queries() -> None:
    query, key, _ = tokens(PROMPT)
    found = vision_importance(query, key, IMAGE, last=4)
    wide = key.repeat_interleave(HEADS // KV_HEADS, 1)
    logits = query @ wide.transpose(-1, -2) / DIM**0.5
    weights = logits.masked_fill(torch.ones(PROMPT, PROMPT).triu(1).bool(), float("-inf")).softmax(-1)
    expected = weights[:, :, -4:].unflatten(1, (KV_HEADS, -1)).mean((2, 3))[..., IMAGE[0] : IMAGE[1]]
    assert torch.allclose(found, expected, atol=1e-12)
    cache = AVLCache(IMAGE, 0.5, 0.5, last=4)
    cache.prefill(key, key, query=query)
    best = expected.topk(10).indices.sort().values + IMAGE[0]
    assert torch.equal(cache.positions[cache.core].view(2, KV_HEADS, 10), best)


def test_the_core_holds_between_refreshes() -> None:
    qkv = tokens(PROMPT + 12)
    cache = AVLCache(IMAGE, 0.5, 0.2, refresh=4)
    begin(cache, qkv)
    cores = []
    for t in range(PROMPT, PROMPT + 12):
        cache.step(*(x[:, :, t : t + 1] for x in qkv))
        cores.append(cache.positions[cache.core].tolist())
    for start in (3, 7):
        assert all(cores[start] == core for core in cores[start : start + 4])
    assert cores[2] != cores[3]


def test_counters_say_what_was_stored_and_computed() -> None:
    qkv = tokens(PROMPT + 8)
    cache = AVLCache(IMAGE, 0.5, 0.2, text_recent=None, refresh=4)
    begin(cache, qkv)
    for t in range(PROMPT, PROMPT + 8):
        cache.step(*(x[:, :, t : t + 1] for x in qkv))
    text = PROMPT - 20
    assert cache.full_keys == sum(PROMPT + s for s in range(1, 9))
    assert cache.computed_keys == sum((10 if s % 4 == 0 else 4) + text + s for s in range(1, 9))
    assert cache.nbytes() < sum(t.nbytes for t in qkv[1:])


def test_as_the_state_of_a_mechanism_and_as_a_cache() -> None:
    qkv = tokens(PROMPT + 3)
    full: Any = regard.create("full")
    cache = AVLCache(IMAGE, 0.5, 0.2, text_recent=4, text_heavy=2)
    state = full.init_state(2, like=qkv[0], cache=cache)
    full.step(*(t[:, :, :PROMPT] for t in qkv), state)
    assert cache.stored == (10, 6)
    branch = cache.copy()
    cache.step(*(x[:, :, PROMPT:] for x in qkv))
    assert branch.seen == PROMPT and cache.seen == PROMPT + 3
    cache.crop(PROMPT + 1)
    assert cache.seen == PROMPT + 1 and int(cache.positions.max()) <= PROMPT
    cache.step(*(x[:, :, -1:] for x in qkv))
    cache.select(torch.tensor([1, 1]))
    assert torch.equal(cache.positions[0], cache.positions[1])


def test_one_cache_a_layer() -> None:
    caches = AVLPolicy(IMAGE, core=0.1).caches(3)
    assert len(caches) == 3 and caches[0] is not caches[1] and caches[2].policy == AVLPolicy(IMAGE, core=0.1)


def test_wrong_input_is_explained() -> None:
    query, key, value = tokens(PROMPT)
    for wrong in ({"core": 0.6}, {"secondary": 1.5}, {"core": 0.0}):
        with pytest.raises(OptionError, match="core <= secondary"):
            AVLCache(IMAGE, **wrong)
    with pytest.raises(OptionError, match="text_heavy"):
        AVLCache(IMAGE, text_heavy=1.5)
    with pytest.raises(OptionError, match="refresh"):
        AVLCache(IMAGE, refresh=0)
    with pytest.raises(OptionError, match="past the last"):
        AVLCache((5, 5))
    with pytest.raises(OptionError, match="one of both"):
        AVLCache(IMAGE).prefill(key, value)
    with pytest.raises(ShapeError, match="does not hold the image"):
        AVLCache((3, 40)).prefill(key, value, query=query)
    with pytest.raises(ShapeError, match="stored tokens"):
        AVLCache(IMAGE).prefill(key, value, weights=torch.rand(2, HEADS, 1, 5))
    with pytest.raises(OptionError, match="share"):
        ppci(torch.rand(5), torch.rand(5), 10)
    with pytest.raises(ShapeError, match="same tokens"):
        ppci(torch.rand(5), torch.rand(4), 0.5)
    with pytest.raises(OptionError, match="vision_range"):
        vision_importance(query, key, (3, 90))
