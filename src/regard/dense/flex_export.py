"""A mechanism of this library as FlexAttention's two functions: ``flex(query, key, value, **to_flex(...)._asdict())``.

What a mechanism declares is taken as it is: its own functions (:class:`~regard.dense.program.Program`), its mask, the
blocks or tokens that it selects. Of any other the implied attention matrix is compared with softmax of the scores over
the pairs that it sees: if they agree the mechanism is a mask; if what is left does not depend on the queries and keys
it is a mask and a bias; otherwise it is neither, and an error says by how much it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regard.dense.full import FullAttention
from regard.dense.program import Program
from regard.errors import UnsupportedPatternError
from regard.kernels.shapes import expand_groups, score_scale
from regard.layers.block_mask import BlockMask, create_block_mask
from regard.layers.score_mods import ScoreMod
from regard.layout import BlockLayout
from regard.masks import Boolean, Mask
from regard.mechanism import Mechanism, Request, SparseMechanism

__all__ = ["FlexParts", "to_flex"]

# Relative difference of weights up to which two forms are the same, by dtype; other dtypes are compared in float32.
_CLOSE = {torch.float64: 1e-8, torch.float32: 2e-3}


class FlexParts(NamedTuple):
    """Arguments of :func:`~regard.dense.flex_attention.flex`."""

    score_mod: ScoreMod | None
    block_mask: BlockMask | None
    scale: float | None


def to_flex(
    mechanism: Mechanism,
    query: Tensor,
    key: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
    block_size: int = 128,
) -> FlexParts:
    """The ``score_mod`` and block mask with which :func:`~regard.dense.flex_attention.flex` gives what
    ``mechanism(query, key, value, causal=..., ...)`` gives.

    A mechanism that selects by content sees other pairs for other inputs, so what is returned holds for these. Where
    weights had to be compared, a bias is kept as the numbers that it has now.

    Raises UnsupportedPatternError for mechanisms that are no such softmax.
    """
    if not isinstance(mechanism, Mechanism):
        raise UnsupportedPatternError(
            f"{type(mechanism).__name__} has projections of its own, or works on maps; FlexAttention takes query, key "
            "and value. Export the mechanism inside it."
        )
    request = mechanism.request(query, key, key, causal, mask, grid, scale)
    sizes = (query.shape[2], key.shape[2])
    if isinstance(mechanism, Program):
        return _program(mechanism, query, key, request, block_size)
    if type(mechanism) is FullAttention and request.bias is None:
        rule = request.visible
        return FlexParts(None, None if rule is None else _blocks(rule, sizes, block_size, query), request.scale)
    if isinstance(mechanism, SparseMechanism) and type(mechanism).attend is SparseMechanism.attend:
        layout = mechanism.select(query, key, request)
        if isinstance(layout, BlockLayout):
            return FlexParts(None, BlockMask.from_layout(layout), request.scale)
        return FlexParts(None, _blocks(Boolean(layout.dense()), sizes, block_size, query), request.scale)
    return _compared(mechanism, query, key, request, block_size)


def _blocks(rule: Mask, sizes: tuple[int, int], block_size: int, like: Tensor) -> BlockMask:
    return create_block_mask(rule, None, None, *sizes, block_size, like.device)


def _program(mechanism: Program, query: Tensor, key: Tensor, request: Request, block_size: int) -> FlexParts:
    if mechanism.rowwise.name != "softmax":
        raise UnsupportedPatternError(
            f"This program reduces rows by {mechanism.rowwise.name!r}, and FlexAttention by softmax alone."
        )
    call = mechanism.call(query, key, request)
    sizes = (query.shape[2], key.shape[2])
    score = None if call.score_mod is None else _shifted(call.score_mod.function, call.offset)
    return FlexParts(score, None if call.mask is None else _blocks(call.mask, sizes, block_size, query), call.scale)


def _shifted(score_mod: Callable[..., Tensor], offset: int) -> ScoreMod:
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, q_idx + offset, kv_idx)


def _compared(mechanism: Mechanism, query: Tensor, key: Tensor, request: Request, block_size: int) -> FlexParts:
    name = mechanism.registered_name or type(mechanism).__name__
    if not mechanism.value_linear:
        raise UnsupportedPatternError(f"{name} is not linear in the values, so no score_mod and mask_mod give it.")
    seen, rest = _residual(mechanism, query, key, request, name)
    mask = _blocks(Boolean(_shared(seen)), (query.shape[2], key.shape[2]), block_size, query)
    close = _CLOSE.get(query.dtype, _CLOSE[torch.float32])
    if float(rest.abs().max()) <= close:
        return FlexParts(None, mask, request.scale)
    generator = torch.Generator().manual_seed(0)
    other = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (query, key)]
    seen_there, rest_there = _residual(mechanism, other[0], other[1], request, name)
    apart = float((rest - rest_there).abs().max()) if seen.equal(seen_there) else float("inf")
    if apart > close:
        raise UnsupportedPatternError(
            f"{name} is no softmax of scores under a mask and a bias: over the pairs that it sees, the logs of its "
            f"weights differ from the scores by up to {float(rest.abs().max()):.2g}, and not by the same for other "
            "inputs. A function of single scores can be written as score_mod of regard.program."
        )
    bias = rest[0]

    def added(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + bias[h, q_idx, kv_idx].to(score.dtype)

    return FlexParts(added, mask, request.scale)


def _shared(seen: Tensor) -> Tensor:
    """With one sequence or head where all are the same."""
    for axis in (0, 1):
        first = seen.narrow(axis, 0, 1)
        seen = first if bool((seen == first).all()) else seen
    return seen


def _residual(mechanism: Mechanism, query: Tensor, key: Tensor, request: Request, name: str) -> tuple[Tensor, Tensor]:
    """The pairs that are seen, and there the log of the weights less the score, less its mean in each row."""
    with torch.no_grad():
        weights = mechanism.implied(query, key, key.new_empty(*key.shape[:3], 0), request)
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        weights = weights.to(work)
        if bool((weights < 0).any()):
            raise UnsupportedPatternError(f"{name} has negative weights, which no softmax has.")
        sums = weights.sum(-1)
        if bool(((sums > 0) & ((sums - 1).abs() > _CLOSE[work])).any()):
            raise UnsupportedPatternError(
                f"{name} has rows of weights that do not sum to 1 (one sums to {float(sums[sums > 0].min()):.3g}), so "
                "it is no softmax over keys."
            )
        seen = weights > 0
        scores = score_scale(query, request.scale) * query.to(work) @ expand_groups(key, query.shape[1]).to(work).mT
        rest = torch.where(seen, torch.where(seen, weights, 1).log() - scores, 0)
        mean = rest.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
        return seen, torch.where(seen, rest - mean, 0)
