"""Attention along the axes of a grid: a query sees the lines through its own place, under one joint softmax.

On a grid of sides ``n_1 .. n_D`` the lines through a place hold ``n_1 + ... + n_D - D + 1`` different places: its row
and its column on an image (a cross, or plus). The place itself lies on all of them and counts once. Scores and weights
take ``N (n_1 + ... + n_D)`` numbers where full attention takes ``N^2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.kernels import accumulation_dtype, expand_groups, score_scale

__all__ = ["axis_attention", "axis_mask", "axis_transport", "axis_weights"]


def axis_weights(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """The joint softmax over the lines through each place, ``(batch, heads, *space, n_1 + ... + n_D)``.

    query ``(batch, heads, *space, head_dim)``, key likewise (its heads may divide the query's). scale: of the logits,
    by default ``1 / sqrt(head_dim)``. The last axis holds the line along the first axis, then that along the second and
    so on; a place itself has its weight on the line along the last axis, and zero on the others. Half precision gives
    float32.
    """
    axes = query.dim() - 3
    if axes < 1 or query.shape[2:] != key.shape[2:] or query.shape[0] != key.shape[0]:
        raise ShapeError(
            "Axis attention takes query and key (batch, heads, *space, head_dim) on one space; got "
            f"{tuple(query.shape)} and {tuple(key.shape)}."
        )
    work = accumulation_dtype(query.dtype)
    queries, keys = query.to(work) * score_scale(query, scale), expand_groups(key, query.shape[1]).to(work)
    lines = []
    for axis in range(2, axes + 2):
        scores = queries.movedim(axis, -2) @ keys.movedim(axis, -2).transpose(-1, -2)
        if axis < axes + 1:
            itself = torch.eye(query.shape[axis], dtype=torch.bool, device=query.device)
            scores = scores.masked_fill(itself, float("-inf"))
        lines.append(scores.movedim(-2, axis))
    return torch.cat(lines, -1).softmax(-1)


def axis_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Softmax attention of every place to the lines through it: ``(batch, heads, *space, value_dim)``.

    As :func:`axis_weights`; the value may have another width than the key.
    """
    if key.shape[:-1] != value.shape[:-1]:
        raise ShapeError(f"Key and value stand on one space; got {tuple(key.shape)} and {tuple(value.shape)}.")
    weights = axis_weights(query, key, scale=scale)
    values = expand_groups(value, query.shape[1]).to(weights.dtype)
    out = weights.new_zeros(1)
    for axis, line in enumerate(weights.split(query.shape[2:-1], -1), start=2):
        out = out + (line.movedim(axis, -2) @ values.movedim(axis, -2)).movedim(-2, axis)
    return out.to(query.dtype)


def axis_transport(weights: Tensor, mass: Tensor) -> Tensor:
    """How much each place receives when every query hands its ``mass (batch, heads, *space)`` out by its weights.

    weights: as :func:`axis_weights` gives them. With a mass of one at one place, its row of the attention matrix as a
    map; again with earlier weights, what reaches that place through several passes.
    """
    axes = weights.dim() - 3
    if axes < 1 or mass.shape != weights.shape[:-1]:
        raise ShapeError(
            f"Transport takes mass of one number a place, {tuple(weights.shape[:-1])}; got {tuple(mass.shape)}."
        )
    received = torch.zeros_like(mass)
    for axis, line in enumerate(weights.split(weights.shape[2:-1], -1), start=2):
        received = received + (mass[..., None] * line).sum(axis).movedim(-1, axis)
    return received


def axis_mask(space: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Boolean ``(places, places)``, row-major: pairs on one line along an axis, a place and itself included."""
    place = torch.arange(math.prod(space), device=device)
    apart, step = torch.zeros(len(place), len(place), dtype=torch.int64, device=device), 1
    for side in reversed(space):
        along = place // step % side
        apart += along[:, None] != along
        step *= side
    return apart <= 1
