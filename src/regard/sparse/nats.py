"""Neural Attention Search (NAtS): every token learns, per key/value head, how long it is to be kept.

Three types of tokens: *global* ones are kept for ever; *local* ones up to and including the next global one;
*sliding* ones for ``W`` further tokens. With ``e(j)`` the next global token after ``j``, query ``i`` sees key ``j <=
i`` iff ``j`` is global, or local and ``i <= e(j)``, or sliding and ``i <= j + W``; softmax over those keys alone.

Types come from the input of the layer, detached: logits ``x W_type`` (no bias), 3 for each key/value head. Training
draws them by Gumbel-softmax (temperature 1, hard, straight-through), the first and the last token global; inference
takes the largest, 0.1 added to the global logit, the first token global. The mask's gradient reaches the types by a
rule of its own (:mod:`regard.kernels.typed_tokens`); ``reg`` adds to the gradients of global and local types, in
proportion to how long they live. What has become invisible stays so, so that a cache of the living keys
(:class:`NAtSCache`) decodes exactly: all global tokens, the local ones since the last global one, and at most ``W``
sliding ones.

Deng & Lindauer, "Neural Attention Search", 2025, arXiv 2502.13251, and its released kernel, whose own gradient is
``official=True``: against true switches of one token's type its sign is right less often where a global type is
involved. Input ``(batch, length, embed_dim)``; query ``(batch, num_heads, length, head_dim)``, key and value
``(batch, num_kv_heads, length, head_dim)``, types ``(batch, num_kv_heads, length, 3)``. Training costs what full
attention costs, inference the living pairs. :func:`regard.retrofit.nats.enable_nats` puts types into a trained model.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache import EvictingCache, KeyValueCache
from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import block_sparse_attention, dense_attention, score_scale
from regard.kernels.typed_tokens import GLOBAL, SLIDING, lifetimes, next_marked, typed_attention
from regard.layers.gumbel import gumbel_one_hot
from regard.layers.heads import head_sizes
from regard.layers.padding import layer_keys
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layout import BlockLayout
from regard.masks import Boolean, Mask
from regard.mechanism import Layer, Mechanism, Pattern, Request
from regard.registry import register
from regard.sparse.selection import Lifetime

__all__ = ["NAtS", "NAtSAttention", "NAtSCache", "kv_usage", "nats_attention", "nats_mask", "next_global"]


def _kinds(types: Tensor) -> Tensor:
    if types.dim() != 4 or types.shape[-1] != 3:
        raise ShapeError(
            "Types are one-hot (batch, heads, length, 3) in the order global, local, sliding; got "
            f"{tuple(types.shape)}. torch.nn.functional.one_hot(kinds, 3) makes them from numbers."
        )
    return types.detach().argmax(-1)


def _check_window(window: int) -> None:
    if window < 0:
        raise OptionError(f"window counts the tokens after a sliding one that still see it, 0 or more; got {window}.")


def next_global(types: Tensor) -> Tensor:
    """Position of the first global token at or after each, ``(batch, heads, length)``; the length where there is
    none."""
    return next_marked(_kinds(types) == GLOBAL)


def nats_mask(types: Tensor, window: int) -> Tensor:
    """Who sees whom, boolean ``(batch, heads, length, length)``, for one-hot ``types (batch, heads, length, 3)``."""
    _check_window(window)
    length = types.shape[2] if types.dim() == 4 else 0
    return Lifetime(lifetimes(_kinds(types), window)).dense(length, length, types.device)


def kv_usage(types: Tensor, window: int) -> Tensor:
    """How many keys each query reads, itself included, ``(batch, heads, length)``: the size of the cache then."""
    _check_window(window)
    kinds = _kinds(types)
    length = kinds.shape[-1]
    deaths = lifetimes(kinds, window).clamp_max(length)
    gone = torch.zeros(*kinds.shape[:2], length + 1, dtype=torch.int64, device=kinds.device)
    gone.scatter_add_(-1, deaths, torch.ones_like(deaths))
    return torch.arange(1, length + 1, device=kinds.device) - gone[..., :length].cumsum(-1)


def nats_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    types: Tensor,
    window: int,
    reg: float = 0.0,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    official: bool = False,
    block_size: int = 32,
) -> Tensor:
    """Causal attention under the mask of ``types``, which get a gradient where they ask for one.

    Query ``(batch, num_heads, length, head_dim)``, key and value ``(batch, kv_heads, length, ...)``, one-hot types
    ``(batch, mask_heads, length, 3)``, ``mask_heads`` dividing ``num_heads``. reg, official: of that gradient, see
    :func:`regard.kernels.typed_tokens.typed_attention`. keys: boolean ``(batch | 1, mask_heads | 1, length)``, tokens
    that exist. block_size: of the executor that skips what is not seen, where no gradient of types is asked for.
    """
    _check_window(window)
    kinds, heads, length = _kinds(types), query.shape[1], query.shape[2]
    if key.shape[2] != length or kinds.shape[2] != length or len(kinds) != len(query) or heads % kinds.shape[1]:
        raise ShapeError(
            "Queries, keys and types are of the same tokens, and the heads of types divide those of queries; got "
            f"{length} queries, {key.shape[2]} keys, {heads} heads and types {tuple(types.shape)}."
        )
    if types.requires_grad and torch.is_grad_enabled():
        factor = score_scale(query, scale)
        return typed_attention(query, key, value, types, window, reg=reg, keys=keys, scale=factor, official=official)
    deaths = lifetimes(kinds, window).clamp_max(length)
    if keys is not None:
        deaths = torch.where(keys, deaths, 0)
    rule = Lifetime(deaths.repeat_interleave(heads // kinds.shape[1], 1))
    layout = BlockLayout.of(rule, length, length, block_size, block_size, query.device)
    return block_sparse_attention(query, key, value, layout, scale=scale)


class NAtSCache(EvictingCache):
    """The keys and values that a later token can still see, with the ``type`` of each (0 global, 1 local, 2 sliding)
    in ``extra``."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def deaths(self) -> Tensor:
        """One past the last position that sees each slot, 0 for an empty one."""
        kinds = self.extra["type"]
        return lifetimes(kinds, self.window, self.positions.expand_as(kinds))

    def shown(self, q_len: int, num_heads: int) -> Boolean:
        """Which slots the last ``q_len`` tokens see."""
        place = torch.arange(self.seen - q_len, self.seen, device=self.positions.device)[:, None]
        seen = (self.positions[:, :, None] <= place) & (place < self.deaths()[:, :, None])
        return Boolean(seen.repeat_interleave(num_heads // seen.shape[1], 1))

    def evict(self) -> None:
        """Drop what the next token does not see."""
        self.retain(self.deaths() > self.seen)


class NAtS(Mechanism):
    """The mechanism inside the layer, and inside a trained model: ``hidden (batch, length, embed_dim)``, the input of
    the layer, has to be told before each call.

    window, reg, official: as in :func:`nats_attention`. global_bias: added to the global logit at inference.
    temperature: of the Gumbel-softmax. Settings in force: ``generator`` of its noise, and ``full``, which lets every
    token be seen. After a call ``kinds (batch, num_kv_heads, length)`` holds the types that were chosen.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self",))
    mask_support = "keys"
    needs_training = True
    decodes = True
    true_gradient = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        window: int = 16,
        reg: float = 1e-8,
        official: bool = False,
        global_bias: float = 0.1,
        temperature: float = 1.0,
        block_size: int = 32,
    ) -> None:
        super().__init__()
        _check_window(window)
        if reg < 0 or temperature <= 0 or block_size < 1:
            raise OptionError(
                f"Need reg >= 0, temperature > 0 and block_size >= 1; got {reg}, {temperature}, {block_size}."
            )
        self.num_kv_heads = num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise OptionError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {num_heads}.")
        self.window, self.reg, self.official, self.block_size = window, reg, official, block_size
        self.global_bias, self.temperature = global_bias, temperature
        self.types = nn.Linear(embed_dim, 3 * self.num_kv_heads, bias=False)
        self.hidden: Tensor | None = None
        self.generator: torch.Generator | None = None
        self.full = False
        self.kinds: Tensor | None = None

    def extra_repr(self) -> str:
        return f"window={self.window}, reg={self.reg}, official={self.official}"

    def choose(self, hidden: Tensor, keys: Tensor | None = None, *, first: bool = True, draw: bool = False) -> Tensor:
        """One-hot types ``(batch, num_kv_heads, length, 3)``. first: whether the text begins here. draw: as in
        training. keys ``(batch | 1, num_kv_heads | 1, length)``: tokens that exist; the others are sliding."""
        logits = self.types(hidden.detach()).unflatten(-1, (self.num_kv_heads, 3)).transpose(1, 2)
        if draw:
            types = gumbel_one_hot(logits, self.temperature, generator=self.generator)
        else:
            preference = logits.new_tensor([self.global_bias, 0.0, 0.0])
            types = F.one_hot((logits + preference).detach().argmax(-1), 3).to(logits.dtype)
        real = logits.new_ones(1, 1, logits.shape[2], dtype=torch.bool) if keys is None else keys
        fixed = types.new_zeros(2, 3)
        fixed[0, GLOBAL], fixed[1, SLIDING] = 1, 1
        forced = real & (real.cumsum(-1) == 1) if first else torch.zeros_like(real)
        if draw:
            forced = forced | (real & (real.flip(-1).cumsum(-1).flip(-1) == 1))
        types = torch.where(forced[..., None], fixed[0], types)
        return types if keys is None else torch.where(real[..., None], types, fixed[1])

    def request(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Request:
        if query.shape[2:3] != key.shape[2:3]:
            raise UnsupportedPatternError(
                f"NAtS does not know the types of {key.shape[2] - query.shape[2]} earlier keys. Decode with its own "
                "cache: past_key_values=handle.cache() of enable_nats, or step()."
            )
        return super().request(query, key, *args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        hidden = self._told(query.shape[2])
        if self.full:
            return dense_attention(query, key, value, causal=True, mask=request.mask, scale=request.scale)
        return self.run(query, key, value, hidden, request.keys, request.scale)

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        keys: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Choose types by ``hidden`` and attend; ``keys (batch | 1, heads | 1, length)``: tokens that exist."""
        if keys is not None and keys.shape[1] not in (1, self.num_kv_heads):
            raise UnsupportedMaskError(f"NAtS hides tokens for its {self.num_kv_heads} key heads, not query heads.")
        types = self.choose(hidden, keys, draw=self.training)
        self.kinds = types.detach().argmax(-1)
        return nats_attention(
            query,
            key,
            value,
            types,
            self.window,
            self.reg,
            keys=keys,
            scale=scale,
            official=self.official,
            block_size=self.block_size,
        )

    def _told(self, length: int) -> Tensor:
        if self.hidden is None or self.hidden.shape[1] != length:
            raise ShapeError(
                f"NAtS reads its types off the layer's input: set hidden to (batch, {length}, embed_dim) before the "
                "call, use NAtSAttention, or enable_nats(model), which listens to the model."
            )
        return self.hidden

    def usage(self) -> Tensor:
        """Share of all earlier keys (and its own) that a token read in the last call, over all tokens: ``(batch,
        num_kv_heads)``."""
        if self.kinds is None:
            raise OptionError("There is no last call yet: run the layer first.")
        read, length = kv_usage(F.one_hot(self.kinds, 3), self.window), self.kinds.shape[-1]
        return read.sum(-1) / (length * (length + 1) / 2)

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> NAtSCache:
        self._own_state(cache)
        return NAtSCache(self.window)

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: NAtSCache) -> tuple[Tensor, NAtSCache]:
        types = self.choose(self._told(query.shape[2]), first=not state.seen)
        kept = state.append(key, value, type=types.argmax(-1))
        out = dense_attention(query, kept.key, kept.value, mask=state.shown(query.shape[2], query.shape[1]))
        state.evict()
        return out, state


@register("nats")
class NAtSAttention(Layer):
    """The attention layer: ``(batch, length, embed_dim)`` in and out, causal, rotary positions, no biases.

    window, reg, official, global_bias, temperature: as in :class:`NAtS`.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self",))
    needs_training = True
    true_gradient = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        window: int = 16,
        reg: float = 1e-8,
        official: bool = False,
        global_bias: float = 0.1,
        temperature: float = 1.0,
        rotary: bool = True,
        rotary_base: float = 10000.0,
    ) -> None:
        super().__init__()
        kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.num_heads = num_heads
        self.rotary, self.rotary_base = rotary, rotary_base
        self.mechanism = NAtS(
            embed_dim,
            num_heads,
            kv_heads,
            window=window,
            reg=reg,
            official=official,
            global_bias=global_bias,
            temperature=temperature,
        )
        kv_width = kv_heads * self.head_dim
        self.query = nn.Linear(embed_dim, num_heads * self.head_dim, bias=False)
        self.key = nn.Linear(embed_dim, kv_width, bias=False)
        self.value = nn.Linear(embed_dim, kv_width, bias=False)
        self.out = nn.Linear(num_heads * self.head_dim, embed_dim, bias=False)

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(batch, heads, length, head_dim)`` of tokens at positions from ``start`` on."""
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if self.rotary:
            angles = rotary_angles(
                x.shape[1], self.head_dim, base=self.rotary_base, start=start, device=x.device, dtype=x.dtype
            )
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        return query, key, value

    def forward(self, x: Tensor, *, causal: bool = True, mask: Mask | None = None) -> Tensor:
        """Attend within ``x``."""
        if not causal:
            raise UnsupportedPatternError("NAtS is defined for causal attention alone: its lifetimes run forwards.")
        out = self.mechanism.run(*self.project(x), x, layer_keys(mask, x.shape[1], x.device, "NAtS"))
        return cast(Tensor, self.out(out.transpose(1, 2).flatten(2)))

    def step(self, x: Tensor, cache: NAtSCache | None = None) -> tuple[Tensor, NAtSCache]:
        """The next tokens ``(batch, new, embed_dim)``: their outputs and the new cache (None: before the first)."""
        cache = NAtSCache(self.mechanism.window) if cache is None else cache
        self.mechanism.hidden = x.detach()
        out, cache = self.mechanism.step(*self.project(x, cache.seen), cache)
        return cast(Tensor, self.out(out.transpose(1, 2).flatten(2))), cache
