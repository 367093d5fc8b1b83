"""A block layout as lists: the key blocks of each query block, and the masks inside partial blocks, evaluated once.

A plan depends on the layout alone, so it is made at the first use of a layout and kept as long as the layout lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from regard.kernels.score_bias import TableBias
from regard.layout import BlockLayout

__all__ = ["Codes", "Group", "Pictures", "Plan", "codes_of", "plan_of"]

# Masks inside partial blocks are kept when they take at most this many bytes, else evaluated a stretch at a time.
_KEPT = 1 << 25
# From so many bytes on, equal masks (as neighbourhoods have them all over a grid) are found and kept once.
_ALIKE = 1 << 21
# Pairs whose mask is evaluated at once.
_EVALUATED = 1 << 20


@dataclass(frozen=True)
class Group:
    """Query blocks that are computed together, each with equally many key blocks."""

    queries: Tensor  # (rows,) index of each query block among all (batch, head, block)
    keys: Tensor  # (rows, slots) index of each key block among all (batch, kv head, block)
    empty: Tensor | None  # (rows, slots), True where a slot only fills up the group
    partial: tuple[Tensor, Tensor]  # row and slot of each block that needs a mask inside
    tiles: Tensor  # (partial blocks,) which distinct mask each of them needs


@dataclass(eq=False)
class Plan:
    """The visited blocks of a layout, row by row.

    ``starts`` ``(batch * heads * num_q_blocks + 1,)``: where the list of each query block begins, for as many batches
    and heads as the layout tells apart. ``columns``: the key blocks. ``tiles``: the number of the distinct mask inside
    each of them, -1 for none. ``places`` ``(4, distinct masks)``: batch, head, query block and key block of each.
    """

    starts: Tensor
    columns: Tensor
    tiles: Tensor
    places: Tensor
    batch: int
    heads: int
    _kept: Tensor | None = None
    _groups: dict[tuple[int, int, int, int], list[Group]] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: BlockLayout) -> Plan:
        """The lists of ``layout``; a short last key block counts as partial."""
        visit, partial = layout.visit, layout.partial
        nq, nk = visit.shape[-2:]
        if layout.k_len % layout.block_k:
            partial = partial.clone()
            partial[..., -1] |= visit[..., -1]
        rule_batch, rule_heads = (layout.mask.batch, layout.mask.heads) if bool(partial.any()) else (1, 1)
        batch, heads = max(visit.shape[0], rule_batch), max(visit.shape[1], rule_heads)
        needed = partial.expand(batch, heads, nq, nk)
        needed = needed.any(0, keepdim=True) if rule_batch == 1 else needed
        needed = needed.any(1, keepdim=True) if rule_heads == 1 else needed
        number = torch.full(needed.shape, -1, dtype=torch.int32, device=visit.device)
        places = needed.nonzero().T
        number[needed] = torch.arange(places.shape[1], dtype=torch.int32, device=visit.device)
        number = torch.where(partial, number, -1).expand(batch, heads, nq, nk)
        wide = visit.expand(batch, heads, nq, nk)
        counts = wide.flatten(0, 2).sum(-1)
        starts = torch.zeros(len(counts) + 1, dtype=torch.int64, device=visit.device)
        starts[1:] = counts.cumsum(0)
        columns = torch.arange(nk, dtype=torch.int32, device=visit.device).expand_as(wide)[wide]
        tiles = number[wide]
        if places.shape[1] * layout.block_q * layout.block_k > _ALIKE:
            places, alike = _distinct(layout, places)
            tiles = torch.where(tiles >= 0, alike[tiles.clamp_min(0)], -1).to(torch.int32)
        return cls(starts, columns, tiles, places, batch, heads)

    def visible(self, layout: BlockLayout, tiles: Tensor | None = None) -> Tensor:
        """Boolean ``(masks, block_q, block_k)``: the pairs seen in these distinct masks (None: in all)."""
        if self._kept is None and self.places.shape[1] * layout.block_q * layout.block_k <= _KEPT:
            self._kept = _evaluate(layout, self.places)
        if self._kept is not None:
            return self._kept if tiles is None else self._kept.index_select(0, tiles)
        if tiles is None:
            return _evaluate(layout, self.places)
        distinct, where = tiles.unique(return_inverse=True)
        return _evaluate(layout, self.places[:, distinct])[where]

    def groups(self, layout: BlockLayout, batch: int, heads: int, kv_heads: int, area: int) -> list[Group]:
        """Query blocks sorted by how many key blocks they visit, cut so that a group has at most ``area`` pairs."""
        key = (batch, heads, kv_heads, area)
        if key not in self._groups:
            self._groups.clear()
            self._groups[key] = list(self._cut(layout, batch, heads, kv_heads, area))
        return self._groups[key]

    def _cut(self, layout: BlockLayout, batch: int, heads: int, kv_heads: int, area: int) -> Iterator[Group]:
        nq, nk = layout.visit.shape[-2:]
        device = self.starts.device
        lists = torch.arange(self.batch * self.heads * nq, device=device).view(self.batch, self.heads, nq)
        lists = lists.expand(batch, heads, nq).flatten()
        counts = self.starts.diff()[lists]
        order = counts.argsort(stable=True)
        sizes = counts[order].tolist()
        block = layout.block_q * layout.block_k
        start = next((i for i, count in enumerate(sizes) if count), len(sizes))
        while start < len(sizes):
            stop = start + 1
            while stop < len(sizes) and (stop + 1 - start) * sizes[stop] * block <= area:
                if sizes[stop] > 1.25 * sizes[start] + 1:
                    break
                stop += 1
            rows, slot = order[start:stop], torch.arange(sizes[stop - 1], device=device)
            empty = slot >= counts[rows][:, None]
            at = (self.starts[lists[rows]][:, None] + slot).masked_fill_(empty, 0)
            head = rows.div(nq, rounding_mode="floor")
            lane = head.div(heads, rounding_mode="floor") * kv_heads + (head % heads) // (heads // kv_heads)
            tiles = self.tiles[at].masked_fill_(empty, -1)
            row, column = (tiles >= 0).nonzero(as_tuple=True)
            keys = lane[:, None] * nk + self.columns[at]
            yield Group(rows, keys, empty if sizes[start] < len(slot) else None, (row, column), tiles[row, column])
            start = stop


def _fingerprints(rows: Tensor) -> Tensor:
    """A 64-bit number per row of integers or booleans ``(rows, ...)``, equal for equal rows and else all but surely
    different: a random linear form modulo 2^64."""
    flat = rows.flatten(1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(1 << 62), 1 << 62, (flat.shape[1],), generator=generator).to(flat.device)
    return torch.cat([(part * weights).sum(-1) for part in flat.split(max(_EVALUATED // flat.shape[1], 1))])


@dataclass
class Pictures:
    """Rows of integers ``(rows, ...)`` that come in stretches, each different one kept once, as int32."""

    rows: list[Tensor] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def add(self, rows: Tensor) -> list[int]:
        """Which of the kept rows each of these is."""
        numbers = _fingerprints(rows).tolist()
        for number, row in zip(numbers, rows, strict=True):
            if number not in self._numbers:
                self._numbers[number] = len(self.rows)
                self.rows.append(row.to(torch.int32))
        return [self._numbers[number] for number in numbers]

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return 4 * len(self.rows) * self.rows[0].numel() if self.rows else 0


def _distinct(layout: BlockLayout, places: Tensor) -> tuple[Tensor, Tensor]:
    """The places of masks that differ, and for each place which of those has its mask."""
    step = max(_EVALUATED // (layout.block_q * layout.block_k), 1)
    prints = torch.cat([_fingerprints(_seen(layout, part)) for part in places.split(step, 1)])
    distinct, alike = prints.unique(return_inverse=True)
    first = torch.full_like(distinct, len(prints)).scatter_reduce_(
        0, alike, torch.arange(len(prints), device=prints.device), "amin"
    )
    return places[:, first], alike


def _evaluate(layout: BlockLayout, places: Tensor) -> Tensor:
    """The masks at these places, a few at a time: rules make temporaries much larger than their result."""
    step = max(_EVALUATED // (layout.block_q * layout.block_k), 1)
    return torch.cat([_seen(layout, part) for part in places.split(step, 1)])


def _seen(layout: BlockLayout, places: Tensor) -> Tensor:
    batch, head, q_block, k_block = (place[:, None, None] for place in places)
    device = places.device
    query = q_block * layout.block_q + torch.arange(layout.block_q, device=device)[:, None]
    key = k_block * layout.block_k + torch.arange(layout.block_k, device=device)
    seen = layout.mask.mod(layout.q_len, layout.k_len)(
        batch, head, query.clamp_max(layout.q_len - 1), key.clamp_max(layout.k_len - 1)
    )
    return seen.expand(places.shape[1], layout.block_q, layout.block_k) & (key < layout.k_len)


_plans: WeakKeyDictionary[BlockLayout, Plan] = WeakKeyDictionary()


def plan_of(layout: BlockLayout) -> Plan:
    """The plan of ``layout``, made once."""
    plan = _plans.get(layout)
    if plan is None:
        plan = _plans[layout] = Plan.of(layout)
    return plan


@dataclass(frozen=True, eq=False)
class Codes:
    """Masks and biases of a layout that all sequences and heads share, as one: ``places`` ``(distinct blocks, block_q,
    block_k)`` int32, places in the bias's table and -1 where a pair is not seen; ``tiles`` int32: which of them each
    visited block has, in the order of the plan's lists."""

    tiles: Tensor
    places: Tensor


_codes: WeakKeyDictionary[BlockLayout, WeakKeyDictionary[Callable[[Tensor, Tensor], Tensor], Codes | None]]
_codes = WeakKeyDictionary()


def codes_of(layout: BlockLayout, bias: TableBias) -> Codes | None:
    """The codes of a layout under the bias's rule, made once; None if the layout is not shared, or they are too many to
    keep."""
    kept = _codes.setdefault(layout, WeakKeyDictionary())
    if bias.index not in kept:
        kept[bias.index] = _coded(layout, bias)
    return kept[bias.index]


@torch.inference_mode(False)
def _coded(layout: BlockLayout, bias: TableBias) -> Codes | None:
    if layout.visit.shape[:2] != (1, 1) or (layout.mask.batch, layout.mask.heads) != (1, 1):
        return None
    plan, (nq, area) = plan_of(layout), (layout.visit.shape[2], layout.block_q * layout.block_k)
    rows = torch.arange(nq, device=plan.starts.device).repeat_interleave(plan.starts.diff())
    tiles: list[int] = []
    pictures = Pictures()
    step = max(_EVALUATED // area, 1)
    for q_block, k_block in zip(rows.split(step), plan.columns.long().split(step), strict=True):
        zero = torch.zeros_like(q_block)
        seen = _seen(layout, torch.stack((zero, zero, q_block, k_block)))
        query = q_block[:, None, None] * layout.block_q + torch.arange(layout.block_q, device=zero.device)[:, None]
        key = k_block[:, None, None] * layout.block_k + torch.arange(layout.block_k, device=zero.device)
        places = bias.entries(query.clamp_max(layout.q_len - 1), key.clamp_max(layout.k_len - 1))
        tiles += pictures.add(torch.where(seen, places, -1))
        if pictures.bytes > _KEPT:
            return None
    return Codes(torch.tensor(tiles, dtype=torch.int32), torch.stack(pictures.rows)) if tiles else None
