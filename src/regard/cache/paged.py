"""A cache in pages of a common pool, so that sequences of any length share memory and prefixes.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023, arXiv 2309.06180.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.cache.base import Cached, KeyValueCache, nothing_cached
from regard.errors import OptionError

__all__ = ["PagePool", "PagedCache"]


class PagePool:
    """Pages of ``page_size`` tokens for one layer, lent to the caches of many sequences.

    A page may belong to several sequences (a common prefix, beams); it is copied when one of them writes to it, and
    free again when none holds it.
    """

    def __init__(self, num_pages: int, page_size: int = 16) -> None:
        if num_pages < 1 or page_size < 1:
            raise OptionError(f"num_pages and page_size are at least 1; got {num_pages} and {page_size}.")
        self.num_pages, self.page_size = num_pages, page_size
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self._holders = [0] * num_pages
        self._free = list(range(num_pages))[::-1]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def open(self, key: Tensor, value: Tensor) -> None:
        """Take the memory, for heads as those of these tensors."""
        if self.key is None:
            # Heads come first in memory, so that all pages in a row are one long sequence without a copy.
            self.key, self.value = (
                t.new_zeros(t.shape[1], self.num_pages, self.page_size, t.shape[3]).transpose(0, 1)
                for t in (key, value)
            )

    def take(self) -> int:
        """A free page, held once. There must be one."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def shared(self, page: int) -> bool:
        """Whether several sequences hold it."""
        return self._holders[page] > 1

    def share(self, page: int) -> None:
        """One holder more."""
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less."""
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def own(self, page: int) -> int:
        """The page itself for its only holder, otherwise a copy for this one."""
        if not self.shared(page):
            return page
        assert self.key is not None and self.value is not None
        fresh = self.take()
        self.release(page)
        self.key[fresh], self.value[fresh] = self.key[page], self.value[page]
        return fresh


class PagedCache(KeyValueCache):
    """One batch of sequences of equal length in pages of ``pool``; several caches share one pool.

    :meth:`copy` shares all pages (a common prompt is stored once); :meth:`release` gives them back. Gradients do not
    pass through a page.
    """

    def __init__(self, pool: PagePool) -> None:
        super().__init__()
        self.pool = pool
        self.tables: list[list[int]] = []
        """The pages of each row of the batch."""

    def read(self) -> Cached:
        if not self.tables or self.pool.key is None or self.pool.value is None:
            raise nothing_cached()
        index = torch.tensor(self.tables, device=self.pool.key.device)

        def gather(pages: Tensor) -> Tensor:
            rows = pages[index].transpose(1, 2)
            return rows.flatten(2, 3)[:, :, : self.seen]

        return Cached(gather(self.pool.key), gather(self.pool.value))

    def nbytes(self) -> int:
        if self.pool.key is None or self.pool.value is None:
            return 0
        pages = {page for table in self.tables for page in table}
        return len(pages) * (self.pool.key[0].nbytes + self.pool.value[0].nbytes)

    def crop(self, length: int) -> None:
        self._check_crop(length)
        kept = -(-length // self.pool.page_size)
        for table in self.tables:
            for page in table[kept:]:
                self.pool.release(page)
            del table[kept:]
        self.seen = length

    def select(self, index: Tensor) -> None:
        tables = [list(self.tables[row]) for row in index.tolist()]
        for table in tables:
            for page in table:
                self.pool.share(page)
        self.release()
        self.tables = tables

    def release(self) -> None:
        """Give all pages back; the cache is then empty."""
        for table in self.tables:
            for page in table:
                self.pool.release(page)
        self.tables = []

    def copy(self) -> PagedCache:
        other = PagedCache(self.pool)
        other.seen, other.tables = self.seen, [list(table) for table in self.tables]
        for table in other.tables:
            for page in table:
                self.pool.share(page)
        return other

    def _store(self, key: Tensor, value: Tensor) -> None:
        pool, size = self.pool, self.pool.page_size
        pool.open(key, value)
        assert pool.key is not None and pool.value is not None
        if not self.tables:
            self.seen, self.tables = 0, [[] for _ in range(key.shape[0])]
        self._check_room(key.shape[2])
        start, stop = self.seen, self.seen + key.shape[2]
        for row, table in enumerate(self.tables):
            for number in range(start // size, -(-stop // size)):
                if number == len(table):
                    table.append(pool.take())
                else:
                    table[number] = pool.own(table[number])
                low, high = max(start, number * size), min(stop, (number + 1) * size)
                inside = slice(low - number * size, high - number * size)
                pool.key[table[number], :, inside] = key[row, :, low - start : high - start].detach()
                pool.value[table[number], :, inside] = value[row, :, low - start : high - start].detach()

    def _check_room(self, new: int) -> None:
        """Refused before the first write, so that a full pool leaves the cache as it was."""
        size = self.pool.page_size
        wanted = sum(-(-(self.seen + new) // size) - len(table) for table in self.tables)
        if self.seen % size:
            wanted += sum(self.pool.shared(table[-1]) for table in self.tables)
        if wanted > self.pool.free_pages:
            raise OptionError(
                f"{wanted} pages of {size} tokens are needed and {self.pool.free_pages} of {self.pool.num_pages} are "
                "free. Release sequences that are done, or make the pool larger."
            )

    def _like(self) -> tuple[Tensor, Tensor] | None:
        if self.pool.key is None or self.pool.value is None:
            return None
        rows = len(self.tables)
        if not rows:
            return None  # The first tokens of a sequence are checked against the pool when they are stored.
        return self.pool.key[:1].expand(rows, -1, -1, -1), self.pool.value[:1].expand(rows, -1, -1, -1)
