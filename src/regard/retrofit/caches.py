"""A cache for ``generate`` in which each retrofitted layer keeps its mechanism's own decoding state.

transformers' caches keep every key and value and hand all of them to attention at each step. Here a layer hands over
the new ones alone, and its mechanism goes on from its state: a cache of regard of any kind, or what else it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from regard.cache import KeyValueCache, StaticCache
from regard.errors import RetrofitError
from regard.retrofit.switch import Decoding, Replacement, Switch, name_of, switches

if TYPE_CHECKING:
    from regard.retrofit.handle import Handle

__all__ = ["decoding_cache"]


class _StateLayer(CacheLayerMixin):
    """One layer's state in the dress of transformers."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, handle: Handle, switch: Switch, decoding: Decoding) -> None:
        super().__init__()
        self._handle, self._switch, self._decoding = handle, switch, decoding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are; the layer's switch is told whose state they go on from."""
        if not self._handle.active or switches.get(id(self._switch.site.module)) is not self._switch:
            raise RetrofitError(
                "This cache belongs to a retrofit that was restored, and its states mean nothing to the model's own "
                "attention. Generate within the retrofit, or start with a new cache."
            )
        self.is_initialized = True
        self._switch.pending = self._decoding
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._decoding.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self._decoding.seen

    def get_max_length(self) -> int:
        state = self._decoding.state
        return state.max_length if isinstance(state, StaticCache) else -1

    def reset(self) -> None:
        self._decoding.seen, self._decoding.state, self.is_initialized = 0, None, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self._decoding.seen -= abs(tokens_to_remove)
            self._kept("cannot forget single tokens again").crop(self._decoding.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._decoding.state is not None:
            state = self._kept("cannot be divided by rows of the batch")
            rows = state.read().key.shape[0]
            state.select(torch.arange(rows, device=state.read().key.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._decoding.state is not None:
            state = self._kept("cannot be divided by rows of the batch")
            state.select(indices.to(state.read().key.device))

    def _kept(self, problem: str) -> KeyValueCache:
        state = self._decoding.state
        if not isinstance(state, KeyValueCache):
            raise RetrofitError(
                f"{self._switch.site.path}: the state of {name_of(self._decoding.owner)} {problem}, as beam search and "
                "assisted generation ask for. Sample or decode greedily, or generate without this cache."
            )
        return state


def decoding_cache(
    handle: Handle, answering: list[tuple[Switch, Replacement]], storage: Callable[[], KeyValueCache] | None
) -> Cache:
    """A transformers cache for the model of ``handle``; see :meth:`regard.retrofit.Handle.cache`."""
    modules = [switch.site.module for switch, _ in answering]
    config = getattr(modules[0], "config", None)
    places = [getattr(module, "layer_idx", None) for module in modules]
    if config is None or None in places or getattr(config, "is_encoder_decoder", False):
        raise RetrofitError(
            "A cache of states belongs to a decoder of transformers whose attention layers know their number "
            "(layer_idx) and stand in one stack; in this model they do not."
        )
    cache = DynamicCache(config=config)
    for (switch, replacement), place in zip(answering, cast(list[int], places), strict=True):
        owner = replacement.decode or replacement.mechanism
        if not owner.decodes:
            raise RetrofitError(
                f"{switch.site.path}: {name_of(owner)} has no decoding state. Generate without this cache (it is then "
                "given all keys at each step), or name another mechanism for that: retrofit(..., decode='full')."
            )
        # Refused now rather than in the middle of a generation.
        owner.init_state(1, like=torch.empty(0), cache=None if storage is None else storage())
        while len(cache.layers) <= place:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layers[place] = _StateLayer(handle, switch, Decoding(replacement, storage))
    return cache
