"""AttentionEngine: attention of one's own from a score, a mask and a row normaliser that is a fold with its derivative.

    for each block of keys:   s = score_mod(q k^T), hidden pairs neutral;  (p, scales, f) = online_fwd(s, scales)
                              o = o f + p v
    at the end:               (o, final) = online_fwd_epilogue(o, scales)
    backward, tile by tile:   p = forward(s, final),  dp = do v^T,  ds = backward(dp, p, final, sum do o)

Chen et al., "AttentionEngine: A Versatile Framework for Efficient Attention Mechanisms on Diverse Hardware Platforms",
2025, arXiv 2502.15349 (released code: ``AttentionEngine``, ``OnlineFunc``, ``CustomIO``, ``decider``). There the
functions become TileLang or CuTe kernels; here they run on torch tensors, a tile at a time. The recurrent pattern is
:class:`~regard.dense.linear_attention_engine.LinearAttentionEngine`.

When this, and when :func:`regard.program`: a program's normaliser is a monoid without a derivative (autograd goes
through a row of tiles, computed again), its functions may hold parameters, and it picks among executors: take it first.
Take an engine for a normaliser that is known as a sequential fold, for a backward pass written by hand (also one that
is not the derivative: ``OnlineRetention(detach=True)``), for scores of one tile at a time in both passes, or to carry
over code written for AttentionEngine.

Shapes: query ``(batch, num_heads, q_len, dim)``, key ``(batch, kv_heads, k_len, dim)``, value ``(batch, kv_heads,
k_len, value_dim)``. Time ``2 block_m block_n (dim + value_dim)`` for each tile that the mask needs; scores take
``block_m block_n`` numbers of each sequence and head, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.dense.full import FullAttention
from regard.errors import OptionError, ShapeError
from regard.kernels.elementwise import Elementwise, reads
from regard.kernels.online import OnlineCall, ScoreRule, TorchScore, online_attention, split_attention
from regard.kernels.online_functions import OnlineFunc, online_function
from regard.kernels.schedule import Device, Schedule, schedule
from regard.kernels.shapes import score_scale
from regard.kernels.tuning import Record, kept, shape_class, tune
from regard.layers.custom_io import CustomIO
from regard.layers.packed_heads import PackedScore, pack_custom, pack_mask, pack_queries, unpack_rows
from regard.layers.symbolic import SymbolicScore, trace_score
from regard.layout import BlockLayout
from regard.masks import Mask, MaskMod, Predicate
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = ["VARIANTS", "AttentionEngine", "EngineAttention", "choose_template", "meta_tensor"]

ScoreMod = Callable[..., Any]
"""``(score, custom, b, h, q_idx, kv_idx) -> score`` of a tile: tensors that broadcast together, custom by name."""
Template = Literal["mha", "gqa", "block_sparse", "decode_mha", "decode_gqa", "mla_decode"]

# Queries and keys of a tile that tuning tries, and keys of a part that decoding takes by itself.
_TILES = ((32, 128), (64, 128), (64, 256), (128, 128), (128, 256), (256, 256))
_PART = 4096


def sigmoid_score(score: Any, *_: Any) -> Any:
    """``sigmoid(s) = (tanh(s / 2) + 1) / 2`` of a symbolic array or a tensor."""
    return ((score * 0.5).tanh() + 1) * 0.5


def relu_score(score: Any, *_: Any) -> Any:
    """``max(s, 0)`` of a symbolic array."""
    return score.max(0.0)


VARIANTS: dict[str, tuple[ScoreMod | None, str]] = {
    "softmax": (None, "softmax"),
    "retention": (None, "retention"),
    "sigmoid": (sigmoid_score, "identity"),
    "relu": (relu_score, "identity"),
}
"""By name: a ``score_mod`` (None: the score itself) and an online function."""


def meta_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor with a shape and a dtype and no numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def choose_template(
    query: Tensor, key: Tensor, value: Tensor, *, extern_block_mask: bool = False, kv_shared: bool = False
) -> Template:
    """By shape. ``block_sparse`` and ``mla_decode`` by what is asked for; fewer queries than keys decode; heads that
    share keys are ``gqa``. Where queries decode, keys are split, and query heads that share keys are rows of one tile.
    """
    if extern_block_mask:
        return "block_sparse"
    if kv_shared:
        return "mla_decode"
    shared, decodes = query.shape[1] > key.shape[1], query.shape[2] < key.shape[2]
    if decodes:
        return "decode_gqa" if shared else "decode_mha"
    return "gqa" if shared else "mha"


def _rule(score_mod: ScoreMod | None, custom: CustomIO) -> ScoreRule | None:
    """With a derived formula where it can be traced."""
    if score_mod is None:
        return None
    names = custom.names

    def on_tensors(scores: Tensor, held: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
        changed: Tensor = score_mod(scores, custom.by_name(held), *index)
        return changed

    return trace_score(score_mod, names) or TorchScore(on_tensors)


class AttentionEngine:
    """A callable ``engine(query, key, value, *custom, block_mask=None)`` with gradients for all of these tensors.

    qkv_meta: query, key and value as they will come, or meta tensors (:func:`meta_tensor`); heads, dims and template
    are kept, lengths may change. custom_inputs: names and axes of more tensors, axes named ``batch``, ``heads``,
    ``seq_len``, ``seq_len_kv``. score_mod: ``(score, custom, b, h, q_idx, kv_idx)`` of a tile; it scales, as scores
    come as ``scale q k``, by default with scale 1. Tensors that it holds get no gradient. mask_mod: ``(b, h, q_idx,
    kv_idx) -> bool`` or a :class:`~regard.masks.Mask`; asked once for each size of call. online_func: ``"softmax"``,
    ``"retention"``, ``"identity"`` or one's own. mask_value: the score of hidden pairs, by default the function's; it
    must be neutral. infer_mask: skip blocks in which nothing is seen. extern_block_mask: each call brings a boolean
    ``(batch | 1, num_heads | 1, q_len / block_m, k_len / block_n)`` of blocks that are computed. kv_shared: calls are
    ``engine(query, kv, *custom)``, the value is the first ``value_dim`` channels of the key. backend: ``"tiled"``, or
    ``"reference"``, the whole map with autograd. device: run unfused (``reference``) where :meth:`schedule` finds no
    tile for it. align: the last query stands where the last key stands (``"end"``), or the first where the first
    stands. splits: parts of the keys in decoding without gradients, by default of about 4096 keys. tune: measure tile
    sizes at the first call.
    """

    def __init__(
        self,
        qkv_meta: tuple[Tensor, Tensor, Tensor],
        custom_inputs: CustomIO | Mapping[str, Sequence[int | str]] | None = None,
        score_mod: ScoreMod | None = None,
        mask_mod: MaskMod | Mask | None = None,
        online_func: str | OnlineFunc = "softmax",
        *,
        mask_value: float | None = None,
        infer_mask: bool = True,
        block_m: int = 128,
        block_n: int = 128,
        extern_block_mask: bool = False,
        kv_shared: bool = False,
        backend: Literal["reference", "tiled"] = "tiled",
        device: Device | None = None,
        scale: float = 1.0,
        align: Literal["end", "start"] = "end",
        splits: int | None = None,
        tune: bool = False,
    ) -> None:
        if backend not in ("reference", "tiled") or align not in ("end", "start"):
            raise OptionError(f"backend is 'reference' or 'tiled', align 'end' or 'start'; got {backend!r}, {align!r}.")
        FullAttention().request(*qkv_meta)
        self.qkv_meta = tuple(meta_tensor(*t.shape, dtype=t.dtype) for t in qkv_meta)
        self.custom_inputs = custom_inputs if isinstance(custom_inputs, CustomIO) else CustomIO(custom_inputs)
        self.score = _rule(score_mod, self.custom_inputs)
        self.online_func, self.mask_value = online_function(online_func, mask_value)
        self.mask_mod, self.infer_mask, self.align, self.scale = mask_mod, infer_mask, align, scale
        self.block_m, self.block_n = _tile(block_m, block_n)
        self.extern_block_mask, self.kv_shared, self.splits, self.tunes = extern_block_mask, kv_shared, splits, tune
        self.template = choose_template(*qkv_meta, extern_block_mask=extern_block_mask, kv_shared=kv_shared)
        fused = device is None or self.schedule(device).fuse
        self.backend = backend if fused else "reference"
        self._layouts: dict[Any, BlockLayout] = {}

    @property
    def derivative(self) -> dict[str, str]:
        """The derived formulas of ``score_mod`` by what they are the gradient of; empty where autograd runs."""
        found = self.score.derivative if isinstance(self.score, SymbolicScore) else {}
        return {name: str(formula) for name, formula in found.items()}

    def schedule(self, device: Device) -> Schedule:
        """The tile configurations with which a fused kernel of these shapes fits a GPU."""
        query, key, value = self.qkv_meta
        return schedule((query, key, value), device)

    def __call__(self, query: Tensor, key: Tensor, *rest: Tensor, block_mask: Tensor | None = None) -> Tensor:
        value, custom = self._parted(query, key, rest)
        if self.tunes and self.backend == "tiled":
            record = kept("online", self._class(query, key, value))
            self._use(self._measure(query, key, value, custom, block_mask) if record is None else record)
            self.tunes = False
        return self._run(query, key, value, custom, block_mask)

    def tune(self, query: Tensor, key: Tensor, *rest: Tensor, block_mask: Tensor | None = None) -> Record:
        """Measure tile sizes for calls like this one (with a backward pass if an input asks for a gradient), use the
        fastest from now on and keep it for engines of this kind on this machine."""
        value, custom = self._parted(query, key, rest)
        record = self._measure(query, key, value, custom, block_mask)
        self._use(record)
        return record

    def _parted(self, query: Tensor, key: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Value and placed custom inputs, checked against what the engine was made for."""
        if self.kv_shared:
            value, custom = key[..., : self.qkv_meta[2].shape[3]], rest
        elif rest:
            value, custom = rest[0], rest[1:]
        else:
            raise ShapeError("An engine is called with query, key, value and its custom inputs; value is missing.")
        FullAttention().request(query, key, value)
        made, got = ([(t.shape[1], t.shape[3], t.dtype) for t in some] for some in (self.qkv_meta, (query, key, value)))
        template = choose_template(
            query, key, value, extern_block_mask=self.extern_block_mask, kv_shared=self.kv_shared
        )
        if made != got or template != self.template:
            raise ShapeError(
                f"This engine is a {self.template!r} for heads, dims and dtypes {made}; the call is a {template!r} of "
                f"{got}. Make another engine for it."
            )
        sizes = dict(zip(("batch", "heads", "seq_len", "seq_len_kv"), (*query.shape[:3], key.shape[2]), strict=True))
        return value, self.custom_inputs.placed(custom, sizes, query)

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, custom: tuple[Tensor, ...], block_mask: Tensor | None
    ) -> Tensor:
        if (block_mask is not None) != self.extern_block_mask:
            raise OptionError(
                "block_mask comes with every call of an engine with extern_block_mask=True, and with no other."
            )
        q_len, k_len = query.shape[2], key.shape[2]
        offset = k_len - q_len if self.align == "end" else 0
        call = OnlineCall(self.online_func, self.score, self.mask_value, self.scale, offset)
        packs = self.backend == "tiled" and self.template in ("decode_gqa", "mla_decode") and q_len < k_len
        group = query.shape[1] // key.shape[1] if packs else 1
        layout = self._layout(query, key, group)
        if block_mask is not None:
            layout = layout.only(_checked(block_mask, layout, query))
        if self.backend == "reference":
            return online_attention(query, key, value, call, layout, custom, reference=True)[0]
        if group > 1:
            score = None if call.score is None else PackedScore(call.score, group, q_len, offset)
            call = replace(call, score=score, offset=0)
            custom = tuple(pack_custom(t, query.shape[1], group, q_len) for t in custom)
        rows = pack_queries(query, group)
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *custom))
        splits = 1
        if not differentiated and self.template in ("decode_mha", "decode_gqa", "mla_decode"):
            splits = min(max(k_len // _PART, 1), layout.visit.shape[3]) if self.splits is None else self.splits
        if splits > 1:
            out = split_attention(rows, key, value, call, layout, custom, splits=splits)
        else:
            out = online_attention(rows, key, value, call, layout, custom)[0]
        return unpack_rows(out, group)

    def _layout(self, query: Tensor, key: Tensor, group: int) -> BlockLayout:
        sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        known = (*sizes, self.block_m, self.block_n, group, query.device)
        if known not in self._layouts:
            mask, rows = self._mask(sizes, query), sizes[2] * group
            if mask is not None and group > 1:
                mask = pack_mask(mask, group, sizes[2], sizes[3], key.shape[1])
            block_m, block_n = min(self.block_m, rows), min(self.block_n, sizes[3])
            layout = BlockLayout.of(mask, rows, sizes[3], block_m, block_n, query.device)
            if not self.infer_mask:
                visit = torch.ones_like(layout.visit)
                layout = replace(layout, visit=visit, full=torch.zeros_like(visit) if mask is not None else visit)
            # Lengths that grow one by one are not all kept.
            if len(self._layouts) >= 8:
                self._layouts.clear()
            self._layouts[known] = layout
        return self._layouts[known]

    def _mask(self, sizes: tuple[int, int, int, int], query: Tensor) -> Mask | None:
        if self.mask_mod is None or isinstance(self.mask_mod, Mask):
            return None if self.mask_mod is None else self.mask_mod.to(query.device)
        offset = sizes[3] - sizes[2] if self.align == "end" else 0
        places = (range(sizes[0]), range(sizes[1]), range(offset, offset + sizes[2]), range(sizes[3]))
        function = Elementwise(self.mask_mod, 4, places, query)
        batch, heads = (
            size if reads(self.mask_mod, 4, place, query.device) else 1 for place, size in enumerate(sizes[:2])
        )
        return Predicate(lambda b, h, q_idx, kv_idx: function(b, h, q_idx + offset, kv_idx), batch, heads)

    def _class(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        return shape_class(query, key, value, online=type(self.online_func).__name__, template=self.template)

    def _measure(
        self, query: Tensor, key: Tensor, value: Tensor, custom: tuple[Tensor, ...], block_mask: Tensor | None
    ) -> Record:
        if block_mask is not None:
            raise OptionError("An external block mask fixes the tile size; there is nothing to tune.")
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        q, k, v = inputs = tuple(t.detach().requires_grad_(gradient) for t in (query, key, value))
        usual = self.block_m, self.block_n

        def run(tile: tuple[int, int]) -> Callable[[], Any]:
            def once() -> Any:
                self.block_m, self.block_n = tile
                out = self._run(q, k, v, custom, None)
                return torch.autograd.grad(out.sum(), inputs) if gradient else out

            return once

        try:
            return tune("online", self._class(query, key, value), {f"{m} {n}": run((m, n)) for m, n in _TILES})
        finally:
            self.block_m, self.block_n = usual

    def _use(self, record: Record) -> None:
        self.block_m, self.block_n = (int(size) for size in record.best.split())


def _tile(block_m: int, block_n: int) -> tuple[int, int]:
    if block_m < 1 or block_n < 1:
        raise OptionError(f"block_m and block_n are at least 1, got {block_m} and {block_n}.")
    return block_m, block_n


def _checked(block_mask: Tensor, layout: BlockLayout, query: Tensor) -> Tensor:
    expected = layout.visit.shape[2:]
    lanes = [size in (1, full) for size, full in zip(block_mask.shape, query.shape[:2], strict=False)]
    if block_mask.dtype != torch.bool or block_mask.dim() != 4 or block_mask.shape[2:] != expected or not all(lanes):
        raise ShapeError(
            f"block_mask is boolean (batch | 1, num_heads | 1, {expected[0]}, {expected[1]}) for blocks of "
            f"{layout.block_q} x {layout.block_k}; got {block_mask.dtype} {tuple(block_mask.shape)}."
        )
    return block_mask.to(query.device)


@register("attention_engine")
class EngineAttention(Mechanism):
    """The engine's parallel pattern as a mechanism.

    variant: ``"softmax"``, ``"retention"``, ``"sigmoid"``, ``"relu"`` or an
    :class:`~regard.kernels.online_functions.OnlineFunc`. score_mod: ``(score, custom, b, h, q_idx, kv_idx)``, in place
    of the variant's; ``custom`` is empty. block_m, block_n: queries and keys of a tile.
    """

    decodes = True

    def __init__(
        self,
        variant: str | OnlineFunc = "softmax",
        score_mod: ScoreMod | None = None,
        *,
        block_m: int = 128,
        block_n: int = 128,
    ) -> None:
        super().__init__()
        online: str | OnlineFunc
        if isinstance(variant, str):
            if variant not in VARIANTS:
                raise OptionError(f"variant is one of {', '.join(VARIANTS)} or an OnlineFunc, got {variant!r}.")
            own, online = VARIANTS[variant]
        else:
            own, online = None, variant
        self.score = _rule(own if score_mod is None else score_mod, CustomIO())
        self.online_func, self.mask_value = online_function(online)
        self.block_m, self.block_n = _tile(block_m, block_n)

    def extra_repr(self) -> str:
        return f"{type(self.online_func).__name__}, block_m={self.block_m}, block_n={self.block_n}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        q_len, k_len = query.shape[2], key.shape[2]
        scale = score_scale(query, request.scale)
        call = OnlineCall(self.online_func, self.score, self.mask_value, scale, k_len - q_len)
        blocks = min(self.block_m, q_len), min(self.block_n, k_len)
        layout = BlockLayout.of(request.visible, q_len, k_len, *blocks, query.device)
        return online_attention(query, key, value, call, layout)[0]

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        blocks = min(self.block_m, query.shape[2]), min(self.block_n, key.shape[2])
        return BlockLayout.of(request.visible, query.shape[2], key.shape[2], *blocks, query.device).density()

    def cost(self, shape: AttentionShape) -> Cost:
        return dense_cost(shape)
