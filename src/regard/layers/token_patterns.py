"""Patterns that say, from tokens and segments alone, which keys a query should look at.

A predicate takes ``tokens`` ``(batch, length)`` and ``segments`` ``(batch, length)`` int64 (sentences, or the two
contexts of a pair; negative at padding) and gives a map ``(batch, length, length)``, boolean: True where query ``i`` is
to look at key ``j``. Weighted maps of weights of at least 0 go wherever boolean ones go. Rows may be empty: what then
happens is the user's choice (:func:`row_normalised` flags them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = [
    "Predicate",
    "first_token",
    "intra_sentence",
    "matching_token",
    "pattern_maps",
    "positional",
    "row_normalised",
    "same_segment_context",
    "segments_from_markers",
]

Predicate = Callable[[Tensor, Tensor | None], Tensor]


def segments_from_markers(tokens: Tensor, marker: int) -> Tensor:
    """Numbers ``(batch, length)`` of segments that each begin with ``marker``; what stands before the first has -1."""
    return (tokens == marker).cumsum(-1) - 1


def matching_token(tokens: Tensor, segments: Tensor | None = None, ignored: Sequence[int] = ()) -> Tensor:
    """Other places of the query's own token. ignored: tokens that match nothing (separators, punctuation)."""
    same = tokens[:, :, None] == tokens[:, None, :]
    same = same & ~torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    if ignored:
        special = torch.isin(tokens, torch.as_tensor(ignored, dtype=tokens.dtype, device=tokens.device))
        same = same & ~special[:, :, None]
    return _real(same, segments)


def intra_sentence(tokens: Tensor, segments: Tensor | None) -> Tensor:
    """Keys of the query's own sentence, the query among them."""
    own = _required(tokens, segments)
    return _real(own[:, :, None] == own[:, None, :], own)


def same_segment_context(tokens: Tensor, segments: Tensor | None) -> Tensor:
    """Keys of the query's own context; the first token, which stands for the whole, sees all."""
    own = _required(tokens, segments)
    same = own[:, :, None] == own[:, None, :]
    same[:, 0] = True
    return _real(same, own)


def first_token(tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    """The first key."""
    length = tokens.shape[1]
    first = torch.arange(length, device=tokens.device) == 0
    return _real(first.expand(len(tokens), length, length).clone(), segments)


def positional(offset: int) -> Predicate:
    """The key ``offset`` places from the query: -1 the one before, 1 the one after."""

    def at_offset(tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        found = place - place[:, None] == offset
        return _real(found.expand(len(tokens), -1, -1).clone(), segments)

    at_offset.__name__ = f"positional({offset:+d})"
    return at_offset


def pattern_maps(patterns: Sequence[Predicate], tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    """Several patterns of the same tokens: ``(batch, patterns, length, length)``."""
    if not patterns:
        return tokens.new_zeros((len(tokens), 0, tokens.shape[1], tokens.shape[1]), dtype=torch.bool)
    return torch.stack([pattern(tokens, segments) for pattern in patterns], 1)


def row_normalised(pattern: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of a map ``(..., length, length)`` over their sums, and which rows are empty ``(..., length)``; these stay
    zero. Boolean maps become ``dtype``, others keep their own."""
    if not pattern.is_floating_point():
        pattern = pattern.to(dtype)
    elif bool((pattern < 0).any()):
        raise OptionError("A pattern's weights are at least 0; this map has negative ones.")
    whole = pattern.sum(-1, keepdim=True)
    empty = whole == 0
    return pattern / torch.where(empty, 1, whole), empty[..., 0]


def _required(tokens: Tensor, segments: Tensor | None) -> Tensor:
    if segments is None:
        raise OptionError(
            "This pattern needs segments (batch, length), the number of each token's sentence or context; "
            "segments_from_markers makes them of separators."
        )
    if segments.shape != tokens.shape:
        raise ShapeError(f"segments are shaped as tokens, {tuple(tokens.shape)}; got {tuple(segments.shape)}.")
    return segments


def _real(found: Tensor, segments: Tensor | None) -> Tensor:
    """Without padding, either way."""
    if segments is None:
        return found
    real = segments >= 0
    return found & real[:, :, None] & real[:, None, :]
