"""The suite finds what it is there to find: one wrong mechanism per contract, and the check that catches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from regard import registry
from regard.cache import DynamicCache
from regard.kernels import dense_attention
from regard.mechanism import Mechanism, Pattern, Request
from tests.conformance import test_mechanisms as checks
from tests.conformance.subjects import BROKEN, Subject


class Sound(Mechanism):
    """Softmax attention without any fault; each class below adds one."""

    takes_bias = True
    decodes = True
    exact = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return dense_attention(
            query,
            key,
            value,
            causal=request.causal,
            mask=request.mask,
            bias=request.bias,
            scale=request.scale,
        )


class Leaky(Sound):
    """Its scale knows the last key."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query * (1 + 1e-6 * key[:, :1, -1:, :1]), key, value, request)


class SeesTheFuture(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return dense_attention(query, key, value, mask=request.mask, bias=request.bias)


class NeverLeaks(Sound):
    strictly_causal = False


class IgnoresMasks(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return dense_attention(query, key, value, causal=request.causal, bias=request.bias)


class NormalisesHiddenKeys(Sound):
    """Hidden keys get no weight, but shift the others'."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query, key / key.abs().amax((2, 3), keepdim=True), value, request)


class NanOnEmptyRows(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
        if request.visible is not None:
            seen = request.visible.dense(query.shape[2], key.shape[2])
            scores = scores.masked_fill(~seen, float("-inf"))
        return scores.softmax(-1) @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)


class NoGroups(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query, key[:, : query.shape[1]], value, request)[:, : key.shape[1]]


class MixesTheBatch(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query, key - 0.01 * key.mean(0, keepdim=True), value, request)


class Random(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query, key + 1e-3 * torch.randn_like(key), value, request)


class HiddenState(Sound):
    """Draws at construction what its state dict does not carry."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = float(torch.rand(()))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query * (1 + self.shift), key, value, request)


class WrongGradient(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query, key.detach(), value, request)


class Overflows(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        weights = (query @ key.transpose(-1, -2)).exp()
        return weights @ value / weights.sum(-1, keepdim=True)


class CoarseInHalf(Sound):
    """Keeps two digits of its keys below double precision."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if key.dtype != torch.float64:
            key = (key * 8).round() / 8
        return super().attend(query, key, value, request)


class NotLinearInValues(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query, key, value.tanh(), request)


class NotExact(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query * 1.01, key, value, request)


class ChangesItsInput(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        out = super().attend(query, key, value, request)
        value.detach().mul_(1.001)
        return out


class ForgetsWhileDecoding(Sound):
    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, Any]:
        out, state = super().step(query, key, value, state)
        kept, state = state.read(), DynamicCache()
        state.append(kept.key[:, :, -9:], kept.value[:, :, -9:])
        return out, state


class DropsTheBias(Sound):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return dense_attention(query, key, value, causal=request.causal, mask=request.mask)


class Undeclared(Sound):
    """Cannot do cross attention and does not say so."""

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "cross", "causal-self", "causal-cross"})

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return super().attend(query, key, value, request) + 0 * (query + key.repeat_interleave(1, 1)).mean()


class CheapOnPaper(Sound):
    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return 1.5


FAULTS: list[tuple[type[Mechanism], Callable[[Subject], None]]] = [
    (Leaky, checks.test_no_leak_from_the_future),
    (SeesTheFuture, checks.test_no_leak_from_the_future),
    (SeesTheFuture, checks.test_implied_matrix),
    (IgnoresMasks, checks.test_implied_matrix),
    (IgnoresMasks, checks.test_hidden_keys_do_not_matter),
    (NormalisesHiddenKeys, checks.test_hidden_keys_do_not_matter),
    (NanOnEmptyRows, checks.test_nothing_to_see_gives_zeros),
    (NoGroups, lambda s: checks.test_patterns(s, "even")),
    (MixesTheBatch, checks.test_batch_independence),
    (Random, checks.test_determinism),
    (HiddenState, checks.test_state_dict),
    (WrongGradient, checks.test_gradient),
    (Overflows, lambda s: checks.test_magnitudes(s, 1e4)),
    (CoarseInHalf, lambda s: checks.test_low_precision(s, torch.float32)),
    (NotLinearInValues, checks.test_implied_matrix),
    (NotExact, checks.test_exact_means_softmax),
    (ChangesItsInput, checks.test_memory_layout_does_not_matter),
    (ForgetsWhileDecoding, lambda s: checks.test_step_by_step(s, (1,) * 30)),
    (DropsTheBias, checks.test_bias),
    (Undeclared, lambda s: checks.test_patterns(s, "cross")),
    (CheapOnPaper, checks.test_cost_and_pairs),
]


def subject(cls: type[Mechanism], monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(registry, "_classes", {**registry._classes, "faulty": cls})
    return Subject("faulty", "mechanism", {}, cls)


@pytest.mark.parametrize(("fault", "check"), FAULTS, ids=lambda part: getattr(part, "__name__", "check"))
def test_a_fault_is_found(
    fault: type[Mechanism], check: Callable[[Subject], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(subject(Sound, monkeypatch))
    row = subject(fault, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(row)


def test_a_leak_that_does_not_exist_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.skip.Exception, match="no leak was found"):
        checks.test_no_leak_from_the_future(subject(NeverLeaks, monkeypatch))


def test_no_entry_is_left_out() -> None:
    """An entry whose module does not import would be checked by nobody."""
    assert not BROKEN
