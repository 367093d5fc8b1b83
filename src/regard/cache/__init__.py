"""What decoding keeps of the past: one interface, five ways to store.

A mechanism's state is a :class:`KeyValueCache` unless it needs another; who decodes chooses the storage::

    state = mechanism.init_state(1, like=query, cache=QuantizedCache(bits=4))
    out, state = mechanism.step(query, key, value, state)
"""

from regard.cache.base import Cached, KeyValueCache
from regard.cache.evicting import EvictingCache, HeavyHitters, Policy, Recent
from regard.cache.growing import DynamicCache, StaticCache
from regard.cache.paged import PagedCache, PagePool
from regard.cache.quantized import QuantizedCache

__all__ = [
    "Cached",
    "DynamicCache",
    "EvictingCache",
    "HeavyHitters",
    "KeyValueCache",
    "PagePool",
    "PagedCache",
    "Policy",
    "QuantizedCache",
    "Recent",
    "StaticCache",
]
