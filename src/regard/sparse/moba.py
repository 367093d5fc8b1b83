"""MoBA: mixture of block attention.

Keys are cut into blocks of ``c`` tokens, summarised by their mean (after rotary positions). Query ``t`` has a gate
per block,

    g_tb = q_t . mean_{j in b} k_j    (-inf for blocks after t, +inf for the block that holds t)

and attends, in one softmax, to the tokens of the ``top_k`` blocks of largest gate: its own block, causally, and
``top_k - 1`` complete past ones (all of them where there are fewer). No parameters; the gate is not differentiated: a
model learns keys whose block means tell by (continued) training with it. It is not meant as a patch for a trained
model.

Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, arXiv 2502.13189, section 2.2, equations 2
to 8. Query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads, k_len, ...); gates are per query
head. Time ``O(N (N / c) d + N top_k c d)``. The paper trains with blocks of 512, top 3 at 8k tokens, and with 4096,
top 12 on long context; it ends training with full attention for the last tenth of the tokens and keeps the last
layers full when tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from regard.cache import KeyValueCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError
from regard.kernels import accumulation_dtype, block_sparse_attention, dense_attention
from regard.layout import BlockLayout, num_blocks
from regard.masks import Boolean
from regard.mechanism import Pattern, Request, SparseMechanism
from regard.registry import register
from regard.sparse.scoring import block_has, block_index, grouped_scores, per_kv_head, pool_blocks
from regard.sparse.selection import settle_mask, top_k_mask

__all__ = ["MoBAAttention", "MoBAState", "hybrid_schedule", "moba_attention", "moba_gate", "moba_select"]

Mode = Literal["moba", "full"]
Executor = Literal["merged", "masked", "rows"]


def moba_gate(
    query: Tensor, key: Tensor, block_size: int, keys: Tensor | None = None, means: Tensor | None = None
) -> Tensor:
    """Gates ``(batch, num_heads, q_len, num_blocks)``, unscaled, in float32 or better, block-causal.

    ``keys``: keys that count, as in :func:`~regard.sparse.scoring.pool_blocks`; a past block without any is closed.
    ``means``: block means already known (of the first blocks; those that are missing must not be past any query).
    """
    q_len, k_len = query.shape[2], key.shape[2]
    with torch.no_grad():
        if means is None:
            means = pool_blocks(per_kv_head(key, keys), block_size, keys)
        known = grouped_scores(query.to(means.dtype), means)
        gate = known.new_full((*known.shape[:3], num_blocks(k_len, block_size)), float("-inf"))
        gate[..., : known.shape[-1]] = known
        own = block_index(q_len, k_len, block_size, query.device)[:, None]
        block = torch.arange(gate.shape[-1], device=query.device)
        gate.masked_fill_(block > own, float("-inf"))
        if keys is not None:
            gate.masked_fill_(~block_has(keys, block_size)[:, :, None], float("-inf"))
        return gate.masked_fill_(block == own, float("inf"))


def moba_select(gate: Tensor, top_k: int) -> Tensor:
    """Blocks that each query attends to: True for its ``top_k`` largest gates, its own block among them."""
    return top_k_mask(gate, top_k)


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int = 512,
    top_k: int = 3,
    executor: Executor = "merged",
    scale: float | None = None,
) -> Tensor:
    """MoBA as a function; see :class:`MoBAAttention`."""
    return MoBAAttention(block_size, top_k, executor=executor)(query, key, value, causal=True, scale=scale)


def hybrid_schedule(step: int, total: int, switch: float = 0.9) -> Mode:
    """The mode for a training step of the paper's hybrid recipe: MoBA for the first ``switch`` of all steps, then
    full."""
    return "moba" if step < switch * total else "full"


@dataclass
class MoBAState:
    """The key-value cache, and the means of its complete blocks ``(batch, kv_heads, blocks, head_dim)``."""

    cache: KeyValueCache
    means: Tensor | None = None


@register("moba")
class MoBAAttention(SparseMechanism):
    """block_size: tokens a block. top_k: blocks a query attends to, its own included.

    executor: ``"merged"`` gathers the queries of each key block and merges by log-sum-exp; ``"masked"`` is dense
    attention under the same mask; ``"rows"`` gathers keys query by query. They differ in speed alone. mode:
    ``"moba"`` or ``"full"`` attention; assign to it at any time, no weight changes. full_layers: this many last
    layers of the model are always full.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self", "causal-cross"))
    needs_training = True
    decodes = True
    growth = "N (N / c + k c)"

    def __init__(
        self,
        block_size: int = 512,
        top_k: int = 3,
        *,
        executor: Executor = "merged",
        mode: Mode = "moba",
        full_layers: int = 0,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        if block_size < 1 or top_k < 1 or full_layers < 0:
            raise OptionError(
                f"Need block_size >= 1, top_k >= 1, full_layers >= 0; got {block_size}, {top_k}, {full_layers}."
            )
        if executor not in ("merged", "masked", "rows"):
            raise OptionError(f"executor is 'merged', 'masked' or 'rows', not {executor!r}.")
        self.block_size, self.top_k, self.executor = block_size, top_k, executor
        self.always_full = layer_index >= num_layers - full_layers
        self.mode = mode

    @property
    def mode(self) -> Mode:
        """What runs: ``"moba"`` or ``"full"``."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in ("moba", "full"):
            raise OptionError(f"mode is 'moba' or 'full', not {mode!r}.")
        self._mode: Mode = "full" if self.always_full else mode

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, top_k={self.top_k}, mode={self.mode!r}"

    def select(self, query: Tensor, key: Tensor, request: Request, means: Tensor | None = None) -> BlockLayout:
        """The layout: rows of single queries, columns of key blocks."""
        q_len, k_len = query.shape[2], key.shape[2]
        visible, keys = settle_mask(request, q_len, k_len)
        layout = BlockLayout.of(visible, q_len, k_len, 1, self.block_size, query.device)
        if self.mode == "full":
            return layout
        return layout.only(moba_select(moba_gate(query, key, self.block_size, keys, means), self.top_k))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return self._run(query, key, value, request, None)

    def _run(self, query: Tensor, key: Tensor, value: Tensor, request: Request, means: Tensor | None) -> Tensor:
        if self.mode == "full":
            return dense_attention(query, key, value, causal=True, mask=request.mask, scale=request.scale)
        layout = self.select(query, key, request, means)
        if self.executor == "masked":
            return dense_attention(query, key, value, mask=Boolean(layout.dense()), scale=request.scale)
        backend = "gather" if self.executor == "rows" else None
        return block_sparse_attention(query, key, value, layout, scale=request.scale, backend=backend)

    def cost(self, shape: AttentionShape) -> Cost:
        if self.mode == "full":
            return dense_cost(shape)
        own = block_index(shape.q_len, shape.k_len, self.block_size)
        blocks = (own + 1).clamp(0, self.top_k)
        seen = min(float(blocks.double().mean()) * self.block_size / shape.k_len, 1.0)
        count = num_blocks(shape.k_len, self.block_size)
        gate = 2 * shape.batch * shape.num_heads * shape.q_len * count * shape.head_dim
        return dense_cost(shape, seen, gate)

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> MoBAState:
        return MoBAState(super().init_state(batch, like=like, cache=cache))

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, MoBAState]:
        kept, means = state.cache.append(key, value), state.means
        known = 0 if means is None else means.shape[2]
        start, stop = known * self.block_size, state.cache.seen // self.block_size * self.block_size
        if stop > start:
            fresh = pool_blocks(kept.key[:, :, start:stop], self.block_size)
            means = fresh if means is None else torch.cat((means, fresh), 2)
        elif means is None:
            means = key.new_empty(*key.shape[:2], 0, key.shape[3], dtype=accumulation_dtype(key.dtype))
        request = self.request(query, kept.key, kept.value, causal=True)
        return self._run(query, kept.key, kept.value, request, means), MoBAState(state.cache, means)
