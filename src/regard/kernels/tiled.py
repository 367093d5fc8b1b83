"""The tiled online softmax, key block by key block, with tiles that may be skipped and scores that may be int8.

It follows the loop of a fused GPU kernel: running maximum, running sum, running output. A tile whose scores all lie far
below the running maxima needs neither exponentials nor the product with the values. :func:`regard.kernels.
block_sparse_attention` computes the same layouts faster where nothing is skipped; here what is saved is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.backends import has_triton, resolve
from regard.kernels.block_sparse import block_sparse_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups, score_scale
from regard.layout import BlockLayout, num_blocks

__all__ = ["TileStats", "quantize_block_int8", "smooth_k", "tiled_attention"]


@dataclass(frozen=True)
class TileStats:
    """Counted per batch and head, ``(batch, heads)`` int64 each; a tile is one warp of queries times one key block,
    not all hidden by the mask.

    ``tiles``: scores computed. ``skipped``: tiles among them without exponentials and value product. ``kept`` ``(batch,
    heads, warps, num_k_blocks)`` boolean: tiles computed to the end.
    """

    tiles: Tensor
    skipped: Tensor
    kept: Tensor


def smooth_k(key: Tensor) -> Tensor:
    """Keys minus their mean over tokens: a shift of every row of logits by a constant, which softmax does not see."""
    return key - key.mean(2, keepdim=True)


def quantize_block_int8(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``(..., length, dim)`` to int8 with one scale per block of tokens, ``max |x| / 127``.

    Returns the integers in the shape of ``x`` and the scales ``(..., num_blocks)``; ``x`` is about integers times
    scale.
    """
    short = -x.shape[-2] % block_size
    blocks = F.pad(x.to(accumulation_dtype(x.dtype)), (0, 0, 0, short)).unflatten(-2, (-1, block_size))
    scale = blocks.abs().amax((-2, -1)) / 127
    whole = (blocks / torch.where(scale > 0, scale, 1)[..., None, None]).round().to(torch.int8)
    return whole.flatten(-3, -2)[..., : x.shape[-2], :], scale


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    skip_threshold: float | Tensor = 50.0,
    quant: Literal["int8"] | None = None,
    smooth: bool = True,
    warps: int = 4,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, TileStats]:
    """Attention over the pairs of ``layout``; the output ``(batch, num_heads, q_len, value_dim)`` and what it took.

    skip_threshold: in powers of two, per call or per head ``(num_heads,)``: a tile is skipped when every row's
    largest score in it lies at least so far below the row's running maximum, so that each dropped weight is at most
    ``2^-threshold`` of the row's largest; infinity skips nothing. warps: groups of rows of a query block that decide
    on their own. quant: ``"int8"`` forms scores from int8 queries and keys (less their mean, unless ``smooth`` is
    off), one scale a block, exactly as integer arithmetic would. backend: ``"reference"``, or ``"triton"`` on a GPU.
    Where a gradient is asked for, it is that of the tiles computed, without quantisation.
    """
    if layout.q_len != query.shape[2] or layout.k_len != key.shape[2]:
        raise ShapeError(
            f"The layout is for {layout.q_len} queries and {layout.k_len} keys; got {query.shape[2]}, {key.shape[2]}."
        )
    if quant not in (None, "int8"):
        raise OptionError(f"quant is None or 'int8', not {quant!r}.")
    while layout.block_q % warps:
        warps -= 1
    threshold = torch.as_tensor(skip_threshold, dtype=torch.float32, device=query.device).expand(query.shape[1])
    form = resolve("tiled", backend, ("reference", "triton"))
    if form == "auto":
        form = "triton" if query.is_cuda and has_triton() and query.dtype != torch.float64 else "reference"
    with torch.no_grad():
        work, rounded = accumulation_dtype(query.dtype), (query, key)
        if quant == "int8":
            plain = smooth_k(key.to(work)) if smooth else key.to(work)
            rounded = (_rounded(query.to(work), layout.block_q), _rounded(plain, layout.block_k))
        run = _by_triton if form == "triton" else _run
        out, stats = run(*rounded, value, layout, threshold, warps, score_scale(query, scale))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        rows = layout.block_q // warps
        kept = stats.kept[:, :, : num_blocks(layout.q_len, rows)]
        none = torch.zeros_like(kept)
        fine = BlockLayout(kept, none, layout.mask, layout.q_len, layout.k_len, rows, layout.block_k)
        through = block_sparse_attention(query, key, value, fine, scale=scale)
        assert isinstance(through, Tensor)
        out = through + (out - through).detach()
    return out, stats


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    threshold: Tensor,
    warps: int,
    scale: float,
) -> tuple[Tensor, TileStats]:
    (batch, heads, q_len, _), work = query.shape, accumulation_dtype(query.dtype)
    block_q, block_k = layout.block_q, layout.block_k
    nq, nk, rows = layout.visit.shape[2], layout.visit.shape[3], layout.block_q // warps
    short_q, short_k = nq * block_q - q_len, nk * block_k - layout.k_len
    # Units are warps of rows: (batch, heads, nq, warps) flattened.
    queries = F.pad(query.to(work) * scale, (0, 0, 0, short_q)).reshape(-1, rows, query.shape[-1])
    keys = F.pad(expand_groups(key, heads).to(work), (0, 0, 0, short_k)).view(batch * heads, nk, block_k, -1)
    values = F.pad(expand_groups(value, heads).to(work), (0, 0, 0, short_k)).view(batch * heads, nk, block_k, -1)
    visit = layout.visit.expand(batch, heads, nq, nk).repeat_interleave(warps, 2).reshape(-1, nk)
    partial = layout.partial.expand(batch, heads, nq, nk).repeat_interleave(warps, 2).reshape(-1, nk)
    lane = torch.arange(len(queries), device=query.device) // (nq * warps)
    limit = -threshold.repeat(batch)[lane].to(work) * math.log(2)
    # Rows that only fill up the last unit have no say in what is skipped.
    real = ((torch.arange(len(queries), device=query.device) % (nq * warps))[:, None] * rows) + torch.arange(
        rows, device=query.device
    ) < q_len
    rule, one_batch, one_head = layout.mask.mod(q_len, layout.k_len), layout.mask.batch == 1, layout.mask.heads == 1
    top = queries.new_full((len(queries), rows), float("-inf"))
    total, out = torch.zeros_like(top), queries.new_zeros(len(queries), rows, value.shape[-1])
    kept, alive = torch.zeros_like(visit), torch.zeros_like(visit)
    for block in range(nk):
        unit = visit[:, block].nonzero()[:, 0]
        if not len(unit):
            continue
        scores = queries[unit] @ keys[lane[unit], block].transpose(-1, -2)
        edge = partial[unit, block] if block < nk - 1 or not short_k else torch.ones_like(unit, dtype=torch.bool)
        where = edge.nonzero()[:, 0]
        if len(where):
            some = unit[where]
            token_q = (some % (nq * warps))[:, None, None] * rows + torch.arange(rows, device=some.device)[:, None]
            token_k = torch.arange(block * block_k, (block + 1) * block_k, device=some.device)[None, None]
            at = lane[some][:, None, None]
            seen = rule(
                torch.zeros_like(at) if one_batch else at // heads,
                torch.zeros_like(at) if one_head else at % heads,
                token_q.clamp_max(q_len - 1),
                token_k.clamp_max(layout.k_len - 1),
            )
            scores[where] = scores[where].masked_fill(~(seen & (token_k < layout.k_len)), float("-inf"))
        local, before = scores.amax(-1), top[unit]
        gain = torch.where((local == float("-inf")) | ~real[unit], float("-inf"), local - before)
        best = gain.amax(-1)
        alive[unit, block] = best > float("-inf")
        go = best > limit[unit]
        kept[unit[go], block] = True
        unit, scores = unit[go], scores[go]
        if not len(unit):
            continue
        before, new = before[go], torch.maximum(before[go], local[go])
        base = torch.where(new.isfinite(), new, 0)
        weights, fade = (scores - base[..., None]).exp(), (before - base).exp()
        total[unit] = total[unit] * fade + weights.sum(-1)
        out[unit] = out[unit] * fade[..., None] + weights @ values[lane[unit], block]
        top[unit] = new
    out = out / torch.where(total > 0, total, 1)[..., None]
    tiles = alive.view(batch, heads, -1).sum(-1)
    done = kept.view(batch, heads, -1, nk)
    stats = TileStats(tiles, tiles - done.flatten(2).sum(-1), done)
    return out.view(batch, heads, nq * block_q, -1)[:, :, :q_len].to(value.dtype), stats


def _by_triton(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, threshold: Tensor, warps: int, scale: float
) -> tuple[Tensor, TileStats]:
    from regard.kernels.triton_blocks import skipping_forward

    limits = -threshold.float() * math.log(2)
    out, counted = skipping_forward(query, key.to(query.dtype), value.to(query.dtype), layout, scale, limits, warps)
    stats = TileStats((counted > 0).flatten(2).sum(-1), (counted == 1).flatten(2).sum(-1), counted == 2)
    return out.to(value.dtype), stats


def _rounded(x: Tensor, block_size: int) -> Tensor:
    """What int8 makes of ``x``. Products of such numbers, in float32, are those of the integers times both scales."""
    whole, scale = quantize_block_int8(x, block_size)
    return whole.to(x.dtype) * scale.repeat_interleave(block_size, -1)[..., : x.shape[-2], None]
