"""ProxyAttn: heads agree on which tokens matter and differ in how many they need, so one proxy head scores for many.

Which blocks. The ``H`` query heads form ``groups`` of neighbours; the mean query and the mean key of a group's heads,
after rotary positions, are its proxy head. Its attention is formed token by token, with the causal mask, and a block
scores

    max over its pairs (i, j) of  p_ij = softmax_j(scale qbar_i . kbar_j),

so that no mean over tokens hides a single large pair. Every ``stride``-th query of a block is enough. (Scores here are
``log p``: the same order, and no underflow.)

How many. Each true head looks at all keys with the last block of queries; ``n_h`` is the smallest number of key blocks
that carry ``gamma`` of that attention, ``rho_h = n_h / blocks seen`` its share, and a block of queries that sees ``m``
blocks gets ``ceil(rho_h m)`` of them, never fewer than ``min_tokens`` in all. A head computes its best blocks by the
scores of its group, and the first and the nearest block besides; attention inside is exact. Within a group, the blocks
of a head with a smaller budget are among those of one with a larger.

Wang et al., "ProxyAttn: Guided Sparse Attention via Representative Heads", 2025, arXiv 2509.24745. Query (batch,
num_heads, q_len, head_dim), key and value (batch, num_kv_heads, k_len, ...); a group may span several key heads. Time
to choose: ``groups / (H stride)`` of the dense scores, no product with values; then the share of blocks kept, of dense.
It is for prefill, without training: a single query, as in decoding, attends to all keys. Causal: the scores of a block
of queries know its own later tokens and nothing behind it, but the budgets are read off the end of the sequence, as the
paper has it; values never reach back.

Settings that are public: stride 4, 2048 tokens at least, one group on Llama and four on Qwen, softmax before the
maximum. ``gamma`` and the way a budget of the last row becomes one of earlier rows are not; they are choices here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, expand_groups, masked_softmax, score_scale
from regard.layout import BlockLayout, num_blocks
from regard.masks import Causal
from regard.registry import register
from regard.sparse.frame import BlockSelector
from regard.sparse.scoring import BlockView, grouped_scores
from regard.sparse.selection import top_p_mask

__all__ = [
    "ProxyAttention",
    "head_budgets",
    "proxy_attention",
    "proxy_block_mask",
    "proxy_block_scores",
    "proxy_heads",
]

# Token scores that are formed at once: few enough to stay in a processor's cache.
_AREA = 1 << 19


def proxy_heads(query: Tensor, key: Tensor, groups: int, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean query and mean key of each group of neighbouring query heads, ``(batch, groups, length, head_dim)`` each, in
    the accumulation dtype.

    A key head counts once for each query head that it serves. keys: as in
    :class:`~regard.sparse.scoring.BlockView`; where it differs between heads, only those that may see a key count.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    if groups < 1 or heads % groups:
        raise ShapeError(f"groups={groups} must divide the {heads} query heads; take for example {_divisors(heads)}.")
    work = accumulation_dtype(query.dtype)
    queries = query.to(work).unflatten(1, (groups, -1)).mean(2)
    if keys is None or keys.shape[1] == 1:
        return queries, expand_groups(key.to(work), math.lcm(kv_heads, groups)).unflatten(1, (groups, -1)).mean(2)
    shown = keys[..., None].unflatten(1, (groups, -1))
    each = expand_groups(key.to(work), heads).unflatten(1, (groups, -1))
    return queries, torch.where(shown, each, 0).sum(2) / shown.sum(2).clamp_min(1)


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


@torch.no_grad()
def proxy_block_scores(
    query: Tensor,
    key: Tensor,
    block_size: int = 128,
    groups: int = 1,
    stride: int = 1,
    causal: bool = True,
    *,
    view: BlockView | None = None,
) -> Tensor:
    """Largest log-probability of a proxy head in each block, ``(batch, groups, num_q_blocks, num_k_blocks)``; ``-inf``
    where it sees nothing.

    view: the blocks and the mask of the call (default: by ``causal`` alone).
    """
    view = _view(query, key, block_size, causal) if view is None else view
    queries, keys = proxy_heads(query, key, groups, view.keys)
    keys = keys * view.scale
    layout, device = view.layout, query.device
    q_len, k_len, block = layout.q_len, layout.k_len, view.block_k
    count, total = layout.visit.shape[-2:]
    rows = torch.arange(count, device=device)[:, None] * block + torch.arange(0, block, stride, device=device)
    scores = keys.new_full((keys.shape[0], groups, count, total), float("-inf"))
    masked = ~layout.full.all(1).all(0).cpu()
    step = max(_AREA // (scores.shape[0] * groups * rows.shape[1] * k_len), 1)
    for start in range(0, count, step):
        part = rows[start : start + step]
        at = part.clamp_max(q_len - 1).flatten()
        # Under causality nothing is computed beyond the last block that these rows see.
        last = min((start + step) * block, q_len) + k_len - q_len
        stop = min(max(num_blocks(last, block), 1) * block, k_len) if view.causal else k_len
        logits = grouped_scores(queries[:, :, at], keys[:, :, :stop])
        hidden = masked[start : start + step, : num_blocks(stop, block)].any(0).nonzero()
        if len(hidden):
            # The mask is evaluated from the first block that needs it to the last, in causal attention the diagonal.
            low, high = int(hidden[0]) * block, min(int(hidden[-1] + 1) * block, stop)
            columns = torch.arange(low, high, device=device).view(1, 1, 1, -1)
            seen = layout.mask.at(at.view(1, 1, -1, 1), columns, q_len, k_len)
            if seen.shape[1] > 1:
                seen = seen.unflatten(1, (groups, -1)).any(2)
            logits[..., low:high].masked_fill_(~seen, float("-inf"))
        whole = F.pad(logits, (0, -stop % block), value=float("-inf")) if stop % block else logits
        largest = whole.unflatten(-1, (-1, block)).amax(-1)
        top = largest.amax(-1, keepdim=True)
        top = torch.where(top.isfinite(), top, 0)
        sums = logits.sub_(top).exp_().sum(-1, keepdim=True)
        shares = largest - top - torch.where(sums > 0, sums, 1).log()
        shares = shares.unflatten(2, part.shape).masked_fill(~(part < q_len)[..., None], float("-inf"))
        scores[:, :, start : start + step, : largest.shape[-1]] = shares.amax(3)
    return scores


@torch.no_grad()
def head_budgets(
    query: Tensor,
    key: Tensor,
    block_size: int = 128,
    gamma: float = 0.95,
    min_blocks: int = 1,
    causal: bool = True,
    *,
    view: BlockView | None = None,
) -> Tensor:
    """How many blocks each head computes for each block of queries, ``(batch, num_heads, num_q_blocks)``.

    gamma: share of the attention of the last block of queries that a budget carries; 1 gives all blocks. No row gets
    fewer than ``min_blocks``. view: as in :func:`proxy_block_scores`.
    """
    view = _view(query, key, block_size, causal) if view is None else view
    layout, work = view.layout, accumulation_dtype(query.dtype)
    batch, heads = query.shape[:2]
    q_len, k_len, block = layout.q_len, layout.k_len, view.block_k
    visible = view.seen.sum(-1).expand(batch, heads, -1)
    most = visible[..., -1:]
    if gamma >= 1:
        needed = most
    else:
        columns = torch.arange(k_len, device=query.device).view(1, 1, 1, -1)
        keys, mass = key.to(work) * view.scale, query.new_zeros(batch, heads, layout.visit.shape[-1], dtype=work)
        step = max(_AREA // (batch * heads * k_len), 1)
        for start in range((layout.visit.shape[-2] - 1) * block, q_len, step):
            rows = torch.arange(start, min(start + step, q_len), device=query.device)
            seen = layout.mask.at(rows.view(1, 1, -1, 1), columns, q_len, k_len)
            weights = masked_softmax(grouped_scores(query[:, :, rows].to(work), keys), seen)
            mass += F.pad(weights, (0, -k_len % block)).unflatten(-1, (-1, block)).sum((2, -1))
        shares = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(work).tiny)
        needed = top_p_mask(shares, gamma, minimum=0).sum(-1, keepdim=True)
    # Where the last queries see nothing, nothing is known of what others need: they get all blocks.
    needed, most = torch.where(most > 0, needed, 1), most.clamp_min(1)
    return (needed * visible + most - 1).div(most, rounding_mode="floor").clamp_min(min_blocks)


@torch.no_grad()
def proxy_block_mask(
    scores: Tensor, budgets: Tensor, sinks: int = 1, local: int = 1, *, view: BlockView | None = None
) -> Tensor:
    """The blocks that each head computes, boolean ``(batch, num_heads, num_q_blocks, num_k_blocks)``: the
    ``budgets (batch, num_heads, num_q_blocks)`` best by ``scores (batch, groups, num_q_blocks, num_k_blocks)``, the
    ``sinks`` first and the ``local`` nearest besides. Blocks of score ``-inf`` are never among the best.

    view: where the blocks stand (default: whole blocks of causal self-attention).
    """
    heads = budgets.shape[1]
    if scores.shape[1] < 1 or heads % scores.shape[1] or budgets.shape[2] != scores.shape[2]:
        raise ShapeError(
            "Need scores (batch, groups, num_q_blocks, num_k_blocks) and budgets (batch, num_heads, num_q_blocks) with "
            f"num_heads a multiple of groups; got {tuple(scores.shape)} and {tuple(budgets.shape)}."
        )
    if view is None:
        rows, columns = scores.shape[-2:]
        view = BlockView(BlockLayout.of(Causal(), rows, columns, 1, 1, scores.device), None, True, 1.0)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(dim=-1).masked_fill(scores == float("-inf"), torch.iinfo(torch.int64).max)
    chosen = expand_groups(place, heads) < budgets[..., None]
    if sinks:
        chosen = chosen | view.first(sinks)
    if local:
        chosen = chosen | view.nearest(local)
    return chosen & view.seen


def _view(query: Tensor, key: Tensor, block_size: int, causal: bool) -> BlockView:
    rule = Causal() if causal else None
    layout = BlockLayout.of(rule, query.shape[2], key.shape[2], block_size, block_size, query.device)
    return BlockView(layout, None, causal, score_scale(query, None))


def proxy_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True, scale: float | None = None, **options: object
) -> Tensor:
    """ProxyAttn as a function; options as in :class:`ProxyAttention`."""
    return ProxyAttention(**options)(query, key, value, causal=causal, scale=scale)  # type: ignore[arg-type]


@register("proxyattn")
class ProxyAttention(BlockSelector):
    """block_size: tokens a block, of queries and of keys. groups: proxy heads; a divisor of the query heads. stride:
    a block is scored by every ``stride``-th of its queries. gamma: share of attention that a head's budget carries; 1
    computes all. min_tokens: every block of queries gets at least so many keys, in whole blocks. sinks, local: first
    and nearest blocks that are always kept."""

    def __init__(
        self,
        block_size: int = 128,
        groups: int = 1,
        stride: int = 4,
        gamma: float = 0.95,
        min_tokens: int = 2048,
        *,
        sinks: int = 1,
        local: int = 1,
    ) -> None:
        super().__init__(block_size, block_size)
        if groups < 1 or not 1 <= stride <= block_size:
            raise OptionError(f"Need groups >= 1 and 1 <= stride <= block_size; got {groups}, {stride}, {block_size}.")
        if not 0 < gamma <= 1:
            raise OptionError(f"gamma is a share of attention, above 0 and at most 1; got {gamma}.")
        if min(min_tokens, sinks, local) < 0:
            raise OptionError(f"min_tokens, sinks and local cannot be negative; got {min_tokens}, {sinks}, {local}.")
        self.groups, self.stride, self.gamma, self.min_tokens = groups, stride, gamma, min_tokens
        self.sinks, self.local = sinks, local

    @property
    def min_blocks(self) -> int:
        """The least budget of a row."""
        return max(num_blocks(self.min_tokens, self.block_k), self.sinks + self.local, 1)

    def extra_repr(self) -> str:
        return f"block_size={self.block_q}, groups={self.groups}, stride={self.stride}, gamma={self.gamma}"

    def choose(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        if query.shape[2] == 1 or self.gamma == 1:
            return view.seen
        scores = proxy_block_scores(query, key, groups=self.groups, stride=self.stride, view=view)
        if view.seen.shape[1] > 1:
            scores = expand_groups(scores, query.shape[1]).masked_fill(~view.seen, float("-inf"))
        budgets = head_budgets(query, key, gamma=self.gamma, min_blocks=self.min_blocks, view=view)
        return proxy_block_mask(scores, budgets, self.sinks, self.local, view=view)

    def scoring_flops(self, shape: AttentionShape) -> int:
        rows = num_blocks(shape.q_len, self.block_q) * num_blocks(self.block_q, self.stride)
        last = shape.num_heads * min(self.block_q, shape.q_len)
        return 2 * shape.batch * (self.groups * min(rows, shape.q_len) + last) * shape.k_len * shape.head_dim
