"""Block-sparse global attention for multi-view transformers: of all frames' patches, those blocks that match; camera
and register tokens see, and are seen by, everything.

In VGGT and pi^3 layers alternate between attention within a frame and global attention over all ``F`` frames, whose
cost grows with ``F^2`` and whose weight lies on the few patches that show the same place. Global attention of a trained
model becomes sparse without training. Each frame has ``S`` special tokens (camera, registers), then its patches:

1. special queries attend densely to all keys;
2. patch tokens of all frames, in their order, are cut in blocks of ``block_q`` queries and ``block_k`` keys, averaged
   (``pool="max"``: largest number per channel; a short last block over the tokens that it has), and
   ``probs = softmax(scale qbar kbar^T)`` over the blocks of patch keys;
3. of ``n`` such blocks a row keeps the ``max(n_p, n_r)`` of largest ``probs``: ``n_p`` of them sum to at most ``top_p``
   (the one that would exceed it is left out), ``n_r = floor(n (1 - sparse_ratio))``; one at least;
4. patch queries attend, in one softmax, to the patches of these blocks and to all special keys, which act as sinks.

"Faster VGGT with Block-Sparse Global Attention", 2025, arXiv 2509.07120. Query (batch, num_heads, F (S + P), head_dim)
and key (batch, num_kv_heads, F (S + P), head_dim) are those after the model's normalisation and rotary positions. Not
causal. Time: the share of blocks kept, of dense, and ``O((F P)^2 / (block_q block_k) d)`` to choose. Special keys stand
in blocks of their own here; in the released code the block in which patches end and special keys begin is one of those
always on. The release's kernel further rounds queries and keys to int8 (:mod:`regard.sparse.spargeattn` has it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, block_sparse_attention, score_scale
from regard.layers.tiles import TileOrder
from regard.layout import BlockLayout, num_blocks
from regard.masks import Everything, Reindexed
from regard.mechanism import Request, SparseMechanism
from regard.registry import register
from regard.sparse.scoring import block_has, grouped_scores, per_kv_head, pool_blocks, split_blocks
from regard.sparse.selection import Selection, TopK, TopP, settle_mask

__all__ = [
    "Planned",
    "SparseVGGTAttention",
    "block_sparse_global_attention",
    "match_concentration",
    "merge_special",
    "pooled_block_probs",
    "select_blocks",
    "split_special",
]

Pool = Literal["mean", "max"]


def split_special(x: Tensor, frames: int, per_frame: int, special: int = 5) -> tuple[Tensor, Tensor]:
    """``(..., frames * per_frame, dim)`` -> patches ``(..., frames * (per_frame - special), dim)`` and special tokens
    ``(..., frames * special, dim)``, both frame by frame; a frame begins with its special tokens."""
    if x.shape[-2] != frames * per_frame or not 0 <= special <= per_frame:
        raise ShapeError(
            f"{frames} frames of {per_frame} tokens, the first {special} of each special, need (..., "
            f"{frames * per_frame}, dim) and at least that many tokens a frame; got {tuple(x.shape)}."
        )
    beside, patches = x.unflatten(-2, (frames, per_frame)).split((special, per_frame - special), -2)
    return patches.flatten(-3, -2), beside.flatten(-3, -2)


def merge_special(patches: Tensor, beside: Tensor, frames: int) -> Tensor:
    """The inverse of :func:`split_special`."""
    if patches.shape[-2] % frames or beside.shape[-2] % frames:
        raise ShapeError(
            f"{patches.shape[-2]} patches and {beside.shape[-2]} special tokens do not make {frames} frames."
        )
    parts = (x.unflatten(-2, (frames, x.shape[-2] // frames)) for x in (beside, patches))
    return torch.cat(tuple(parts), -2).flatten(-3, -2)


def _logits(query: Tensor, key: Tensor, block_q: int, block_k: int, pool: Pool, keys: Tensor | None) -> Tensor:
    """Products of pooled blocks, not scaled; ``keys``: those that count."""
    key = per_kv_head(key, keys)
    if pool == "mean":
        return grouped_scores(pool_blocks(query, block_q), pool_blocks(key, block_k, keys))
    return grouped_scores(_largest(query, block_q, None), _largest(key, block_k, keys))


def _largest(x: Tensor, block: int, keys: Tensor | None) -> Tensor:
    """Largest number of each channel in each block; zeros where no token counts."""
    counts = x.new_ones(1, 1, x.shape[2], dtype=torch.bool) if keys is None else keys
    shown = split_blocks(counts[..., None], block)
    blocks = split_blocks(x.to(accumulation_dtype(x.dtype)), block).masked_fill(~shown, float("-inf"))
    return blocks.amax(-2).masked_fill(~shown.any(-2), 0)


def pooled_block_probs(
    query: Tensor,
    key: Tensor,
    block_q: int = 128,
    block_k: int = 64,
    mode: Pool = "mean",
    *,
    scale: float | None = None,
) -> Tensor:
    """Softmax over pooled key blocks, ``(batch, num_heads, num_q_blocks, num_k_blocks)``, of patches alone."""
    _check_pool(mode)
    return (_logits(query, key, block_q, block_k, mode, None) * score_scale(query, scale)).softmax(-1)


def select_blocks(
    probs: Tensor, sparse_ratio: float | None = None, top_p: float | None = None, top_k: int | None = None
) -> Tensor:
    """Blocks to keep, boolean of the shape of ``probs (..., num_k_blocks)``, whose zeros are out of sight.

    Each condition that is given asks for a number of largest blocks, at least one: ``floor(n (1 - sparse_ratio))``, as
    many as sum to at most ``top_p``, or ``top_k``. Of several the largest number is kept, so that all are met.
    """
    return _selection(probs.shape[-1], sparse_ratio, top_p, top_k)(probs.log())


def _selection(count: int, sparse_ratio: float | None, top_p: float | None, top_k: int | None) -> Selection:
    """The rule for rows of ``count`` blocks."""
    rules: list[Selection] = []
    if sparse_ratio is None and top_p is None and top_k is None:
        raise OptionError("Say how many blocks to keep: give sparse_ratio, top_p or top_k.")
    counts = [] if top_k is None else [top_k]
    if top_p == 1:
        counts.append(count)  # those too whose share is rounded to zero
    elif top_p is not None:
        # The release's allowance for the rounding of the running sum.
        rules.append(TopP(min(top_p + 1e-5, 1.0), "exclude"))
    if sparse_ratio is not None:
        counts.append(_ratio_count(count, sparse_ratio))
    if counts:
        rules.append(TopK(max(counts)))
    return rules[0] if len(rules) == 1 else rules[0] | rules[1]


def _ratio_count(count: int, sparse_ratio: float) -> int:
    """``floor(count (1 - sparse_ratio))``, at least 1; 1 - 0.9 is a little less than a tenth, and that is not meant."""
    return max(int(count * (1 - sparse_ratio) + 1e-9), 1)


def match_concentration(attn: Tensor, top: float = 0.1) -> Tensor:
    """Share of all attention that lies on the ``top`` share of query-key pairs of largest weight, ``(batch, heads)``.

    ``attn (batch, heads, q_len, k_len)``: weights, for example of patches alone. ``top`` itself where all are equal;
    near 1 where each patch looks at its few matches.
    """
    if attn.dim() != 4 or not 0 < top <= 1:
        raise ShapeError(f"Need weights (batch, heads, q_len, k_len) and 0 < top <= 1, got {tuple(attn.shape)}, {top}.")
    pairs = attn.flatten(2)
    best = pairs.topk(max(round(top * pairs.shape[-1]), 1), -1).values
    return best.sum(-1) / pairs.sum(-1)


def _check_pool(pool: Pool) -> None:
    if pool not in ("mean", "max"):
        raise OptionError(f"Blocks are pooled by 'mean' or 'max', not {pool!r}.")


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _order(frames: int, per_frame: int, special: int, block: int, device: torch.device) -> TileOrder:
    """Patches in blocks of ``block``, the last filled up, then all special tokens."""
    tokens = torch.arange(frames * per_frame, device=device)
    patches, beside = (x[:, 0] for x in split_special(tokens[:, None], frames, per_frame, special))
    filling = patches[-1:].expand(-len(patches) % block)
    order = torch.cat((patches, filling, beside))
    valid = torch.ones_like(order, dtype=torch.bool)
    valid[len(patches) : len(patches) + len(filling)] = False
    inverse = torch.empty_like(tokens)
    inverse[order[valid]] = torch.arange(len(order), device=device)[valid]
    return TileOrder(order, valid, inverse, block, special == 0 and len(filling) == 0)


@dataclass(frozen=True, eq=False)
class Planned:
    """A call's orders of queries (``rows``) and of keys (``columns``), and the layout of the tokens in these orders."""

    rows: TileOrder
    columns: TileOrder
    layout: BlockLayout

    def density(self) -> float:
        """Share of the pairs of real tokens that is computed."""
        queries, keys = (order.block_tokens().to(torch.float64) for order in (self.rows, self.columns))
        pairs = (self.layout.visit.to(torch.float64) * queries[:, None] * keys).sum((-2, -1)).mean()
        return float(pairs) / (self.rows.length * self.columns.length)


@register("sparse_vggt")
class SparseVGGTAttention(SparseMechanism):
    """special: tokens at the start of each frame that see all and are seen by all. sparse_ratio: share of blocks that
    may be left out; top_p: share of the softmax over blocks that need not be exceeded; None for no such condition, of
    two the one that keeps more. pool: ``"mean"`` or ``"max"``. frames: for callers that give no grid, as
    :func:`regard.retrofit` may be; a grid that is given counts.

    ``grid`` is (frames, tokens a frame), the special ones included.
    """

    patterns = frozenset(("self",))
    growth = "share of N^2"
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(
        self,
        special: int = 5,
        sparse_ratio: float | None = 0.5,
        top_p: float | None = 0.9,
        block_q: int = 128,
        block_k: int = 64,
        pool: Pool = "mean",
        frames: int | None = None,
    ) -> None:
        super().__init__()
        if special < 0 or block_q < 1 or block_k < 1 or (frames is not None and frames < 1):
            raise OptionError(
                "Need special >= 0, block_q >= 1, block_k >= 1 and frames >= 1; "
                f"got {special}, {block_q}, {block_k} and {frames}."
            )
        if sparse_ratio is None and top_p is None:
            raise OptionError("Say how many blocks to keep: give sparse_ratio, top_p or both.")
        if not all(0 <= share <= 1 for share in (sparse_ratio, top_p) if share is not None):
            raise OptionError(f"sparse_ratio and top_p are shares between 0 and 1; got {sparse_ratio} and {top_p}.")
        _check_pool(pool)
        self.special, self.sparse_ratio, self.top_p = special, sparse_ratio, top_p
        self.block_q, self.block_k, self.pool, self.frames = block_q, block_k, pool, frames
        if frames is not None:
            self.needs_grid = False  # type: ignore[misc]

    def extra_repr(self) -> str:
        shares = f"sparse_ratio={self.sparse_ratio}, top_p={self.top_p}"
        return f"special={self.special}, {shares}, block_q={self.block_q}, block_k={self.block_k}, pool={self.pool!r}"

    def _frames(self, length: int, grid: tuple[int, ...] | None) -> tuple[int, int]:
        """Frames, and tokens a frame."""
        known = (self.frames, length // self.frames) if grid is None and self.frames is not None else grid
        if known is None or len(known) != 2 or known[0] * known[1] != length or known[1] < self.special:
            raise ShapeError(
                f"sparse_vggt needs grid=(frames, tokens a frame), {self.special} of these special (option special), "
                f"or the option frames, for its {length} tokens; got grid={grid}, frames={self.frames}."
            )
        return known[0], known[1]

    def plan(self, frames: int, per_frame: int, device: torch.device) -> tuple[TileOrder, TileOrder]:
        """The orders of queries and of keys: patches in blocks, the last filled up, then special tokens in theirs."""
        sizes = frames, per_frame, self.special
        return _order(*sizes, self.block_q, device), _order(*sizes, self.block_k, device)

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        """The layout of the tokens in the orders of :meth:`plan`."""
        return self.planned(query, key, request).layout

    @torch.no_grad()
    def planned(self, query: Tensor, key: Tensor, request: Request) -> Planned:
        """The orders of :meth:`plan` and the layout for this input."""
        length = query.shape[2]
        frames, per_frame = self._frames(length, request.grid)
        rows, columns = self.plan(frames, per_frame, query.device)
        rule, keys = settle_mask(request, length, length)
        if rule is not None or max(rows.padded, columns.padded) > length:
            inner = Everything() if rule is None else rule
            rule = Reindexed(inner, rows.order, columns.order, rows.valid, columns.valid, length, length)
        blocks = self.block_q, self.block_k
        layout = BlockLayout.of(rule, rows.padded, columns.padded, *blocks, query.device)
        if per_frame == self.special:
            return Planned(rows, columns, layout)
        patch_q, patch_k = (split_special(x, frames, per_frame, self.special)[0] for x in (query, key))
        if keys is not None:
            keys = split_special(keys[..., None], frames, per_frame, self.special)[0][..., 0]
        scores = _logits(patch_q, patch_k, *blocks, self.pool, keys)
        count_q, count_k = scores.shape[-2:]
        seen = layout.visit[:, :, :count_q, :count_k]
        seen = seen if keys is None else seen & block_has(keys, self.block_k)[:, :, None]
        scores = (scores * score_scale(query, request.scale)).masked_fill(~seen, float("-inf"))
        chosen = _selection(count_k, self.sparse_ratio, self.top_p, None)(scores)
        beside = layout.visit.shape[-1] - count_k, layout.visit.shape[-2] - count_q
        return Planned(rows, columns, layout.only(F.pad(chosen, (0, beside[0], 0, beside[1]), value=True)))

    def run(self, query: Tensor, key: Tensor, value: Tensor, request: Request, planned: Planned) -> Tensor:
        """The output for a choice already made."""
        query, key, value = planned.rows.apply(query), *(planned.columns.apply(x) for x in (key, value))
        return planned.rows.undo(block_sparse_attention(query, key, value, planned.layout, scale=request.scale))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return self.run(query, key, value, request, self.planned(query, key, request))

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float:
        return self.planned(query, key, request).density()

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound where ``top_p`` may keep more blocks than ``sparse_ratio``."""
        frames, per_frame = self._frames(shape.q_len, shape.grid)
        patches = frames * (per_frame - self.special)
        count_q, count_k = num_blocks(patches, self.block_q), num_blocks(patches, self.block_k)
        choice = 2 * shape.batch * shape.num_heads * count_q * count_k * shape.head_dim
        if self.top_p is not None or self.sparse_ratio is None or patches == 0:
            return dense_cost(shape, 1.0, choice)
        kept = min(_ratio_count(count_k, self.sparse_ratio) * self.block_k, patches)
        share = patches / shape.q_len
        return dense_cost(shape, 1 - share * (patches - kept) / shape.k_len, choice)


def block_sparse_global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frames: int,
    special: int = 5,
    sparse_ratio: float | None = 0.5,
    top_p: float | None = 0.9,
    *,
    scale: float | None = None,
    **options: Any,
) -> tuple[Tensor, float]:
    """:class:`SparseVGGTAttention` as a function: the output, and the share of query-key pairs that was left out."""
    module = SparseVGGTAttention(special, sparse_ratio, top_p, frames=frames, **options)
    request = module.request(query, key, value, scale=scale)
    planned = module.planned(query, key, request)
    return module.run(query, key, value, request, planned), 1 - planned.density()
