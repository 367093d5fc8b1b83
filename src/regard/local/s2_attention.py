"""S2-Attention: every head sees its own shard of the context, the nearest blocks and some stripes, so that the heads
together see all of it.

The sequence is cut into blocks of ``b`` tokens. Under key/value head ``h`` query block ``i`` sees key block ``j <= i``
if

    i - j < local_blocks                              (the neighbourhood, its own block included)
    or  (j + h step + offset) mod stride = 0          (vertical stripes, at absolute places)

with ``step = max(1, stride // num_heads)`` counted in query heads; query heads of one key/value head share its pattern,
and the last ``dense_heads`` key/value heads see everything. One softmax over the union, causal inside the diagonal
block. The union over heads is the whole past if stripes of all residues occur: with step 1, if there are at least
``stride`` sparse key/value heads (:func:`coverage`). Without causality stripes stand at relative places: ``(|i - j| + h
step + offset) mod stride = 0`` beyond the neighbourhood.

Absolute stripes make decoding cheap: a block that leaves a head's neighbourhood outside of its stripes is never seen
by that head again (:func:`is_kv_efficient`), so :class:`S2KVCache` drops it; at most ``local_blocks + ceil(t /
stride)`` of ``t`` blocks stay. Relative stripes lack this. Partial results over parts of the keys merge by their
log-sum-exp (:meth:`S2Attention.with_lse`, :func:`regard.kernels.merge_attentions`).

Source: Lin et al., "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads" (S2-
Attention), 2024, arXiv 2407.17678. Phi-3-small has blocks of 64, 16 local blocks, stride 8, and full attention in every
second layer (:func:`hybrid_schedule`). Query ``(batch, num_heads, N, head_dim)``, key and value ``(batch, num_kv_heads,
N, head_dim)``. Time ``O((N^2 / (2 stride) + N local_blocks b) d)`` a head.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.cache import EvictingCache, KeyValueCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention, dense_attention, expand_groups
from regard.layout import BlockLayout, block_members, num_blocks
from regard.masks import Boolean, Causal, Mask, Predicate
from regard.mechanism import Pattern, Request, SparseMechanism
from regard.registry import register

__all__ = [
    "BlockSparseAttention",
    "S2Attention",
    "S2KVCache",
    "coverage",
    "flops",
    "hybrid_schedule",
    "is_kv_efficient",
    "kv_cache_blocks",
    "local_stride_pattern",
    "merge_q",
]

# Layouts kept by an instance: training and evaluation see few sizes, generation does not need them.
_KEPT = 8


@dataclass(frozen=True)
class _Stripes:
    """The rule of the module's formula, on block numbers."""

    kv_heads: int
    local_blocks: int
    stride: int
    dense_heads: int
    step: int
    offset: int
    homogeneous: bool

    @classmethod
    def of(
        cls,
        heads: int,
        local_blocks: int,
        stride: int,
        kv_heads: int | None,
        dense_heads: int,
        head_step: int | None,
        head_offset: int,
        homogeneous: bool,
    ) -> _Stripes:
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise OptionError(f"Key/value heads must divide the heads; got {kv_heads} and {heads}.")
        if local_blocks < 1 or stride < 1 or not 0 <= dense_heads <= kv_heads:
            raise OptionError(
                "Need local_blocks >= 1, stride >= 1 and 0 <= dense_heads <= number of key/value heads "
                f"({kv_heads}); got {local_blocks}, {stride}, {dense_heads}."
            )
        step = max(1, stride // heads) if head_step is None else head_step
        return cls(kv_heads, local_blocks, stride, dense_heads, step, head_offset, homogeneous)

    def at(self, q_block: Tensor, k_block: Tensor, causal: bool) -> Tensor:
        """Boolean ``(kv_heads | 1, len(q_block), len(k_block))``."""
        distance = q_block[:, None] - k_block
        head = torch.arange(self.kv_heads, device=distance.device)[:, None, None]
        shift = self.offset + (head[:1] if self.homogeneous else head) * self.step
        place = k_block if causal else distance.abs()
        seen = (distance.abs() < self.local_blocks) | ((place + shift) % self.stride == 0)
        if self.dense_heads:
            seen = seen | (head >= self.kv_heads - self.dense_heads)
        return seen & (distance >= 0) if causal else seen


def local_stride_pattern(
    heads: int,
    blocks: int,
    local_blocks: int,
    stride: int,
    kv_heads: int | None = None,
    dense_heads: int = 0,
    head_step: int | None = None,
    head_offset: int = 0,
    homogeneous: bool = False,
    causal: bool = True,
) -> Tensor:
    """The pattern of ``blocks`` blocks, boolean ``(heads, blocks, blocks)``: which key blocks each query block sees.

    dense_heads counts key/value heads. homogeneous: all heads have the first one's stripes. Without ``causal`` stripes
    are relative.
    """
    rule = _Stripes.of(heads, local_blocks, stride, kv_heads, dense_heads, head_step, head_offset, homogeneous)
    index = torch.arange(blocks)
    return expand_groups(rule.at(index, index, causal)[None], heads)[0]


def _past(pattern: Tensor) -> Tensor:
    if pattern.dim() != 3 or pattern.dtype != torch.bool:
        raise ShapeError(
            f"A pattern is boolean (heads, query blocks, key blocks); got {pattern.dtype} of {tuple(pattern.shape)}."
        )
    return pattern.tril()


def coverage(pattern: Tensor) -> float:
    """Share of the causal blocks that at least one head sees."""
    seen = _past(pattern).any(0)
    return float(seen.sum()) / float(torch.ones_like(seen).tril().sum())


def is_kv_efficient(pattern: Tensor) -> bool:
    """Whether a key block that some query block did not see is never seen by a later one (what lies behind the
    diagonal counts), so that a cache may drop it."""
    past = _past(pattern)
    return not bool((past[:, 1:] & ~past[:, :-1]).tril().any())


def kv_cache_blocks(pattern: Tensor, t: int) -> Tensor:
    """Key blocks of each head ``(heads,)`` that are still needed when ``t`` blocks have been read: those that the
    ``t``-th query block, or one after it, sees."""
    if not 1 <= t <= pattern.shape[1]:
        raise OptionError(f"t lies between 1 and the pattern's {pattern.shape[1]} blocks, got {t}.")
    return _past(pattern)[:, t - 1 :, :t].any(1).sum(-1)


def flops(pattern: Tensor, block_size: int = 64, head_dim: int = 64) -> int:
    """Floating-point operations of scores and read-out over the blocks of ``pattern``, whole blocks, all heads."""
    return 4 * int(pattern.sum()) * block_size**2 * head_dim


def merge_q(pattern: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """``m`` neighbouring query blocks as one, ``(heads, ceil(query blocks / m), key blocks)``: key blocks that any of
    them sees, and those that all of them see. Between the two lies what needs a mask."""
    if m < 1:
        raise OptionError(f"m must be at least 1, got {m}.")
    members = pattern[:, block_members(pattern.shape[1], m, pattern.device)]
    return members.any(2), members.all(2)


def hybrid_schedule(layers: int, dense_every: int = 2) -> list[str]:
    """A mechanism's name for each of ``layers`` layers: every ``dense_every``-th is full attention."""
    if layers < 1 or dense_every < 1:
        raise OptionError(f"Need layers >= 1 and dense_every >= 1, got {layers} and {dense_every}.")
    return ["s2_attention" if (layer + 1) % dense_every else "full" for layer in range(layers)]


class _BlockPattern(SparseMechanism):
    """What S2 and patterns of a user's own share: :meth:`seen` says who sees whom, block by block."""

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("self", "causal-self", "causal-cross"))
    decodes = True

    def __init__(self, block_size: int, merge: int) -> None:
        super().__init__()
        if block_size < 1 or merge < 1:
            raise OptionError(f"Need block_size >= 1 and merge >= 1, got {block_size} and {merge}.")
        self.block_size, self.merge = block_size, merge
        self._layouts: dict[tuple[Any, ...], BlockLayout] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}}

    @abstractmethod
    def seen(self, q_block: Tensor, k_block: Tensor, causal: bool) -> Tensor:
        """Which of these key blocks each of these query blocks sees, boolean ``(heads, ..., ...)`` with 1 head, or
        any number that divides the query heads."""

    def _layout(
        self, num_heads: int | None, q_len: int, k_len: int, rule: Mask | None, causal: bool, device: torch.device
    ) -> BlockLayout:
        """The layout for so many query heads (None: with the heads of the pattern)."""
        block, offset = self.block_size, k_len - q_len
        # Query blocks small enough to lie in one block of the pattern each, wherever the queries begin.
        block_q = math.gcd(block, offset)
        first = torch.arange(num_blocks(q_len, block_q), device=device) * block_q + offset
        at = first.div(block, rounding_mode="floor").clamp_min(0)
        seen = self.seen(at, torch.arange(num_blocks(k_len, block), device=device), causal)
        if num_heads is not None and len(seen) > 1:
            if num_heads % len(seen):
                raise ShapeError(f"A pattern of {len(seen)} heads does not divide {num_heads} query heads.")
            seen = expand_groups(seen[None], num_heads)[0]
        if self.merge == 1 or offset:
            return BlockLayout.of(rule, q_len, k_len, block_q, block, device).only(seen)
        visited, shared = merge_q(seen, self.merge)
        block_q = self.merge * block
        layout = BlockLayout.of(rule, q_len, k_len, block_q, block, device).only(visited)
        inside = Predicate(lambda b, h, q, k: seen[h, q // block, k // block], 1, len(seen))
        inside_rule = inside if rule is None else rule & inside
        return BlockLayout(layout.visit, layout.full & shared, inside_rule, q_len, k_len, block_q, block)

    @torch.compiler.disable
    def layout(self, num_heads: int, q_len: int, k_len: int, causal: bool, device: torch.device) -> BlockLayout:
        """The blocks that are computed when there is no mask; kept, because they depend on sizes alone."""
        key = (num_heads, q_len, k_len, causal, device, self.merge)
        if key not in self._layouts:
            if len(self._layouts) >= _KEPT:
                self._layouts.clear()
            with torch.inference_mode(False):
                rule = Causal() if causal else None
                self._layouts[key] = self._layout(num_heads, q_len, k_len, rule, causal, device)
        return self._layouts[key]

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        sizes = query.shape[1], query.shape[2], key.shape[2]
        if request.mask is None:
            return self.layout(*sizes, request.causal, query.device)
        return self._layout(*sizes, request.visible, request.causal, query.device)

    def with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As a call, and the log-sum-exp of each row ``(batch, num_heads, q_len)``: results over parts of the keys
        (a mask hides the others) merge by it."""
        request = self.request(query, key, value, causal, mask, None, scale)
        layout = self.select(query, key, request)
        out, lse = block_sparse_attention(query, key, value, layout, scale=request.scale, return_lse=True)
        return out, lse

    def cost(self, shape: AttentionShape) -> Cost:
        rule = Causal() if shape.causal else None
        layout = self._layout(None, shape.q_len, shape.k_len, rule, shape.causal, torch.device("cpu"))
        return dense_cost(shape, layout.density())


class BlockSparseAttention(_BlockPattern):
    """Softmax attention over any fixed pattern of blocks.

    pattern: boolean ``(heads, blocks, blocks)``, where ``heads`` is 1 or divides the number of query heads (so one row
    a key/value head will do) and ``blocks`` is as many as the longest sequence needs; or a function of the number of
    blocks that gives one. With ``causal`` what it says of later blocks does not count. merge: query blocks computed
    together; it changes speed, not the result. Decoding keeps all keys.
    """

    def __init__(self, block_size: int, pattern: Tensor | Callable[[int], Tensor], merge: int = 1) -> None:
        super().__init__(block_size, merge)
        if isinstance(pattern, Tensor):
            if pattern.dim() != 3 or pattern.dtype != torch.bool or pattern.shape[1] != pattern.shape[2]:
                raise OptionError(
                    f"A pattern is boolean (heads, blocks, blocks); got {pattern.dtype} of {tuple(pattern.shape)}."
                )
            self.register_buffer("pattern", pattern, persistent=False)
        else:
            self.pattern = pattern

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}"

    def seen(self, q_block: Tensor, k_block: Tensor, causal: bool) -> Tensor:
        blocks = int(max(q_block.max(), k_block.max())) + 1
        pattern = self.pattern if isinstance(self.pattern, Tensor) else self.pattern(blocks)
        if min(pattern.shape[1:]) < blocks:
            raise ShapeError(
                f"The pattern has {min(pattern.shape[1:])} blocks of {self.block_size} tokens, but {blocks} are needed."
            )
        return pattern.to(q_block.device)[:, q_block][..., k_block]


class S2KVCache(EvictingCache):
    """Keys and values of the live blocks of each head; heads keep different tokens."""

    def blocks(self, block_size: int) -> Tensor:
        """Blocks of ``block_size`` that each head keeps tokens of, ``(kv_heads | 1,)``."""
        rows = (self.positions[0] // block_size).tolist() if self.seen else [[]]
        return torch.tensor([len({block for block in row if block >= 0}) for row in rows])


@register("s2_attention")
class S2Attention(_BlockPattern):
    """block_size: tokens a block. local_blocks: nearest blocks that every head sees, its own included. stride: one
    block in so many is a stripe.

    dense_heads: so many last key/value heads see everything. head_step, head_offset: how far stripes move from one
    key/value head to the next, by default ``max(1, stride // num_heads)``, and where the first head's begin.
    homogeneous: all heads have the same stripes. merge: query blocks computed together; it changes speed alone.
    """

    needs_training = True
    growth = "N^2 / s + N w"

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        block_size: int = 64,
        local_blocks: int = 16,
        stride: int = 8,
        dense_heads: int = 0,
        head_step: int | None = None,
        head_offset: int = 0,
        homogeneous: bool = False,
        merge: int = 1,
    ) -> None:
        super().__init__(block_size, merge)
        self.num_heads = num_heads
        self.rule = _Stripes.of(
            num_heads, local_blocks, stride, num_kv_heads, dense_heads, head_step, head_offset, homogeneous
        )

    def extra_repr(self) -> str:
        return (
            f"block_size={self.block_size}, local_blocks={self.rule.local_blocks}, stride={self.rule.stride}, "
            f"kv_heads={self.rule.kv_heads}, step={self.rule.step}"
        )

    def seen(self, q_block: Tensor, k_block: Tensor, causal: bool) -> Tensor:
        return self.rule.at(q_block, k_block, causal)

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        if query.shape[1] != self.num_heads:
            raise ShapeError(f"These stripes were laid out for {self.num_heads} heads, got {query.shape[1]}.")
        return super().select(query, key, request)

    def cost(self, shape: AttentionShape) -> Cost:
        cost, block = super().cost(shape), self.block_size
        blocks = num_blocks(shape.k_len, block)
        alive = self.seen(torch.tensor([blocks - 1]), torch.arange(blocks), True)
        kept = min(round(float(alive.sum(-1).double().mean()) * block), shape.k_len)
        return Cost(cost.flops, cost.bytes, dense_cost(shape, cached=kept).state_bytes, cost.pairs)

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> S2KVCache:
        self._own_state(cache)
        return S2KVCache()

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: S2KVCache) -> tuple[Tensor, S2KVCache]:
        if key.shape[1] != self.rule.kv_heads:
            raise ShapeError(f"These stripes were laid out for {self.rule.kv_heads} key heads, got {key.shape[1]}.")
        block, before = self.block_size, state.seen
        kept = state.append(key, value)
        if before == 0:
            out = self(query, key, value, causal=True)
        else:
            self.request(query, kept.key, kept.value, causal=True)
            place = torch.arange(before, state.seen, device=key.device)
            every = torch.arange(num_blocks(state.seen, block), device=key.device)
            slots = state.positions[0].expand(self._lanes, -1)
            rows = self.seen(place // block, every, True)
            visible = rows.gather(2, (slots.clamp_min(0) // block)[:, None].expand(-1, len(place), -1))
            visible = visible & (slots >= 0)[:, None] & (slots[:, None] <= place[:, None])
            mask = Boolean(visible[None] if self._lanes == 1 else expand_groups(visible[None], query.shape[1]))
            out = dense_attention(query, kept.key, kept.value, mask=mask)
        now = state.seen // block
        if now > before // block:
            # What the next token's block does not see, no later one will.
            alive = self.seen(torch.tensor([now], device=key.device), torch.arange(now + 1, device=key.device), True)
            slots = state.positions[0].expand(self._lanes, -1)
            state.retain(alive[:, 0].gather(1, slots.clamp_min(0) // block)[None])
        return out, state

    @property
    def _lanes(self) -> int:
        """Key heads that keep different tokens."""
        return 1 if self.rule.homogeneous and not self.rule.dense_heads else self.rule.kv_heads
