"""One switch per attention layer: who answers its call, and who watches.

Retrofits and captures lie on a switch in any order and may be taken off in any order: the newest retrofit answers,
without one the model's own attention does, and every capture sees the call. A layer's ways in (the AttentionInterface,
an instance's ``forward``) are opened when the first of them comes and closed again when the last goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache import EvictingCache, KeyValueCache
from regard.dense.full import FullAttention
from regard.errors import RetrofitError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import accumulation_dtype, expand_groups, masked_softmax, score_scale
from regard.mechanism import Mechanism
from regard.retrofit.reading import Reading
from regard.retrofit.sites import Site

__all__ = [
    "SOFTMAX",
    "Call",
    "Decoding",
    "DropoutPolicy",
    "Editor",
    "Observer",
    "Patches",
    "Replacement",
    "Switch",
    "Weights",
    "evaluating",
    "implied_weights",
    "name_of",
    "respond",
    "switches",
]

DropoutPolicy = Literal["auto", "weights", "off"]


@dataclass(eq=False)
class Call:
    """One call of an attention layer: ``query`` ``(batch, num_heads, q_len, head_dim)``, ``key`` and ``value``
    ``(batch, kv_heads, k_len, ...)``, ``read`` to understand the mask, ``scale`` of the logits (None: ``1 /
    sqrt(head_dim)``), ``dropout`` of the weights (0 outside training). With ``decoding``, keys and values are the new
    ones alone, and it holds what the layer keeps of those before."""

    query: Tensor
    key: Tensor
    value: Tensor
    read: Callable[[], Reading]
    scale: float | None = None
    dropout: float = 0.0
    grid: tuple[int, ...] | None = None
    decoding: Decoding | None = None

    @cached_property
    def reading(self) -> Reading:
        return self.read()

    def softmax_weights(self, rows: slice | None = None) -> Tensor:
        """Softmax attention's weights ``(batch, num_heads, q_len, k_len)``, whatever computed the output; of some
        queries alone if ``rows`` is given."""
        reading, work, q_len = self.reading, accumulation_dtype(self.query.dtype), self.query.shape[2]
        index = torch.arange(q_len, device=self.query.device)[rows or slice(None)]
        query = self.query if rows is None else self.query[:, :, rows]
        key = expand_groups(self.key[:, :, : reading.keys], self.query.shape[1]).to(work)
        scores = query.to(work) * score_scale(self.query, self.scale) @ key.transpose(-1, -2)
        if reading.bias is not None:
            bias = reading.bias.to(work)
            scores = scores + (bias if bias.shape[-2] == 1 else bias[..., index, :])
        visible = None
        if reading.visible is not None:
            columns = torch.arange(reading.keys, device=index.device)
            rule = reading.visible.to(index.device)
            visible = rule.at(index.view(1, 1, -1, 1), columns.view(1, 1, 1, -1), q_len, reading.keys)
        return self.padded(masked_softmax(scores, visible).to(self.query.dtype))

    def padded(self, weights: Tensor) -> Tensor:
        """Weights of the keys that there are, with zeros for those that there are not yet."""
        return F.pad(weights, (0, self.key.shape[2] - weights.shape[-1]))


class Weights(Protocol):
    """Asks for the weights ``(batch, num_heads, q_len, k_len)`` of a call, of all queries or some rows of them; None
    where a mechanism implies none."""

    def __call__(self, rows: slice | None = None) -> Tensor | None: ...


class Observer(Protocol):
    """Somebody who watches a layer."""

    def observe(self, site: Site, call: Call, output: Tensor, weights: Weights) -> None:
        """``output`` ``(batch, q_len, num_heads, value_dim)`` is the very tensor that the model goes on with."""


class Editor(Protocol):
    """Somebody who changes what a layer takes or gives (:mod:`regard.inspect.intervene`)."""

    def before(self, site: Site, call: Call) -> Call:
        """The call that is answered."""

    def after(self, site: Site, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        """The output ``(batch, q_len, num_heads, value_dim)`` that the model goes on with, and its weights."""


@dataclass(eq=False)
class Replacement:
    """A mechanism in a layer's place. ``decode`` answers calls of one query with earlier keys, where it is given."""

    mechanism: Mechanism
    dropout: DropoutPolicy = "auto"
    decode: Mechanism | None = None

    def answering(self, call: Call) -> Mechanism:
        """Who answers this call."""
        later = call.query.shape[2] == 1 and call.reading.keys > 1
        return self.decode if self.decode is not None and later else self.mechanism


SOFTMAX = Replacement(FullAttention())
"""Softmax attention over all that a call may see."""


@dataclass(eq=False)
class Decoding:
    """What one layer keeps of the past instead of keys and values; ``seen`` tokens of it."""

    replacement: Replacement
    storage: Callable[[], KeyValueCache] | None = None
    state: Any = None
    seen: int = 0

    @property
    def owner(self) -> Mechanism:
        """Whose state it is."""
        return self.replacement.decode or self.replacement.mechanism

    def answer(self, site: Site, call: Call) -> Tensor:
        """``(batch, num_heads, q_len, value_dim)`` for new tokens, which the state takes in."""
        query, key, value = call.query, call.key, call.value
        reading, new = call.reading, query.shape[2]
        if reading.mask is not None or reading.bias is not None or not (reading.causal or new == 1):
            raise UnsupportedMaskError(
                f"Layer {site.path}: a cache of states decodes plainly causal text, and the model passes a mask beyond "
                "that: padding, a sliding window or a bias. Give texts of one length without padding, or generate "
                "without this cache."
            )
        if call.dropout or _own_scale(query, call.scale) is not None:
            raise RetrofitError(
                f"Layer {site.path}: a cache of states knows neither attention dropout nor logits on a scale other "
                "than 1 / sqrt(head_dim). Generate without this cache."
            )
        first = self.replacement.mechanism
        if self.state is None:
            storage = None if self.storage is None else self.storage()
            self.state = self.owner.init_state(query.shape[0], like=query, cache=storage)
        if first is self.owner or (self.seen and new == 1):
            out, self.state = self.owner.step(query, key, value, self.state)
        else:
            if self.seen and (not isinstance(self.state, KeyValueCache) or isinstance(self.state, EvictingCache)):
                raise RetrofitError(
                    f"Layer {site.path}: {name_of(self.owner)} does not keep the earlier keys that "
                    f"{name_of(first)} needs for a further part of the prompt. Pass the prompt in one piece."
                )
            self.state = self.owner.absorb(query, key, value, self.state)
            if self.seen:
                kept = self.state.read()
                key, value = kept.key, kept.value
            out = first(query, key, value, causal=True)
        self.seen += new
        return out


@dataclass(eq=False)
class Switch:
    """Who answers one layer's calls, and who watches."""

    site: Site
    replacements: list[Replacement] = field(default_factory=list)
    observers: list[Observer] = field(default_factory=list)
    editors: list[Editor] = field(default_factory=list)
    users: int = 0
    pending: Decoding | None = None
    """State that the call which comes next goes on from."""

    @property
    def replacement(self) -> Replacement | None:
        return self.replacements[-1] if self.replacements else None

    def run(
        self,
        call: Call,
        own: Callable[[Call], tuple[Tensor, Tensor | None]],
        want_weights: bool = False,
        own_weights: Callable[[Call], Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Answer a call. Returns ``(batch, q_len, num_heads, value_dim)`` and, where wanted or given by the model's
        own, the weights ``(batch, num_heads, q_len, k_len)``.

        own: the model's own attention; it refuses a changed call that it cannot answer. own_weights: what an observer
        is told if that gives no weights (by default those of softmax attention).
        """
        for editor in self.editors:
            call = editor.before(self.site, call)
        chosen = self.replacement
        if chosen is None:
            output, weights = own(call)
        else:
            output, weights = respond(self.site, chosen, call, want_weights)

        def implied(rows: slice | None = None) -> Tensor | None:
            found = weights
            if found is None:
                if chosen is None and own_weights is None:
                    return call.softmax_weights(rows)
                if chosen is None and own_weights is not None:
                    found = own_weights(call)
                # The keys of a state are out of reach.
                elif chosen is not None and call.decoding is None:
                    found = implied_weights(self.site, chosen.answering(call), call)
            return found if found is None or rows is None else found[:, :, rows]

        telling: Weights = implied
        for editor in self.editors:
            output, telling = editor.after(self.site, call, output, telling)
        for observer in self.observers:
            observer.observe(self.site, call, output, telling)
        if self.editors and weights is not None:
            weights = telling()
        return output, weights


def name_of(mechanism: Mechanism) -> str:
    """What an error calls a mechanism."""
    return mechanism.registered_name or type(mechanism).__name__


switches: dict[int, Switch] = {}
"""By identity of the module, which its switch keeps alive."""


def respond(site: Site, chosen: Replacement, call: Call, want_weights: bool) -> tuple[Tensor, Tensor | None]:
    """A mechanism's answer to a call, in the layout of :meth:`Switch.run`."""
    for each in (chosen.mechanism, chosen.decode):
        if each is not None and each.training != site.module.training:
            each.train(site.module.training)
    if call.decoding is not None:
        return _go_on(site, chosen, call, call.decoding, want_weights), None
    mechanism = chosen.answering(call)
    dropout = call.dropout if chosen.dropout != "off" else 0.0
    if dropout and not _can_drop(mechanism, chosen.dropout):
        name = name_of(mechanism)
        raise RetrofitError(
            f"{site.path}: the model is in training with attention dropout {call.dropout}, which acts on attention "
            f"weights, and {name} forms none. Pass attention_dropout='off' to retrofit (or set the model's dropout to "
            "0)"
            + ("." if not mechanism.value_linear else ", or attention_dropout='weights' to form them all the same.")
        )
    if dropout:
        weights = _run(site, mechanism, call, mechanism.weights)
        weights = F.dropout(weights, dropout)
        value = expand_groups(call.value[:, :, : weights.shape[-1]], weights.shape[1])
        output = weights @ value
        return output.transpose(1, 2).contiguous(), call.padded(weights) if want_weights else None
    output = _run(site, mechanism, call, mechanism, call.value)
    return output.transpose(1, 2).contiguous(), _implied(site, mechanism, call) if want_weights else None


def _go_on(site: Site, chosen: Replacement, call: Call, decoding: Decoding, want_weights: bool) -> Tensor:
    if chosen is not decoding.replacement:
        raise RetrofitError(
            f"{site.path}: this cache was made for another retrofit of the model. Take the cache of the one that "
            "answers."
        )
    if want_weights:
        raise RetrofitError("A cache of states gives no attention weights: generate without it for output_attentions.")
    return decoding.answer(site, call).transpose(1, 2).contiguous()


def _can_drop(mechanism: Mechanism, policy: DropoutPolicy) -> bool:
    return mechanism.value_linear and (policy == "weights" or mechanism.growth.replace(" ", "") == "N^2")


def _run(site: Site, mechanism: Mechanism, call: Call, function: Callable[..., Tensor], *value: Tensor) -> Tensor:
    """Call ``function(query, key[, value])`` of a mechanism; an error of it names the layer and says what to try."""
    reading, keys = call.reading, call.reading.keys
    grid = call.grid
    if grid is None and mechanism.needs_grid:
        grid = (call.query.shape[2],)
    mask = reading.argument(call.query.shape[2], call.query.dtype)
    key, value = call.key[:, :, :keys], tuple(v[:, :, :keys] for v in value)
    try:
        return function(
            call.query,
            key,
            *value,
            causal=reading.causal,
            mask=mask,
            grid=grid,
            scale=_own_scale(call.query, call.scale),
        )
    except (UnsupportedMaskError, UnsupportedPatternError, ShapeError) as error:
        raise type(error)(f"Layer {site.path}: {error}{_advice(error, call)}") from error


def _own_scale(query: Tensor, scale: float | None) -> float | None:
    """None for the usual scale, so that a mechanism whose own scale is another keeps it."""
    usual = scale is not None and math.isclose(scale, query.shape[-1] ** -0.5, rel_tol=1e-6)
    return None if usual else scale


def _advice(error: Exception, call: Call) -> str:
    reading, q_len = call.reading, call.query.shape[2]
    if isinstance(error, UnsupportedPatternError):
        if reading.causal and q_len < reading.keys:
            return (
                " A key-value cache asks for that: some new queries against all past keys. Run the model with "
                "use_cache=False (generate(..., use_cache=False))."
            )
        return " Choose other layers with layers=..., or another mechanism." if "does not define" in str(error) else ""
    if isinstance(error, UnsupportedMaskError):
        if reading.bias is not None:
            return (
                " This model adds a bias to the logits (T5's relative positions, ALiBi or a float mask of its own). "
                "Leave these layers to the model with layers=..., or choose a mechanism with takes_bias=True."
            )
        return (
            " The mask comes from the model: padding, packed documents, a sliding window or one passed by hand. Run "
            "sequences of one length without padding, one document each; leave these layers out with layers=...; or "
            "choose a mechanism with mask_support='any'."
        )
    return ""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that looking changes no running statistics; flags come back one by one."""
    flags = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag


def implied_weights(site: Site, mechanism: Mechanism, call: Call) -> Tensor | None:
    """A mechanism's weights for a call, None if it implies none."""
    return _implied(site, mechanism, call) if mechanism.value_linear else None


def _implied(site: Site, mechanism: Mechanism, call: Call) -> Tensor:
    with evaluating(mechanism):
        return call.padded(_run(site, mechanism, call, mechanism.weights))


class Patches:
    """Changes that are made when the first user comes and undone when the last one goes.

    ``apply`` makes the change and returns what undoes it. The target is kept alive meanwhile.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], list[Any]] = {}

    def acquire(self, target: object, kind: str, apply: Callable[[], Callable[[], None]]) -> None:
        held = self._held.get((id(target), kind))
        if held is None:
            held = self._held[id(target), kind] = [target, 0, apply()]
        held[1] += 1

    def release(self, target: object, kind: str) -> None:
        held = self._held[id(target), kind]
        held[1] -= 1
        if held[1] == 0:
            del self._held[id(target), kind]
            held[2]()
