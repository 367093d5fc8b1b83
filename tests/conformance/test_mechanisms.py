"""Every mechanism on (query, key, value) keeps the contracts of :mod:`regard.mechanism`.

Rules that the contracts leave open and the suite decides:

- A mechanism that is linear in the values takes a value of any head_dim (its implied matrix needs that); another may
  refuse one that differs from the key's with a ShapeError.
- In eval mode nothing is random: the same call gives the same bits, and a state dict carries all that matters.
- What stands at a hidden key never matters, not even for what is selected; a query with nothing to see gives zeros.
- Where ``causal`` is not strict, later tokens may move a selection, but the implied matrix still ends at the diagonal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.cache import (
    DynamicCache,
    EvictingCache,
    KeyValueCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    StaticCache,
)
from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.inspect.metrics import METRICS, head_metrics
from regard.masks import Causal, KeyPadding, Mask
from tests.conformance.subjects import (
    CHANNELS,
    DIM,
    HEADS,
    Subject,
    assert_finite,
    assert_same,
    change,
    check_gradient,
    check_low_precision,
    draw,
    gradients,
    masks_for,
    over,
    query_key_value,
    worst,
)

LENGTHS = {
    "even": (48, 48),
    "odd": (37, 37),
    "tiny": (3, 3),
    "one": (1, 1),
    "cross": (21, 38),
    "cross-long": (38, 21),
    "decode": (1, 29),
}


def pattern(q_len: int, k_len: int, causal: bool) -> str:
    return ("causal-" if causal else "") + ("self" if q_len == k_len else "cross")


def both_masks(mask: Mask | Tensor | None, causal: bool, q_len: int, k_len: int) -> Tensor:
    """What is visible, as a dense tensor."""
    seen = torch.ones(1, 1, q_len, k_len, dtype=torch.bool)
    if isinstance(mask, Mask):
        seen = seen & mask.dense(q_len, k_len)
    elif mask is not None:
        seen = seen & mask
    return seen & Causal().dense(q_len, k_len) if causal else seen


@over("mechanism")
@pytest.mark.parametrize("lengths", LENGTHS)
def test_patterns(subject: Subject, lengths: str) -> None:
    """Declared patterns give the right shape with any key-value grouping; undeclared ones are refused."""
    q_len, k_len = LENGTHS[lengths]
    for causal in (False, True):
        for kv_heads in (HEADS, HEADS // 2, 1):
            module = subject.build(kv_heads=kv_heads)
            inputs = query_key_value(q_len, k_len, kv_heads=kv_heads)
            if pattern(q_len, k_len, causal) not in subject.cls.patterns:
                with pytest.raises(UnsupportedPatternError):
                    module(*inputs, causal=causal, **subject.space(q_len))
                break
            out = module(*inputs, causal=causal, **subject.space(q_len))
            assert out.shape == (2, HEADS, q_len, DIM)
            assert out.dtype == torch.float64
            assert_finite(out)


@over("mechanism")
def test_value_dim(subject: Subject) -> None:
    for causal in subject.causals:
        module, inputs = subject.build(), query_key_value(37, value_dim=5)
        try:
            out = module(*inputs, causal=causal, **subject.space(37))
        except ShapeError:
            assert not subject.cls.value_linear, "a mechanism linear in the values takes any value head_dim"
            continue
        assert out.shape == (2, HEADS, 37, 5)
        assert_finite(out)


@over("mechanism", lambda s: bool(s.cls.grid_axes))
def test_grids(subject: Subject) -> None:
    """Every number of axes that it declares to read works; a grid that does not hold the tokens is refused."""
    module, inputs = subject.build(), query_key_value(48)
    for causal in subject.causals:
        for axes in subject.cls.grid_axes:
            out = module(*inputs, causal=causal, **subject.space(48, axes))
            assert out.shape == (2, HEADS, 48, DIM)
            assert_finite(out)
        with pytest.raises(ShapeError):
            module(*inputs, causal=causal, grid=(7, 7))


@over("mechanism", lambda s: s.cls.needs_grid)
def test_missing_grid_is_refused(subject: Subject) -> None:
    with pytest.raises(ShapeError):
        subject.build()(*query_key_value(48), causal=subject.causals[0])


@over("mechanism", lambda s: s.cls.true_gradient)
def test_gradient(subject: Subject) -> None:
    for causal in subject.causals:
        inputs = query_key_value(20, batch=1, kv_heads=2)
        check_gradient(subject.build(kv_heads=2), *inputs, causal=causal, **subject.space(20))


@over("mechanism", lambda s: not s.cls.true_gradient)
def test_surrogate_gradient_is_finite(subject: Subject) -> None:
    for causal in subject.causals:
        inputs = query_key_value(20, grad=True)
        grads = gradients(subject.build()(*inputs, causal=causal, **subject.space(20)), *inputs)
        assert any(grad is not None and bool(grad.any()) for grad in grads)
        assert_finite(*grads)


@over("mechanism")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_low_precision(subject: Subject, dtype: torch.dtype) -> None:
    for causal in subject.causals:
        module = subject.build(kv_heads=2)
        check_low_precision(module, dtype, *query_key_value(37, kv_heads=2), causal=causal, **subject.space(37))


def leak(module: Any, subject: Subject, q_len: int, k_len: int, seed: int) -> float:
    """How far earlier outputs move when later tokens change, relative to their size."""
    query, key, value = query_key_value(q_len, k_len, seed=seed)
    arguments = {"causal": True, **subject.space(q_len)}
    before, largest = module(query, key, value, **arguments), 0.0
    for cut in sorted({1, q_len // 3, q_len // 2 + 1, q_len - 1} - {0, q_len}):
        k_cut = cut + k_len - q_len
        changed = module(change(query, 2, cut), change(key, 2, k_cut), change(value, 2, k_cut), **arguments)
        moved = (changed - before)[:, :, :cut].detach().abs().max() / before.detach().abs().max()
        largest = max(largest, float(moved.nan_to_num(nan=float("inf"))))
    return largest


@over("mechanism", lambda s: any(p.startswith("causal") for p in s.cls.patterns))
def test_no_leak_from_the_future(subject: Subject) -> None:
    module = subject.build()
    shapes = [shape for shape in ((48, 48), (37, 37), (21, 38)) if pattern(*shape, True) in subject.cls.patterns]
    if module.strictly_causal:
        for q_len, k_len in shapes:
            assert leak(module, subject, q_len, k_len, 0) <= 1e-9
        return
    if not any(leak(module, subject, *shape, seed) > 1e-9 for seed in range(5) for shape in shapes):
        pytest.skip("declared not strictly causal, but no leak was found")


@over("mechanism", lambda s: s.cls.value_linear)
def test_implied_matrix(subject: Subject) -> None:
    """``weights @ value`` is the output, and no weight lies outside of what is visible."""
    for q_len, k_len in ((37, 37), (21, 38)):
        for causal in (False, True):
            if pattern(q_len, k_len, causal) not in subject.cls.patterns:
                continue
            module = subject.build(kv_heads=2)
            query, key, value = query_key_value(q_len, k_len, kv_heads=2)
            masks = {"none": None, **masks_for(2, q_len, k_len, subject.cls.mask_support)}
            for name, mask in masks.items():
                arguments = {"causal": causal, "mask": mask, **subject.space(q_len)}
                weights = module.weights(query, key, value, **arguments)
                assert weights.shape == (2, HEADS, q_len, k_len)
                assert_finite(weights)
                hidden = ~both_masks(mask, causal, q_len, k_len).expand_as(weights)
                assert not bool(weights[hidden].any()), f"weight on hidden keys with mask {name}, causal={causal}"
                assert_same(weights @ value.repeat_interleave(2, 1), module(query, key, value, **arguments))


@over("mechanism", lambda s: s.cls.value_linear)
@torch.no_grad()
def test_metrics_of_the_implied_matrix(subject: Subject) -> None:
    """Of negative weights too, and of those that do not sum to 1."""
    length, module = 37, subject.build()
    causal = subject.causals[0]
    query, key, value = query_key_value(length)
    weights = module.weights(query, key, value, causal=causal, **subject.space(length))
    found = head_metrics(weights)
    assert set(found) == set(METRICS)
    rows, place = weights.abs(), torch.arange(length)
    seen, far = rows.sum(-1) > 0, (place[:, None] - place).abs()
    mean = (rows * far).sum(-1) / rows.sum(-1).clamp_min(1e-300)
    assert_same(found["distance"], (mean * seen).sum(-1) / seen.sum(-1).clamp_min(1))
    for name, most in (("entropy", math.log(length)), ("distance", length - 1.0)):
        assert_finite(found[name])
        assert float(found[name].min()) >= -1e-9 and float(found[name].max()) <= most + 1e-9
    for name in ("sink", "previous", "self", "local"):
        assert_finite(found[name])
        assert float(found[name].min()) >= 0 and float(found[name].max()) <= 1 + 1e-9


@over("mechanism", lambda s: not s.cls.value_linear)
def test_no_implied_matrix(subject: Subject) -> None:
    """What is not linear in the values says so, and is not."""
    query, key, value = query_key_value(37)
    module = subject.build()
    with pytest.raises(UnsupportedPatternError):
        module.weights(query, key, **subject.space(37))
    arguments = {"causal": subject.causals[0], **subject.space(37)}
    other = draw(*value.shape, seed=8)
    with torch.no_grad():
        parts = module(query, key, value, **arguments) + module(query, key, other, **arguments)
        mixed = module(query, key, value + other, **arguments)
    assert float((parts - mixed).abs().max()) > 1e-6, "declared not linear in the values, but it is"


@over("mechanism", lambda s: s.cls.exact)
def test_exact_means_softmax(subject: Subject) -> None:
    """An exact mechanism is softmax attention, here written out."""
    for causal in subject.causals:
        query, key, value = query_key_value(37)
        seen = both_masks(None, causal, 37, 37)
        scores = (query @ key.transpose(-1, -2) / DIM**0.5).masked_fill(~seen, float("-inf"))
        out = subject.build()(query, key, value, causal=causal, **subject.space(37))
        assert_same(out, scores.softmax(-1) @ value)


@over("mechanism")
def test_batch_independence(subject: Subject) -> None:
    for causal in subject.causals:
        module, inputs = subject.build(kv_heads=2), query_key_value(37, batch=3, kv_heads=2)
        arguments = {"causal": causal, **subject.space(37)}
        together = module(*inputs, **arguments)
        for row in range(3):
            assert_same(together[row : row + 1], module(*(t[row : row + 1] for t in inputs), **arguments))


@over("mechanism")
def test_memory_layout_does_not_matter(subject: Subject) -> None:
    """Tensors that are views of (batch, length, heads, dim), or broadcast over the batch, count as their numbers."""
    for causal in subject.causals:
        module, inputs = subject.build(), query_key_value(37)
        arguments = {"causal": causal, **subject.space(37)}
        views = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs]
        plain = [t.detach().clone().requires_grad_() for t in inputs]
        before = [t.detach().clone() for t in views]
        out, expected = module(*views, **arguments), module(*plain, **arguments)
        assert_same(out, expected)
        for grad, wanted in zip(gradients(out, *views), gradients(expected, *plain), strict=True):
            assert (grad is None) == (wanted is None)
            if grad is not None and wanted is not None:
                assert_same(grad, wanted)
        assert all(torch.equal(a, b) for a, b in zip(before, views, strict=True)), "an input was changed in place"
        broadcast = [t[:1].expand(2, -1, -1, -1) for t in inputs]
        assert_same(module(*broadcast, **arguments), module(*(t.clone() for t in broadcast), **arguments))


@over("mechanism", lambda s: s.cls.mask_support != "none")
def test_hidden_keys_do_not_matter(subject: Subject) -> None:
    for causal in subject.causals:
        module, (query, key, value) = subject.build(), query_key_value(37)
        for name, mask in masks_for(2, 37, 37, "keys").items():
            assert isinstance(mask, KeyPadding)
            arguments = {"causal": causal, "mask": mask, **subject.space(37)}
            shown = mask.valid[:, None, :, None]
            other_key, other_value = 5 * draw(*key.shape, seed=41) + 1, 5 * draw(*value.shape, seed=42) + 1
            out = module(query, key, value, **arguments)
            changed = module(
                query, torch.where(shown, key, other_key), torch.where(shown, value, other_value), **arguments
            )
            error = float((out - changed).detach().abs().max())
            assert error <= 1e-9, f"{name}, causal={causal}: hidden keys move the output by {error:.3g}"


@over("mechanism", lambda s: s.cls.mask_support != "none")
def test_nothing_to_see_gives_zeros(subject: Subject) -> None:
    for causal in subject.causals:
        for dtype in (torch.float64, torch.float32):
            module = subject.build(dtype=dtype)
            valid = torch.ones(2, 37, dtype=torch.bool)
            valid[1] = False
            masks: list[tuple[Mask | Tensor, Any]] = [(KeyPadding(valid), (1,))]
            if subject.cls.mask_support == "any":
                seen = torch.ones(1, 1, 37, 37, dtype=torch.bool)
                seen[:, :, 11] = False
                masks.append((seen, (slice(None), slice(None), 11)))
            for mask, empty in masks:
                inputs = query_key_value(37, dtype=dtype, grad=True)
                out = module(*inputs, causal=causal, mask=mask, **subject.space(37))
                assert not bool(out[empty].any()), "a row with nothing to see is not zero"
                assert_finite(out, *gradients(out, *inputs))


@over("mechanism", lambda s: "causal-cross" in s.cls.patterns)
def test_queries_before_the_first_key_give_zeros(subject: Subject) -> None:
    """Aligned at the bottom right, the first queries of a longer query sequence stand before every key."""
    inputs = query_key_value(30, 21, grad=True)
    out = subject.build()(*inputs, causal=True, **subject.space(30))
    assert not bool(out[:, :, :9].any())
    assert_finite(out, *gradients(out, *inputs))


@over("mechanism", lambda s: s.cls.mask_support == "any")
def test_mask_forms_agree(subject: Subject) -> None:
    """A mask object and its dense tensor are the same mask, and a mask that hides nothing is no mask."""
    module, inputs = subject.build(), query_key_value(37)
    for causal in subject.causals:
        arguments = {"causal": causal, **subject.space(37)}
        for mask in masks_for(2, 37, 37, "any").values():
            if isinstance(mask, Mask):
                dense = module(*inputs, mask=mask.dense(37, 37), **arguments)
                assert_same(module(*inputs, mask=mask, **arguments), dense)
        everything = torch.ones(37, 37, dtype=torch.bool)
        assert_same(module(*inputs, mask=everything, **arguments), module(*inputs, **arguments))


@over("mechanism", lambda s: s.cls.mask_support != "any")
def test_unsupported_masks_are_refused(subject: Subject) -> None:
    arguments = {"causal": subject.causals[0], **subject.space(37)}
    refused: list[Mask | Tensor] = [torch.rand(37, 37) < 0.5]
    if subject.cls.mask_support == "none":
        refused.append(KeyPadding(torch.ones(2, 37, dtype=torch.bool)))
    for mask in refused:
        with pytest.raises(UnsupportedMaskError):
            subject.build()(*query_key_value(37), mask=mask, **arguments)


@over("mechanism")
def test_bias(subject: Subject) -> None:
    """A float mask is refused, or it counts: a large bias decides where a query looks."""
    module, inputs = subject.build(), query_key_value(37)
    arguments = {"causal": subject.causals[0], **subject.space(37)}
    bias = torch.zeros(37, 37, dtype=torch.float64)
    if not subject.cls.takes_bias:
        with pytest.raises(UnsupportedMaskError):
            module(*inputs, mask=bias, **arguments)
        return
    plain = module(*inputs, **arguments)
    assert_same(module(*inputs, mask=bias, **arguments), plain)
    assert worst(module(*inputs, mask=3 * draw(37, 37), **arguments), plain) > 1e-3, "the bias does not count"


@over("mechanism")
@pytest.mark.parametrize("size", [1e4, 1e-6], ids=["huge", "tiny"])
def test_magnitudes(subject: Subject, size: float) -> None:
    for causal in subject.causals:
        module = subject.build(dtype=torch.float32)
        inputs = [(size * t).detach().requires_grad_() for t in query_key_value(37, dtype=torch.float32)]
        out = module(*inputs, causal=causal, **subject.space(37))
        assert_finite(out, *gradients(out, *inputs))


@over("mechanism")
def test_determinism(subject: Subject) -> None:
    """The same call gives the same bits, whatever the state of the random generator; so does the same build."""
    for causal in subject.causals:
        arguments = {"causal": causal, **subject.space(37)}
        inputs, outs = query_key_value(37, dtype=torch.float32), []
        module = subject.build(dtype=torch.float32)
        for seed, used in enumerate((module, module, subject.build(dtype=torch.float32))):
            torch.manual_seed(100 + seed)
            outs.append(used(*inputs, **arguments))
        assert torch.equal(outs[0], outs[1]), "two calls differ"
        assert torch.equal(outs[0], outs[2]), "two builds from one seed differ"


@over("mechanism")
def test_earlier_calls_leave_no_trace(subject: Subject) -> None:
    """After other lengths, dtypes and inference mode, numbers and gradients are those of a fresh instance."""
    used, fresh = subject.build(), subject.build()
    with torch.inference_mode():
        for length in (48, 37, 5):
            for causal in subject.causals:
                used(*query_key_value(length, batch=1), causal=causal, **subject.space(length))
        if not [*used.parameters(), *used.buffers()]:
            for dtype in (torch.float32, torch.bfloat16):
                used(*query_key_value(37, dtype=dtype), causal=subject.causals[0], **subject.space(37))
    for causal in subject.causals:
        results = []
        for module in (used, fresh):
            inputs = query_key_value(37, grad=True)
            out = module(*inputs, causal=causal, **subject.space(37))
            results.append((out, *gradients(out, *inputs)))
        for actual, expected in zip(*results, strict=True):
            if actual is not None and expected is not None:
                assert_same(actual, expected)


@over("mechanism")
def test_training_mode(subject: Subject) -> None:
    for causal in subject.causals:
        inputs = query_key_value(37, grad=True)
        module = subject.build(train=True)
        out = module(*inputs, causal=causal, **subject.space(37))
        grads = gradients(out, *inputs, *(p for p in module.parameters() if p.requires_grad))
        assert any(grad is not None for grad in grads)
        assert_finite(out, *grads)


@over("mechanism")
def test_state_dict(subject: Subject) -> None:
    """A state dict carries everything between two instances of different random states; so does a copy."""
    module, other = subject.build(seed=1), subject.build(seed=2)
    assert repr(module)
    arguments = {"causal": subject.causals[0], **subject.space(37)}
    inputs = query_key_value(37)
    expected = module(*inputs, **arguments)
    assert torch.equal(copy.deepcopy(module)(*inputs, **arguments), expected)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(*inputs, **arguments), expected), "the state dict does not carry all that matters"


@over("mechanism", lambda s: s.cls.decodes)
@pytest.mark.parametrize("pieces", [(1,) * 30, (13, 1, 1, 4, 8, 3)], ids=["tokens", "pieces"])
def test_step_by_step(subject: Subject, pieces: tuple[int, ...]) -> None:
    module, inputs = subject.build(kv_heads=2), query_key_value(sum(pieces), kv_heads=2)
    expected = module(*inputs, causal=True)
    state, outs = module.init_state(2, like=inputs[0]), []
    for query, key, value in zip(*(t.split(pieces, 2) for t in inputs), strict=True):
        out, state = module.step(query, key, value, state)
        outs.append(out)
    assert_same(torch.cat(outs, 2), expected)


@over("mechanism", lambda s: s.cls.decodes)
@pytest.mark.parametrize("kind", ["static", "paged", "evicting", "quantized"])
def test_any_cache_decodes_or_is_refused(subject: Subject, kind: str) -> None:
    """Wherever keys and values lie, the numbers are those of the parallel form; in few bits for numbers that these bits
    can hold."""
    module, pieces = subject.build(kv_heads=2), (13, 1, 8, 1)
    query, key, value = query_key_value(sum(pieces), kv_heads=2)
    if kind == "quantized":
        key, value = (t.clamp(-1, 1).add(1).mul(127.5).round() / 127.5 - 1 for t in (key, value))
        key[:, :, ::8], key[:, :, 1::8] = -1, 1
        value[..., 0], value[..., 1] = -1, 1
    expected = module(query, key, value, causal=True)
    make: dict[str, Callable[[], KeyValueCache]] = {
        "static": lambda: StaticCache(32),
        "paged": lambda: PagedCache(PagePool(16, 4)),
        "evicting": EvictingCache,
        "quantized": lambda: QuantizedCache(8, 8, residual=4),
    }
    try:
        state = module.init_state(2, like=query, cache=make[kind]())
    except OptionError:
        own = not isinstance(getattr(module.init_state(2, like=query), "cache", None), KeyValueCache)
        usual = isinstance(module.init_state(2, like=query), DynamicCache)
        assert (kind == "evicting" and not module.takes_evicted) or (own and not usual)
        return
    outs = []
    for q, k, v in zip(*(t.split(pieces, 2) for t in (query, key, value)), strict=True):
        out, state = module.step(q, k, v, state)
        outs.append(out)
    assert_same(torch.cat(outs, 2), expected)


@over("mechanism", lambda s: not s.cls.decodes)
def test_undeclared_decoding_is_refused(subject: Subject) -> None:
    module, inputs = subject.build(), query_key_value(1)
    with pytest.raises(UnsupportedPatternError):
        module.init_state(2, like=inputs[0])
    with pytest.raises(UnsupportedPatternError):
        module.step(*inputs, None)


@over("mechanism")
def test_cost_and_pairs(subject: Subject) -> None:
    """Costs are plain numbers that grow with the length, and shares of pairs lie between 0 and 1."""
    module = subject.build()
    for causal in subject.causals:
        small, large = (
            module.cost(AttentionShape(n, n, HEADS, DIM, causal=causal, **subject.space(n))) for n in (48, 192)
        )
        for cost in (small, large):
            assert all(isinstance(n, int) and n >= 0 for n in (cost.flops, cost.bytes, cost.state_bytes)), cost
            assert cost.flops > 0
            assert cost.pairs is None or 0 < cost.pairs <= 1, cost
        assert small.flops < large.flops <= 17 * small.flops
        share = module.pairs(*query_key_value(48), causal=causal, **subject.space(48))
        assert share is None or 0 < share <= 1
        assert (share is None) == (small.pairs is None)


@over("mechanism")
def test_compile(subject: Subject) -> None:
    """The compiler's front end traces it, forward and backward, and changes nothing."""
    arguments = {"causal": subject.causals[-1], **subject.space(37)}
    module, outs, grads = subject.build(), [], []
    torch._dynamo.reset()
    for run in (module, torch.compile(module, backend="eager", dynamic=False)):
        inputs = query_key_value(37, grad=True)
        outs.append(run(*inputs, **arguments))
        grads.append(gradients(outs[-1], *inputs))
    assert_same(outs[1], outs[0])
    for compiled, eager in zip(grads[1], grads[0], strict=True):
        if compiled is not None and eager is not None:
            assert_same(compiled, eager)


@pytest.mark.slow
@over("mechanism")
def test_inductor(subject: Subject) -> None:
    arguments = {"causal": subject.causals[-1], **subject.space(37)}
    module, inputs = subject.build(dtype=torch.float32), query_key_value(37, dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same(torch.compile(module, dynamic=False)(*inputs, **arguments), module(*inputs, **arguments), 1e-4)


def test_context_is_consistent() -> None:
    """The table's sizes fit together, as a host's would."""
    assert HEADS * DIM == CHANNELS
