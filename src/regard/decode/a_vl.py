"""A-VL: a cache for vision-language models that keeps image and text tokens by different rules.

Zhang et al., "A-VL: Adaptive Attention for Large Vision-Language Models", 2024 (AAAI 2025), arXiv 2409.14846. Image
tokens go on receiving attention throughout an answer, but few of them, and slowly others; text tokens lose it quickly.
So, per layer and key/value head:

- image: after the prompt its tokens are ranked by the attention of the last prompt queries. The minor ones are evicted
  for good; the ``secondary`` share is stored; of these only the ``core`` share is computed at a step. Every ``refresh``
  steps the scores of all stored image tokens are computed again, and the best become the core;
- text: the newest tokens and a few older ones of most accumulated attention stay.

Selection runs beside the model and its result is used from the next step on (``delayed``). The output is attention over
core, kept text and the new token, softmax over these alone. Cost of a step: ``core + text`` keys, all stored ones at a
refresh; memory ``secondary + text``. The shares, the rule of refreshing and the text budgets are this library's
defaults where the sources leave them open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from regard.cache import Cached, EvictingCache
from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention, dense_weights
from regard.kernels.shapes import take_tokens
from regard.sparse.metrics import topk_recall

__all__ = ["AVLCache", "AVLPolicy", "ppci", "vision_importance"]

Budget = int | float | None
"""Tokens (an int), a share of the text seen so far (a float up to 1), or None for all."""

# Queries whose attention is formed at once.
_ROWS = 256


def ppci(scores_a: Tensor, scores_b: Tensor, p: float) -> Tensor:
    """The p-percentile concordance index: the share of ``a``'s top ``p`` tokens that is among ``b``'s, ``(...)``.

    scores ``(..., tokens)``; ``p`` is a share, so 0.1 looks at the top ten percent (at least one token).
    """
    if scores_a.shape != scores_b.shape or not scores_a.shape[-1]:
        raise ShapeError(f"Scores of the same tokens are needed; got {tuple(scores_a.shape)}, {tuple(scores_b.shape)}.")
    if not 0 < p <= 1:
        raise OptionError(f"p is a share between 0 and 1 (0.1: the top ten percent); got {p}.")
    top = max(_share(p, scores_a.shape[-1]), 1)
    return topk_recall(scores_a.topk(top, -1).indices, scores_b, top)


def vision_importance(
    query: Tensor, key: Tensor, vision_range: tuple[int, int], last: int = 16, scale: float | None = None
) -> Tensor:
    """How much the last prompt queries attend to each image token: ``(batch, kv_heads, image tokens)``.

    query ``(batch, num_heads, q_len, head_dim)`` and key ``(batch, kv_heads, k_len, head_dim)`` of the prompt, the last
    query on the last key; attention is causal, averaged over the ``last`` queries and over the heads of a group.
    """
    first, stop = vision_range
    if not 0 <= first < stop <= key.shape[2] or last < 1:
        raise OptionError(
            f"vision_range {vision_range} must lie within {key.shape[2]} keys and last be at least 1 (got {last})."
        )
    weights = dense_weights(query[:, :, -last:], key, causal=True, scale=scale)
    return _per_kv_head(weights, key.shape[1]).mean(2)[..., first:stop]


def _per_kv_head(weights: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads of a group: ``(batch, kv_heads, q_len, k_len)``."""
    return weights.unflatten(1, (kv_heads, -1)).mean(2)


def _share(share: float, total: int) -> int:
    """A share of ``total`` in tokens, rounded up; a rounding error of the product is no token."""
    return min(math.ceil(share * total - 1e-9), total)


def _count(budget: Budget, total: int) -> int:
    if budget is None or isinstance(budget, int):
        return total if budget is None else min(budget, total)
    return _share(budget, total)


@dataclass(frozen=True)
class AVLPolicy:
    """Budgets and rhythm of A-VL, and which stored tokens stay after a step.

    vision_range: first image token of the prompt and the one past the last. secondary, core: shares of the image's
    tokens that are stored and that are computed. text_recent, text_heavy: the newest text tokens and the older ones of
    most attention, as an int (tokens), a float (share of the text so far) or None (all). refresh: steps between two
    choices of the core. last: prompt queries that rank the image. delayed: a choice counts from the next step on, as
    in the paper; False lets a step use the core that its own queries chose.
    """

    vision_range: tuple[int, int]
    secondary: float = 0.5
    core: float = 0.15
    text_recent: Budget = 0.5
    text_heavy: Budget = 0.1
    refresh: int = 8
    last: int = 16
    delayed: bool = True
    needs_weights = True

    def __post_init__(self) -> None:
        first, stop = self.vision_range
        if not 0 <= first < stop:
            raise OptionError(f"vision_range is (first, past the last) of the image tokens; got {self.vision_range}.")
        if not 0 < self.core <= self.secondary <= 1:
            raise OptionError(
                f"core and secondary are shares with 0 < core <= secondary <= 1; got {self.core} and {self.secondary}."
            )
        for name in ("text_recent", "text_heavy"):
            budget = getattr(self, name)
            if budget is not None and (budget < 0 or (isinstance(budget, float) and budget > 1)):
                raise OptionError(
                    f"{name} is a number of tokens (int), a share up to 1.0 (float) or None; got {budget}."
                )
        if self.refresh < 1 or self.last < 1:
            raise OptionError(f"refresh and last are at least 1; got {self.refresh} and {self.last}.")

    @property
    def image_tokens(self) -> int:
        """Image tokens of the prompt."""
        return self.vision_range[1] - self.vision_range[0]

    @property
    def stored_image_tokens(self) -> int:
        """Image tokens that are stored after the prompt."""
        return _share(self.secondary, self.image_tokens)

    @property
    def computed_image_tokens(self) -> int:
        """Image tokens that a step computes."""
        return _share(self.core, self.image_tokens)

    def text_budget(self, seen: int) -> int:
        """Text tokens that are stored once ``seen`` of them have come."""
        return min(_count(self.text_recent, seen) + _count(self.text_heavy, seen), seen)

    def caches(self, num_layers: int) -> list[AVLCache]:
        """One cache a layer."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return [AVLCache(**settings) for _ in range(num_layers)]

    def is_vision(self, positions: Tensor) -> Tensor:
        """Which of these places in the sequence hold image tokens."""
        return (positions >= self.vision_range[0]) & (positions < self.vision_range[1])

    def keep(self, cache: EvictingCache) -> Tensor:
        """The stored share of the image, the newest text, and older text of most attention."""
        mass = cache.extra["mass"]
        place = cache.positions.expand_as(mass)
        vision = self.is_vision(place)
        seen = cache.seen - min(max(cache.seen - self.vision_range[0], 0), self.image_tokens)
        order = _text_order(place, self.vision_range)
        recent = ~vision & (order >= seen - _count(self.text_recent, seen))
        older = ~vision & ~recent & (place >= 0)
        heavy = _best(mass, older, self.text_budget(seen) - _count(self.text_recent, seen))
        image = _best(cache.extra["importance"], vision, self.stored_image_tokens)
        return recent | heavy | image


def _text_order(place: Tensor, vision_range: tuple[int, int]) -> Tensor:
    """The number of each token among those of the text."""
    first, stop = vision_range
    return torch.where(place >= stop, place - (stop - first), place)


def _best(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` best ``among`` the last axis as booleans, all where they are fewer; of equals the newest."""
    ranked = scores.masked_fill(~among, float("-inf")).flip(-1)
    order = ranked.argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = torch.zeros_like(among).scatter_(-1, scores.shape[-1] - 1 - order, True)
    return chosen & among


class AVLCache(EvictingCache):
    """Keys and values of one layer, image and text by the rules of an :class:`AVLPolicy` (its arguments are these).

    :meth:`prefill` takes the prompt in, :meth:`append` and :meth:`attend` take one step; :meth:`step` does either. With
    each token travel ``importance`` (image: attention at the last choice), ``mass`` (text: attention so far) and
    ``core`` (1 for image tokens that are computed). Heads keep different tokens, always equally many. A mechanism that
    ``takes_evicted`` may step over this cache too; it then computes all that is stored.
    """

    policy: AVLPolicy

    def __init__(
        self,
        vision_range: tuple[int, int],
        secondary: float = 0.5,
        core: float = 0.15,
        text_recent: Budget = 0.5,
        text_heavy: Budget = 0.1,
        refresh: int = 8,
        last: int = 16,
        delayed: bool = True,
    ) -> None:
        policy = AVLPolicy(vision_range, secondary, core, text_recent, text_heavy, refresh, last, delayed)
        super().__init__(policy)
        self.policy = policy
        self.steps = 0
        """Steps attended since the prompt."""
        self.computed_keys = 0
        """Keys whose scores were computed in these steps, for one head."""
        self.full_keys = 0
        """Keys that a full cache would have computed in them."""

    @property
    def stored(self) -> tuple[int, int]:
        """Image and text tokens that each head stores."""
        vision = int(self.policy.is_vision(self.positions[0, 0]).sum())
        return vision, int(self.counts()[0, 0]) - vision

    @property
    def core(self) -> Tensor:
        """Which stored tokens are core image tokens, boolean ``(batch, kv_heads, slots)``."""
        return self.extra["core"] > 0

    def append(self, key: Tensor, value: Tensor, **extra: Tensor) -> Cached:
        nothing = torch.zeros(key.shape[:3], device=key.device)
        return super().append(key, value, importance=nothing, core=nothing, **extra)

    def prefill(
        self,
        key: Tensor,
        value: Tensor,
        *,
        query: Tensor | None = None,
        weights: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Take the prompt in and evict what it need not keep.

        query ``(batch, num_heads, prompt, head_dim)``, or weights ``(batch, num_heads, rows, prompt)``: the attention
        of the last rows of the prompt, where the caller has it.
        """
        if self.seen or (query is None) == (weights is None):
            raise OptionError(
                "prefill comes first, and takes the prompt's query or its attention weights, one of both."
            )
        if key.shape[2] < self.policy.vision_range[1]:
            raise ShapeError(
                f"A prompt of {key.shape[2]} tokens does not hold the image at {self.policy.vision_range}; prefill "
                "takes image and text at once."
            )
        self.append(key, value)
        if weights is not None:
            self.observe(weights)
            return
        assert query is not None
        rows = query.shape[2]
        for start in range(0, rows, _ROWS):
            stop = min(start + _ROWS, rows)
            earlier = key.shape[2] - rows + stop
            part = dense_weights(query[:, :, start:stop], key[:, :, :earlier], causal=True, scale=scale)
            self._collect(part)
        weights = dense_weights(query[:, :, -self.policy.last :], key, causal=True, scale=scale)
        self._rank(weights)
        self.settle()

    def attend(self, query: Tensor, scale: float | None = None) -> Tensor:
        """Attention of the newest tokens' queries ``(batch, num_heads, new, head_dim)``, then eviction and, when it is
        time, a new core."""
        policy, kept = self.policy, self.read()
        new, heads = query.shape[2], query.shape[1]
        self.steps += 1
        due = self.steps % policy.refresh == 0
        visible = kept.visible(self.seen, new, heads)
        everything = dense_weights(query, kept.key, mask=visible, scale=scale) if due else None
        if everything is not None and not policy.delayed:
            self._rank(everything)
        computed = (self.core | ~policy.is_vision(self.positions)) & (self.positions >= 0)
        index = _slots(computed)
        key, value = take_tokens(kept.key, index), take_tokens(kept.value, index)
        # -1, which is seen by nobody, where a head computes fewer than another.
        places = self.positions.where(computed, -1).gather(-1, index)
        shown = Cached(key, value, places).visible(self.seen, new, heads)
        weights = dense_weights(query, key, mask=shown, scale=scale)
        out = (weights.unflatten(1, (key.shape[1], -1)).flatten(2, 3) @ value).unflatten(2, (-1, new)).flatten(1, 2)
        self.full_keys += self.seen
        self.computed_keys += computed.shape[-1] if due else index.shape[-1]
        wide = torch.zeros(*weights.shape[:3], computed.shape[-1], dtype=weights.dtype, device=weights.device)
        spread = index.repeat_interleave(heads // key.shape[1], 1)[:, :, None].expand_as(weights)
        self._collect(wide.scatter_(-1, spread, weights))
        if everything is not None and policy.delayed:
            self._rank(everything)
        self.settle()
        return out

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """The prompt at first (full causal attention), then the next tokens; returns the attention's output."""
        if not self.seen:
            self.prefill(key, value, query=query, scale=scale)
            return dense_attention(query, key, value, causal=True, scale=scale)
        self.append(key, value)
        return self.attend(query, scale)

    def observe(self, weights: Tensor) -> None:
        """Tell how the last queries attended to all that is stored, ``(batch, num_heads, q_len, slots)``."""
        if weights.shape[-1] != self.read().key.shape[2]:
            raise ShapeError(f"weights {tuple(weights.shape)} do not fit {self.read().key.shape[2]} stored tokens.")
        self._collect(weights)
        self._rank(weights)
        self.settle()

    def _collect(self, weights: Tensor) -> None:
        """Add to the attention that tokens received, by queries that may have seen the first slots alone."""
        mass = _per_kv_head(weights.detach(), self.read().key.shape[1]).sum(2, dtype=torch.float32)
        self.extra["mass"][..., : mass.shape[-1]] += mass

    def _rank(self, weights: Tensor) -> None:
        """Take the attention of the last queries to image tokens as their importance, and the best as core."""
        policy, kv_heads = self.policy, self.read().key.shape[1]
        latest = _per_kv_head(weights.detach()[:, :, -policy.last :], kv_heads).mean(2, dtype=torch.float32)
        vision = policy.is_vision(self.positions).expand_as(latest)
        self.extra["importance"] = latest.where(vision, 0.0)
        self.extra["core"] = _best(latest, vision, policy.computed_image_tokens).float()


def _slots(computed: Tensor) -> Tensor:
    """Indices of the computed slots in their order, ``(batch, kv_heads, most of a head)``."""
    most = int(computed.sum(-1).max())
    return computed.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
