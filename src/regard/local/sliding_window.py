"""Sliding-window attention with attention sinks.

Each query sees the keys nearer than ``window`` and, whatever their distance, the first ``sinks`` keys, which trained
models use as a resting place of attention: Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
2023, arXiv 2309.17453, section 3.2. Positions are those of the tokens themselves (StreamingLLM re-counts them inside
its cache, which matters only beyond the trained length). Time ``O(N (window + sinks) d)``.
"""

from __future__ import annotations

from torch import Tensor

from regard.cache import EvictingCache, KeyValueCache, Recent
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError
from regard.layout import BlockLayout, kept_layout
from regard.masks import Mask, Sinks, SlidingWindow
from regard.mechanism import Request, SparseMechanism
from regard.registry import register

__all__ = ["SlidingWindowAttention"]


@register("sliding_window")
class SlidingWindowAttention(SparseMechanism):
    """window: keys at a distance below this are seen (the query's own key counts). sinks: first keys seen by all.
    block_size: of the executor's layout; it changes speed, not the result."""

    decodes = True
    growth = "N w"

    def __init__(self, window: int = 256, sinks: int = 4, block_size: int = 64) -> None:
        super().__init__()
        if window < 1 or sinks < 0 or block_size < 1:
            raise OptionError(f"Need window >= 1, sinks >= 0, block_size >= 1; got {window}, {sinks}, {block_size}.")
        self.window, self.sinks, self.block_size = window, sinks, block_size

    def extra_repr(self) -> str:
        return f"window={self.window}, sinks={self.sinks}"

    @property
    def rule(self) -> Mask:
        """The pattern without causality."""
        near = SlidingWindow(self.window)
        return near | Sinks(self.sinks) if self.sinks else near

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        rule = self.rule if request.visible is None else self.rule & request.visible
        make = kept_layout if request.mask is None else BlockLayout.of
        return make(rule, query.shape[2], key.shape[2], self.block_size, self.block_size, query.device)

    def cost(self, shape: AttentionShape) -> Cost:
        seen = min((self.window if shape.causal else 2 * self.window - 1) + self.sinks, shape.k_len)
        return dense_cost(shape, seen / shape.k_len, cached=self.window + self.sinks)

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> KeyValueCache:
        """By default a cache of what a later token can still see: sinks, and the window less the token to come."""
        if cache is None:
            return EvictingCache(Recent(self.window - 1, self.sinks))
        state: KeyValueCache = super().init_state(batch, like=like, cache=cache)
        return state

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        # Sinks come first and the window follows without a gap: the rule reads right off what is kept.
        kept = state.append(key, value)
        out = self(query, kept.key, kept.value, causal=True)
        if isinstance(state, EvictingCache):
            state.settle()
        return out, state
