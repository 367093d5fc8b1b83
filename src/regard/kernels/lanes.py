"""Sequences and heads (lanes) in groups that need the same blocks of a layout, and which blocks those are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.layout import BlockLayout

__all__ = ["Lanes", "by_lanes", "needed"]


class Lanes:
    """Some sequences and some of their heads, all of which need the same blocks."""

    def __init__(self, batches: list[int], heads: list[int], device: torch.device) -> None:
        self.batches, self.heads = batches, heads
        self.index = (
            torch.tensor(batches, device=device).view(-1, 1, 1, 1),
            torch.tensor(heads, device=device).view(1, -1, 1, 1),
        )

    def of(self, tensor: Tensor) -> Tensor:
        """Their part of ``(batch | 1, heads | 1, ...)``; what is shared stays shared."""
        for dim, members in enumerate((self.batches, self.heads)):
            if tensor.shape[dim] > 1:
                tensor = _take(tensor, dim, members)
        return tensor


def by_lanes(
    layout: BlockLayout, batch: int, heads: int, device: torch.device, run: Callable[[Lanes], list[Tensor]]
) -> list[Tensor]:
    """What ``run`` gives, tensors ``(sequences, heads, ...)``, for all lanes in their own order."""
    by_batch, order = [], []
    for batches in _alike(layout, 0, batch):
        by_head, head_order = [], []
        for members in _alike(layout, 1, heads, batches[0]):
            by_head.append(run(Lanes(batches, members, device)))
            head_order += members
        by_batch.append(_together(by_head, 1, head_order))
        order += batches
    return _together(by_batch, 0, order)


def needed(layout: BlockLayout, lanes: Lanes, most: int = 1) -> list[list[tuple[int, int, bool]]]:
    """For each row of blocks runs of up to ``most`` that are computed, from the first to before the last, and whether
    all of their pairs are seen."""
    batch, head = lanes.batches[0], lanes.heads[0]
    visit, full = (t[batch if len(t) > 1 else 0, head if t.shape[1] > 1 else 0] for t in (layout.visit, layout.full))
    rows: list[list[tuple[int, int, bool]]] = [[] for _ in range(len(visit))]
    places = visit.nonzero()
    for (row, block), certain in zip(places.tolist(), full[places[:, 0], places[:, 1]].tolist(), strict=True):
        first, stop, same = rows[row][-1] if rows[row] else (0, 0, False)
        if rows[row] and stop == block and same == certain and stop - first < most:
            rows[row][-1] = (first, block + 1, certain)
        else:
            rows[row].append((block, block + 1, certain))
    return rows


def _alike(layout: BlockLayout, axis: int, size: int, batch: int = 0) -> list[list[int]]:
    """Sequences (axis 0), or heads of one sequence (axis 1), in groups that need the same blocks."""
    kinds = torch.stack((layout.visit, layout.full), -1)
    if axis:
        kinds = kinds[batch if len(kinds) > 1 else 0]
    if len(kinds) == 1:
        return [list(range(size))]
    groups: dict[bytes, list[int]] = {}
    for member, picture in enumerate(kinds.flatten(1).cpu().numpy()):
        groups.setdefault(picture.tobytes(), []).append(member)
    return list(groups.values())


def _take(tensor: Tensor, dim: int, members: list[int]) -> Tensor:
    """These members of an axis; neighbours without a copy."""
    if members == list(range(members[0], members[-1] + 1)):
        return tensor.narrow(dim, members[0], len(members))
    return tensor.index_select(dim, torch.tensor(members, device=tensor.device))


def _together(groups: list[list[Tensor]], dim: int, order: list[int]) -> list[Tensor]:
    """Groups of sequences or heads back in one tensor, in their own order."""
    if len(groups) == 1:
        return groups[0]
    back = torch.tensor(order, device=groups[0][0].device).argsort()
    return [torch.cat(some, dim).index_select(dim, back) for some in zip(*groups, strict=True)]
