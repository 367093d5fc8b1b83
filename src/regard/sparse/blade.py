"""BLADE's adaptive block-sparse attention: which blocks of a video matter is told by a few sampled tokens, and a pooled
picture of everything stands behind what is left out.

1. Tokens of the video are put in the order of a generalised Hilbert curve (:func:`regard.layers.curves.gilbert3d`), so
   that blocks of 128 consecutive ones are compact in space and time. Text tokens go last; their blocks are always
   computed, as queries and as keys.
2. Of each block the same 32 positions are drawn. Importance of a pair of blocks: the largest of ``exp(s - row
   maximum)`` over the sampled queries of one and the sampled keys of the other, ``s`` the scaled logits and the maximum
   over all sampled keys; divided by the sum over the row of blocks.
3. Each row of blocks keeps the fewest largest ones that carry the share ``energy`` of it, but no fewer than
   ``min_ratio`` and no more than ``max_ratio`` of the row's blocks. The choice is not differentiated.
4. ``out1, lse1``: attention to the kept blocks. On request (ASA_G, ``global_gap=g``) ``out2, lse2``: attention to the
   means of keys and of values over runs of ``g`` tokens, and

       out = a out1 + (1 - a) out2,      a = sigmoid( lse1 - (lse2 + log g) ):

   one softmax over kept tokens and means, each mean counting as the tokens that it stands for. Kept tokens count twice,
   once exactly and once pooled; where keys are constant in every run that cancels, and all is exact.

The paper trains models with it in the loop of step distillation: :mod:`regard.train.blade`.

"Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation", 2025, arXiv 2508.10774,
and its released code. Query (batch, num_heads, length, head_dim), key and value (batch, num_kv_heads, length, ...);
bidirectional self-attention, keys alone may be masked (padding). Time: the share of blocks kept, of dense, a sixteenth
for importance, and ``1 / g``. No parameters. The release draws other positions for each head and call; here they are
drawn from ``seed``, so that a call repeats. It also stops one block short of the share of step 3, rounds both bounds
down, and fills a short last run up with copies of its last token; here such a run counts as the tokens that it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention, score_scale
from regard.layers.curves import gilbert3d
from regard.layers.tiles import TileOrder
from regard.layout import BlockLayout, num_blocks
from regard.mechanism import Request
from regard.registry import register
from regard.sparse.compensation import pooled_background
from regard.sparse.frame import BlockSelector
from regard.sparse.scoring import BlockView, sampled_scores
from regard.sparse.selection import reordered_request, top_k_mask

__all__ = [
    "BLADE_PRESETS",
    "AdaptiveBlockSparseAttention",
    "adaptive_block_sparse",
    "energy_mask",
    "sampled_block_importance",
]

BLADE_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cogvideox": {"max_ratio": 0.10, "global_gap": 15, "text": 226, "text_first": True},
    "wan": {"max_ratio": 0.17, "global_gap": 30},
}
"""Options of :class:`AdaptiveBlockSparseAttention` as the paper sets them for its two models."""


@torch.no_grad()
def sampled_block_importance(
    query: Tensor,
    key: Tensor,
    block: int = 128,
    keep: int = 32,
    *,
    seed: int = 0,
    view: BlockView | None = None,
) -> Tensor:
    """Importance of each pair of blocks, ``(batch, num_heads, num_q_blocks, num_k_blocks)``, rows summing to 1.

    keep: positions drawn of ``block``, the same in all blocks. view: the mask of a call (default: none); 0 where
    nothing is seen.
    """
    if not 1 <= keep <= block:
        raise OptionError(f"keep counts the sampled tokens of a block, between 1 and {block}; got {keep}.")
    if view is None:
        layout = BlockLayout.of(None, query.shape[2], key.shape[2], block, block, query.device)
        view = BlockView(layout, None, False, score_scale(query, None))
    largest = sampled_scores(query, key, view, keep / block, seed, minus="max").exp()
    total = largest.sum(-1, keepdim=True)
    return largest / torch.where(total > 0, total, 1)


@torch.no_grad()
def energy_mask(
    importance: Tensor,
    energy: float = 0.95,
    min_ratio: float = 0.05,
    max_ratio: float = 0.10,
    dense_tail: int = 0,
    *,
    seen: Tensor | None = None,
) -> Tensor:
    """The blocks to compute, boolean of the shape of ``importance (..., num_q_blocks, num_k_blocks)``.

    Each row keeps the fewest largest entries that sum to ``energy`` of it; of its ``n`` blocks at least ``min_ratio n``
    and at most ``max_ratio n`` (which wins where no whole number lies between), and one in any case. dense_tail: so
    many last rows and columns are kept whole. seen: blocks that exist, boolean, broadcastable to ``importance``.
    """
    _check_shares(energy, min_ratio, max_ratio)
    shown = torch.ones_like(importance, dtype=torch.bool) if seen is None else seen.expand_as(importance)
    scores = importance.masked_fill(~shown, float("-inf"))
    count = shown.sum(-1, keepdim=True)
    running = scores.sort(dim=-1, descending=True).values.clamp_min(0).cumsum(-1)
    # What is too small to move the sum belongs to all of it nevertheless.
    needed = count if energy == 1 else (running < energy * running[..., -1:]).sum(-1, keepdim=True) + 1
    least = (min_ratio * count - 1e-9).ceil().clamp_min(1).long()
    most = (max_ratio * count + 1e-9).floor().clamp_min(1).long()
    kept = top_k_mask(scores, torch.minimum(torch.maximum(needed, least), most))
    if dense_tail:
        kept[..., -dense_tail:] = True
        kept[..., -dense_tail:, :] = True
    return kept & shown


def _check_shares(energy: float, min_ratio: float, max_ratio: float) -> None:
    if not (0 < energy <= 1 and 0 <= min_ratio <= max_ratio <= 1):
        raise OptionError(
            "Need 0 < energy <= 1 and 0 <= min_ratio <= max_ratio <= 1; "
            f"got energy={energy}, min_ratio={min_ratio}, max_ratio={max_ratio}."
        )


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _order(
    grid: tuple[int, ...] | None, length: int, text: int, text_first: bool, block: int, device: torch.device
) -> TileOrder:
    """The video's tokens along the curve (without a grid: as they are), then the text's."""
    tokens = torch.arange(length)
    beside, video = (tokens[:text], tokens[text:]) if text_first else (tokens[length - text :], tokens[: length - text])
    if grid is not None:
        height, frames = (*reversed(grid[:-1]), 1, 1)[:2]
        video = video[gilbert3d(grid[-1], height, frames)[0]]
    order = torch.cat((video, beside)).to(device)
    whole = torch.ones_like(order, dtype=torch.bool)
    return TileOrder(order, whole, order.argsort(), block, bool((order.cpu() == tokens).all()))


@register("blade")
class AdaptiveBlockSparseAttention(BlockSelector):
    """block_size: tokens a block, of queries and of keys. keep: tokens sampled of each. energy, min_ratio, max_ratio:
    as in :func:`energy_mask`. global_gap: tokens that the pooled branch averages over, None for no such branch. text:
    so many tokens are text, at the end of the sequence or (text_first) at its start; their blocks are always computed.

    ``grid`` is the space ``(frames, height, width)``, ``(height, width)`` or ``(length,)`` of the other tokens, given
    to be put in the order of the curve; without it they stay as they come. ``select`` gives the layout in that order.
    """

    patterns = frozenset(("self",))
    mask_support = "keys"
    grid_axes = frozenset((1, 2, 3))

    def __init__(
        self,
        block_size: int = 128,
        keep: int = 32,
        energy: float = 0.95,
        min_ratio: float = 0.05,
        max_ratio: float = 0.10,
        global_gap: int | None = None,
        text: int = 0,
        text_first: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(block_size, block_size)
        _check_shares(energy, min_ratio, max_ratio)
        if not 1 <= keep <= block_size:
            raise OptionError(f"keep counts the sampled tokens of a block, between 1 and {block_size}; got {keep}.")
        if text < 0 or (global_gap is not None and global_gap < 1):
            raise OptionError(f"text counts tokens and global_gap is None or at least 1; got {text} and {global_gap}.")
        self.keep, self.energy, self.min_ratio, self.max_ratio = keep, energy, min_ratio, max_ratio
        self.global_gap, self.text, self.text_first, self.seed = global_gap, text, text_first, seed
        self.off_grid = text

    def extra_repr(self) -> str:
        shares = f"energy={self.energy}, min_ratio={self.min_ratio}, max_ratio={self.max_ratio}"
        return f"block_size={self.block_q}, keep={self.keep}, {shares}, global_gap={self.global_gap}, text={self.text}"

    def _text_blocks(self, length: int) -> int:
        """Blocks that hold any of the last tokens, those of the text."""
        return num_blocks(length, self.block_q) - max(length - self.text, 0) // self.block_q if self.text else 0

    def _ordered(self, query: Tensor, key: Tensor, request: Request) -> tuple[TileOrder, Tensor, Tensor, Request]:
        length = query.shape[2]
        if request.grid is not None and len(request.grid) > 3:
            raise ShapeError(f"The curve runs through grids of one to three axes, got {request.grid}.")
        place = _order(request.grid, length, min(self.text, length), self.text_first, self.block_q, query.device)
        if not place.identity:
            request = dataclasses.replace(reordered_request(request, place.order), grid=None)
        return place, place.apply(query), place.apply(key), request

    def choose(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        importance = sampled_block_importance(query, key, self.block_q, self.keep, seed=self.seed, view=view)
        tail = self._text_blocks(query.shape[2])
        return energy_mask(importance, self.energy, self.min_ratio, self.max_ratio, tail, seen=view.seen)

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        _, query, key, request = self._ordered(query, key, request)
        return super().select(query, key, request)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        place, query, key, request = self._ordered(query, key, request)
        value, view = place.apply(value), self.view(query, key, request)
        layout = self.chosen(query, key, view)
        if self.global_gap is None:
            return place.undo(block_sparse_attention(query, key, value, layout, scale=view.scale))
        out = pooled_background(query, key, value, layout, self.global_gap, keys=view.keys, scale=view.scale)
        return place.undo(out)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        """The blocks kept and, with the pooled branch, a pair for each query and mean."""
        pooled = 0.0 if self.global_gap is None else num_blocks(key.shape[2], self.global_gap) / key.shape[2]
        return self.select(query, key, request).density() + pooled

    def most_blocks(self, num_k_blocks: int) -> float:
        return max(int(self.max_ratio * num_k_blocks + 1e-9), 1)

    def scoring_flops(self, shape: AttentionShape) -> int:
        sampled = num_blocks(shape.q_len, self.block_q) * self.keep
        return 2 * shape.batch * shape.num_heads * sampled**2 * shape.head_dim

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound where only the input tells the share of blocks; text rows and columns, and the means,
        included."""
        blocks, tail = num_blocks(shape.q_len, self.block_q), self._text_blocks(shape.q_len)
        kept = (blocks - tail) * min(self.most_blocks(blocks) + tail, blocks) + tail * blocks
        means = 0 if self.global_gap is None else num_blocks(shape.k_len, self.global_gap)
        density = kept / blocks**2 + means / shape.k_len
        return dense_cost(shape, density, self.scoring_flops(shape))


def adaptive_block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    global_gap: int | None = None,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """:class:`AdaptiveBlockSparseAttention` as a function, without (ASA) or with (ASA_G) the pooled branch."""
    module = AdaptiveBlockSparseAttention(global_gap=global_gap, **options)
    return module(query, key, value, grid=grid, scale=scale)
