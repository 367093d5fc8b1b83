"""A learned bias on scores that is a table looked up by query and key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TableBias"]


@dataclass(frozen=True, eq=False)
class TableBias:
    """``table[h, index(q, k)]`` is added to the score of query ``q`` and key ``k`` in head ``h``.

    table: ``(num_heads | 1, entries)``. index: elementwise in integer tensors that broadcast; entries of pairs that are
    not seen may be any. ``index`` is asked once per layout and kept with it, so one object serves one rule.
    """

    table: Tensor
    index: Callable[[Tensor, Tensor], Tensor]

    def entries(self, query: Tensor, key: Tensor) -> Tensor:
        """``index``, kept within the table."""
        return self.index(query, key).clamp(0, self.table.shape[1] - 1)

    def dense(self, q_len: int, k_len: int) -> Tensor:
        """``(num_heads | 1, q_len, k_len)``."""
        device = self.table.device
        rows, columns = (torch.arange(length, device=device) for length in (q_len, k_len))
        return self.table[:, self.entries(rows[:, None], columns)]
