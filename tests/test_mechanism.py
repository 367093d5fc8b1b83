"""The contracts' own machinery: requests, implied matrices, selectors, decoding states."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from regard.cache import DynamicCache
from regard.cost import AttentionShape, dense_cost
from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import dense_attention
from regard.layout import BlockLayout, TokenLayout
from regard.masks import Boolean, Causal, KeyPadding, SlidingWindow
from regard.mechanism import Feature, Mechanism, Pattern, Request, SparseMechanism, Traits, per_axis


class Probe(Mechanism):
    """Keeps the request it was given and attends densely."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Request] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        self.seen.append(request)
        return dense_attention(query, key, value, causal=request.causal, mask=request.mask, bias=request.bias)


class SelfOnly(Probe):
    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})


class KeysOnly(Probe):
    mask_support: ClassVar[Literal["any", "keys", "none"]] = "keys"


class NoMask(Probe):
    mask_support: ClassVar[Literal["any", "keys", "none"]] = "none"


class TakesBias(Probe):
    takes_bias = True


class Decodes(Probe):
    decodes = True


def tensors(q_len: int = 5, k_len: int | None = None, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    lengths = ((4, q_len), (kv_heads, k_len or q_len), (kv_heads, k_len or q_len))
    return tuple(torch.randn(2, heads, length, 8, dtype=torch.float64) for heads, length in lengths)  # type: ignore[return-value]


def test_a_request_says_what_was_asked() -> None:
    probe, valid = Probe(), torch.tensor([[True] * 4 + [False]] * 2)
    probe(*tensors(6, 5), causal=True, mask=KeyPadding(valid), grid=[2, 3], scale=0.5)
    request = probe.seen[0]
    assert (request.causal, request.grid, request.scale, request.bias) == (True, (2, 3), 0.5, None)
    assert request.keys is not None and torch.equal(request.keys, valid[:, None])
    assert request.visible is not None
    expected = Causal().dense(6, 5) & valid[:, None, None]
    assert torch.equal(request.visible.dense(6, 5), expected)


def test_visible_is_none_without_restriction() -> None:
    probe = Probe()
    probe(*tensors())
    assert probe.seen[0].visible is None
    assert isinstance(Request(causal=True).visible, Causal)
    window = SlidingWindow(2)
    assert Request(mask=window).visible is window


def test_boolean_tensors_become_masks() -> None:
    probe, seen = Probe(), torch.rand(5, 5) < 0.5
    probe(*tensors(), mask=seen)
    mask = probe.seen[0].mask
    assert isinstance(mask, Boolean) and torch.equal(mask.dense(5, 5)[0, 0], seen)
    assert probe.seen[0].keys is None
    probe(*tensors(), mask=seen[:1])
    assert probe.seen[1].keys is not None, "a mask of one row speaks of keys alone"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 5)])
def test_patterns(causal: bool, lengths: tuple[int, int]) -> None:
    pattern = ("causal-" if causal else "") + ("self" if lengths[0] == lengths[1] else "cross")
    Probe()(*tensors(*lengths), causal=causal)
    if pattern == "self":
        SelfOnly()(*tensors(*lengths), causal=causal)
        return
    with pytest.raises(UnsupportedPatternError, match=rf"SelfOnly does not define {pattern} .* It defines: self"):
        SelfOnly()(*tensors(*lengths), causal=causal)


def test_mask_support() -> None:
    padding, window = KeyPadding(torch.ones(2, 5, dtype=torch.bool)), SlidingWindow(2)
    KeysOnly()(*tensors(), mask=padding)
    with pytest.raises(UnsupportedMaskError, match="can hide keys from all queries"):
        KeysOnly()(*tensors(), mask=padding & window)
    for mask in (padding, window):
        with pytest.raises(UnsupportedMaskError, match="takes no mask"):
            NoMask()(*tensors(), mask=mask)


def test_bias_must_broadcast_and_be_wanted() -> None:
    taker = TakesBias()
    for shape in ((5,), (5, 5), (4, 1, 1), (2, 4, 5, 5)):
        taker(*tensors(), mask=torch.zeros(shape, dtype=torch.float64))
        assert taker.seen[-1].bias is not None and taker.seen[-1].mask is None
    for shape in ((4,), (3, 5, 5), (1, 2, 4, 5, 5)):
        with pytest.raises(ShapeError, match="does not broadcast"):
            taker(*tensors(), mask=torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(UnsupportedMaskError, match="additive bias"):
        Probe()(*tensors(), mask=torch.zeros(5, 5))


def test_masks_of_the_wrong_size() -> None:
    for mask in (KeyPadding(torch.ones(3, 5, dtype=torch.bool)), Boolean(torch.ones(1, 3, 5, 5, dtype=torch.bool))):
        with pytest.raises(ShapeError, match="does not broadcast"):
            Probe()(*tensors(), mask=mask)
    with pytest.raises(ShapeError, match="covers 4 keys, but attention has 5"):
        Probe()(*tensors(), mask=KeyPadding(torch.ones(2, 4, dtype=torch.bool)))


def test_implied_matrix_is_what_identity_values_give() -> None:
    query, key, value = tensors(3, 5, kv_heads=2)
    weights = Probe().weights(query, key, causal=True)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), Probe()(query, key, value, causal=True))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3, dtype=torch.float64))


def test_share_of_pairs_under_causality() -> None:
    probe = Probe()
    for q_len, k_len in ((5, 5), (3, 7), (7, 3), (1, 4)):
        query, key, _ = tensors(q_len, k_len)
        expected = float(Causal().dense(q_len, k_len).double().mean())
        assert probe.pairs(query, key, causal=True) == pytest.approx(expected)
        assert probe.pairs(query, key) == 1.0


def test_default_cost_is_dense() -> None:
    shape = AttentionShape(7, 9, 4, 8)
    assert Probe().cost(shape) == dense_cost(shape)


def test_decoding_by_default_keeps_keys_and_values() -> None:
    query, key, value = tensors(6, kv_heads=2)
    mechanism = Decodes()
    state, outs = mechanism.init_state(2, like=query), []
    assert isinstance(state, DynamicCache)
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        out, state = mechanism.step(query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), mechanism(query, key, value, causal=True))
    assert torch.equal(state.read().key, key) and torch.equal(state.read().value, value)


def test_undeclared_decoding() -> None:
    for call in (lambda: Probe().init_state(1, like=torch.zeros(1)), lambda: Probe().step(*tensors(1), None)):
        with pytest.raises(UnsupportedPatternError, match="cannot decode step by step"):
            call()


@pytest.mark.parametrize("kind", ["blocks", "tokens"])
def test_a_selector_runs_its_layout(kind: str) -> None:
    """Whatever kind of layout it makes, the executor attends within it, and the share of pairs is the layout's."""
    seen = torch.rand(2, 4, 6, 9) < 0.5

    class Chooses(SparseMechanism):
        def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout | TokenLayout:
            visible = seen if request.visible is None else seen & request.visible.dense(6, 9)
            return TokenLayout.of(visible) if kind == "tokens" else BlockLayout.of(Boolean(visible), 6, 9, 2, 3)

    query, key, value = tensors(6, 9)
    for causal in (False, True):
        expected = dense_attention(query, key, value, causal=causal, mask=Boolean(seen))
        torch.testing.assert_close(Chooses()(query, key, value, causal=causal), expected)
    share = Chooses().pairs(query, key)
    if kind == "tokens":
        assert share == pytest.approx(float(seen.double().mean()))
    else:
        assert share == pytest.approx(BlockLayout.of(Boolean(seen), 6, 9, 2, 3).density())


def test_one_value_per_axis() -> None:
    assert per_axis("window", 3, 2) == (3, 3)
    assert per_axis("window", [3, 5], 2) == (3, 5)
    with pytest.raises(OptionError, match=r"window \(3, 5\) has 2 values, but the grid has 3 axes"):
        per_axis("window", (3, 5), 3)


def test_defaults_of_the_traits() -> None:
    assert not any((Traits.exact, Traits.needs_training, Traits.needs_grid))
    assert Traits.true_gradient and Traits.grid_axes == frozenset()
    assert Feature.grid_axes == {2}


def test_a_gradient_reaches_all_three() -> None:
    inputs: Any = [t.requires_grad_() for t in tensors()]
    assert all(bool(g.any()) for g in torch.autograd.grad(Probe()(*inputs, causal=True).square().sum(), inputs))
