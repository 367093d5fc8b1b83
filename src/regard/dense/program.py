"""Attention from plain Python functions: ``regard.program(score_mod=..., mask_mod=..., rowwise=...)``.

    def alibi(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx).abs()

    mine = regard.program(alibi, lambda b, h, q, k: q >= k, rowwise="softmax")
    out = mine(query, key, value)                # forward and backward, on any device, memory linear in length

``out_i = sum_j w_ij v_j`` with ``w_i = rowwise(score_mod(scale q_i k_j, b, h, i, j) : mask_mod(b, h, i, j))``. The
functions are those of FlexAttention (Dong et al., "Flex Attention: A Programming Model for Generating Optimized
Attention Kernels", 2024, arXiv 2412.05496): scalar in their meaning, free to hold tensors, whose gradients they get.
``rowwise`` is an online reduction as in AttentionEngine (Chen et al., 2025, arXiv 2502.15349).

Which executor runs a call is a rule, or what :meth:`Program.tune` measured on this machine; ``program.executor(...)``
tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError
from regard.kernels.elementwise import Elementwise, reads
from regard.kernels.program import FORMS, ProgramCall, program_attention
from regard.kernels.rowwise import Rowwise
from regard.kernels.rowwise import rowwise as known_rowwise
from regard.kernels.tuning import Record, kept, shape_class, tune
from regard.layout import BlockLayout
from regard.masks import Mask, Predicate
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = ["Program", "program"]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Queries and keys of a tile that tuning tries.
_TILES = ((32, 256), (64, 256), (128, 128), (128, 256), (256, 256), (256, 512))


@register("program")
class Program(Mechanism):
    """Attention whose score, mask and reduction are functions.

    score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, or a module with that ``forward``, whose parameters become
    this module's. mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, or a :class:`~regard.masks.Mask`. rowwise: a name in
    :data:`regard.kernels.rowwise.ROWWISE` or a :class:`~regard.kernels.rowwise.Rowwise`, which is checked for
    associativity. align: where queries and keys differ in number, the last query stands where the last key stands
    (``"end"``, as in decoding), or the first where the first stands (``"start"``, as in FlexAttention). tile: queries
    and keys of a tile. backend: ``"auto"``, ``"eager"``, ``"tiled"``, ``"fused"``, ``"flex"``. tune: measure which is
    fastest at the first call of each class of shapes.

    Raises OptionError for functions that do not run on single pairs, or reductions that are not associative.
    """

    decodes = True

    def __init__(
        self,
        score_mod: ScoreMod | None = None,
        mask_mod: MaskMod | Mask | None = None,
        rowwise: str | Rowwise = "softmax",
        *,
        align: Literal["end", "start"] = "end",
        tile: tuple[int, int] | None = None,
        backend: str = "auto",
        tune: bool = False,
    ) -> None:
        super().__init__()
        if align not in ("end", "start"):
            raise OptionError(f"align is 'end' or 'start', got {align!r}.")
        if backend not in ("auto", *FORMS):
            raise OptionError(f"backend is 'auto' or one of {', '.join(FORMS)}; got {backend!r}.")
        if tile is not None and min(tile) < 1:
            raise OptionError(f"tile is (queries, keys), both at least 1; got {tile}.")
        self.score_mod, self.mask_mod, self.rowwise = score_mod, mask_mod, known_rowwise(rowwise)
        self.align, self.tile, self.backend, self.tunes = align, tile, backend, tune
        self._fitted: dict[Any, Elementwise] = {}

    def extra_repr(self) -> str:
        named = {"score_mod": self.score_mod, "mask_mod": self.mask_mod}
        told = [f"{name}={_name(what)}" for name, what in named.items() if what is not None]
        return ", ".join([*told, f"rowwise={self.rowwise.name!r}"])

    # Functions are tried on pairs, and masks decide by their values what is computed: no graph.
    @torch.compiler.disable
    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        call = self.call(query, key, request)
        backend, tile = self._choice(query, key, value, call, self.tunes)
        return program_attention(query, key, value, call, tile=tile, backend=backend)[0]

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        mask = self.call(query, key, request).mask
        if mask is None:
            return 1.0
        return BlockLayout.of(mask, query.shape[2], key.shape[2], device=query.device).density()

    def cost(self, shape: AttentionShape) -> Cost:
        return dense_cost(shape)

    def executor(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> str:
        """Which form runs a call: ``"eager"`` (the whole map), ``"tiled 64 x 512"`` (memory linear in length),
        ``"fused"`` (softmax under a mask) or ``"flex"``; and with it whether that was measured."""
        call = self.call(query, key, self.request(query, key, value, causal))
        backend, tile = self._choice(query, key, value, call, measure=False)
        form = call.forms(query, key, value)[0] if backend == "auto" else backend
        size = f" {tile[0]} x {tile[1]}" if tile is not None and form == "tiled" else ""
        measured = self.backend == "auto" and kept("program", self._class(query, key, value, call)) is not None
        return f"{form}{size}, measured" if measured else f"{form}{size}"

    def tune(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Record:
        """Measure the forms and tile sizes for calls like this one (with a backward pass if an input asks for a
        gradient), and keep which is fastest for all programs of this kind on this machine."""
        call = self.call(query, key, self.request(query, key, value, causal))
        return self._measure(query, key, value, call)

    def _measure(self, query: Tensor, key: Tensor, value: Tensor, call: ProgramCall) -> Record:
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        q, k, v = inputs = tuple(t.detach().requires_grad_(gradient) for t in (query, key, value))

        def run(form: str, tile: tuple[int, int] | None) -> Callable[[], Any]:
            def once() -> Any:
                out, _ = program_attention(q, k, v, call, tile=tile, backend=form)
                return torch.autograd.grad(out.sum(), inputs) if gradient else out

            return once

        candidates: dict[str, Callable[[], Any]] = {}
        for form in call.forms(query, key, value):
            for tile in _TILES if form == "tiled" else (None,):
                name = form if tile is None else f"{form} {tile[0]} {tile[1]}"
                candidates[name] = run(form, tile)
        return tune("program", self._class(query, key, value, call), candidates)

    def _choice(
        self, query: Tensor, key: Tensor, value: Tensor, call: ProgramCall, measure: bool
    ) -> tuple[str, tuple[int, int] | None]:
        if self.backend != "auto" or self.tile is not None:
            return self.backend, self.tile
        shapes = self._class(query, key, value, call)
        record = kept("program", shapes)
        if record is None and measure:
            record = self._measure(query, key, value, call)
        if record is None:
            return "auto", None
        form, *tile = record.best.split()
        if form not in call.forms(query, key, value):
            return "auto", None
        return form, (int(tile[0]), int(tile[1])) if tile else None

    def _class(self, query: Tensor, key: Tensor, value: Tensor, call: ProgramCall) -> str:
        return shape_class(
            query,
            key,
            value,
            rowwise=self.rowwise.name,
            score_mod=_kind(self.score_mod),
            mask=_kind(self.mask_mod) if self.mask_mod is not None else type(call.mask).__name__,
        )

    def call(self, query: Tensor, key: Tensor, request: Request) -> ProgramCall:
        """What a call computes, its functions fitted to these sizes."""
        sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        offset = key.shape[2] - query.shape[2] if self.align == "end" else 0
        rule = request.visible
        if self.mask_mod is not None:
            own = self._mask(sizes, offset, query)
            rule = own if rule is None else rule & own
        score = None if self.score_mod is None else self._fit(self.score_mod, 5, sizes, query)
        return ProgramCall(self.rowwise, score, rule, request.scale, offset)

    def _mask(self, sizes: tuple[int, int, int, int], offset: int, query: Tensor) -> Mask:
        if isinstance(self.mask_mod, Mask):
            return self.mask_mod.to(query.device)
        assert self.mask_mod is not None
        function = self._fit(self.mask_mod, 4, sizes, query)
        needs = [reads(self.mask_mod, 4, place, query.device) for place in (0, 1)]

        def rule(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return function(b, h, q_idx + offset, kv_idx)

        return Predicate(rule, sizes[0] if needs[0] else 1, sizes[1] if needs[1] else 1)

    def _fit(self, function: Any, arity: int, sizes: tuple[int, int, int, int], like: Tensor) -> Elementwise:
        offset = sizes[3] - sizes[2] if self.align == "end" else 0
        # Anew when a size doubles: what is tried should stand for what is run, and decoding grows by one at a time.
        known = (arity, *(size.bit_length() for size in sizes), offset.bit_length(), like.device, like.dtype)
        if known not in self._fitted:
            places = (range(sizes[0]), range(sizes[1]), range(offset, offset + sizes[2]), range(sizes[3]))
            self._fitted[known] = Elementwise(function, arity, places, like)
        return self._fitted[known]


def _name(what: Any) -> str:
    if what is None:
        return "none"
    return getattr(what, "__qualname__", None) or type(what).__name__


def _kind(what: Any) -> str:
    """What measurements of a function are kept under: its name, and what it does, since lambdas share names."""
    code = getattr(what, "__code__", None)
    if code is None:
        return _name(what)
    constants = [constant for constant in code.co_consts if not hasattr(constant, "co_code")]
    does = hashlib.sha256(code.co_code + repr((code.co_names, constants)).encode()).hexdigest()[:8]
    return f"{_name(what)} {does}"


def program(
    score_mod: ScoreMod | nn.Module | None = None,
    mask_mod: MaskMod | Mask | None = None,
    rowwise: str | Rowwise = "softmax",
    **options: Any,
) -> Program:
    """A :class:`Program`, a mechanism like any other: call it, put it into a model with ``regard.retrofit``."""
    return Program(score_mod, mask_mod, rowwise, **options)
