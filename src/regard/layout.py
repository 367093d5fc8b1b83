"""Which key blocks, or key tokens, each query block, or query, computes.

Selectors make layouts from (query, key); executors in ``regard.kernels`` run them. Nothing else knows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.masks import Boolean, Everything, Mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BlockLayout", "TokenLayout", "block_lists", "block_members", "kept_layout", "num_blocks"]


def num_blocks(length: int, block_size: int) -> int:
    """Blocks of ``block_size`` that cover ``length`` tokens; the last may be short."""
    return -(-length // block_size)


def block_members(length: int, block_size: int, device: torch.device | str | None = None) -> Tensor:
    """Token indices of each block, ``(num_blocks, block_size)``; a short last block repeats its last token."""
    index = torch.arange(num_blocks(length, block_size) * block_size, device=device)
    return index.clamp_max(length - 1).view(-1, block_size)


def block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Booleans ``(..., rows, columns)`` as lists, int32: how many columns each row has, ``(..., rows)``, and which,
    ``(..., rows, columns)``, ascending, with the others after them."""
    count = blocks.sum(-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count, order.contiguous()


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Blocks of the attention matrix that are computed.

    ``visit`` ``(batch | 1, heads | 1, num_q_blocks, num_k_blocks)``: blocks computed. ``full``: those of them that need
    no mask inside; the others are *partial* and ``mask`` tells their pairs. Pairs outside visited blocks are unseen.
    """

    visit: Tensor
    full: Tensor
    mask: Mask
    q_len: int
    k_len: int
    block_q: int
    block_k: int

    def __post_init__(self) -> None:
        expected = (num_blocks(self.q_len, self.block_q), num_blocks(self.k_len, self.block_k))
        if self.visit.shape != self.full.shape or self.visit.shape[-2:] != expected or self.visit.dim() != 4:
            raise ShapeError(
                f"A layout of {self.q_len} x {self.k_len} tokens in blocks of {self.block_q} x {self.block_k} needs "
                f"visit and full of shape (batch, heads, {expected[0]}, {expected[1]}); "
                f"got {tuple(self.visit.shape)} and {tuple(self.full.shape)}."
            )

    @classmethod
    def of(
        cls,
        mask: Mask | None,
        q_len: int,
        k_len: int,
        block_q: int = 128,
        block_k: int = 128,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """The blocks that ``mask`` may need (None: all)."""
        if block_q < 1 or block_k < 1:
            raise OptionError(f"Block sizes must be at least 1, got {block_q} and {block_k}.")
        rule = Everything() if mask is None else mask
        q_blocks, k_blocks = block_members(q_len, block_q, device), block_members(k_len, block_k, device)
        possible, certain = rule.bounds(q_blocks, k_blocks, q_len, k_len)
        return cls(possible, possible & certain, rule, q_len, k_len, block_q, block_k)

    def only(self, chosen: Tensor) -> BlockLayout:
        """This layout without the blocks where ``chosen`` (broadcastable to ``visit``) is False."""
        visit = self.visit & chosen
        return BlockLayout(visit, self.full & visit, self.mask, self.q_len, self.k_len, self.block_q, self.block_k)

    @property
    def partial(self) -> Tensor:
        """Blocks computed in which the mask hides something, or may."""
        return self.visit & ~self.full

    def density(self) -> float:
        """Share of the query-key pairs that is computed (whole blocks, as the executor does)."""
        rows = _sizes(self.q_len, self.block_q, self.visit.device)
        columns = _sizes(self.k_len, self.block_k, self.visit.device)
        pairs = (self.visit.to(torch.float64) * rows[:, None] * columns).sum((-2, -1)).mean()
        return float(pairs) / (self.q_len * self.k_len)

    def dense(self) -> Tensor:
        """Boolean ``(batch | 1, heads | 1, q_len, k_len)``: the pairs that are seen."""
        wide = self.visit.repeat_interleave(self.block_q, 2)[:, :, : self.q_len]
        wide = wide.repeat_interleave(self.block_k, 3)[..., : self.k_len]
        return wide & self.mask.dense(self.q_len, self.k_len, self.visit.device)

    def as_mask(self) -> Mask:
        """The pairs that are seen, as a mask."""
        return Boolean(self.dense())

    def block_mask(self) -> BlockMask:
        """The same layout for ``torch.nn.attention.flex_attention``."""
        from torch.nn.attention.flex_attention import BlockMask

        return BlockMask.from_kv_blocks(
            *block_lists(self.partial),
            *block_lists(self.full),
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=self.mask.wide_mod(self.q_len, self.k_len),
            seq_lengths=(self.q_len, self.k_len),
        )


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def kept_layout(rule: Mask, q_len: int, k_len: int, block_q: int, block_k: int, device: torch.device) -> BlockLayout:
    """:meth:`BlockLayout.of` a rule that holds no tensors, made once: executors keep their index work with a layout."""
    return BlockLayout.of(rule, q_len, k_len, block_q, block_k, device)


def _sizes(length: int, block: int, device: torch.device) -> Tensor:
    sizes = torch.full((num_blocks(length, block),), block, dtype=torch.float64, device=device)
    sizes[-1] -= len(sizes) * block - length
    return sizes


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Key tokens of each query: ``indices`` ``(batch | 1, heads | 1, q_len, slots)`` int64, -1 for an empty slot.

    No key may stand twice in a row: it would count twice.
    """

    indices: Tensor
    k_len: int

    def __post_init__(self) -> None:
        if self.indices.dim() != 4 or self.indices.dtype != torch.int64:
            raise ShapeError(
                "A token layout takes int64 indices (batch, heads, q_len, slots); "
                f"got {self.indices.dtype} of shape {tuple(self.indices.shape)}."
            )

    @classmethod
    def of(cls, seen: Tensor) -> TokenLayout:
        """From a boolean ``(batch | 1, heads | 1, q_len, k_len)``; slots are the largest row count, at least one."""
        counts = seen.sum(-1)
        slots = max(int(counts.max()), 1) if counts.numel() else 1
        order = seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :slots]
        empty = torch.arange(order.shape[-1], device=seen.device) >= counts[..., None]
        return cls(order.masked_fill(empty, -1), seen.shape[-1])

    @property
    def valid(self) -> Tensor:
        """Boolean, the shape of ``indices``: slots that hold a key."""
        return self.indices >= 0

    def density(self) -> float:
        """Share of the query-key pairs that is computed."""
        return float(self.valid.to(torch.float64).mean()) * self.indices.shape[-1] / self.k_len

    def dense(self) -> Tensor:
        """Boolean ``(batch | 1, heads | 1, q_len, k_len)``: the pairs that are seen."""
        seen = torch.zeros(*self.indices.shape[:3], self.k_len + 1, dtype=torch.bool, device=self.indices.device)
        seen.scatter_(3, torch.where(self.valid, self.indices, self.k_len), True)
        return seen[..., : self.k_len]
