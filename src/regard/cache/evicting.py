"""A cache that forgets: each head keeps the tokens that it still needs, or that a policy lets it have.

A token that is evicted never comes back. Who knows which tokens are dead (a window that has passed, a learned lifetime)
calls :meth:`EvictingCache.retain`; a :class:`Policy` decides by itself after every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regard.cache.base import Cached, KeyValueCache, nothing_cached
from regard.errors import OptionError, ShapeError

__all__ = ["EvictingCache", "HeavyHitters", "Policy", "Recent"]


class Policy(Protocol):
    """Which tokens stay after a step."""

    needs_weights: bool

    def keep(self, cache: EvictingCache) -> Tensor:
        """Boolean ``(batch | 1, kv_heads | 1, slots)``."""


@dataclass(frozen=True)
class Recent:
    """The first ``sinks`` tokens and the newest ``window`` (Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks", 2023, arXiv 2309.17453). Positions stay those of the text."""

    window: int
    sinks: int = 4
    needs_weights = False

    def __post_init__(self) -> None:
        if self.window < 0 or self.sinks < 0:
            raise OptionError(f"window and sinks count tokens; got {self.window} and {self.sinks}.")

    def keep(self, cache: EvictingCache) -> Tensor:
        place = cache.positions
        return (place < self.sinks) | (place >= cache.seen - self.window)


@dataclass(frozen=True)
class HeavyHitters:
    """The ``budget`` tokens of most attention received so far, the newest ``recent`` and first ``sinks`` among them.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", 2023, arXiv 2306.14048. With grouped
    heads the attention of a group is summed.
    """

    budget: int
    recent: int = 16
    sinks: int = 0
    needs_weights = True

    def __post_init__(self) -> None:
        if min(self.recent, self.sinks) < 0 or self.budget < max(self.recent + self.sinks, 1):
            raise OptionError(
                f"budget must hold the recent and the first tokens: got budget {self.budget}, recent {self.recent}, "
                f"sinks {self.sinks}."
            )

    def keep(self, cache: EvictingCache) -> Tensor:
        place = cache.positions
        always = (place >= cache.seen - self.recent) | ((place < self.sinks) & (place >= 0))
        mass = cache.extra["mass"].masked_fill(always, float("inf")).masked_fill(place < 0, float("-inf"))
        # Among equals the newest: what was just appended has had no time to collect.
        order = mass.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., : self.budget]
        chosen = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.shape[-1] - 1 - order, True)
        return chosen


class EvictingCache(KeyValueCache):
    """Keeps, per row and key/value head, the tokens that were not evicted, in ascending order of position.

    policy: evicts after every step (None: only :meth:`retain` does). Numbers that belong to tokens, ``(batch,
    kv_heads, tokens)``, may be appended by name and travel with them in ``extra``.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        super().__init__()
        self.policy = policy
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._positions: Tensor | None = None
        self.extra: dict[str, Tensor] = {}

    @property
    def positions(self) -> Tensor:
        """``(batch | 1, kv_heads | 1, slots)``, -1 in empty slots."""
        if self._positions is None:
            raise nothing_cached()
        return self._positions

    def counts(self) -> Tensor:
        """How many tokens each row and head keeps ``(batch | 1, kv_heads | 1)``."""
        return torch.zeros(1, 1, dtype=torch.int64) if self._positions is None else (self._positions >= 0).sum(-1)

    def append(self, key: Tensor, value: Tensor, **extra: Tensor) -> Cached:
        """As :meth:`KeyValueCache.append`; the same names of ``extra`` must come every time."""
        names = set(self.extra) - {"mass"}
        if self.seen and set(extra) != names:
            raise ShapeError(f"This cache carries {sorted(names)} with its tokens; got {sorted(extra)}.")
        for name, numbers in extra.items():
            if numbers.shape != key.shape[:3]:
                raise ShapeError(
                    f"{name} must be (batch, kv_heads, tokens) {tuple(key.shape[:3])}; got {tuple(numbers.shape)}."
                )
        kept = super().append(key, value)
        if self.policy is not None and self.policy.needs_weights:
            extra = {**extra, "mass": torch.zeros(key.shape[:3], device=key.device)}
        self.extra = {
            name: numbers if name not in self.extra else torch.cat((self.extra[name], numbers), 2)
            for name, numbers in extra.items()
        }
        return kept

    def observe(self, weights: Tensor) -> None:
        """Tell how the last step's queries attended to the slots, ``(batch, num_heads, q_len, slots)``, and let the
        policy evict."""
        if self._key is None:
            raise nothing_cached()
        heads, slots = self._key.shape[1], self._key.shape[2]
        if weights.shape[1] % heads or weights.shape[3] != slots:
            raise ShapeError(f"weights {tuple(weights.shape)} do not fit {slots} slots of {heads} key heads.")
        mass = weights.detach().unflatten(1, (heads, -1)).sum((2, 3), dtype=torch.float32)
        self.extra["mass"] = self.extra["mass"] + mass
        self.settle()

    def settle(self) -> None:
        """Let the policy evict."""
        if self.policy is not None:
            self.retain(self.policy.keep(self))

    def retain(self, keep: Tensor) -> None:
        """Evict all tokens but these: boolean ``(batch | 1, kv_heads | 1, slots)``."""
        if self._key is None or self._value is None:
            raise nothing_cached()
        keep = keep & (self.positions >= 0)
        if bool(keep.all()):
            return
        most = int(keep.sum(-1).max())
        # Kept tokens to the end, in their order; what is left over stands empty before them.
        order = keep.to(torch.uint8).argsort(dim=-1, stable=True)[..., keep.shape[-1] - most :]
        held = keep.gather(-1, order)
        positions = self.positions.expand(*keep.shape).gather(-1, order)
        self._positions = positions.masked_fill(~held, -1)
        batch, heads = self._key.shape[:2]
        index = order.expand(batch, heads, -1)
        self._key, self._value = (
            t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[3])) for t in (self._key, self._value)
        )
        self.extra = {name: numbers.gather(2, index) for name, numbers in self.extra.items()}

    def read(self) -> Cached:
        if self._key is None or self._value is None:
            raise nothing_cached()
        return Cached(self._key, self._value, self.positions)

    def nbytes(self) -> int:
        kept = [t for t in (self._key, self._value, self._positions) if t is not None]
        return sum(t.nbytes for t in (*kept, *self.extra.values()))

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on. What was evicted in their favour stays evicted."""
        self._check_crop(length)
        if length < self.seen:
            self.retain(self.positions < length)
            self.seen = length

    def select(self, index: Tensor) -> None:
        if self._key is None or self._value is None:
            return
        self._key, self._value = self._key[index], self._value[index]
        if self.positions.shape[0] > 1:
            self._positions = self.positions[index]
        self.extra = {name: numbers[index] for name, numbers in self.extra.items()}

    def _store(self, key: Tensor, value: Tensor) -> None:
        new = torch.arange(self.seen, self.seen + key.shape[2], device=key.device)
        if self._key is None or self._value is None or self._positions is None:
            self._key, self._value, self._positions = key, value, new[None, None]
            return
        self._key, self._value = torch.cat((self._key, key), 2), torch.cat((self._value, value), 2)
        self._positions = torch.cat((self._positions, new.expand(*self._positions.shape[:2], -1)), 2)

    def _like(self) -> tuple[Tensor, Tensor] | None:
        return None if self._key is None or self._value is None else (self._key, self._value)
