"""Nexus: queries and keys are themselves outputs of attention, so that one layer matches on what another token knows.

Chen et al., "Nexus: Higher-Order Attention Mechanisms in Transformers", 2025, arXiv 2512.03377. Order 1 is multi-head
attention, ``A = softmax(Q K^T / sqrt(d) + M) V`` with Q = x W_Q and so on. In order m the query and the key (or one of
them, ``nest``) come from an attention of order m - 1 under the same mask M, the value stays x W_V:

    U = heads' outputs of order m - 1,  Q = (x + g U) W_Q,  K = (x + g U) W_K,  A = softmax(Q K^T / sqrt(d) + M) V

A logit of order 1 is ``x_i^T B x_j`` with a fixed B and is blind to other tokens; from order 2 on it depends on all
that i and j see. With shared weights the recursion uses the same W_Q, W_K, W_V, so that the number of parameters does
not grow with the order; g is one (no gate) unless the layer upgrades a trained one.

The paper's abstract leaves open whether U is projected again and which matrices are shared; both are options. Without
the residual x, keys forget which token they stand for. Cost: ``order`` attentions with shared weights, else the sum of
``len(nest)^l`` for l < order; no map is kept. Decoding keeps the values and the keys of every level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from regard.cache import DynamicCache
from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention, dense_weights
from regard.layers.heads import head_sizes
from regard.layers.maps import merge_heads, split_heads
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean, Mask
from regard.mechanism import Layer, Mechanism
from regard.registry import register

__all__ = ["NexusAttention", "NexusState", "logit_context_dependence", "nexus_from_pretrained"]

Branch = Literal["q", "k"]


@dataclass
class NexusState:
    """What decoding keeps: the values and every level's keys, one cache each, in the order in which they are formed."""

    caches: list[DynamicCache] = field(default_factory=list)
    seen: int = 0
    _turn: int = 0

    def keep(self, new: Tensor) -> Tensor:
        """All of a tensor that a call forms anew, ``(batch, heads, seen + new, head_dim)``."""
        if self._turn == len(self.caches):
            self.caches.append(DynamicCache())
        cache = self.caches[self._turn]
        self._turn += 1
        return cache.append(new, new[..., :0]).key

    def advance(self, tokens: int) -> None:
        """A step of so many tokens is over."""
        self.seen, self._turn = self.seen + tokens, 0

    def nbytes(self) -> int:
        """Bytes of storage held."""
        return sum(cache.nbytes() for cache in self.caches)


@dataclass
class _Call:
    """One pass: who sees whom, where tokens stand, and what is kept of it."""

    causal: bool
    rule: Mask | None
    angles: tuple[Tensor, Tensor] | None = None
    state: NexusState | None = None
    inner: list[Tensor] | None = None

    def turn(self, x: Tensor) -> Tensor:
        return x if self.angles is None else apply_rotary(x, *self.angles)

    def keep(self, x: Tensor) -> Tensor:
        return x if self.state is None else self.state.keep(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The heads' outputs of an inner attention."""
        if self.inner is not None:
            self.inner.append(dense_weights(query, key, causal=self.causal, mask=self.rule))
        return dense_attention(query, key, value, causal=self.causal, mask=self.rule)


class _Projections(nn.Module):
    """Queries, keys and values of one attention: the outer one, or an inner one with weights of its own."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        order: int,
        share_weights: bool,
        nest: tuple[Branch, ...],
        inner_residual: bool,
        reproject: bool,
        gate_init: float | None,
        bias: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.nest, self.inner_residual, self.reproject = num_heads, nest, inner_residual, reproject

        def linear(branch: Branch | None = None) -> nn.Linear | None:
            # An inner output that replaces the linear map leaves it no part, unless an inner level shares it.
            replaced = order > 1 and branch in nest and not (share_weights or inner_residual or reproject)
            return None if replaced else nn.Linear(embed_dim, embed_dim, bias=bias)

        self.query, self.key = linear("q"), linear("k")
        self.value = nn.Linear(embed_dim, embed_dim, bias=bias)
        own = () if share_weights or order == 1 else nest
        self.inner = nn.ModuleDict(
            {
                branch: _Projections(
                    embed_dim, num_heads, order - 1, False, nest, inner_residual, reproject, gate_init, bias
                )
                for branch in own
            }
        )
        self.gate: nn.Parameter | None = None
        if gate_init is not None and order > 1:
            self.gate = nn.Parameter(torch.full((len(nest), num_heads), gate_init))

    def heads(self, linear: nn.Linear | None, x: Tensor) -> Tensor:
        assert linear is not None
        return split_heads(linear(x), self.num_heads)[0]

    def form(self, x: Tensor, order: int, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``(batch, num_heads, length, head_dim)`` and all keys and values, of an attention of this order."""
        if order > 1 and not self.inner:
            query, key, value = self.form(x, order - 1, call)
            below = dict.fromkeys(self.nest, call.attend(query, key, value))
        else:
            below = {
                cast(Branch, branch): call.attend(*cast(_Projections, node).form(x, order - 1, call))
                for branch, node in self.inner.items()
            }
            value = call.keep(self.heads(self.value, x))
            if "q" not in below:
                query = call.turn(self.heads(self.query, x))
            if "k" not in below:
                key = call.keep(call.turn(self.heads(self.key, x)))
        if "q" in below:
            query = call.turn(self._refined("q", x, below["q"]))
        if "k" in below:
            key = call.keep(call.turn(self._refined("k", x, below["k"])))
        return query, key, value

    def _refined(self, branch: Branch, x: Tensor, below: Tensor) -> Tensor:
        linear = self.query if branch == "q" else self.key
        if self.gate is not None:
            below = below * self.gate[self.nest.index(branch)].to(below.dtype).view(-1, 1, 1)
        if not self.reproject:
            return below + self.heads(linear, x) if self.inner_residual else below
        hidden = merge_heads(below)
        return self.heads(linear, x + hidden if self.inner_residual else hidden)


@register("nexus")
class NexusAttention(Layer):
    """``(batch, length, embed_dim)`` in and out.

    order: 1 is multi-head attention, each one more nests another attention. share_weights: one set of W_Q, W_K, W_V for
    all levels; else each nested query and key has an inner set of its own. nest: what comes from inner attention,
    ``("q", "k")`` or one of them. inner_residual: add the layer's input to the inner output. reproject: project the
    inner output by W_Q or W_K; False takes it as the query or key itself (with ``inner_residual``, added to the linear
    one). gate_init: None for no gate, else the first value of a learned gate per head on the inner
    output. rotary: rotary positions on queries and keys of every level.
    """

    patterns = frozenset(("self", "causal-self"))
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        order: int = 2,
        share_weights: bool = True,
        nest: Sequence[str] = ("q", "k"),
        inner_residual: bool = True,
        *,
        reproject: bool = True,
        gate_init: float | None = None,
        bias: bool = True,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        _, self.head_dim = head_sizes(embed_dim, num_heads)
        if order < 1:
            raise OptionError(f"order counts attentions inside one another, so it is at least 1; got {order}.")
        branches = tuple(dict.fromkeys(nest))
        if not branches or not set(branches) <= {"q", "k"}:
            raise OptionError(f"nest holds 'q', 'k' or both, got {nest!r}; for plain attention set order=1.")
        if gate_init is not None and not inner_residual:
            raise OptionError("A gate weighs the inner output against the residual; set inner_residual=True.")
        self.embed_dim, self.num_heads, self.order, self.share_weights = embed_dim, num_heads, order, share_weights
        self.nest, self.rotary = cast(tuple[Branch, ...], branches), rotary
        self.maps = _Projections(
            embed_dim, num_heads, order, share_weights, self.nest, inner_residual, reproject, gate_init, bias
        )
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias)

    def extra_repr(self) -> str:
        return f"order={self.order}, nest={self.nest}, share_weights={self.share_weights}"

    @property
    def attentions(self) -> int:
        """How many attentions a call computes."""
        return self.order if self.share_weights else sum(len(self.nest) ** level for level in range(self.order))

    def forward(
        self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None, return_inner: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Attend. mask: a regard mask or a boolean tensor, True where visible; it holds on every level.

        return_inner: also the maps ``(batch, num_heads, length, length)`` of the inner attentions, innermost first.
        """
        call = self._call(x, causal, mask)
        call.inner = [] if return_inner else None
        query, key, value = self.maps.form(x, self.order, call)
        heads = dense_attention(query, key, value, causal=causal, mask=call.rule)
        out: Tensor = self.out(merge_heads(heads))
        return out if call.inner is None else (out, call.inner)

    def logits(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """Outer scores before mask and softmax, ``(batch, num_heads, length, length)``."""
        query, key, _ = self.maps.form(x, self.order, self._call(x, causal, mask))
        return query @ key.transpose(-1, -2) * self.head_dim**-0.5

    def weights(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """The outer map, ``(batch, num_heads, length, length)``."""
        call = self._call(x, causal, mask)
        query, key, _ = self.maps.form(x, self.order, call)
        return dense_weights(query, key, causal=causal, mask=call.rule)

    def init_state(self, batch: int, *, like: Tensor) -> NexusState:
        """The decoding state before the first token."""
        return NexusState()

    def step(self, x: Tensor, state: NexusState) -> tuple[Tensor, NexusState]:
        """The next tokens ``(batch, new, embed_dim)``: their outputs and the state, which is changed in place."""
        call = self._call(x, True, None, state.seen)
        call.state = state
        heads = dense_attention(*self.maps.form(x, self.order, call), causal=True)
        state.advance(x.shape[1])
        return self.out(merge_heads(heads)), state

    def _call(self, x: Tensor, causal: bool, mask: Mask | Tensor | None, start: int = 0) -> _Call:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"NexusAttention takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
        angles = None
        if self.rotary:
            angles = rotary_angles(x.shape[1], self.head_dim, start=start, device=x.device, dtype=x.dtype)
        return _Call(causal, Boolean(mask) if isinstance(mask, Tensor) else mask, angles)


@torch.no_grad()
def nexus_from_pretrained(
    mha: nn.Module, order: int = 2, gate_init: float = 0.0, *, share_weights: bool = True, **options: Any
) -> NexusAttention:
    """Upgrade a trained layer; with ``gate_init=0`` its function is unchanged at first and the gates learn.

    mha: an ``nn.MultiheadAttention`` (its dropout is left out) or a :class:`regard.nn.MultiHeadAttention` around exact
    attention. With ``share_weights=False`` inner sets begin as copies. options: as in :class:`NexusAttention`.
    """
    parts = _torch_parts(mha) if isinstance(mha, nn.MultiheadAttention) else _host_parts(mha)
    weight, bias = parts[0]
    layer = NexusAttention(
        weight.shape[0],
        cast(int, mha.num_heads),
        order,
        share_weights,
        gate_init=gate_init,
        bias=bias is not None,
        rotary=bool(getattr(mha, "rotary", False)),
        **options,
    ).to(weight.device, weight.dtype)
    sets = [module for module in layer.modules() if isinstance(module, _Projections)]
    targets = [(each.query, each.key, each.value, layer.out) for each in sets]
    for linears in targets:
        for linear, (weight, bias) in zip(linears, parts, strict=True):
            if linear is None:
                continue
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
    return layer.train(mha.training)


def _torch_parts(mha: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    if mha.in_proj_weight is None or mha.bias_k is not None or mha.add_zero_attn:
        raise OptionError("Needs a plain self-attention module: one embed_dim, no add_bias_kv, no add_zero_attn.")
    biases = (None, None, None) if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
    pairs = list(zip(mha.in_proj_weight.chunk(3), biases, strict=True))
    return [*pairs, (mha.out_proj.weight, mha.out_proj.bias)]


def _host_parts(host: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    linears = [getattr(host, name, None) for name in ("query", "key", "value", "out")]
    mechanism = getattr(host, "mechanism", None)
    if not isinstance(mechanism, Mechanism) or not all(isinstance(linear, nn.Linear) for linear in linears):
        raise OptionError(
            f"Needs an nn.MultiheadAttention or a regard.nn.MultiHeadAttention, got {type(host).__name__}."
        )
    found = [(linear.weight, linear.bias) for linear in linears if linear is not None]
    if not mechanism.exact or any(weight.shape != found[0][0].shape for weight, _ in found):
        raise OptionError(
            "Only exact attention with equally many query and key heads is upgraded without change; got "
            f"{type(mechanism).__name__} with projections {[tuple(weight.shape) for weight, _ in found]}."
        )
    return found


@torch.no_grad()
def logit_context_dependence(layer: NexusAttention, x: Tensor, third: int = 0, *, causal: bool = False) -> Tensor:
    """How much each outer logit (i, j) moves when another token changes, ``(length, length)``: the largest change over
    batch and heads when token ``third`` is replaced by its negative; 0 where i or j is that token."""
    changed = x.clone()
    changed[:, third] = -changed[:, third]
    moved = (layer.logits(changed, causal=causal) - layer.logits(x, causal=causal)).abs().amax((0, 1))
    moved[third], moved[:, third] = 0, 0
    return moved
