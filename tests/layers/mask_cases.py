"""Masks of papers, each as the library has it and once more for two plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from regard.layers import mask_mods as masks
from regard.layers.curves import hilbert_order
from regard.masks import MaskMod

LENGTHS = (7, 0, 13, 20)
INTERVALS = ((0, 7), (1, 7), (7, 12))


@dataclass(frozen=True)
class Case:
    """mask: the library's. shown: for sequence, head, query and key."""

    name: str
    mask: MaskMod
    shown: Callable[[int, int, int, int], bool]
    q_len: int = 40
    k_len: int = 40
    batch: int | None = None


def _document(index: int) -> int:
    ends = [sum(LENGTHS[: n + 1]) for n in range(len(LENGTHS))]
    return next(n for n, end in enumerate(ends) if index < end)


def _near(q: int, k: int, window: int, length: int) -> bool:
    """Whether ``k`` is in the window of ``q`` on an axis, found by moving the window inward step by step."""
    first = q - window // 2
    while first < 0:
        first += 1
    while first + window > length:
        first -= 1
    return first <= k < first + window


def _grid_near(q: int, k: int) -> bool:
    return _near(q // 8, k // 8, 3, 6) and _near(q % 8, k % 8, 4, 8)


def _tiled(index: int) -> int:
    """The row-major token at a place of a 6 x 8 grid in tiles of 2 x 4."""
    places = [
        (2 * down + y) * 8 + 4 * right + x
        for down in range(3)
        for right in range(2)
        for y in range(2)
        for x in range(4)
    ]
    return places[index]


_CURVE = hilbert_order((6, 8)).tolist()


def _tile(q: int, k: int) -> bool:
    """Sliding tiles of 2 x 2 x 2 on a grid of 4 x 4 x 6, window 2 x 4 x 6, and 5 tokens of text behind."""
    if q >= 96 or k >= 96:
        return True
    sides, counts = (1, 2, 3), (2, 2, 3)
    places = [(index // 8 // 6, index // 8 // 3 % 2, index // 8 % 3) for index in (q, k)]
    return all(_near(a, b, side, count) for a, b, side, count in zip(*places, sides, counts, strict=True))


def _spatial(q: int, k: int) -> bool:
    return q < 4 or k < 4 + 9 or abs(q - k) < 16


def _temporal(q: int, k: int) -> bool:
    return q < 4 or k < 4 or abs((q - 4) % 9 - (k - 4) % 9) < 4


CASES = (
    Case("full", masks.noop, lambda b, h, q, k: True),
    Case("causal", masks.causal, lambda b, h, q, k: k <= q),
    Case("sliding_window", masks.sliding_window(5), lambda b, h, q, k: abs(q - k) <= 5),
    Case(
        "dilated_sliding_window",
        masks.dilated_sliding_window(12, 3),
        lambda b, h, q, k: k - q in (-12, -9, -6, -3, 0, 3, 6, 9, 12),
    ),
    Case("prefix_lm", masks.prefix_lm(9), lambda b, h, q, k: k < 9 or k <= q),
    Case(
        "prefix_lm_each",
        masks.prefix_lm(torch.tensor([3, 21])),
        lambda b, h, q, k: k < (3, 21)[b] or k <= q,
        batch=2,
    ),
    Case("document", masks.document(LENGTHS), lambda b, h, q, k: _document(q) == _document(k)),
    Case(
        "document_offsets",
        masks.document(offsets=torch.tensor([0, 7, 7, 20, 40])),
        lambda b, h, q, k: _document(q) == _document(k),
    ),
    Case("attention_sink", masks.attention_sink(6, 2), lambda b, h, q, k: k <= q and (k < 2 or k >= q - 6)),
    Case("neighborhood", masks.neighborhood((6, 8), (3, 4)), lambda b, h, q, k: _grid_near(q, k), 48, 48),
    Case(
        "tiled_neighborhood",
        masks.tiled_neighborhood((6, 8), (3, 4), (2, 4)),
        lambda b, h, q, k: _grid_near(_tiled(q), _tiled(k)),
        48,
        48,
    ),
    Case(
        "curve_neighborhood",
        masks.curve_neighborhood((6, 8), (3, 4)),
        lambda b, h, q, k: _grid_near(_CURVE[q], _CURVE[k]),
        48,
        48,
    ),
    Case(
        "flamingo",
        masks.flamingo(INTERVALS, 6),
        lambda b, h, q, k: INTERVALS[k // 6][0] <= q < INTERVALS[k // 6][1],
        14,
        18,
    ),
    Case(
        "sliding_tile",
        masks.sliding_tile((4, 4, 6), (2, 4, 6), (2, 2, 2), text=5),
        lambda b, h, q, k: _tile(q, k),
        101,
        101,
    ),
    Case("svg_spatial", masks.svg_spatial(4, 9, sink=True, multiple=8), lambda b, h, q, k: _spatial(q, k), 40, 40),
    Case("svg_temporal", masks.svg_temporal(4, 4, 9), lambda b, h, q, k: _temporal(q, k), 40, 40),
    Case(
        "batchify",
        masks.batchify(masks.sliding_window(2), 8),
        lambda b, h, q, k: q // 8 == k // 8 and abs(q - k) <= 2,
    ),
    Case(
        "make_document",
        masks.make_document(masks.prefix_lm(3), LENGTHS),
        lambda b, h, q, k: _document(q) == _document(k) and (k <= q or k - sum(LENGTHS[: _document(k)]) < 3),
    ),
    Case(
        "heads",
        lambda b, h, q, k: (q >= k) & (q - k < 4 * (h + 1)),
        lambda b, h, q, k: 0 <= q - k < 4 * (h + 1),
    ),
)
"""All masks of :data:`regard.layers.mask_mods.MASKS`, and one that differs by head."""
