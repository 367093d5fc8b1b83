"""Caches that keep every token side by side: growing as needed, or of a size set beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.cache.base import Cached, KeyValueCache, nothing_cached
from regard.errors import OptionError

__all__ = ["DynamicCache", "StaticCache"]

_LEAST_ROOM = 16


class DynamicCache(KeyValueCache):
    """Keeps every token. Room doubles when it runs out, so that a token costs the same however many came before.

    With gradients on, tensors are joined instead and stay part of the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def read(self) -> Cached:
        if self._key is None or self._value is None:
            raise nothing_cached()
        return Cached(self._key[:, :, : self.seen], self._value[:, :, : self.seen])

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._key, self._value) if t is not None)

    def crop(self, length: int) -> None:
        self._check_crop(length)
        self.seen = length

    def select(self, index: Tensor) -> None:
        if self._key is not None and self._value is not None:
            self._key, self._value = self._key[index], self._value[index]

    def _store(self, key: Tensor, value: Tensor) -> None:
        self._key = self._extended(self._key, key)
        self._value = self._extended(self._value, value)

    def _extended(self, kept: Tensor | None, new: Tensor) -> Tensor:
        stop = self.seen + new.shape[2]
        if torch.is_grad_enabled() and (new.requires_grad or (kept is not None and kept.requires_grad)):
            return new if kept is None else torch.cat((kept[:, :, : self.seen], new), 2)
        if kept is None or kept.shape[2] < stop or kept.requires_grad or kept.is_inference() != new.is_inference():
            room = self._room(stop, 0 if kept is None else kept.shape[2])
            larger = new.new_empty(*new.shape[:2], room, new.shape[3])
            if kept is not None:
                larger[:, :, : self.seen] = kept[:, :, : self.seen].detach()
            kept = larger
        kept[:, :, self.seen : stop] = new.detach()
        return kept

    def _room(self, needed: int, present: int) -> int:
        return max(needed, 2 * present, _LEAST_ROOM)

    def _like(self) -> tuple[Tensor, Tensor] | None:
        return None if self._key is None or self._value is None else (self._key, self._value)


class StaticCache(DynamicCache):
    """Keeps every token in room for ``max_length``, taken at the first token: addresses never change."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        if max_length < 1:
            raise OptionError(f"max_length counts tokens, so it is at least 1; got {max_length}.")
        self.max_length = max_length

    def _check(self, key: Tensor, value: Tensor) -> None:
        super()._check(key, value)
        if self.seen + key.shape[2] > self.max_length:
            raise OptionError(
                f"This cache has room for {self.max_length} tokens; it holds {self.seen}, and {key.shape[2]} more "
                "came. Make it longer, or use a DynamicCache."
            )

    def _room(self, needed: int, present: int) -> int:
        return self.max_length
