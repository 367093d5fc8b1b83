"""The contracts: what every mechanism takes, gives, declares and refuses.

:class:`Mechanism` works on ``(query, key, value)``; :class:`SparseMechanism` is one whose idea is a choice of blocks or
tokens; :class:`Layer` owns its projections, ``(batch, length, channels)`` in and out; :class:`Feature` works on maps
``(batch, channels, *space)``. A mechanism checks nothing itself: :meth:`Mechanism.forward` validates in one place and
hands :meth:`Mechanism.attend` a :class:`Request` that it can honour.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regard.cache import DynamicCache, EvictingCache, KeyValueCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, PlacementError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import block_sparse_attention, token_sparse_attention
from regard.layout import BlockLayout, TokenLayout
from regard.masks import Boolean, Causal, Mask

__all__ = [
    "ALL_PATTERNS",
    "Feature",
    "Layer",
    "Mechanism",
    "Pattern",
    "Request",
    "SparseMechanism",
    "Traits",
    "per_axis",
]

Pattern = Literal["self", "cross", "causal-self", "causal-cross"]
ALL_PATTERNS: frozenset[Pattern] = frozenset(("self", "cross", "causal-self", "causal-cross"))

# Identity values are fed in slices of this many keys, so that an implied matrix costs no more than its own size.
_IDENTITY_SLICE = 512


@dataclass(frozen=True)
class Request:
    """One validated call: what is asked besides the tensors.

    ``keys``: boolean ``(batch | 1, heads | 1, k_len)`` when the mask speaks of keys alone, else None. ``bias``:
    additive, broadcastable to ``(batch, heads, q_len, k_len)``.
    """

    causal: bool = False
    mask: Mask | None = None
    bias: Tensor | None = None
    keys: Tensor | None = None
    grid: tuple[int, ...] | None = None
    scale: float | None = None

    @property
    def visible(self) -> Mask | None:
        """Mask and causality as one rule, None for no restriction."""
        if not self.causal:
            return self.mask
        return Causal() if self.mask is None else self.mask & Causal()


class Traits:
    """What a mechanism says of itself; the conformance suite checks that it is true."""

    registered_name: ClassVar[str] = ""
    """Its name in the registry."""
    patterns: ClassVar[frozenset[Pattern]] = ALL_PATTERNS
    """Which of the four attention patterns it defines; the others raise :class:`UnsupportedPatternError`."""
    exact: ClassVar[bool] = False
    """Whether it equals softmax attention under its mask."""
    needs_training: ClassVar[bool] = False
    """Whether a model must be trained with it, so that swapping it in untrained makes little sense."""
    growth: ClassVar[str] = "N^2"
    """How its time grows with the length N."""
    grid_axes: ClassVar[frozenset[int]] = frozenset()
    """Numbers of axes of the grids that it reads, or of a feature map's space; empty: it reads no grid."""
    needs_grid: ClassVar[bool] = False
    """Whether a call without ``grid`` is refused (with a ShapeError)."""
    true_gradient: ClassVar[bool] = True
    """Whether its gradient is the derivative of its output (False: straight-through or stopped, by the paper's
    design)."""
    applies_rotary: bool = False
    """Whether it applies rotary positions itself, so that queries and keys have to come without."""


class Mechanism(nn.Module, Traits):
    """Attention on ``query (batch, num_heads, q_len, head_dim)``, ``key (batch, kv_heads, k_len, head_dim)`` and
    ``value (batch, kv_heads, k_len, value_dim)``, as in ``scaled_dot_product_attention``.

    Constructor arguments named ``num_heads``, ``num_kv_heads``, ``head_dim``, ``layer_index`` and ``num_layers`` are
    filled in by hosts and by retrofit from the model; all others are options and have defaults.
    """

    mask_support: ClassVar[Literal["any", "keys", "none"]] = "any"
    """Masks it can honour: any, those that speak of keys alone (padding), or none."""
    takes_bias: ClassVar[bool] = False
    """Whether it accepts a float ``mask``, added to the logits."""
    value_linear: ClassVar[bool] = True
    """Whether the output is linear in the values, given queries and keys."""
    decodes: ClassVar[bool] = False
    """Whether ``step`` gives, token by token, the numbers of the causal parallel form."""
    takes_evicted: ClassVar[bool] = False
    """Whether ``step`` runs over a cache in which heads keep different tokens: the order of keys tells it nothing."""
    off_grid: int = 0
    """How many of the queries stand beside the grid (text beside an image); the grid holds the others."""

    @property
    def _name(self) -> str:
        return self.registered_name or type(self).__name__

    @property
    def strictly_causal(self) -> bool:
        """Whether with ``causal`` nothing of a later token reaches an earlier output, its selection included."""
        return True

    def token_positions(self, length: int) -> Tensor | None:
        """Where the ``length`` tokens of a call stand, ``(length,)``, for a host that rotates queries and keys; None:
        one after the other, which is not so where a call holds a shard of a sequence (:mod:`regard.parallel`)."""
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        grid: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend. Returns ``(batch, num_heads, q_len, value_dim)``.

        causal: the last query sees the last key, earlier ones up to their own position. mask: a :class:`~regard.masks.
        Mask`, a boolean tensor (True: visible) or, where the mechanism takes one, a float tensor added to the logits.
        grid: the space ``(length,)``, ``(height, width)`` or ``(frames, height, width)`` behind the flattened sequence.
        scale: of the logits, by default the mechanism's own (mostly ``1 / sqrt(head_dim)``).

        Raises ShapeError, PlacementError, UnsupportedPatternError, UnsupportedMaskError.
        """
        return self.attend(query, key, value, self.request(query, key, value, causal, mask, grid, scale))

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        """The mechanism itself, on validated input."""

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        grid: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The implied attention matrix ``(batch, num_heads, q_len, k_len)``: what identity values give.

        ``value`` is read only by mechanisms whose choice of keys depends on the values (``value_linear`` is False).
        """
        probe = key.new_empty(*key.shape[:3], 0) if value is None else value
        return self.implied(query, key, value, self.request(query, key, probe, causal, mask, grid, scale))

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        """As :meth:`weights`, on validated input. By default what identity values give."""
        self._require_value_linear()
        batch, kv_heads, k_len, _ = key.shape
        columns = []
        for start in range(0, k_len, _IDENTITY_SLICE):
            width = min(_IDENTITY_SLICE, k_len - start)
            identity = torch.zeros(k_len, width, dtype=key.dtype, device=key.device)
            identity[torch.arange(start, start + width), torch.arange(width)] = 1
            columns.append(self.attend(query, key, identity.expand(batch, kv_heads, -1, -1), request))
        return torch.cat(columns, -1)

    def pairs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        grid: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> float | None:
        """Share of the ``q_len x k_len`` query-key pairs that is computed for this input; None where none is formed."""
        probe = key.new_empty(*key.shape[:3], 0) if value is None else value
        return self.computed_pairs(query, key, probe, self.request(query, key, probe, causal, mask, grid, scale))

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        """As :meth:`pairs`, on validated input. By default all pairs, half of them under ``causal``."""
        q_len, k_len = query.shape[2], key.shape[2]
        if not request.causal:
            return 1.0
        last = min(q_len, k_len)
        return (last * (last + 1) / 2 + last * max(k_len - q_len, 0)) / (q_len * k_len)

    def cost(self, shape: AttentionShape) -> Cost:
        """What a call of this shape costs, as far as shapes tell."""
        return dense_cost(shape)

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> Any:
        """The decoding state before the first token, on ``like``'s device and in its dtype.

        cache: where keys and values are kept, by default a :class:`~regard.cache.DynamicCache`. Raises OptionError for
        mechanisms whose state is another, and for caches that it cannot read.
        """
        self._require_decoding()
        if isinstance(cache, EvictingCache) and not self.takes_evicted:
            raise OptionError(
                f"{self._name} knows keys by their place in the sequence, so it cannot read a cache that evicts. Use "
                "another cache, or a mechanism with takes_evicted=True such as 'full'."
            )
        return DynamicCache() if cache is None else cache

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next token or tokens: shapes as in :meth:`forward`; returns the output and the new state.

        A cache is changed in place; keep ``state.copy()`` to go back to it.
        """
        self._require_decoding()
        kept = state.append(key, value)
        if not isinstance(state, EvictingCache):
            return self(query, kept.key, kept.value, causal=True), state
        mask = kept.visible(state.seen, query.shape[2], query.shape[1])
        out = self(query, kept.key, kept.value, mask=mask)
        if state.policy is not None and state.policy.needs_weights:
            with torch.no_grad():
                state.observe(self.weights(query, kept.key, mask=mask))
        else:
            state.settle()
        return out, state

    def absorb(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> Any:
        """The state after tokens that another mechanism answers, as one may read a prompt and another decode."""
        if isinstance(state, KeyValueCache) and not isinstance(state, EvictingCache):
            state.append(key, value)
            return state
        return self.step(query, key, value, state)[1]

    def _own_state(self, cache: KeyValueCache | None) -> None:
        """Refuse a cache: for mechanisms whose state is another."""
        if cache is not None:
            raise OptionError(
                f"{self._name} keeps a state of its own and reads no {type(cache).__name__}; leave cache out."
            )

    def _require_value_linear(self) -> None:
        if not self.value_linear:
            raise UnsupportedPatternError(
                f"{self._name} is not linear in the values, so it implies no attention matrix."
            )

    def _require_decoding(self) -> None:
        if not self.decodes:
            raise UnsupportedPatternError(
                f"{self._name} cannot decode step by step; run its parallel form on the whole "
                "sequence, or choose a mechanism with decodes=True."
            )

    def request(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        grid: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Request:
        """Validate a call in one place."""
        _check_tensors(query, key, value)
        name = self._name
        q_len, k_len = query.shape[2], key.shape[2]
        cross = q_len != k_len
        pattern: Pattern = ("causal-cross" if cross else "causal-self") if causal else ("cross" if cross else "self")
        if pattern not in self.patterns:
            raise UnsupportedPatternError(
                f"{name} does not define {pattern} attention ({q_len} queries, {k_len} keys, causal={causal}). "
                f"It defines: {', '.join(sorted(self.patterns))}."
            )
        if grid is not None:
            grid = tuple(grid)
            if math.prod(grid) != q_len - self.off_grid or any(length < 1 for length in grid):
                beside = f", {self.off_grid} of them beside the grid" if self.off_grid else ""
                raise ShapeError(f"grid {grid} holds {math.prod(grid)} tokens, but there are {q_len} queries{beside}.")
        bias, keys = None, None
        if isinstance(mask, Tensor):
            if mask.dtype == torch.bool:
                mask = Boolean(mask)
            elif mask.is_floating_point():
                bias, mask = mask, None
            else:
                raise UnsupportedMaskError(
                    f"A mask tensor is boolean (True: visible) or floating (added to the logits); got {mask.dtype}."
                )
        if bias is not None:
            if not self.takes_bias:
                raise UnsupportedMaskError(
                    f"{name} takes no additive bias. Pass a boolean mask, or use a mechanism with takes_bias=True "
                    "such as 'full'."
                )
            _check_broadcast("The additive bias", bias.shape, (*query.shape[:3], k_len))
        if mask is not None:
            _check_broadcast("The mask", (mask.batch, mask.heads), tuple(query.shape[:2]))
            mask = mask.to(query.device)
            keys = mask.key_validity(k_len)
            keys = None if keys is None else keys.to(query.device)
            if self.mask_support == "none":
                raise UnsupportedMaskError(f"{name} takes no mask. Remove padding first, or use another mechanism.")
            if self.mask_support == "keys" and keys is None:
                raise UnsupportedMaskError(
                    f"{name} can hide keys from all queries (KeyPadding), but not per query as {mask!r:.120} does."
                )
        return Request(causal, mask, bias, keys, grid, scale)


class SparseMechanism(Mechanism):
    """A selector: it says which blocks or tokens to compute; an executor of ``regard.kernels`` computes them."""

    @abstractmethod
    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout | TokenLayout:
        """The layout for this input, causality and mask included."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        layout = self.select(query, key, request)
        if isinstance(layout, BlockLayout):
            return block_sparse_attention(query, key, value, layout, scale=request.scale)
        out = token_sparse_attention(query, key, value, layout, scale=request.scale)
        assert isinstance(out, Tensor)
        return out

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return self.select(query, key, request).density()


class Layer(nn.Module, Traits):
    """Attention with its own projections: ``(batch, length, channels)`` in and out.

    ``forward(x, *, causal=False, mask=None, grid=None)`` as far as the paper defines them: an argument that ``forward``
    names is honoured. A layer that is always causal names no ``causal`` and declares causal patterns alone.
    """


class Feature(nn.Module, Traits):
    """Attention on a feature map: ``(batch, channels, *space)`` in and out.

    ``grid_axes`` names the numbers of spatial axes that it takes.
    """

    grid_axes: ClassVar[frozenset[int]] = frozenset({2})


def per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One int per axis from an int or a sequence."""
    if isinstance(value, int):
        return (value,) * axes
    if len(value) != axes:
        raise OptionError(f"{name} {tuple(value)} has {len(value)} values, but the grid has {axes} axes.")
    return tuple(value)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    expected = "expected query (batch, heads, q_len, head_dim), key and value (batch, kv_heads, k_len, dim)"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ShapeError(f"Attention takes tensors of four axes: {expected}; got {shapes}.")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ShapeError(f"Batch sizes differ: {shapes}.")
    if key.shape[1] != value.shape[1] or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ShapeError(f"Key and value need the same number of heads, one that divides the query's: {shapes}.")
    if key.shape[2] != value.shape[2]:
        raise ShapeError(f"Key and value lengths differ: {shapes}.")
    if query.shape[3] != key.shape[3]:
        raise ShapeError(
            f"Query and key head_dim differ: {shapes}. Is one (batch, length, heads, head_dim)? Then transpose 1 and 2."
        )
    if not query.shape[2] or not key.shape[2]:
        raise ShapeError(f"Attention needs at least one query and one key: {shapes}.")
    if not query.device == key.device == value.device:
        raise PlacementError(f"Tensors are on different devices: {query.device}, {key.device}, {value.device}.")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise PlacementError(
            f"Tensors need one floating dtype, got query {query.dtype}, key {key.dtype}, value {value.dtype}. "
            "Cast them to the same, e.g. key.to(query.dtype)."
        )


def _check_broadcast(what: str, shape: Sequence[int], full: Sequence[int]) -> None:
    short = full[len(full) - len(shape) :] if len(shape) <= len(full) else None
    if short is None or any(a not in (1, b) for a, b in zip(shape, short, strict=True)):
        raise ShapeError(f"{what} of shape {tuple(shape)} does not broadcast to {tuple(full)}.")
