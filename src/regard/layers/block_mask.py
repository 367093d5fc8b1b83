"""Which blocks of the attention matrix a ``mask_mod`` needs, as FlexAttention keeps it.

For each block of queries the lists of key blocks with at least one visible pair: *partial* ones, in which the predicate
is asked pair by pair, and *full* ones, where it is known to hold. Memory ``ceil(L / block) ceil(S / block)`` per
sequence and head, both of which may be shared. Dong et al., "Flex Attention: A Programming Model for Generating
Optimized Attention Kernels", 2024, arXiv 2412.05496, section 4.

:class:`BlockMask` is a :class:`~regard.layout.BlockLayout` with its lists and its function; :meth:`BlockMask.to_torch`
and :meth:`BlockMask.from_torch` go to ``torch.nn.attention.flex_attention`` and back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.elementwise import Elementwise
from regard.layers.mask_mods import noop
from regard.layout import BlockLayout, block_lists, num_blocks
from regard.masks import Mask, MaskMod, Predicate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

__all__ = ["BlockMask", "create_block_mask", "create_mask"]

Index = int | slice | Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The blocks of ``mask_mod``, made by :func:`create_block_mask` or from lists by :meth:`from_kv_blocks`.

    ``layout`` runs in the library's executors. ``mask_mod`` is asked for pairs of partial blocks alone.
    """

    layout: BlockLayout
    mask_mod: MaskMod

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        block_size: int | tuple[int, int] = 128,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
    ) -> BlockMask:
        """From lists ``(batch, heads, rows)`` of counts and ``(batch, heads, rows, slots)`` of key blocks, of which the
        first ``count`` of a row are read. mask_mod: asked inside the blocks of the first two lists; those of the full
        ones are seen whole. seq_lengths: queries and keys, by default as many as rows and slots have room for.

        Raises ShapeError for lists that do not fit together, OptionError for blocks out of range or in both lists.
        """
        block_q, block_k = _pair(block_size)
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            raise ShapeError("full_kv_num_blocks and full_kv_indices come together: give both, or neither.")
        if kv_indices.dim() != 4:
            raise ShapeError(f"kv_indices is (batch, heads, rows, slots), got {tuple(kv_indices.shape)}.")
        q_len, k_len = seq_lengths or (kv_indices.shape[2] * block_q, kv_indices.shape[3] * block_k)
        size = num_blocks(q_len, block_q), num_blocks(k_len, block_k)
        partial = _listed(kv_num_blocks, kv_indices, size)
        if full_kv_num_blocks is None or full_kv_indices is None:
            full = torch.zeros_like(partial)
        else:
            full = _listed(full_kv_num_blocks, full_kv_indices, size)
        if bool((partial & full).any()):
            raise OptionError(
                "A block stands in the list of partial and in that of full blocks; it can be one of them."
            )
        partial, full = torch.broadcast_tensors(partial, full)
        rule = noop if mask_mod is None else mask_mod
        mask = _mask_of(rule, full, (q_len, k_len), (block_q, block_k))
        return cls(BlockLayout(partial | full, full, mask, q_len, k_len, block_q, block_k), rule)

    @classmethod
    def from_layout(cls, layout: BlockLayout) -> BlockMask:
        """The same blocks, with the layout's mask as function."""
        return cls(layout, layout.mask.wide_mod(layout.q_len, layout.k_len))

    @classmethod
    def from_torch(cls, block_mask: TorchBlockMask) -> BlockMask:
        """From ``torch.nn.attention.flex_attention.BlockMask``."""
        return cls.from_kv_blocks(
            block_mask.kv_num_blocks,
            block_mask.kv_indices,
            block_mask.full_kv_num_blocks,
            block_mask.full_kv_indices,
            block_mask.BLOCK_SIZE,
            block_mask.mask_mod,
            block_mask.seq_lengths,
        )

    def to_torch(self) -> TorchBlockMask:
        """For ``torch.nn.attention.flex_attention.flex_attention``."""
        return self.layout.block_mask()

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.layout.q_len, self.layout.k_len

    @property
    def block_size(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self.layout.block_q, self.layout.block_k

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch | 1, heads | 1, q_len, k_len)``."""
        return (*self.layout.visit.shape[:2], *self.seq_lengths)

    @cached_property
    def _partial(self) -> tuple[Tensor, Tensor]:
        return block_lists(self.layout.partial)

    @cached_property
    def _full(self) -> tuple[Tensor, Tensor]:
        return block_lists(self.layout.full)

    @property
    def kv_num_blocks(self) -> Tensor:
        """Partial key blocks of each row, int32 ``(batch, heads, rows)``."""
        return self._partial[0]

    @property
    def kv_indices(self) -> Tensor:
        """Which, int32 ``(batch, heads, rows, columns)``; what follows the first ``kv_num_blocks`` of a row has no
        meaning."""
        return self._partial[1]

    @property
    def full_kv_num_blocks(self) -> Tensor:
        """As :attr:`kv_num_blocks`, for full blocks."""
        return self._full[0]

    @property
    def full_kv_indices(self) -> Tensor:
        """As :attr:`kv_indices`, for full blocks."""
        return self._full[1]

    @cached_property
    def q_blocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The transposed lists, from key blocks to query blocks, which a backward pass walks: ``(q_num_blocks,
        q_indices, full_q_num_blocks, full_q_indices)``."""
        return (*block_lists(self.layout.partial.mT), *block_lists(self.layout.full.mT))

    def to_dense(self) -> Tensor:
        """Boolean ``(batch | 1, heads | 1, rows, columns)``: the blocks that are computed."""
        return self.layout.visit

    def sparsity(self) -> float:
        """Share of the blocks that is skipped, from 0 to 1 (torch's own gives per cent)."""
        return 1 - float(self.layout.visit.to(torch.float64).mean())

    def __getitem__(self, index: Index | tuple[Index, ...]) -> BlockMask:
        """Some sequences, heads and rows of blocks: ``mask[0]``, ``mask[:, 2]``, ``mask[:, :, 3:]``. A number keeps its
        axis. The function answers for what was kept, so that queries of the rows count from 0 again."""
        given = index if isinstance(index, tuple) else (index,)
        if len(given) > 3:
            raise OptionError(f"A block mask is cut by sequence, head and row of blocks; got {len(given)} indices.")
        layout, whole = self.layout, (slice(None),) * (3 - len(given))
        device, sizes = layout.visit.device, layout.visit.shape[:3]
        kept = [_kept(one, size, device) for one, size in zip((*given, *whole), sizes, strict=True)]
        batches, heads, rows = kept
        short = -layout.q_len % layout.block_q
        last = (rows == sizes[2] - 1).nonzero().flatten().tolist()
        if short and last and last != [len(rows) - 1]:
            raise ShapeError(
                f"The last row of blocks holds {layout.block_q - short} queries, so it stays the last one."
            )
        block, q_len = layout.block_q, len(rows) * layout.block_q - (short if last else 0)
        visit, full = (t[batches][:, heads][:, :, rows] for t in (layout.visit, layout.full))

        def moved(rule: MaskMod, wide: bool) -> MaskMod:
            def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                old_b = b if wide and sizes[0] == 1 else batches[b]
                old_h = h if wide and sizes[1] == 1 else heads[h]
                return rule(old_b, old_h, rows[q_idx // block] * block + q_idx % block, kv_idx)

            return mask

        inner = layout.mask.wide_mod(layout.q_len, layout.k_len)
        mask = Predicate(moved(inner, False), len(batches), len(heads))
        return BlockMask(
            BlockLayout(visit, full, mask, q_len, layout.k_len, block, layout.block_k), moved(self.mask_mod, True)
        )

    def _adjust(self, q_len: int, k_len: int) -> BlockMask:
        """Cut to shorter lengths, queries and keys from the first on: right for functions that do not depend on the
        lengths, as the causal one. Blocks that were full stay full."""
        layout = self.layout
        if not (1 <= q_len <= layout.q_len and 1 <= k_len <= layout.k_len):
            raise ShapeError(
                f"A block mask of {layout.q_len} queries and {layout.k_len} keys is cut to fewer, not to {q_len} and "
                f"{k_len}. Make one for the longest lengths and cut that."
            )
        rows, columns = num_blocks(q_len, layout.block_q), num_blocks(k_len, layout.block_k)
        visit, full = (t[:, :, :rows, :columns] for t in (layout.visit, layout.full))
        rule = Predicate(layout.mask.mod(layout.q_len, layout.k_len), layout.mask.batch, layout.mask.heads)
        return BlockMask(BlockLayout(visit, full, rule, q_len, k_len, layout.block_q, layout.block_k), self.mask_mod)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same on another device; tensors that the function holds stay where they are."""
        layout = self.layout
        moved = BlockLayout(
            layout.visit.to(device), layout.full.to(device), layout.mask.to(device), *self.seq_lengths, *self.block_size
        )
        return BlockMask(moved, self.mask_mod)

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """A picture of text: ``█`` where all blocks of a cell are full, ``░`` where some are computed, a blank where
        none is. grid_size: at most so many cells down and across. limit: at most so many sequences and heads."""
        down, across = _pair(grid_size)
        pictures: list[str] = []
        for batch in range(self.shape[0]):
            for head in range(self.shape[1]):
                if len(pictures) < limit:
                    cells = _cells(self.layout.visit[batch, head], self.layout.full[batch, head], down, across)
                    pictures.append("\n".join([f"({batch}, {head})", *cells]))
        left = self.shape[0] * self.shape[1] - len(pictures)
        return "\n\n".join([*pictures, f"... and {left} more: mask[batch, head] shows one."] if left else pictures)

    def __str__(self) -> str:
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.1%})\n{self.to_string()}"


def create_block_mask(
    mask_mod: MaskMod | Mask,
    batch: int | None,
    heads: int | None,
    q_len: int,
    k_len: int,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The blocks that ``mask_mod(b, h, q_idx, kv_idx)`` needs.

    batch, heads: how far it depends on them; with None it is asked for 0 alone, and holds for all. A
    :class:`~regard.masks.Mask` (batch and heads are its own) says what its blocks are without being asked for pairs.
    Raises OptionError for functions that do not run on single pairs.
    """
    block_q, block_k = _pair(block_size)
    if isinstance(mask_mod, Mask):
        layout = BlockLayout.of(mask_mod.to(device), q_len, k_len, block_q, block_k, device)
        return BlockMask.from_layout(layout)
    mask = _predicate(mask_mod, batch, heads, q_len, k_len, torch.device(device))
    return BlockMask(BlockLayout.of(mask, q_len, k_len, block_q, block_k, device), mask_mod)


def create_mask(
    mask_mod: MaskMod,
    batch: int | None,
    heads: int | None,
    q_len: int,
    k_len: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The whole boolean mask ``(batch | 1, heads | 1, q_len, k_len)`` of a function."""
    return _predicate(mask_mod, batch, heads, q_len, k_len, torch.device(device)).dense(q_len, k_len, device)


def _predicate(
    mask_mod: MaskMod, batch: int | None, heads: int | None, q_len: int, k_len: int, device: torch.device
) -> Predicate:
    sizes = (1 if batch is None else batch, 1 if heads is None else heads, q_len, k_len)
    if min(sizes) < 1:
        raise ShapeError(f"A mask has at least one sequence, head, query and key; got {sizes}.")
    places = (range(sizes[0]), range(sizes[1]), range(q_len), range(k_len))
    return Predicate(Elementwise(mask_mod, 4, places, torch.empty(0, device=device)), sizes[0], sizes[1])


def _mask_of(rule: MaskMod, full: Tensor, lengths: tuple[int, int], block: tuple[int, int]) -> Predicate:
    """The predicate in partial blocks, and everything in full ones, whatever the function says there."""
    inner = _predicate(rule, full.shape[0], full.shape[1], *lengths, full.device).rule
    if not bool(full.any()):
        return Predicate(inner, full.shape[0], full.shape[1])

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return full[b, h, q_idx // block[0], kv_idx // block[1]] | inner(b, h, q_idx, kv_idx)

    return Predicate(mask, full.shape[0], full.shape[1])


def _listed(counts: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Lists as booleans ``(batch, heads, rows, columns)``."""
    rows, columns = size
    if counts.shape != indices.shape[:-1] or indices.shape[2] != rows:
        raise ShapeError(
            f"Lists for {rows} rows are counts (batch, heads, {rows}) and indices (batch, heads, {rows}, slots); got "
            f"{tuple(counts.shape)} and {tuple(indices.shape)}."
        )
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    wrong = indices[used & ((indices < 0) | (indices >= columns))]
    if len(wrong) or bool((counts > indices.shape[-1]).any()):
        raise OptionError(
            f"There are {columns} key blocks and {indices.shape[-1]} slots a row; the lists name blocks "
            f"{wrong.unique().tolist()} or counts of up to {int(counts.max())}."
        )
    found = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    found.scatter_(-1, torch.where(used, indices, columns).long(), True)
    return found[..., :columns]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    both = (size, size) if isinstance(size, int) else (size[0], size[1])
    if min(both) < 1:
        raise OptionError(f"Sizes of blocks and pictures are at least 1, got {size}.")
    return both


def _kept(index: Index, size: int, device: torch.device) -> Tensor:
    every = torch.arange(size, device=device)
    if isinstance(index, int):
        if not -size <= index < size:
            raise OptionError(f"Index {index} is not among {size}.")
        return every[index].view(1)
    kept = every[index]
    if not len(kept):
        raise OptionError(f"Nothing is left of {size}.")
    return kept


def _cells(visit: Tensor, full: Tensor, down: int, across: int) -> list[str]:
    """Lines of a picture, each cell two characters wide."""
    tall, wide = (math.ceil(n / cells) for n, cells in zip(visit.shape, (down, across), strict=True))
    lines = []
    for row in range(0, visit.shape[0], tall):
        signs = []
        for column in range(0, visit.shape[1], wide):
            part = (slice(row, row + tall), slice(column, column + wide))
            signs.append("██" if bool(full[part].all()) else "░░" if bool(visit[part].any()) else "  ")
        lines.append("".join(signs).rstrip())
    return lines
