"""GRAT: cells of an image or video attend to whole cells, so that sparsity needs no mask inside a block.

Group first: the grid is cut into cells of ``g_1 x g_2 (x g_3)`` tokens, and tokens are reordered so that those of a
cell are consecutive. Attend smartly: all queries of cell ``p`` share the keys of the cells ``q`` with

- ``kind="cross"`` (GRAT-X): ``p_a = q_a`` on at least one axis: the cells of the same row or column; on videos the
  three planes through the cell, as in the released mask;
- ``kind="block"`` (GRAT-B): ``|p_a - q_a| <= radius`` on every axis: the cell and those around it.

One softmax over these keys and all text tokens, which stand beside the grid: every query sees them, and as queries they
see everything. A cell is a block of the executor: of ``G_1 x G_2`` cells, cross computes ``(G_1 + G_2 - 1) / (G_1
G_2)`` of the pairs, in three dimensions ``1 - prod(1 - 1 / G_a)``, block at most ``(2 radius + 1)^2 / (G_1 G_2)``.
There are no parameters: it is put into a trained model (:func:`regard.retrofit.grat.apply_grat`).

Source: Ren et al., "Grouping First, Attending Smartly: Training-Free Acceleration for Diffusion Transformers", 2025,
arXiv 2505.14687, section 3; cells of 4 x 8 x 8 for video are the released script's, those of 16 x 16 for images an
assumption, and so is the border of ``kind="block"`` (the release has the cross for videos alone): by default the
surroundings are cut off there. The release refuses grids that cells do not divide; here the last cells are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention
from regard.layers.tiles import TileOrder, tile_order, token_permute, token_unpermute
from regard.layout import BlockLayout, num_blocks
from regard.masks import Everything, KeyPadding, Mask, Reindexed, axis_windows
from regard.mechanism import Request, SparseMechanism, per_axis
from regard.registry import register

__all__ = ["GRAT", "grat_attention", "grat_block_mask", "group_tokens", "ungroup_tokens"]

Kind = Literal["cross", "block"]
Border = Literal["truncate", "clamp"]

_CELLS = {2: (16, 16), 3: (4, 8, 8)}


def group_tokens(x: Tensor, shape: Sequence[int], group: int | Sequence[int]) -> Tensor:
    """``(batch, heads, prod(shape), dim)`` -> ``(batch, heads, cells * prod(group), dim)``, cell by cell, both in
    row-major order; cells that stick out are filled up with zeros."""
    if x.dim() != 4 or x.shape[2] != math.prod(shape):
        raise ShapeError(
            f"Grouping on {tuple(shape)} takes (batch, heads, {math.prod(shape)}, dim), got {tuple(x.shape)}."
        )
    return token_permute(x.unflatten(2, tuple(shape)), per_axis("group", group, len(shape)))


def ungroup_tokens(x: Tensor, shape: Sequence[int], group: int | Sequence[int]) -> Tensor:
    """The inverse of :func:`group_tokens`; filling is cut off."""
    sides = per_axis("group", group, len(shape))
    count = math.prod(num_blocks(n, g) * g for n, g in zip(shape, sides, strict=True))
    if x.dim() != 4 or x.shape[2] != count:
        raise ShapeError(f"Cells of {sides} on {tuple(shape)} hold (batch, heads, {count}, dim), got {tuple(x.shape)}.")
    return token_unpermute(x, shape, sides).flatten(2, -2)


def grat_block_mask(
    shape: Sequence[int],
    group: int | Sequence[int],
    kind: Kind = "cross",
    radius: int = 1,
    text: int = 0,
    text_valid: Tensor | None = None,
    border: Border = "truncate",
) -> Tensor:
    """Which cells a cell sees, boolean ``(cells, cells)``; with text ``(cells + text_blocks, cells + text_blocks)``.

    Text comes last, in blocks of ``prod(group)`` tokens: their rows and columns are on, but for columns without a valid
    token. text_valid: boolean ``(text,)``, or ``(batch, text)`` for one mask a sequence, ``(batch, ...)``.
    """
    sides = per_axis("group", group, len(shape))
    counts = [num_blocks(n, side) for n, side in zip(shape, sides, strict=True)]
    cells = _cells(tuple(counts), kind, radius, border)
    block = math.prod(sides)
    seen = F.pad(cells, (0, num_blocks(text, block)) * 2, value=True)
    if text_valid is None:
        return seen
    if text_valid.dtype != torch.bool or text_valid.dim() not in (1, 2) or text_valid.shape[-1] != text:
        raise ShapeError(
            f"text_valid is boolean, ({text},) or (batch, {text}); got {text_valid.dtype} {tuple(text_valid.shape)}."
        )
    valid = F.pad(text_valid, (0, -text % block)).unflatten(-1, (-1, block)).any(-1)
    columns = torch.cat((valid.new_ones(*valid.shape[:-1], len(cells)), valid), -1)
    return seen.to(columns.device) & columns[..., None, :]


def _cells(counts: tuple[int, ...], kind: Kind, radius: int, border: Border) -> Tensor:
    """Boolean ``(cells, cells)`` of a grid of so many cells per axis."""
    if kind not in get_args(Kind) or border not in get_args(Border) or radius < 0:
        raise OptionError(
            f"kind is one of {get_args(Kind)}, border one of {get_args(Border)} and radius at least 0; got {kind!r}, "
            f"{border!r} and {radius}."
        )
    places = torch.meshgrid(*(torch.arange(count) for count in counts), indexing="ij")
    on_axes = []
    for count, place in zip(counts, (p.flatten() for p in places), strict=True):
        if kind == "cross":
            on_axes.append(place[:, None] == place)
        else:
            start, stop = axis_windows(count, 2 * radius + 1, border="clamp" if border == "clamp" else "mask")
            on_axes.append((place >= start[place][:, None]) & (place < stop[place][:, None]))
    stacked = torch.stack(on_axes)
    return stacked.any(0) if kind == "cross" else stacked.all(0)


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _plan(
    grid: tuple[int, ...],
    cell: tuple[int, ...],
    kind: Kind,
    radius: int,
    border: Border,
    text: int,
    text_first: bool,
    device: torch.device,
) -> tuple[TileOrder, BlockLayout]:
    """The order of all tokens, cell by cell and the text behind, and the layout in that order; kept, because they
    depend on sizes alone."""
    tiles = tile_order(grid, cell, (1,) * len(grid), device)
    beside = torch.arange(text, device=device)
    at, text_at = (text, 0) if text_first else (0, tiles.length)
    image_place, text_place = tiles.inverse, tiles.padded + beside
    order = TileOrder(
        torch.cat((tiles.order + at, text_at + beside)),
        torch.cat((tiles.valid, torch.ones_like(beside, dtype=torch.bool))),
        torch.cat((text_place, image_place) if text_first else (image_place, text_place)),
        tiles.block,
        False,
    )
    chosen = grat_block_mask(grid, cell, kind, radius, text, border=border).to(device)
    return order, _layout(Everything(), order, chosen)


def _layout(rule: Mask, order: TileOrder, chosen: Tensor) -> BlockLayout:
    """The chosen blocks, with ``rule`` on the tokens inside them; filling is hidden."""
    if not isinstance(rule, Everything) or order.padded > order.length:
        rule = Reindexed(rule, order.order, order.order, None, order.valid, order.length, order.length)
    layout = BlockLayout.of(rule, order.padded, order.padded, order.block, order.block, order.order.device)
    return layout.only(chosen)


@register("grat")
class GRAT(SparseMechanism):
    """group: sides of a cell, one for all axes or one per axis; by default 16 x 16 on images and 4 x 8 x 8 on videos.
    kind, radius: which cells a cell sees, see the module. border: of ``kind="block"``, the surroundings are cut off
    (``"truncate"``) or moved inward (``"clamp"``). text: so many tokens stand beside the grid, the last ones or, with
    text_first, the first. shape: the grid, for callers that give none.

    Padded text is hidden by the mask (:class:`~regard.masks.KeyPadding`), as any other key. ``grid`` holds the tokens
    without the text.
    """

    patterns = frozenset(("self",))
    growth = "N^1.5"
    grid_axes = frozenset((2, 3))
    needs_grid = True

    def __init__(
        self,
        group: int | Sequence[int] | None = None,
        kind: Kind = "cross",
        radius: int = 1,
        border: Border = "truncate",
        text: int = 0,
        text_first: bool = False,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        sides = (group,) if isinstance(group, int) else group
        if sides is not None and min(sides) < 1:
            raise OptionError(f"grat's cells hold at least one token on every axis, got group={group}.")
        if text < 0:
            raise OptionError(f"text counts tokens beside the grid, so it cannot be {text}.")
        _cells((1,), kind, radius, border)
        self.group, self.kind, self.radius, self.border = group, kind, radius, border
        self.off_grid, self.text_first = text, text_first
        self.shape = None if shape is None else tuple(shape)
        if self.shape is not None:
            self._cell(self.shape)
            self.needs_grid = False  # type: ignore[misc]

    def extra_repr(self) -> str:
        radius = f", radius={self.radius}" if self.kind == "block" else ""
        return f"group={self.group}, kind={self.kind!r}{radius}, text={self.off_grid}, shape={self.shape}"

    def _cell(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The sides of a cell on ``grid``, none longer than its axis."""
        if len(grid) not in _CELLS:
            raise ShapeError(f"grat groups grids of 2 or 3 axes, got {tuple(grid)}.")
        sides = _CELLS[len(grid)] if self.group is None else per_axis("group", self.group, len(grid))
        return tuple(min(side, length) for side, length in zip(sides, grid, strict=True))

    def plan(self, grid: Sequence[int], device: torch.device) -> tuple[TileOrder, BlockLayout]:
        """The order of the tokens, cell by cell with the text behind, and the layout in that order."""
        options = (self.kind, self.radius, self.border, self.off_grid, self.text_first)
        return _plan(tuple(grid), self._cell(grid), *options, device)

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        """The layout of the tokens in the order of :meth:`plan`."""
        return self._planned(query, request)[1]

    def _planned(self, query: Tensor, request: Request) -> tuple[TileOrder, BlockLayout]:
        grid = self.shape if request.grid is None else request.grid
        if grid is None or math.prod(grid) + self.off_grid != query.shape[2]:
            raise ShapeError(
                "grat needs grid=(height, width) or (frames, height, width) holding all tokens but the text: with "
                f"text={self.off_grid}, {query.shape[2] - self.off_grid} of {query.shape[2]}; got {grid}."
            )
        order, layout = self.plan(grid, query.device)
        if request.mask is not None:
            layout = _layout(request.mask, order, layout.visit)
        return order, layout

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        order, layout = self._planned(query, request)
        q, k, v = (order.apply(x) for x in (query, key, value))
        return order.undo(block_sparse_attention(q, k, v, layout, scale=request.scale))

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float:
        order, layout = self._planned(query, request)
        return _density(order, layout)

    def cost(self, shape: AttentionShape) -> Cost:
        grid = shape.grid or self.shape
        if grid is None:
            raise ShapeError("The cost of grat depends on the grid: give AttentionShape(grid=...).")
        return dense_cost(shape, _density(*self.plan(grid, torch.device("cpu"))))


def _density(order: TileOrder, layout: BlockLayout) -> float:
    """Share of the pairs of real tokens that lie in visited blocks."""
    tokens = order.block_tokens().to(torch.float64)
    pairs = (layout.visit.to(torch.float64) * tokens[:, None] * tokens).sum((-2, -1)).mean()
    return float(pairs) / order.length**2


def grat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: Sequence[int],
    group: int | Sequence[int] | None = None,
    kind: Kind = "cross",
    radius: int = 1,
    text: int = 0,
    text_valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:class:`GRAT` on ``(batch, heads, prod(shape) + text, head_dim)``, the text last.

    text_valid: boolean ``(batch, text)``, False for padding, which is never attended.
    """
    mask = None
    if text_valid is not None:
        if text_valid.shape != (query.shape[0], text):
            raise ShapeError(
                f"text_valid has one flag a text token, ({query.shape[0]}, {text}); got {tuple(text_valid.shape)}."
            )
        mask = KeyPadding(F.pad(text_valid, (math.prod(shape), 0), value=True))
    return GRAT(group, kind, radius, text=text)(query, key, value, mask=mask, grid=shape, scale=scale)
