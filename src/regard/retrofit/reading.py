"""What a model's mask says, read off its values: causal or not, which keys are padding, what is left.

Models hand over a boolean tensor, a float tensor of zeros and very negative numbers, a 2-D padding mask, a
FlexAttention ``BlockMask`` or nothing at all. A mechanism is told as little as that means: no mask where nothing is
hidden, ``causal`` where the triangle is all, :class:`~regard.masks.KeyPadding` where whole keys are hidden, a boolean
tensor otherwise.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import UnsupportedMaskError
from regard.masks import Boolean, Causal, KeyPadding, Mask, from_block_mask

__all__ = ["Reading", "read_mask"]

# A logit lowered by this much has no weight left in any dtype; models write -1e4, -1e9, finfo.min or -inf.
_HIDDEN = -9999.0


@dataclass(frozen=True)
class Reading:
    """A mask understood. ``keys``: how many leading keys there are at all (a static cache has room for later ones)."""

    causal: bool
    mask: Mask | None
    bias: Tensor | None
    keys: int

    @property
    def visible(self) -> Mask | None:
        """Mask and causality as one rule."""
        if not self.causal:
            return self.mask
        return Causal() if self.mask is None else self.mask & Causal()

    def argument(self, q_len: int, dtype: torch.dtype) -> Mask | Tensor | None:
        """The ``mask`` argument of a mechanism: a rule, or the bias with what the rule hides lowered out of sight."""
        if self.bias is None or self.mask is None:
            return self.mask if self.bias is None else self.bias.to(dtype)
        seen = self.mask.dense(q_len, self.keys, self.bias.device)
        return torch.where(seen, self.bias.to(dtype), torch.finfo(dtype).min)


@dataclass(frozen=True)
class _Parsed:
    causal: bool
    keys: int
    padding: Tensor | None = None
    dense: bool = False
    converted: Tensor | None = None
    bias: Tensor | None = None


def read_mask(mask: Any, q_len: int, k_len: int, causal: bool, *, position_bias: Tensor | None = None) -> Reading:
    """Read a mask for ``q_len`` queries and ``k_len`` keys.

    causal: whether the layer is a causal self-attention; with no mask at all it is then causal from the first key on.
    position_bias: added to the logits besides, as in T5; all zeros count as none.
    """
    if position_bias is not None and not bool(position_bias.any()):
        position_bias = None
    if mask is None:
        # A causal layer without a mask and with more keys than queries is the first pass over an empty static cache.
        keys = q_len if causal and 1 < q_len < k_len else k_len
        return Reading(causal, None, _cut(position_bias, keys), keys)
    tensor = _four_axes(mask, q_len, k_len)
    parsed = _cached(tensor, q_len, k_len, causal)
    rule: Mask | None = None
    if parsed.padding is not None:
        rule = KeyPadding(parsed.padding)
    elif parsed.dense:
        visible = parsed.converted if parsed.converted is not None else _compact(tensor)
        rule = Boolean(visible[..., : parsed.keys])
    bias = position_bias if parsed.bias is None else parsed.bias
    if parsed.bias is not None and position_bias is not None:
        bias = parsed.bias + position_bias
    return Reading(parsed.causal, rule, _cut(bias, parsed.keys), parsed.keys)


def _cut(bias: Tensor | None, keys: int) -> Tensor | None:
    return bias if bias is None or bias.shape[-1] <= keys else bias[..., :keys]


def _four_axes(mask: Any, q_len: int, k_len: int) -> Tensor:
    if not isinstance(mask, Tensor):
        if type(mask).__name__ == "BlockMask":
            return from_block_mask(mask).dense(q_len, k_len)
        raise UnsupportedMaskError(f"A mask of type {type(mask).__name__} cannot be read; pass a tensor.")
    if mask.dim() == 2:
        # Two axes are (batch, keys): 1 or True for a token, 0 or False for padding.
        mask = mask.bool()[:, None, None]
    elif mask.dim() == 3:
        mask = mask[:, None]
    fits = mask.dim() == 4 and mask.shape[2] in (1, q_len) and mask.shape[3] >= k_len
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise UnsupportedMaskError(
            f"A mask for {q_len} queries and {k_len} keys is boolean or float (batch, heads, queries, keys); got "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
    return mask if mask.shape[3] == k_len else mask[..., :k_len]


def _compact(mask: Tensor) -> Tensor:
    """The mask without repetition along batch, heads and queries."""
    for axis in (0, 1, 2):
        if mask.stride(axis) == 0 and mask.shape[axis] > 1:
            mask = mask.narrow(axis, 0, 1)
    return mask


_cache: dict[int, tuple[weakref.ref[Tensor], int, dict[tuple[int, int, bool], _Parsed]]] = {}


def _cached(mask: Tensor, q_len: int, k_len: int, causal: bool) -> _Parsed:
    """Parsed once per mask and not once per layer; what is kept dies with the mask."""
    version = 0 if mask.is_inference() else mask._version
    identity = id(mask)
    entry = _cache.get(identity)
    if entry is None or entry[0]() is not mask or entry[1] != version:
        entry = (weakref.ref(mask, lambda _: _cache.pop(identity, None)), version, {})
        _cache[identity] = entry
    key = (q_len, k_len, causal)
    if key not in entry[2]:
        entry[2][key] = _parse(mask, q_len, k_len, causal)
    return entry[2][key]


def _parse(mask: Tensor, q_len: int, k_len: int, causal: bool) -> _Parsed:
    seen, converted, bias = _compact(mask), None, None
    if seen.dtype != torch.bool:
        values, hidden = seen, seen <= _HIDDEN
        seen = converted = ~hidden
        if bool(((values != 0) & seen).any()):
            bias = values.masked_fill(hidden, 0)
    keys = k_len
    if causal and k_len > q_len:
        columns = seen.flatten(0, 2).any(0).nonzero()
        keys = max(int(columns.max()) + 1 if len(columns) else 0, q_len)
        seen = seen[..., :keys]
    some = seen.any(2, keepdim=True)
    triangle = torch.ones(q_len, keys, dtype=torch.bool, device=seen.device).tril(keys - q_len)
    below = not bool((seen & ~triangle).any())
    # A layer that is not causal of itself may be given an autoregressive mask by hand. A padding mask that happens to
    # show no later token either is taken for what it is first.
    is_causal = below if causal else below and q_len == keys > 1 and not bool((seen == some).all())
    rule = some & triangle if is_causal else some
    plain = bool((seen == rule).all())
    if plain and bool(some.all()):
        return _Parsed(is_causal, keys, bias=bias)
    if plain and some.shape[1] == 1:
        return _Parsed(is_causal, keys, padding=some[:, 0, 0].clone(), bias=bias)
    return _Parsed(is_causal, keys, dense=True, converted=converted, bias=bias)
