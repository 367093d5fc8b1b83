"""Attention by an online function, tile by tile, forward and backward.

For a block of queries and each block of keys that the layout lists: ``s = score(scale q k^T)``, hidden pairs set to the
function's neutral score, ``(p, scales, f) = online_fwd(s, scales)``, ``o = o f + p v``; then the epilogue. The backward
pass makes ``p = forward(s, final)`` again, ``dp = do v^T``, ``ds = backward(dp, p, final, sum do o)``, takes ``ds``
through the score's own derivative, and adds ``dq = ds k``, ``dk = ds^T q``, ``dv = p^T do``. Scores exist for one tile
``block_q x block_k`` of each sequence and head at a time. Form ``reference`` has the map whole, and autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.errors import OptionError
from regard.kernels.lanes import Lanes, by_lanes, needed
from regard.kernels.online_functions import OnlineFunc, Scales, initial_scales, whole_row
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.layout import BlockLayout
from regard.masks import MaskMod

__all__ = ["OnlineCall", "ScoreRule", "TorchScore", "online_attention", "split_attention"]

Index = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a tile: sequences ``(n, 1, 1, 1)``, heads ``(1, n, 1, 1)``, queries ``(1, 1, n, 1)``, keys ``(1, 1, 1, n)``."""
Custom = tuple[Tensor, ...]
"""Tensors of four axes, sequences, heads, queries, keys, each whole or of size 1; of a tile, their part in it."""


class ScoreRule(Protocol):
    """A change of a tile of scores, with its derivative."""

    def __call__(self, scores: Tensor, custom: Custom, index: Index) -> Tensor:
        """The scores, changed."""
        ...

    def gradient(
        self, grad: Tensor, scores: Tensor, custom: Custom, index: Index, needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Of the scores, and of the custom tensors that need it, from the gradient of what was changed."""
        ...


@dataclass(frozen=True)
class TorchScore:
    """A function of torch tensors ``(scores, custom, index)``; autograd derives a tile of it at a time."""

    function: Callable[[Tensor, Custom, Index], Tensor]

    def __call__(self, scores: Tensor, custom: Custom, index: Index) -> Tensor:
        return self.function(scores, custom, index).expand(scores.shape)

    def gradient(
        self, grad: Tensor, scores: Tensor, custom: Custom, index: Index, needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        with torch.enable_grad():
            given = scores.detach().requires_grad_()
            held = [t.detach().requires_grad_(need) for t, need in zip(custom, needs, strict=True)]
            changed = self(given, tuple(held), index)
            wanted = [given, *(t for t in held if t.requires_grad)]
            found = iter(torch.autograd.grad(changed, wanted, grad, allow_unused=True))
        first = next(found)
        return torch.zeros_like(scores) if first is None else first, [next(found) if need else None for need in needs]


@dataclass(frozen=True)
class OnlineCall:
    """What is computed. score: None for the scores themselves. mask_value: of hidden pairs, where the function is
    neutral. offset: added to a query's place to give the score's ``q_idx``."""

    function: OnlineFunc
    score: ScoreRule | None
    mask_value: float
    scale: float
    offset: int = 0


def online_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: OnlineCall,
    layout: BlockLayout,
    custom: Custom = (),
    *,
    reference: bool = False,
) -> tuple[Tensor, Scales]:
    """The output ``(batch, num_heads, q_len, value_dim)`` and the final scales ``(batch, num_heads, q_len, 1)``.

    query ``(batch, num_heads, q_len, d)``; key and value ``(batch, kv_heads, k_len, ...)``. Tiles are the layout's
    blocks. Gradients reach query, key, value and custom, not what comes through the scales. reference: the whole map,
    differentiated by autograd and not by ``call.function.backward``.
    """
    heads, work = query.shape[1], accumulation_dtype(query.dtype)
    q, k, v = query.to(work), expand_groups(key, heads).to(work), expand_groups(value, heads).to(work)
    held = tuple(t.to(work) if t.is_floating_point() else t for t in custom)
    if call.score is not None and torch.is_grad_enabled():
        _nothing_held(call.score, q, held)
    if reference:
        out, final = _whole(q, k, v, call, layout, held)
    else:
        out, final = _tiles(q, k, v, call, layout, held)
    return out.to(query.dtype), final


def _nothing_held(score: ScoreRule, like: Tensor, custom: Custom) -> None:
    """Try one pair for gradients that tiles would not pass on."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=like.device)
    held = tuple(t[:1, :1, :1, :1].detach() for t in custom)
    if score(like.new_zeros(1, 1, 1, 1), held, (zero, zero, zero, zero)).requires_grad:
        raise OptionError(
            "score_mod holds a tensor that asks for a gradient, which it would not get. Pass it as a custom input, or "
            "use regard.program, where functions may hold parameters."
        )


def _whole(
    q: Tensor, k: Tensor, v: Tensor, call: OnlineCall, layout: BlockLayout, custom: Custom
) -> tuple[Tensor, Scales]:
    scores = call.scale * q @ k.transpose(-1, -2)
    places = [torch.arange(size, device=q.device) for size in (q.shape[0], q.shape[1], q.shape[2], k.shape[2])]
    b, h, q_idx, kv_idx = (place.view([-1 if i == at else 1 for i in range(4)]) for at, place in enumerate(places))
    if call.score is not None:
        scores = call.score(scores, custom, (b, h, q_idx + call.offset, kv_idx))
    return whole_row(call.function, torch.where(layout.dense(), scores, call.mask_value), v)


# Which tiles are computed depends on the mask's values: no graph.
@torch.compiler.disable
def _tiles(
    q: Tensor, k: Tensor, v: Tensor, call: OnlineCall, layout: BlockLayout, custom: Custom
) -> tuple[Tensor, Scales]:
    rule = layout.mask.wide_mod(layout.q_len, layout.k_len)

    def run(lanes: Lanes) -> list[Tensor]:
        plan = _Plan(call, layout, rule, lanes, needed(layout, lanes))
        return list(_Online.apply(plan, *(lanes.of(t) for t in (q, k, v, *custom))))

    out, *final = by_lanes(layout, q.shape[0], q.shape[1], q.device, run)
    return out, dict(zip(call.function.final_rowscales, final, strict=True))


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: OnlineCall,
    layout: BlockLayout,
    custom: Custom = (),
    *,
    splits: int,
) -> Tensor:
    """As :func:`online_attention`, over ``splits`` parts of the key blocks that know nothing of each other and are
    summed with the shares that ``call.function.combine`` gives. No gradients."""
    columns = layout.visit.shape[3]
    if not 1 <= splits <= columns:
        raise OptionError(f"{columns} blocks of keys are split into 1 to {columns} parts, not {splits}.")
    outs: list[Tensor] = []
    finals: list[Scales] = []
    for part in torch.arange(columns, device=query.device).tensor_split(splits):
        chosen = torch.zeros(columns, dtype=torch.bool, device=query.device)
        chosen[part] = True
        with torch.no_grad():
            out, final = online_attention(query, key, value, call, layout.only(chosen), custom)
        outs.append(out.to(accumulation_dtype(query.dtype)))
        finals.append(final)
    shares = call.function.combine({name: torch.stack([f[name] for f in finals]) for name in finals[0]})
    return (shares.to(query.device) * torch.stack(outs)).sum(0).to(query.dtype)


@dataclass(frozen=True)
class _Plan:
    """The tiles of some lanes: for each block of queries its blocks of keys."""

    call: OnlineCall
    layout: BlockLayout
    rule: MaskMod
    lanes: Lanes
    rows: list[list[tuple[int, int, bool]]]

    def tile(
        self, q: Tensor, k: Tensor, custom: Custom, row: int, first: int, certain: bool
    ) -> tuple[Tensor, Tensor, Custom, Index, Tensor | None]:
        """Scores before and after the score's rule and the mask, the tile's custom tensors and indices, and which pairs
        are seen (None: all)."""
        top, left = row * self.layout.block_q, first * self.layout.block_k
        q_idx = torch.arange(top, top + q.shape[2], device=q.device).view(1, 1, -1, 1)
        kv_idx = torch.arange(left, left + k.shape[2], device=q.device).view(1, 1, 1, -1)
        part = tuple(_part(_part(t, 2, top, q.shape[2]), 3, left, k.shape[2]) for t in custom)
        index = (*self.lanes.index, q_idx + self.call.offset, kv_idx)
        plain = scores = (q * self.call.scale) @ k.transpose(-1, -2)
        if self.call.score is not None:
            scores = self.call.score(scores, part, index)
        seen = None
        if not certain:
            seen = self.rule(*self.lanes.index, q_idx, kv_idx).expand(scores.shape)
            scores = torch.where(seen, scores, self.call.mask_value)
        return plain, scores, part, index, seen


def _part(tensor: Tensor, dim: int, start: int, count: int) -> Tensor:
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, start, count)


class _Online(torch.autograd.Function):
    """Of ``(plan, query, key, value, *custom)``: the output, and the final scales in their order."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, *custom: Tensor) -> tuple[Tensor, ...]:
        function, layout = plan.call.function, plan.layout
        outs, finals = [], []
        for row, blocks in enumerate(plan.rows):
            part = _rows(q, row, layout.block_q)
            scales = initial_scales(function, part)
            out = part.new_zeros(*part.shape[:3], v.shape[3])
            for first, _, certain in blocks:
                keys, values = (_rows(t, first, layout.block_k) for t in (k, v))
                scores = plan.tile(part, keys, custom, row, first, certain)[1]
                weights, scales, factor = function.online_fwd(scores, scales)
                out = out * factor + weights @ values
            out, final = function.online_fwd_epilogue(out, scales)
            outs.append(out)
            finals.append([final[name] for name in function.final_rowscales])
        whole = torch.cat(outs, 2)
        scaled = [torch.cat(some, 2) for some in zip(*finals, strict=True)]
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, whole, *scaled, *custom)
        ctx.mark_non_differentiable(*scaled)
        return (whole, *scaled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *scales: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        function, layout, names = plan.call.function, plan.layout, plan.call.function.final_rowscales
        q, k, v, out, *rest = ctx.saved_tensors
        scaled, custom = rest[: len(names)], tuple(rest[len(names) :])
        needs = ctx.needs_input_grad[4:]
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        dcustom = [torch.zeros_like(t) if need else None for t, need in zip(custom, needs, strict=True)]
        for row, blocks in enumerate(plan.rows):
            part, do = _rows(q, row, layout.block_q), _rows(grad, row, layout.block_q)
            final = {name: _rows(t, row, layout.block_q) for name, t in zip(names, scaled, strict=True)}
            doosum = (do * _rows(out, row, layout.block_q)).sum(-1, keepdim=True)
            for first, _, certain in blocks:
                keys, values = (_rows(t, first, layout.block_k) for t in (k, v))
                plain, scores, held, index, seen = plan.tile(part, keys, custom, row, first, certain)
                weights = function.forward(scores, final)
                _rows(dv, first, layout.block_k).add_(weights.transpose(-1, -2) @ do)
                ds = function.backward(do @ values.transpose(-1, -2), weights, final, doosum)
                if seen is not None:
                    ds = ds.masked_fill(~seen, 0)
                if plan.call.score is not None:
                    ds, more = plan.call.score.gradient(ds, plain, held, index, needs)
                    _add_custom(dcustom, more, row * layout.block_q, first * layout.block_k)
                ds = ds * plan.call.scale
                _rows(dq, row, layout.block_q).add_(ds @ keys)
                _rows(dk, first, layout.block_k).add_(ds.transpose(-1, -2) @ part)
        return (None, dq, dk, dv, *dcustom)


def _rows(tensor: Tensor, index: int, block: int) -> Tensor:
    """A block of tokens."""
    return tensor[:, :, index * block : (index + 1) * block]


def _add_custom(totals: list[Tensor | None], found: list[Tensor | None], top: int, left: int) -> None:
    for total, tile in zip(totals, found, strict=True):
        if total is not None and tile is not None:
            _part(_part(total, 2, top, tile.shape[2]), 3, left, tile.shape[3]).add_(tile)
