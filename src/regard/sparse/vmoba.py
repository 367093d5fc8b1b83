"""VMoBA: mixture of block attention for video; blocks change shape from layer to layer, and queries compete for them.

Keys of a video ``(T, H, W)`` are cut into blocks: ``c`` frames (1-D), tiles of ``h x w`` places through all frames
(2-D), or cuboids of ``t x h x w`` tokens (3-D); layers take the three in turn. Each query has a gate per block,
``g_ib = q_i . mean_{j in b} k_j``, and attends, in one softmax, to the tokens of its own block and of the selected:

- ``mode="threshold"``: in a scope ``S`` of query-block pairs gates are brought to 0..1,
  ``g' = (g - min_S) / (max_S - min_S)``. With ``r = max(0, tau - sum of g' over own pairs / sum of g' over S)``, the
  largest others are taken until their ``g'`` sum to the share ``r`` of all, one at least. Queries with clear
  preferences so get more blocks than others. ``tau = 1`` takes all.
- ``mode="topk"``: ``k`` blocks a query (scope ``"query"``), or the ``k N`` best pairs of a head (scope ``"head"``;
  ``"all"``: of all heads), own ones first.

Scopes: ``"query"`` (one query's blocks), ``"head"`` (all pairs of a head, the paper's choice), ``"block"`` (all pairs
of a key block, over heads), ``"all"``. Sequences of a batch never mix.

"VMoBA: Mixture-of-Block Attention for Video Diffusion Models", 2025, arXiv 2506.23858. Query (batch, num_heads, T H W,
head_dim), key and value (batch, num_kv_heads, T H W, ...), after rotary positions; not causal. No parameters; the gate
is not differentiated. Time ``O(N n d)`` for the gates of ``n`` blocks, and the density times ``N^2 d``. Blocks at the
border of the grid may be short. Sizes of blocks by default are an assumption. In the released code ``tau = 1`` can end
with two blocks a query by rounding, and ``top_k = 1`` runs full attention; here they mean all and the own block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention
from regard.layers.tiles import TileOrder, tile_order, token_permute, token_unpermute
from regard.layout import BlockLayout, num_blocks
from regard.masks import Everything, Reindexed
from regard.mechanism import Request, SparseMechanism
from regard.registry import register
from regard.sparse.scoring import block_has, grouped_scores, per_kv_head, pool_blocks
from regard.sparse.selection import settle_mask, top_k_mask

__all__ = [
    "VMoBAAttention",
    "partition_video",
    "select_pairs",
    "unpartition_video",
    "vmoba_gate",
    "vmoba_partition_for_layer",
]

Mode = Literal["threshold", "topk"]
PairScope = Literal["query", "head", "block", "all"]


def _tile(grid: Sequence[int], block: int | Sequence[int]) -> tuple[int, int, int]:
    """Sides of a block on ``grid``, none longer than its axis."""
    sides = (block,) if isinstance(block, int) else tuple(block)
    if len(sides) not in (1, 2, 3) or min(sides) < 1:
        raise OptionError(f"A block is c frames, (h, w) places or (t, h, w) tokens, each at least 1; got {block}.")
    if len(grid) != 3:
        raise ShapeError(f"vmoba cuts videos (frames, height, width), got grid {tuple(grid)}.")
    frames, height, width = grid
    whole = {1: (*sides, height, width), 2: (frames, *sides), 3: sides}[len(sides)]
    t, h, w = (min(side, length) for side, length in zip(whole, grid, strict=True))
    return t, h, w


def partition_video(x: Tensor, grid: Sequence[int], block: int | Sequence[int]) -> Tensor:
    """``(batch, T H W, heads, dim)`` -> ``(batch, blocks * tokens of one, heads, dim)``, block by block.

    block: ``c`` frames, ``(h, w)`` places through all frames, or ``(t, h, w)``; short ones at the border are filled up
    with zeros.
    """
    tile = _tile(grid, block)
    if x.dim() != 4 or x.shape[1] != math.prod(grid):
        raise ShapeError(f"A video of {tuple(grid)} is (batch, {math.prod(grid)}, heads, dim), got {tuple(x.shape)}.")
    return token_permute(x.transpose(1, 2).unflatten(2, tuple(grid)), tile).transpose(1, 2)


def unpartition_video(x: Tensor, grid: Sequence[int], block: int | Sequence[int]) -> Tensor:
    """The inverse of :func:`partition_video`; filling is cut off."""
    tile = _tile(grid, block)
    count = math.prod(num_blocks(n, side) * side for n, side in zip(grid, tile, strict=True))
    if x.dim() != 4 or x.shape[1] != count:
        raise ShapeError(f"Blocks of {tile} on {tuple(grid)} are (batch, {count}, heads, dim), got {tuple(x.shape)}.")
    return token_unpermute(x.transpose(1, 2), grid, tile).flatten(2, 4).transpose(1, 2)


def vmoba_partition_for_layer(
    layer: int, blocks_1d: int, blocks_2d: Sequence[int], blocks_3d: Sequence[int]
) -> int | tuple[int, ...]:
    """The block of a layer: 1-D, 2-D and 3-D in turn."""
    return (blocks_1d, tuple(blocks_2d), tuple(blocks_3d))[layer % 3]


def vmoba_gate(query: Tensor, key: Tensor, block: int, keys: Tensor | None = None) -> Tensor:
    """Gates ``(batch, num_heads, q_len, num_blocks)``, unscaled, in float32 or better.

    key: block by block, ``block`` tokens each. keys: those that count, as in
    :func:`~regard.sparse.scoring.pool_blocks`.
    """
    means = pool_blocks(per_kv_head(key, keys), block, keys)
    return grouped_scores(query.to(means.dtype), means)


def _to_rows(x: Tensor, scope: PairScope) -> Tensor:
    """``(batch, heads, q_len, blocks)`` with what is chosen from together in the last axis."""
    if scope == "query":
        return x
    if scope == "block":
        return x.permute(0, 3, 1, 2).flatten(2)
    return x.flatten(2) if scope == "head" else x.flatten(1)


def _from_rows(rows: Tensor, shape: torch.Size, scope: PairScope) -> Tensor:
    """The inverse of :func:`_to_rows`."""
    if scope == "block":
        return rows.unflatten(2, tuple(shape[1:3])).permute(0, 2, 3, 1)
    return rows.view(shape)


@torch.no_grad()
def select_pairs(
    gate: Tensor,
    own: Tensor,
    mode: Mode = "threshold",
    scope: PairScope = "head",
    top_k: int = 3,
    threshold: float = 0.25,
) -> Tensor:
    """Blocks that each query attends to, boolean of the shape of ``gate (batch, heads, q_len, blocks)``.

    A gate of ``-inf`` is never taken. own: the block ``(q_len,)`` in which each query stands, always taken.
    """
    _check_choice(mode, scope, top_k, threshold)
    seen = gate > float("-inf")
    mine = (own[:, None] == torch.arange(gate.shape[3], device=gate.device)) & seen
    if mode == "topk":
        count = {"query": 1, "head": gate.shape[2]}.get(scope, gate.shape[1] * gate.shape[2])
        rows = _to_rows(gate.masked_fill(mine, float("inf")), scope)
        return _from_rows(top_k_mask(rows, top_k * count), gate.shape, scope)
    if threshold == 1:
        return seen
    rows, known, first = (_to_rows(x, scope) for x in (gate, seen, mine))
    return _from_rows(_up_to(rows, known, first, threshold) | first, gate.shape, scope)


def _up_to(gate: Tensor, seen: Tensor, own: Tensor, threshold: float) -> Tensor:
    """Of each row's pairs that are not own, the largest that complete the share ``threshold``, one at least."""
    low = gate.masked_fill(~seen, float("inf")).amin(-1, keepdim=True)
    span = gate.amax(-1, keepdim=True) - low
    even = ((gate - low) / torch.where(span > 0, span, 1)).masked_fill(~seen, 0)
    total = even.sum(-1, keepdim=True).clamp_min(torch.finfo(even.dtype).tiny)
    missing = threshold - (even * own).sum(-1, keepdim=True) / total
    ordered, order = even.masked_fill(own | ~seen, -1).sort(dim=-1, descending=True, stable=True)
    before = ordered.clamp_min(0).cumsum(-1) - ordered.clamp_min(0)
    kept = before / total < missing
    kept[..., :1] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept & (ordered >= 0))


def _check_choice(mode: Mode, scope: PairScope, top_k: int, threshold: float) -> None:
    if mode not in get_args(Mode) or scope not in get_args(PairScope):
        raise OptionError(
            f"mode is one of {get_args(Mode)}, scope one of {get_args(PairScope)}; got {mode!r}, {scope!r}."
        )
    if mode == "topk" and scope == "block":
        raise OptionError("A number of blocks a query is kept in the scopes 'query', 'head' and 'all', not in 'block'.")
    if top_k < 1 or not 0 <= threshold <= 1:
        raise OptionError(f"Need top_k >= 1 and 0 <= threshold <= 1, got {top_k} and {threshold}.")


@register("vmoba")
class VMoBAAttention(SparseMechanism):
    """block: ``c`` frames, ``(h, w)`` or ``(t, h, w)``; by default blocks_1d, blocks_2d and blocks_3d in turn, by the
    layer's index. mode, scope, top_k, threshold: how pairs are selected, see the module. shape: the grid, for callers
    that give none. ``pairs`` tells the density of a call.

    In a padded batch the queries of padded tokens take part in the choice of scopes larger than ``"query"``.
    """

    patterns = frozenset(("self",))
    growth = "share of N^2"
    grid_axes = frozenset((3,))
    needs_grid = True

    def __init__(
        self,
        block: int | Sequence[int] | None = None,
        mode: Mode = "threshold",
        scope: PairScope = "head",
        top_k: int = 3,
        threshold: float = 0.25,
        *,
        blocks_1d: int = 1,
        blocks_2d: Sequence[int] = (8, 8),
        blocks_3d: Sequence[int] = (4, 8, 8),
        shape: Sequence[int] | None = None,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        _check_choice(mode, scope, top_k, threshold)
        if block is None:
            block = vmoba_partition_for_layer(layer_index, blocks_1d, blocks_2d, blocks_3d)
        _tile((1, 1, 1), block)
        self.block = block if isinstance(block, int) else tuple(block)
        self.mode, self.scope, self.top_k, self.threshold = mode, scope, top_k, threshold
        self.shape = None if shape is None else tuple(shape)
        if self.shape is not None:
            _tile(self.shape, block)
            self.needs_grid = False  # type: ignore[misc]

    def extra_repr(self) -> str:
        rule = f"top_k={self.top_k}" if self.mode == "topk" else f"threshold={self.threshold}"
        return f"block={self.block}, {rule}, scope={self.scope!r}, shape={self.shape}"

    def order(self, length: int, grid: Sequence[int] | None, device: torch.device) -> TileOrder:
        """The order of the keys, block by block; queries stay where they are."""
        space = self.shape if grid is None else tuple(grid)
        if space is None or math.prod(space) != length:
            raise ShapeError(
                f"vmoba needs grid=(frames, height, width), or the option shape, of its {length} tokens; got {space}."
            )
        return tile_order(space, _tile(space, self.block), (1,) * len(space), device)

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        """The layout: rows of single queries in the grid's order, columns of key blocks in the order of
        :meth:`order`."""
        return self._planned(query, key, request)[1]

    @torch.no_grad()
    def _planned(self, query: Tensor, key: Tensor, request: Request) -> tuple[TileOrder, BlockLayout]:
        length = query.shape[2]
        order = self.order(length, request.grid, query.device)
        rule, keys = settle_mask(request, length, length)
        shown = keys
        if rule is not None or order.padded > length:
            tokens = torch.arange(length, device=query.device)
            rule = Reindexed(rule or Everything(), tokens, order.order, None, order.valid, length, length)
            shown = order.valid[None, None] if keys is None else keys[..., order.order] & order.valid
        layout = BlockLayout.of(rule, length, order.padded, 1, order.block, query.device)
        gate = vmoba_gate(query, order.apply(key), order.block, shown)
        seen = layout.visit if shown is None else layout.visit & block_has(shown, order.block)[:, :, None]
        own = order.inverse.div(order.block, rounding_mode="floor")
        choice = (self.mode, self.scope, self.top_k, self.threshold)
        return order, layout.only(select_pairs(gate.masked_fill(~seen, float("-inf")), own, *choice))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        order, layout = self._planned(query, key, request)
        key, value = order.apply(key), order.apply(value)
        return block_sparse_attention(query, key, value, layout, scale=request.scale)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float:
        order, layout = self._planned(query, key, request)
        tokens = order.block_tokens().to(torch.float64)
        return float((layout.visit.to(torch.float64) @ tokens).mean()) / order.length

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound: the share of a threshold is known for an input alone, and so are the sizes of short
        blocks."""
        order = self.order(shape.q_len, shape.grid, torch.device("cpu"))
        tokens = order.block_tokens()
        kept = self.top_k if self.mode == "topk" else len(tokens)
        density = min(kept * int(tokens.max()) / order.length, 1.0)
        gate = 2 * shape.batch * shape.num_heads * shape.q_len * len(tokens) * shape.head_dim
        return dense_cost(shape, density, gate)
