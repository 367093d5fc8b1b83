"""Attention over pages without copying them together: block masks and functions are translated instead.

All pages of a :class:`~regard.cache.PagePool` are one long sequence of keys, ``(1, heads, num_pages page_size, dim)``.
A table says which page holds which block of which sequence; the lists of a block mask are translated through it, and
the functions are wrapped so that they see a key's place in its own sequence. No kernel knows of pages. Dong et al.,
"Flex Attention", 2024, arXiv 2412.05496, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.cache.paged import PagedCache, PagePool
from regard.errors import OptionError, ShapeError
from regard.layers.block_mask import BlockMask
from regard.layers.mask_mods import noop
from regard.layers.score_mods import ScoreMod
from regard.layout import BlockLayout
from regard.masks import MaskMod, Predicate

__all__ = ["PagedAttention"]

Rows = Tensor | Sequence[int] | None


class PagedAttention:
    """The pages of up to ``max_batch`` sequences of any lengths.

    Sequences are numbered. ``page_table`` ``(max_batch, num_pages)``: the page of each block of a sequence, -1 for
    none. ``physical_to_logical``, the same shape: the block that a page holds of a sequence, -1 for none. ``lengths``
    ``(max_batch,)``: tokens of each sequence. Functions and block masks read these as they are when they are asked.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_batch: int,
        device: torch.device | str = "cpu",
        *,
        pool: PagePool | None = None,
    ) -> None:
        if max_batch < 1:
            raise OptionError(f"max_batch must be at least 1, got {max_batch}.")
        self.pool = PagePool(num_pages, page_size) if pool is None else pool
        self.page_table = torch.full((max_batch, self.pool.num_pages), -1, device=device)
        self.physical_to_logical = self.page_table.clone()
        self.lengths = torch.zeros(max_batch, dtype=torch.int64, device=device)

    @classmethod
    def from_cache(cls, cache: PagedCache) -> PagedAttention:
        """The sequences of a cache, whose pages it shares: nothing is copied, and :meth:`erase` gives them back."""
        if not cache.tables or cache.pool.key is None:
            raise OptionError("The cache is empty: append to it first.")
        pool = cache.pool
        found = cls(pool.num_pages, pool.page_size, len(cache.tables), cache.pool.key.device, pool=pool)
        for row, table in enumerate(cache.tables):
            for page in table:
                pool.share(page)
            found._hold(row, 0, table)
        found.lengths.fill_(cache.seen)
        return found

    @property
    def key(self) -> Tensor:
        """All pages as one sequence, ``(1, heads, num_pages * page_size, dim)``."""
        return self._long(self.pool.key)

    @property
    def value(self) -> Tensor:
        """As :attr:`key`."""
        return self._long(self.pool.value)

    def _long(self, pages: Tensor | None) -> Tensor:
        if pages is None:
            raise OptionError("The pages are empty: reserve room and assign keys and values first.")
        return pages.transpose(0, 1).flatten(1, 2)[None]

    def reserve(self, row: int, length: int) -> None:
        """Room for ``length`` tokens of a sequence; what it has stays. Raises OptionError where pages run out."""
        held = self._pages(row)
        wanted = -(-length // self.pool.page_size) - len(held)
        if wanted > self.pool.free_pages:
            raise OptionError(
                f"Sequence {row} needs {wanted} more pages of {self.pool.page_size} tokens and {self.pool.free_pages} "
                f"of {self.pool.num_pages} are free. Erase sequences that are done, or make more pages."
            )
        self._hold(row, len(held), [self.pool.take() for _ in range(wanted)])

    def assign(self, rows: Rows, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Store ``key`` and ``value`` ``(sequences, heads, new, dim)`` of the sequences ``rows`` (None: the first ones)
        at ``positions`` ``(sequences, new)``, where room is reserved. Gradients do not pass through a page."""
        index = self._rows(rows, key.shape[0])
        if key.dim() != 4 or key.shape[:3] != value.shape[:3] or positions.shape != (len(index), key.shape[2]):
            raise ShapeError(
                "assign takes key and value (sequences, heads, new, dim) and positions (sequences, new); got "
                f"{tuple(key.shape)}, {tuple(value.shape)} and {tuple(positions.shape)} for {len(index)} sequences."
            )
        size, room = self.pool.page_size, (self.page_table[index] >= 0).sum(1) * self.pool.page_size
        if bool((positions < 0).any()) or bool((positions >= room[:, None]).any()):
            raise OptionError(f"Sequences {index.tolist()} have room for {room.tolist()} tokens; reserve more first.")
        self.pool.open(key, value)
        assert self.pool.key is not None and self.pool.value is not None
        self._own(index, positions // size)
        places = self.page_table[index].gather(1, positions // size).flatten(), (positions % size).flatten()
        for pages, new in ((self.pool.key, key), (self.pool.value, value)):
            pages[places[0], :, places[1]] = new.detach().transpose(1, 2).flatten(0, 1)
        self.lengths[index] = torch.maximum(self.lengths[index], positions.amax(1) + 1)

    def _own(self, index: Tensor, blocks: Tensor) -> None:
        """Copies of those pages, to be written to, that others read as well."""
        written = {(row, block) for row, some in zip(index.tolist(), blocks.tolist(), strict=True) for block in some}
        shared = [(row, block, int(self.page_table[row, block])) for row, block in sorted(written)]
        shared = [(row, block, page) for row, block, page in shared if self.pool.shared(page)]
        if len(shared) > self.pool.free_pages:
            raise OptionError(
                f"{len(shared)} pages are shared and have to be copied before they are written; {self.pool.free_pages} "
                "are free. Erase sequences that are done, or make more pages."
            )
        for row, block, page in shared:
            self._hold(row, block, [self.pool.own(page)], instead=page)

    def erase(self, row: int) -> None:
        """Give a sequence's pages back."""
        for page in self._pages(row):
            self.pool.release(page)
        self.page_table[row] = self.physical_to_logical[row] = -1
        self.lengths[row] = 0

    def convert_logical_block_mask(self, block_mask: BlockMask, rows: Rows = None) -> BlockMask:
        """A block mask over the keys of each sequence as one over all pages. Its blocks of keys are of ``page_size``.

        rows: the sequences of the mask's batch, by default the first ones. Blocks without a page, and places behind a
        sequence's end, are hidden.
        """
        layout, size = block_mask.layout, self.pool.page_size
        if layout.block_k != size:
            raise ShapeError(f"Blocks of {layout.block_k} keys do not fit pages of {size}; use block_size=(., {size}).")
        index = self._rows(rows, layout.visit.shape[0], shared=len(layout.visit) == 1)
        visit, full = (t.expand(len(index), -1, -1, -1) for t in (layout.visit, layout.full))
        columns = min(visit.shape[-1], self.pool.num_pages)
        pages = self.page_table[index, :columns]
        ends = torch.arange(1, columns + 1, device=pages.device) * size
        whole = ends <= self.lengths[index, None].clamp_max(layout.k_len)

        def physical(blocks: Tensor) -> Tensor:
            found = blocks.new_zeros(*blocks.shape[:3], self.pool.num_pages + 1)
            place = torch.where(pages >= 0, pages, self.pool.num_pages)[:, None, None].expand(*blocks.shape[:3], -1)
            return found.scatter_(-1, place, blocks)[..., : self.pool.num_pages]

        inner = layout.mask.wide_mod(layout.q_len, layout.k_len)

        def inside(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx < layout.k_len) & inner(b, h, q_idx, kv_idx.clamp_max(layout.k_len - 1))

        rule = Predicate(self.get_mask_mod(inside, index), len(index), layout.mask.heads)
        paged = BlockLayout(
            physical(visit[..., :columns]),
            physical(full[..., :columns] & whole[:, None, None]),
            rule,
            layout.q_len,
            self.pool.num_pages * size,
            layout.block_q,
            size,
        )
        return BlockMask(paged, self.get_mask_mod(block_mask.mask_mod, index))

    def get_mask_mod(self, mask_mod: MaskMod | None = None, rows: Rows = None) -> MaskMod:
        """``mask_mod`` for keys counted over all pages; other sequences' keys and places without a token are hidden."""
        rule, index = noop if mask_mod is None else mask_mod, None if rows is None else self._rows(rows, len(rows))

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            logical, valid = self._logical(b if index is None else index[b], kv_idx)
            return valid & rule(b, h, q_idx, logical)

        return mask

    def get_score_mod(self, score_mod: ScoreMod | None = None, rows: Rows = None) -> ScoreMod:
        """``score_mod`` for keys counted over all pages; scores of what :meth:`get_mask_mod` hides are ``-inf``."""
        index = None if rows is None else self._rows(rows, len(rows))

        def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            logical, valid = self._logical(b if index is None else index[b], kv_idx)
            changed = score if score_mod is None else score_mod(score, b, h, q_idx, logical)
            return torch.where(valid, changed, float("-inf"))

        return mod

    def _logical(self, row: Tensor, kv_idx: Tensor) -> tuple[Tensor, Tensor]:
        """A key's place in its sequence (some place of it where it is none of the sequence), and whether it is one."""
        size = self.pool.page_size
        block = self.physical_to_logical[row, kv_idx // size]
        place = block * size + kv_idx % size
        valid = (block >= 0) & (place < self.lengths[row])
        return torch.where(valid, place, 0), valid

    def _rows(self, rows: Rows, count: int, shared: bool = False) -> Tensor:
        index = torch.arange(count) if rows is None else torch.as_tensor(rows)
        index = index.to(self.page_table.device)
        if index.dim() != 1 or (len(index) != count and not shared) or bool((index < 0).any()):
            raise ShapeError(f"Expected the numbers of {count} sequences, got {index.tolist()}.")
        if bool((index >= len(self.page_table)).any()):
            raise OptionError(f"There are {len(self.page_table)} sequences (max_batch); got numbers {index.tolist()}.")
        return index

    def _pages(self, row: int) -> list[int]:
        if not 0 <= row < len(self.page_table):
            raise OptionError(f"There are {len(self.page_table)} sequences (max_batch); got number {row}.")
        table = self.page_table[row]
        pages: list[int] = table[table >= 0].tolist()
        return pages

    def _hold(self, row: int, first: int, pages: list[int], instead: int | None = None) -> None:
        """Note the pages of a sequence's blocks from ``first`` on."""
        if instead is not None:
            self.physical_to_logical[row, instead] = -1
        index = torch.tensor(pages, dtype=torch.int64, device=self.page_table.device)
        self.page_table[row, first : first + len(pages)] = index
        self.physical_to_logical[row, index] = torch.arange(first, first + len(pages), device=index.device)
