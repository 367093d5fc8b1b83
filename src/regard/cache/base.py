"""The cache of one attention layer: its interface."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.masks import Boolean

__all__ = ["Cached", "KeyValueCache"]


@dataclass(frozen=True)
class Cached:
    """What queries read: ``key`` and ``value`` ``(batch, kv_heads, slots, dim)``, the newest tokens last.

    positions: ``(batch | 1, kv_heads | 1, slots)``, the place of each token in the sequence, ascending, -1 in slots
    that a head leaves empty (before all others); None where slot ``j`` holds token ``j`` in every head.
    """

    key: Tensor
    value: Tensor
    positions: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether every slot holds a token."""
        return self.positions is None or bool((self.positions >= 0).all())

    def visible(self, seen: int, q_len: int, num_heads: int) -> Boolean:
        """Which slots the last ``q_len`` of ``seen`` tokens may read: all that hold their own or an earlier token."""
        slots = self.key.shape[2]
        place = torch.arange(seen - q_len, seen, device=self.key.device)
        positions = self.positions
        if positions is None:
            positions = torch.arange(slots, device=self.key.device)[None, None]
        shown = (positions[:, :, None] <= place[:, None]) & (positions >= 0)[:, :, None]
        if shown.shape[1] > 1:
            shown = shown.repeat_interleave(num_heads // shown.shape[1], 1)
        return Boolean(shown)


class KeyValueCache(ABC):
    """Keys and values of one layer's past. Appending changes the cache in place; :meth:`copy` makes a branch."""

    def __init__(self) -> None:
        self.seen = 0
        """Tokens ever appended, which is the position of the next one."""

    def append(self, key: Tensor, value: Tensor) -> Cached:
        """Take in new tokens ``(batch, kv_heads, new, dim)``; returns all that is kept, they among it.

        Raises ShapeError where they do not fit what is cached, OptionError where there is no room.
        """
        self._check(key, value)
        self._store(key, value)
        self.seen += key.shape[2]
        return self.read()

    @abstractmethod
    def read(self) -> Cached:
        """All that is kept. Raises ShapeError before the first token."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of storage held for keys, values and what belongs to them."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget the tokens from position ``length`` on, as a rejected draft asks for."""

    @abstractmethod
    def select(self, index: Tensor) -> None:
        """Keep these rows of the batch, in this order; rows may repeat (beam search)."""

    @abstractmethod
    def _store(self, key: Tensor, value: Tensor) -> None:
        """Take in tokens that were checked; ``seen`` still counts those before them."""

    @abstractmethod
    def _like(self) -> tuple[Tensor, Tensor] | None:
        """Tensors whose batch, heads, last axis, dtype and device new keys and values must have, None at first."""

    def copy(self) -> Self:
        """An independent cache of the same content."""
        return copy.deepcopy(self)

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ShapeError(
                "A cache takes key and value (batch, kv_heads, tokens, dim) of the same tokens; got "
                f"{tuple(key.shape)} and {tuple(value.shape)}."
            )
        kept = self._like()
        if kept is None:
            return
        for name, new, old in (("key", key, kept[0]), ("value", value, kept[1])):
            same = new.shape[:2] == old.shape[:2] and new.shape[3] == old.shape[3]
            if not same or new.dtype != old.dtype or new.device != old.device:
                raise ShapeError(
                    f"The cache holds {name}s of batch {old.shape[0]}, {old.shape[1]} heads, dim {old.shape[3]} "
                    f"({old.dtype}, {old.device}); the new ones are {tuple(new.shape)} ({new.dtype}, {new.device}). "
                    "A cache belongs to one layer and one batch: start a new one for another."
                )

    def _check_crop(self, length: int) -> None:
        if not 0 <= length <= self.seen:
            raise OptionError(f"Cannot crop to {length} tokens: the cache has seen {self.seen}.")


def nothing_cached() -> ShapeError:
    """The error of reading an empty cache."""
    return ShapeError("The cache is empty: append the first tokens before reading it.")
