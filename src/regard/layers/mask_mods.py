"""Masks as functions ``mask_mod(b, h, q_idx, kv_idx) -> bool`` of one pair, and their algebra.

The convention is FlexAttention's (Dong et al., 2024, arXiv 2412.05496): queries and keys both count from 0, so a mask
for queries that continue a sequence shifts ``q_idx`` itself. :mod:`regard.masks` has rules that know their lengths and
align at the end. Each function below makes a ``mask_mod``; the mask itself is its inner function. :data:`MASKS` has
them by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.layers.curves import hilbert_order
from regard.layers.tiles import tile_order
from regard.masks import MaskMod

__all__ = [
    "MASKS",
    "and_masks",
    "attention_sink",
    "batchify",
    "causal",
    "curve_neighborhood",
    "dilated_sliding_window",
    "document",
    "flamingo",
    "make_document",
    "neighborhood",
    "noop",
    "not_mask",
    "or_masks",
    "prefix_lm",
    "sliding_tile",
    "sliding_window",
    "svg_spatial",
    "svg_temporal",
    "tiled_neighborhood",
]


def noop(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Everything is seen."""
    return (q_idx == q_idx) & (kv_idx == kv_idx)


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Keys up to the query's own place."""
    return q_idx >= kv_idx


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """What all of them show."""
    _callable(mask_mods)

    def both(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = noop(b, h, q_idx, kv_idx)
        for mask_mod in mask_mods:
            seen = seen & mask_mod(b, h, q_idx, kv_idx)
        return seen

    return both


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """What any of them shows."""
    _callable(mask_mods)

    def either(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = ~noop(b, h, q_idx, kv_idx)
        for mask_mod in mask_mods:
            seen = seen | mask_mod(b, h, q_idx, kv_idx)
        return seen

    return either


def not_mask(mask_mod: MaskMod) -> MaskMod:
    """What it hides."""
    _callable((mask_mod,))
    return lambda b, h, q_idx, kv_idx: ~mask_mod(b, h, q_idx, kv_idx)


def _callable(mask_mods: Sequence[object]) -> None:
    for mask_mod in mask_mods:
        if not callable(mask_mod):
            raise OptionError(
                f"Masks combine functions mask_mod(b, h, q_idx, kv_idx) -> bool, got {type(mask_mod).__name__}. A "
                "regard.masks.Mask becomes one by mask.mod(q_len, k_len)."
            )


def sliding_window(window: int) -> MaskMod:
    """Keys at a distance of at most ``window`` on both sides; ``and_masks(sliding_window(w), causal)`` is ``0 <= i - j
    <= w``."""
    _at_least(window=window)
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= window


def dilated_sliding_window(window: int, dilation: int) -> MaskMod:
    """Those of the window at a distance that is a multiple of ``dilation``."""
    _at_least(window=window)
    _at_least(1, dilation=dilation)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = (q_idx - kv_idx).abs()
        return (distance <= window) & (distance % dilation == 0)

    return mask


def prefix_lm(length: int | Tensor) -> MaskMod:
    """Causal, and the first ``length`` keys for all queries; one length, or one per sequence ``(batch,)``."""
    if isinstance(length, int):
        _at_least(length=length)
        return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (kv_idx < length)
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (kv_idx < length[b])


def attention_sink(window: int, sinks: int = 4) -> MaskMod:
    """Causal: the ``window`` keys before a query, its own, and the first ``sinks`` (Xiao et al., 2023, arXiv
    2309.17453)."""
    _at_least(window=window, sinks=sinks)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & ((q_idx - kv_idx <= window) | (kv_idx < sinks))

    return mask


def document(
    lengths: Tensor | Sequence[int] | None = None, *, offsets: Tensor | Sequence[int] | None = None
) -> MaskMod:
    """Documents packed one after the other see themselves alone. lengths: of the documents; or offsets: where each
    begins and the last ends, one more than there are documents."""
    return make_document(noop, lengths, offsets=offsets)


def make_document(
    mask_mod: MaskMod,
    lengths: Tensor | Sequence[int] | None = None,
    *,
    offsets: Tensor | Sequence[int] | None = None,
) -> MaskMod:
    """``mask_mod`` inside each of the documents that are packed one after the other, its indices counted from the
    document's beginning. lengths, offsets: as in :func:`document`. What lies behind the last document sees nothing."""
    starts = _starts(lengths, offsets)
    # The beginning of each token's document, which tells documents apart as well: empty ones have no tokens.
    own, total = starts[:-1].repeat_interleave(starts.diff()), int(starts[-1])

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        begins = own.to(q_idx.device)
        q_doc, kv_doc = begins[q_idx.clamp_max(total - 1)], begins[kv_idx.clamp_max(total - 1)]
        inside = (q_doc == kv_doc) & (q_idx < total) & (kv_idx < total)
        return inside & mask_mod(b, h, q_idx - q_doc, kv_idx - kv_doc)

    return mask


def _starts(lengths: Tensor | Sequence[int] | None, offsets: Tensor | Sequence[int] | None) -> Tensor:
    if (lengths is None) == (offsets is None):
        raise OptionError("Documents are told by lengths or by offsets: give one of the two.")
    if offsets is None:
        assert lengths is not None
        ends = torch.as_tensor(lengths).cumsum(0)
        starts = torch.cat((ends.new_zeros(1), ends))
    else:
        starts = torch.as_tensor(offsets)
    if starts.dim() != 1 or len(starts) < 2 or starts[0] != 0 or bool((starts.diff() < 0).any()) or starts[-1] < 1:
        raise OptionError(
            "Offsets begin with 0 and do not fall, lengths are not negative, and there is at least one token; got "
            f"offsets {starts.tolist()}."
        )
    return starts


def neighborhood(grid: tuple[int, int], window: tuple[int, int], order: Tensor | None = None) -> MaskMod:
    """The ``window`` of keys around a query on a grid ``(height, width)``, moved inward at the border (Hassani et al.,
    "Neighborhood Attention Transformer", 2023, arXiv 2204.07143).

    order: the token (row-major) at each place of the sequence, by default row-major.
    """
    (height, width), (rows, columns) = grid, window
    _inside(grid, window)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q, kv = (index if order is None else order.to(index.device)[index] for index in (q_idx, kv_idx))
        down = kv // width - (q // width - rows // 2).clamp(0, height - rows)
        right = kv % width - (q % width - columns // 2).clamp(0, width - columns)
        return (down >= 0) & (down < rows) & (right >= 0) & (right < columns)

    return mask


def tiled_neighborhood(grid: tuple[int, int], window: tuple[int, int], tile: tuple[int, int]) -> MaskMod:
    """:func:`neighborhood` of tokens that come tile by tile, so that blocks of the sequence are blocks of space."""
    _inside(grid, window)
    _divides("grid", grid, "tile", tile)
    return neighborhood(grid, window, tile_order(grid, tile, (1, 1), torch.device("cpu")).order)


def curve_neighborhood(grid: tuple[int, int], window: tuple[int, int]) -> MaskMod:
    """:func:`neighborhood` of tokens that come along Hilbert's curve (:func:`regard.layers.curves.hilbert_order`)."""
    _inside(grid, window)
    return neighborhood(grid, window, hilbert_order(grid))


def sliding_tile(grid: Sequence[int], window: Sequence[int], tile: Sequence[int], text: int = 0) -> MaskMod:
    """Sliding tile attention (Zhang et al., 2025, arXiv 2502.04507) on grids of any number of axes: tokens come tile by
    tile, and all queries of a tile see the same ``window`` of whole tiles around it, moved inward at the border.

    text: so many tokens after the grid, which see and are seen by all.
    """
    _inside(grid, window)
    _divides("grid", grid, "tile", tile)
    _divides("window", window, "tile", tile)
    tiles = [length // side for length, side in zip(grid, tile, strict=True)]
    reach = [length // side for length, side in zip(window, tile, strict=True)]
    volume, tokens = math.prod(tile), math.prod(grid)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q, kv = q_idx // volume, kv_idx // volume
        seen = kv_idx < tokens + text
        near = (q_idx < tokens) & (kv_idx < tokens)
        for count, wide in zip(reversed(tiles), reversed(reach), strict=True):
            step = kv % count - (q % count - wide // 2).clamp(0, count - wide)
            near, q, kv = near & (step >= 0) & (step < wide), q // count, kv // count
        return seen & (near | (q_idx >= tokens) | (kv_idx >= tokens))

    return mask


def svg_spatial(prompt: int, frame: int, width: int = 2, sink: bool = False, multiple: int = 128) -> MaskMod:
    """Spatial heads of Sparse VideoGen (Xi et al., 2025, arXiv 2502.01776): frames of ``frame`` tokens after ``prompt``
    tokens of text; a query sees the text and keys nearer than ``width`` frames, rounded down to ``multiple`` tokens.

    sink: the first frame is seen by all as well. Queries of the text see everything.
    """
    _at_least(prompt=prompt, width=width)
    _at_least(1, frame=frame, multiple=multiple)
    reach, first = width * frame // multiple * multiple, prompt + (frame if sink else 0)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx < prompt) | (kv_idx < first) | ((q_idx - kv_idx).abs() < reach)

    return mask


def svg_temporal(prompt: int, frames: int, frame: int, width: int = 2) -> MaskMod:
    """Temporal heads of Sparse VideoGen: a query sees the text and, in all ``frames`` frames, the tokens whose place in
    their frame is nearer to its own than ``width frame / frames``. Queries of the text see everything."""
    _at_least(prompt=prompt, width=width)
    _at_least(1, frame=frame, frames=frames)
    reach = width * frame // frames

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        apart = ((q_idx - prompt) % frame - (kv_idx - prompt) % frame).abs()
        return (q_idx < prompt) | (kv_idx < prompt) | (apart < reach)

    return mask


def flamingo(intervals: Tensor | Sequence[Sequence[int]], image_tokens: int) -> MaskMod:
    """Cross attention from text to images of ``image_tokens`` tokens each (Alayrac et al., 2022, arXiv 2204.14198).
    intervals ``(images, 2)``: the text tokens, from the first to before the last, that see each image."""
    spans = torch.as_tensor(intervals)
    _at_least(1, image_tokens=image_tokens)
    if spans.dim() != 2 or spans.shape[1] != 2:
        raise ShapeError(f"intervals is (images, 2), first and one past the last text token; got {tuple(spans.shape)}.")

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        first, last = spans.to(q_idx.device).unbind(1)
        image = kv_idx // image_tokens
        return (q_idx >= first[image]) & (q_idx < last[image])

    return mask


def batchify(mask_mod: MaskMod, length: int) -> MaskMod:
    """``mask_mod`` inside each run of ``length`` tokens: a batch of equal sequences laid out as one."""
    _at_least(1, length=length)
    _callable((mask_mod,))

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        inside = q_idx // length == kv_idx // length
        return inside & mask_mod(b, h, q_idx % length, kv_idx % length)

    return mask


def _at_least(least: int = 0, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise OptionError(f"{name} must be at least {least}, got {size}.")


def _inside(grid: Sequence[int], window: Sequence[int]) -> None:
    if len(grid) != len(window) or any(not 1 <= side <= n for n, side in zip(grid, window, strict=True)):
        raise OptionError(f"A window fits into its grid on every axis; got window {tuple(window)}, grid {tuple(grid)}.")


def _divides(what: str, sizes: Sequence[int], part: str, sides: Sequence[int]) -> None:
    if len(sizes) != len(sides) or any(side < 1 or n % side for n, side in zip(sizes, sides, strict=True)):
        raise OptionError(f"Tiles fill the {what} on every axis; got {what} {tuple(sizes)}, {part} {tuple(sides)}.")


MASKS: dict[str, Callable[..., MaskMod]] = {
    "full": lambda: noop,
    "causal": lambda: causal,
    "sliding_window": sliding_window,
    "dilated_sliding_window": dilated_sliding_window,
    "prefix_lm": prefix_lm,
    "document": document,
    "attention_sink": attention_sink,
    "neighborhood": neighborhood,
    "tiled_neighborhood": tiled_neighborhood,
    "curve_neighborhood": curve_neighborhood,
    "flamingo": flamingo,
    "sliding_tile": sliding_tile,
    "svg_spatial": svg_spatial,
    "svg_temporal": svg_temporal,
    "batchify": batchify,
}
"""What makes a mask, by name; options are those of the function."""
