"""NAtS: lifetimes are what the table says, their gradient is that of the mask, and the cache forgets nothing needed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError, UnsupportedPatternError
from regard.kernels import typed_tokens
from regard.masks import KeyPadding
from regard.models.sequence import SequenceModel
from regard.retrofit.nats import enable_nats
from regard.sparse.nats import NAtS, NAtSAttention, NAtSCache, kv_usage, nats_attention, nats_mask, next_global
from tests.retrofit.small_models import llama

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
Kinds = list[int]
LETTERS = {"G": 0, "L": 1, "S": 2}


def one_hot(kinds: Tensor | str) -> Tensor:
    if isinstance(kinds, str):
        kinds = torch.tensor([[[LETTERS[letter] for letter in kinds]]])
    return F.one_hot(kinds, 3).to(torch.float64)


def drawn(length: int, batch: int = 1, heads: int = 1, seed: int = 0, ends: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.2, 0.4, 0.4])
    kinds = torch.multinomial(shares, batch * heads * length, True, generator=generator).view(batch, heads, length)
    if ends:
        kinds[..., 0] = kinds[..., -1] = 0
    return kinds


def qkv(length: int, batch: int = 1, heads: int = 1, kv_heads: int = 1, dim: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    counts = (heads, kv_heads, kv_heads)
    return [torch.randn(batch, h, length, dim, generator=generator, dtype=torch.float64) for h in counts]


def visible(kinds: Kinds, window: int) -> Tensor:
    """The rule, pair by pair."""
    length = len(kinds)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for j, kind in enumerate(kinds):
        end = next((m for m in range(j + 1, length) if kinds[m] == 0), length)
        for i in range(j, length):
            seen[i, j] = kind == 0 or (kind == 1 and i <= end) or (kind == 2 and i <= j + window)
    return seen


def masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)


@pytest.mark.paper("nats")
def test_a_mask_written_by_hand() -> None:
    table = """
        1......
        11.....
        111....
        1111...
        1..11..
        1..111.
        1..1.11
    """
    expected = torch.tensor([[letter == "1" for letter in row] for row in table.split()])
    assert torch.equal(nats_mask(one_hot("GLLGSLG"), window=1)[0, 0], expected)
    assert next_global(one_hot("GLLGSLG"))[0, 0].tolist() == [0, 3, 3, 3, 6, 6, 6]
    assert next_global(one_hot("LGS"))[0, 0].tolist() == [1, 1, 3]


@pytest.mark.paper("nats")
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_all_of_one_type(trained: bool) -> None:
    query, key, value = qkv(23, batch=2, heads=4, kv_heads=2)

    def attend(kinds: Tensor) -> Tensor:
        return nats_attention(query, key, value, one_hot(kinds).requires_grad_(trained), window=5)

    shape = (2, 2, 23)
    full = masked(query, key, value, torch.ones(23, 23, dtype=torch.bool).tril())
    torch.testing.assert_close(attend(torch.zeros(shape, dtype=torch.int64)), full, **TIGHT)
    i, j = torch.arange(23)[:, None], torch.arange(23)
    near = masked(query, key, value, (j <= i) & (i - j <= 5))  # W + 1 keys
    torch.testing.assert_close(attend(torch.full(shape, 2)), near, **TIGHT)
    local = torch.ones(shape, dtype=torch.int64)
    local[..., -1] = 0
    torch.testing.assert_close(attend(local), full, **TIGHT)


@pytest.mark.paper("nats")
@pytest.mark.parametrize("window", [0, 1, 6])
def test_the_mask_is_causal_and_monotone(window: int) -> None:
    kinds = drawn(31, batch=3, heads=2, ends=False)
    seen = nats_mask(one_hot(kinds), window)
    assert not bool((seen & ~torch.ones(31, 31, dtype=torch.bool).tril()).any())
    later, earlier = seen[:, :, 1:], seen[:, :, :-1]
    assert bool((earlier | ~later | torch.eye(31, dtype=torch.bool)[1:]).all()), "a key came back"
    for b in range(3):
        for h in range(2):
            assert torch.equal(seen[b, h], visible(kinds[b, h].tolist(), window))
    assert torch.equal(kv_usage(one_hot(kinds), window), seen.sum(-1))


@pytest.mark.paper("nats")
@pytest.mark.parametrize("area", [1 << 21, 300])
@pytest.mark.parametrize("heads", [(1, 1, 1), (4, 2, 2), (4, 4, 2)])
def test_training_and_inference_give_the_same(heads: tuple[int, int, int], area: int, monkeypatch: Any) -> None:
    """Numbers, and the gradients of queries, keys and values."""
    monkeypatch.setattr(typed_tokens, "_AREA", area)
    query_heads, kv_heads, mask_heads = heads
    inputs = [x.requires_grad_() for x in qkv(37, 2, query_heads, kv_heads)]
    types = one_hot(drawn(37, 2, mask_heads))
    keys = torch.ones(2, 1, 37, dtype=torch.bool)
    keys[1, :, :9] = False
    outs = [nats_attention(*inputs, types.requires_grad_(asks), 4, keys=keys) for asks in (False, True)]
    seen = nats_mask(types, 4).repeat_interleave(query_heads // mask_heads, 1) & keys[:, :, None]
    expected = torch.where(seen.any(-1, keepdim=True), masked(*inputs, seen | ~seen.any(-1, keepdim=True)), 0)
    weight = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (*outs, expected)]
    for out, found in zip(outs, grads[:2], strict=True):
        torch.testing.assert_close(out, expected, **TIGHT)
        for one, other in zip(found, grads[2], strict=True):
            torch.testing.assert_close(one, other, **TIGHT)


def soft_mask(types: Tensor, window: int) -> Tensor:
    """Visibility as a polynomial in the types ``(length, 3)``, factor by factor."""
    length = len(types)
    columns = []
    for j in range(length):
        entries, alive = [], torch.ones((), dtype=types.dtype)
        for i in range(length):
            if i < j:
                entries.append(torch.zeros((), dtype=types.dtype))
                continue
            if i > j + 1:
                alive = alive * (1 - types[i - 1, 0])
            entries.append(types[j, 0] + types[j, 1] * alive + types[j, 2] * (i <= j + window))
        columns.append(torch.stack(entries))
    return torch.stack(columns, 1)


def attend_softly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(s) * mask`` normalised, and the share of the causal softmax that the mask leaves, ``(length, 1)``."""
    weights = (query @ key.T / query.shape[-1] ** 0.5).exp().tril()
    total = (weights * mask).sum(-1, keepdim=True)
    return (weights * mask / total) @ value, total / weights.sum(-1, keepdim=True)


@pytest.mark.paper("nats")
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_types_is_that_of_the_soft_mask(seed: int) -> None:
    """By autograd through the polynomial; the softmax over all causal keys weighs each row by what is left of it."""
    length, window = 19, 3
    query, key, value = qkv(length, seed=seed)
    types = one_hot(drawn(length, seed=seed)).requires_grad_()
    weight = torch.randn(length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out, left = attend_softly(query[0, 0], key[0, 0], value[0, 0], soft_mask(types[0, 0], window))
    (expected,) = torch.autograd.grad(out, types, weight * left.detach())
    got = nats_attention(query, key, value, types, window)
    torch.testing.assert_close(got[0, 0], out, **TIGHT)
    torch.testing.assert_close(torch.autograd.grad(got, types, weight[None, None])[0], expected, **TIGHT)


def released_gradient(query: Tensor, key: Tensor, value: Tensor, kinds: Kinds, window: int, weight: Tensor) -> Tensor:
    """The released kernel's sums, entry by entry, of one head."""
    length = len(kinds)
    seen = visible(kinds, window)
    scores = (query @ key.T / query.shape[-1] ** 0.5).masked_fill(~torch.ones_like(seen).tril(), float("-inf"))
    out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    entry = scores.softmax(-1) * (weight @ value.T - (weight * out).sum(-1, keepdim=True))
    marks = [j for j, kind in enumerate(kinds) if kind == 0]
    grad = torch.zeros(length, 3, dtype=query.dtype)
    for j in range(length):
        upto = next(m for m in marks if m >= j)
        after = next((m for m in marks if m > j), length - 1)
        following = next((m for m in marks if m > after), after)
        for i in range(j, length):
            grad[j, 0] += entry[i, j] * (i > after)
            grad[j, 1] += entry[i, j] * (i <= upto)
            grad[j, 2] += entry[i, j] * (i <= j + window)
            if after <= i < following:
                grad[after, 0] -= entry[i, j]
            if seen[i, j]:
                for m in range(j + 1, i):
                    if m - j <= 16 and i - m <= 16:
                        grad[m, 0] -= entry[i, j]
    return grad


@pytest.mark.paper("nats")
@pytest.mark.parametrize("seed", range(2))
def test_the_released_gradient_entry_by_entry(seed: int) -> None:
    length, window = 45, 5
    inputs, kinds = qkv(length, seed=seed), drawn(length, seed=seed)
    types = one_hot(kinds).requires_grad_()
    weight = torch.randn(length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = nats_attention(*inputs, types, window, official=True)
    expected = released_gradient(*(x[0, 0] for x in inputs), kinds[0, 0].tolist(), window, weight)
    torch.testing.assert_close(torch.autograd.grad(out, types, weight[None, None])[0][0, 0], expected, **TIGHT)


@pytest.mark.paper("nats")
def test_gradients_tell_what_a_switch_of_type_would_do() -> None:
    """Sign of the option gradients' difference against the true change of the loss, token by token."""
    length, window = 48, 6
    agree: dict[tuple[bool, bool], list[bool]] = {}
    for seed in range(6):
        query, key, value = qkv(length, seed=seed)
        kinds = drawn(length, seed=seed)
        weight = torch.randn(length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        grads = []
        for official in (False, True):
            types = one_hot(kinds).requires_grad_()
            out = nats_attention(1.5 * query, key, value, types, window, official=official)
            grads.append(torch.autograd.grad(out, types, weight[None, None])[0][0, 0])
        own = kinds[0, 0]
        places = [(j, kind) for j in range(1, length - 1) for kind in range(3) if kind != int(own[j])]
        switched = own.repeat(len(places), 1, 1)
        for row, (j, kind) in enumerate(places):
            switched[row, 0, j] = kind
        wide = [x.expand(len(places), -1, -1, -1) for x in (1.5 * query, key, value)]
        change = ((nats_attention(*wide, one_hot(switched), window) - out.detach()) * weight).sum((1, 2, 3))
        for (j, kind), moved in zip(places, change.tolist(), strict=True):
            if abs(moved) > 1e-9:
                for official, grad in zip((False, True), grads, strict=True):
                    foretold = float(grad[j, kind] - grad[j, own[j]])
                    agree.setdefault((official, 0 in (kind, int(own[j]))), []).append((foretold > 0) == (moved > 0))
    shares = {case: sum(found) / len(found) for case, found in agree.items()}
    assert shares[False, True] > 0.8, "switches to or from a global type"
    assert shares[False, False] > 0.8, "between local and sliding"
    assert 0.5 < shares[True, True] < shares[False, True] - 0.1, (
        "the released gradient, where a global type is involved"
    )


def layer(**options: Any) -> NAtSAttention:
    torch.manual_seed(0)
    return NAtSAttention(32, 4, 2, **{"window": 4, **options}).double().eval()


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.paper("nats")
def test_decoding_from_the_evicting_cache() -> None:
    module, x = layer(), tokens(60)
    with torch.no_grad():
        whole, cache, parts = module(x), None, []
        usage = kv_usage(one_hot(module.mechanism.kinds), 4)
        assert len(set(usage[..., -1].flatten().tolist())) > 1, "heads keep different numbers of keys"
        for place in range(60):
            held = cache.counts().expand(2, 2) if cache is not None else torch.zeros(2, 2)
            assert bool((held + 1 == usage[..., place]).all()), "what a token reads: the cache and itself"
            out, cache = module.step(x[:, place : place + 1], cache)
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TIGHT)
    assert cache is not None and int(cache.counts().max()) < 60


@pytest.mark.paper("nats")
def test_decoding_in_pieces() -> None:
    module, x = layer(), tokens(41)
    with torch.no_grad():
        cache: NAtSCache | None = None
        parts = []
        for piece in x.split([13, 1, 9, 18], 1):
            out, cache = module.step(piece, cache)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), module(x), **TIGHT)


@pytest.mark.paper("nats")
def test_a_large_regulariser_leaves_the_sliding_minimum() -> None:
    module, x = layer(reg=1.0, window=3), tokens(24, batch=4)
    optimizer = torch.optim.Adam(module.mechanism.types.parameters(), lr=0.05)
    x[..., 0] = 3.0  # a constant by which every token can be told what it is
    torch.manual_seed(0)
    module.train()
    for _ in range(60):
        optimizer.zero_grad()
        (0.0 * module(x)).sum().backward()
        optimizer.step()
    module.eval()(x)
    least = torch.tensor([min(i + 1, 4 + (i > 3)) for i in range(24)])  # the first token, and the window
    assert bool((kv_usage(one_hot(module.mechanism.kinds), 3) == least).all())


@pytest.mark.paper("nats")
def test_choice_of_types() -> None:
    mechanism = NAtS(8, 2).double()
    hidden = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = mechanism.types(hidden).unflatten(-1, (2, 3)).transpose(1, 2)
    chosen = mechanism.choose(hidden).argmax(-1)
    expected = (logits + torch.tensor([0.1, 0.0, 0.0])).argmax(-1)
    assert torch.equal(chosen[..., 1:], expected[..., 1:]) and bool((chosen[..., 0] == 0).all())
    assert not bool((mechanism.choose(hidden, first=False).argmax(-1) - expected).any())
    torch.manual_seed(0)
    draws = torch.stack([mechanism.choose(hidden, draw=True).detach() for _ in range(2000)])
    assert bool((draws[..., [0, -1], :].argmax(-1) == 0).all()), "first and last are global in training"
    torch.testing.assert_close(draws.mean(0)[:, :, 1:-1], logits.softmax(-1)[:, :, 1:-1], atol=0.06, rtol=0)
    padded = torch.ones(1, 1, 30, dtype=torch.bool)
    padded[..., :4] = False
    chosen = mechanism.choose(hidden, padded).argmax(-1)
    assert bool((chosen[..., :4] == 2).all() & (chosen[..., 4] == 0).all())


@pytest.mark.paper("nats")
def test_types_learn_and_the_input_is_not_told() -> None:
    """The projection to types gets a gradient, through which nothing flows to the input."""
    module, x = layer().train(), tokens(20).requires_grad_()
    torch.manual_seed(3)
    module(x).square().sum().backward()
    weight = module.mechanism.types.weight
    assert weight.grad is not None and float(weight.grad.abs().min()) > 0
    kinds = module.mechanism.kinds
    query, key, value = module.project(x)
    fixed = nats_attention(query, key, value, one_hot(kinds), 4)
    (expected,) = torch.autograd.grad(module.out(fixed.transpose(1, 2).flatten(2)).square().sum(), x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, **TIGHT)


def test_the_regulariser_is_per_option() -> None:
    """Later rows count against a global type, rows up to the next one against a local."""
    kinds = drawn(17, heads=2)
    inputs, types = qkv(17, heads=4, kv_heads=2), one_hot(kinds).requires_grad_()
    found = []
    for reg in (0.0, 0.5):
        out = nats_attention(*inputs, types, 3, reg)
        found.append(torch.autograd.grad(out.sum(), types)[0])
    added = (found[1] - found[0])[0]
    for head in range(2):
        own = kinds[0, head].tolist()
        for j, kind in enumerate(own):
            reach = next(m for m in range(j, 17) if own[m] == 0) - j
            expected = [(17 - j) / 17 * (kind == 0), reach / 17 * (kind == 1), 0.0]
            # Two query heads share the types of a key head.
            assert added[head, j].tolist() == pytest.approx([0.5 * 2 * e for e in expected], abs=1e-12)


def test_padding_on_the_left_changes_nothing() -> None:
    module, x = layer(), tokens(30, batch=1)
    shifted = torch.cat((tokens(7, batch=1, seed=5), x), 1)
    valid = torch.ones(1, 37, dtype=torch.bool)
    valid[:, :7] = False
    torch.testing.assert_close(module(shifted, mask=KeyPadding(valid))[:, 7:], module(x), **TIGHT)


def test_generation_from_a_cache_that_forgets() -> None:
    model = llama().double().eval()
    ids = torch.randint(5, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    before = model(ids).logits
    with enable_nats(model, window=3) as handle, torch.no_grad():
        call: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 15}
        slow = model.generate(ids, use_cache=False, **call)
        cache = handle.cache()
        assert torch.equal(model.generate(ids, past_key_values=cache, **call), slow)
        assert any(int(each._decoding.state.counts().max()) < 30 for each in cache.layers)
        assert handle.usage().shape == (3,) and float(handle.usage().max()) < 1
        with pytest.raises(UnsupportedPatternError, match=r"handle\.cache\(\)"):
            model.generate(ids, **call)
        with handle.full():
            torch.testing.assert_close(model(ids).logits, before, **TIGHT)
    assert torch.equal(model(ids).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("host", ["transformers", "regard"])
def test_distillation_trains_types_alone(host: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = llama() if host == "transformers" else SequenceModel(61, vocab_size=61, embed_dim=32)
    ids = torch.randint(5, 61, (4, 40), generator=torch.Generator().manual_seed(0))
    weights = copy.deepcopy(model.state_dict())

    def run() -> Tensor:
        out: Tensor = model.model(ids)[0] if host == "transformers" else model(ids)
        return out

    with enable_nats(model.eval(), window=2) as handle:
        with torch.no_grad():
            start = float(handle.distillation_loss(run))
        model.train()
        optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
        for _ in range(25):
            optimizer.zero_grad()
            handle.distillation_loss(run).backward()
            optimizer.step()
        assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.eval()
        with torch.no_grad():
            assert float(handle.distillation_loss(run)) < 0.6 * start
            some = torch.zeros(4, 40, dtype=torch.bool)
            assert float(handle.distillation_loss(run, some)) == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_errors_teach() -> None:
    query, key, value = qkv(9)
    with pytest.raises(ShapeError, match="one-hot"):
        nats_attention(query, key, value, torch.zeros(1, 1, 9), 3)
    with pytest.raises(ShapeError, match="same tokens"):
        nats_attention(query, key, value, one_hot(drawn(8)), 3)
    with pytest.raises(OptionError, match="window"):
        nats_mask(one_hot(drawn(8)), -1)
    with pytest.raises(OptionError, match="reg"):
        NAtSAttention(32, 4, reg=-1.0)
    with pytest.raises(UnsupportedPatternError, match="causal"):
        layer()(tokens(5), causal=False)
    with pytest.raises(ShapeError, match="enable_nats"):
        NAtS(8, 1)(*qkv(5), causal=True)
    with pytest.raises(OptionError, match="run the layer"):
        NAtS(8, 1).usage()
    with pytest.raises(OptionError, match="types only"):
        enable_nats(llama(), train="everything")  # type: ignore[arg-type]
    with pytest.raises(RetrofitError, match=r"nn\.MultiheadAttention"):
        enable_nats(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1))
