"""FlexAttention: softmax attention whose scores and mask are functions of one pair, over blocks that the mask needs.

    out = softmax(score_mod(scale q k^T, b, h, q_idx, kv_idx), -inf where mask_mod(b, h, q_idx, kv_idx) is False) v

Dong, Feng, Guessous, Liang and He, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
2024, arXiv 2412.05496. A mask apart from the scores lets whole blocks be left out, and others be computed without
asking (:mod:`regard.layers.block_mask`). Functions compose, where a library of kernels needs one for each combination:
:mod:`regard.layers.mask_mods` and :mod:`regard.layers.score_mods` have those that papers use.

    near = and_masks(causal, sliding_window(256))
    out = flex(query, key, value, soft_cap(30.0), create_block_mask(near, None, None, 4096, 4096))

Shapes: query ``(batch, num_heads, L, dim)``, key ``(batch, kv_heads, S, dim)`` and value ``(batch, kv_heads, S,
value_dim)`` give ``(batch, num_heads, L, value_dim)``. Time ``2 B^2 (dim + value_dim)`` for each block ``B x B`` that
is listed. The ``"tiled"`` back end keeps memory linear in length, forward and backward; ``"torch"`` compiles
``torch.nn.attention.flex_attention``, which on a CPU has no backward pass and no auxiliary outputs. Queries and keys
both count from 0, as there; the registered mechanism aligns them at the end, as all others do.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from regard.dense.full import FullAttention
from regard.dense.program import Program
from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.kernels import merge_attentions
from regard.kernels.elementwise import Elementwise
from regard.kernels.program import ProgramCall, program_attention
from regard.kernels.rowwise import ROWWISE, State
from regard.layers.block_mask import BlockMask, create_block_mask, create_mask
from regard.layers.mask_mods import MASKS, and_masks, make_document, not_mask, or_masks
from regard.layers.score_mods import MODS, ScoreMod
from regard.layout import BlockLayout
from regard.masks import Mask, MaskMod, Predicate
from regard.registry import register

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

__all__ = [
    "MASKS",
    "MODS",
    "BlockMask",
    "FlexAttention",
    "FlexAux",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex",
    "flex_decode",
    "make_document",
    "not_mask",
    "or_masks",
]

Backend = Literal["auto", "eager", "tiled", "torch"]
_FORMS = {"auto": "auto", "eager": "eager", "tiled": "tiled", "torch": "flex"}
# Keys of a part that flex_decode takes by itself.
_PART = 4096


class FlexAux(NamedTuple):
    """Of each row, ``(batch, num_heads, L)`` in the accumulation dtype, ``-inf`` where nothing is seen.

    lse: the log of the sum of exponentials of its scores. max_scores: the largest; no gradient passes through it.
    """

    lse: Tensor
    max_scores: Tensor


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | TorchBlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_aux: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, FlexAux]:
    """Attention under a ``score_mod`` and a block mask, with gradients for tensors that the functions hold.

    key and value of batch 1 serve all queries (as :class:`~regard.cache.paged_attention.PagedAttention` has them).
    enable_gqa: key/value heads may divide the query heads. return_aux: give a :class:`FlexAux` as well. backend:
    ``"eager"`` (the whole map), ``"tiled"`` (block by block), ``"torch"`` or ``"auto"``. A row with nothing to see
    gives zeros.

    Raises ShapeError, OptionError for functions that do not run on single pairs, BackendError.
    """
    key, value = _checked(query, key, value, enable_gqa)
    if backend not in _FORMS:
        raise OptionError(f"backend is one of {', '.join(_FORMS)}, got {backend!r}.")
    layout = _layout(block_mask, query, key)
    call = ProgramCall(ROWWISE["softmax"], _fitted(score_mod, query, key), scale=scale)
    out, state = program_attention(
        query, key, value, call, layout=layout, with_state=return_aux, backend=_FORMS[backend]
    )
    return (out, _aux(state)) if return_aux else out


def flex_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | TorchBlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_aux: bool = False,
    splits: int | None = None,
) -> Tensor | tuple[Tensor, FlexAux]:
    """:func:`flex` for a few queries over many keys, split into parts.

    Parts of the keys know nothing of each other and are merged by their log-sum-exps; one that no query sees is not
    read. Query heads that share a key head are rows of one product. splits: by default parts of about 4096 keys.
    """
    key, value = _checked(query, key, value, enable_gqa)
    heads, q_len = query.shape[1:3]
    kv_heads, k_len = key.shape[1:3]
    count = max(k_len // _PART, 1) if splits is None else splits
    if not 1 <= count <= k_len:
        raise OptionError(f"{k_len} keys are split into 1 to {k_len} parts, not {count}.")
    group, layout = heads // kv_heads, _layout(block_mask, query, key)
    fitted = _fitted(score_mod, query, key)
    packed = query.unflatten(1, (kv_heads, group)).flatten(2, 3)
    outs, lses, tops = [], [], []
    bounds = [k_len * part // count for part in range(count + 1)]
    for start, stop in pairwise(bounds):
        if layout is not None and not _reads(layout, start, stop):
            continue
        call = ProgramCall(
            ROWWISE["softmax"],
            None if fitted is None else fitted.instead(_packed_score(fitted.function, group, q_len, start)),
            None if layout is None else _packed_mask(layout, group, q_len, kv_heads, start),
            scale,
        )
        keys, values = key[:, :, start:stop], value[:, :, start:stop]
        out, state = program_attention(packed, keys, values, call, with_state=True)
        aux = _aux(state)
        outs.append(out)
        lses.append(aux.lse)
        tops.append(aux.max_scores)
    if outs:
        merged, lse = merge_attentions(outs, lses)
        top = torch.stack(tops).amax(0)
    else:
        merged = packed.new_zeros(*packed.shape[:3], value.shape[3])
        lse = top = packed.new_full(packed.shape[:3], float("-inf"))
    result, *rows = (t.unflatten(2, (group, q_len)).flatten(1, 2) for t in (merged, lse, top))
    return (result, FlexAux(*rows)) if return_aux else result


def _reads(layout: BlockLayout, start: int, stop: int) -> bool:
    """Whether any query sees a block of these keys."""
    return bool(layout.visit[..., start // layout.block_k : -(-stop // layout.block_k)].any())


def _packed_score(score_mod: Any, group: int, q_len: int, start: int) -> ScoreMod:
    """The function for rows that are a key head's query heads, and in each its queries; keys from ``start`` on."""

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        changed: Tensor = score_mod(score, b, h * group + q_idx // q_len, q_idx % q_len, kv_idx + start)
        return changed

    return mod


def _packed_mask(layout: BlockLayout, group: int, q_len: int, kv_heads: int, start: int) -> Mask:
    """The layout's pairs for the same rows."""
    visit, rule = layout.visit, layout.mask.wide_mod(layout.q_len, layout.k_len)
    batches, heads = max(len(visit), layout.mask.batch), max(visit.shape[1], layout.mask.heads)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head, q, kv = h * group + q_idx // q_len, q_idx % q_len, kv_idx + start
        lanes = b if len(visit) > 1 else b * 0, head if visit.shape[1] > 1 else head * 0
        return visit[(*lanes, q // layout.block_q, kv // layout.block_k)] & rule(b, head, q, kv)

    return Predicate(mask, batches, kv_heads if heads > 1 else 1)


def _aux(state: State | None) -> FlexAux:
    assert state is not None
    top, total = (part[..., 0] for part in state)
    seen = total > 0
    return FlexAux(torch.where(seen, torch.where(seen, total, 1).log() + top, float("-inf")), top)


def _checked(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor]:
    """Key and value with the query's batch."""
    if key.dim() == value.dim() == query.dim() == 4 and key.shape[0] == value.shape[0] == 1:
        key, value = (t.expand(query.shape[0], -1, -1, -1) for t in (key, value))
    FullAttention().request(query, key, value)
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ShapeError(
            f"There are {query.shape[1]} query heads and {key.shape[1]} key heads. Pass enable_gqa=True if groups of "
            "query heads share a key head."
        )
    return key, value


def _layout(block_mask: BlockMask | TorchBlockMask | None, query: Tensor, key: Tensor) -> BlockLayout | None:
    if block_mask is None:
        return None
    mask = block_mask if isinstance(block_mask, BlockMask) else BlockMask.from_torch(block_mask)
    batch, heads, q_len, k_len = mask.shape
    if (q_len, k_len) != (query.shape[2], key.shape[2]):
        raise ShapeError(
            f"The block mask is for {q_len} queries and {k_len} keys; got {query.shape[2]} and {key.shape[2]}. Make "
            "one for these lengths, or, if its function does not depend on them, cut one by mask._adjust(q_len, k_len)."
        )
    if batch not in (1, query.shape[0]) or heads not in (1, query.shape[1]):
        raise ShapeError(
            f"The block mask is for {batch} sequences and {heads} heads; the queries have {query.shape[0]} and "
            f"{query.shape[1]}. Make it with None where it is the same for all."
        )
    return mask.layout if mask.layout.visit.device == query.device else mask.to(query.device).layout


def _fitted(score_mod: ScoreMod | None, query: Tensor, key: Tensor) -> Elementwise | None:
    if score_mod is None:
        return None
    places = (range(query.shape[0]), range(query.shape[1]), range(query.shape[2]), range(key.shape[2]))
    return Elementwise(score_mod, 5, places, query)


@register("flex_attention")
class FlexAttention(Program):
    """Softmax attention from a score_mod and a mask_mod, given as functions or by name.

    score_mod: a function, a module, or a name in :data:`MODS` with score_options; mask_mod: a function, a
    :class:`~regard.masks.Mask`, or a name in :data:`MASKS` with mask_options. ``num_heads`` is filled in where a named
    score_mod takes it. Other options as :class:`~regard.dense.program.Program` has them.
    """

    def __init__(
        self,
        score_mod: ScoreMod | str | None = None,
        mask_mod: MaskMod | Mask | str | None = None,
        *,
        score_options: Mapping[str, Any] | None = None,
        mask_options: Mapping[str, Any] | None = None,
        align: Literal["end", "start"] = "end",
        tile: tuple[int, int] | None = None,
        backend: str = "auto",
        num_heads: int = 1,
    ) -> None:
        scored: Any = score_mod
        if isinstance(score_mod, str):
            options = dict(score_options or {})
            if score_mod in ("alibi", "relative_position", "learned_bias"):
                options.setdefault("num_heads", num_heads)
            scored = _named("score_mod", MODS, score_mod, options)
        masked: Any = mask_mod
        if isinstance(mask_mod, str):
            masked = _named("mask_mod", MASKS, mask_mod, dict(mask_options or {}))
        super().__init__(scored, masked, align=align, tile=tile, backend=backend)


def _named(what: str, known: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Any:
    if name not in known:
        raise UnknownNameError(what, name, known)
    try:
        return known[name](**options)
    except TypeError as error:
        raise OptionError(f"{what} {name!r} does not take these options: {error}.") from error
