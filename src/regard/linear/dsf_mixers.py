"""The token mixers that the dynamical systems framework compares, in one frame, so that they differ in their recurrence
alone.

Sieber et al., "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", 2024, arXiv 2405.15731; :mod:`regard.linear.dsf` writes each as the same linear time-varying system.

    separable attention  h_i = h_{i-1} + psi(k_i) v_i^T,                        y_i = phi(q_i) h_i / eta_i
    S6, SSD              h_i = exp(Delta_i A) h_{i-1} + Delta_i b_i u_i^T,      y_i = c_i h_i + D u_i
    RG-LRU               h_i = a_i h_{i-1} + sqrt(1 - a_i^2) sigmoid(g_i) u_i,  y_i = h_i
    qLSTM                h_i = sigmoid(f_i) h_{i-1} + sigmoid(g_i) u_i,         y_i = sigmoid(o_i) h_i

``eta`` is the sum of scores (linear attention), ``exp(w . u_i)`` (*normalized attention*, the paper's: it learns its
normaliser apart from the keys) or one. The reversed qLSTM forgets by ``sigmoid(-f)^relu(alpha)``, which is SSD's decay.
All cost ``O(length)`` and decode with a state of ``n d`` numbers (state expansion ``n``, width ``d``), softmax apart.

The frame: a linear map in (with a gate ``z`` beside), a short causal convolution, the recurrence, the gate, a linear
map out. Which of them there are is a setting; the defaults are those of each model's own paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import LinearState, accumulation_dtype, dense_attention, linear_attention
from regard.layers.causal_conv import CausalConv
from regard.layers.feature_maps import poly_features, poly_width
from regard.layers.gated_recurrence import QuasiLSTM, RealGatedLRU
from regard.layers.padding import layer_keys
from regard.layers.ssm import ScalarSSM, SelectiveSSM
from regard.masks import KeyPadding, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = [
    "QLSTM",
    "RGLRU",
    "S6",
    "SSD",
    "MixerState",
    "NormalizedAttention",
    "SeparableAttention",
    "SeparableCore",
    "StateMixer",
    "normalized_attention",
]

KERNELS = ("elu", "identity", "taylor", "softmax")
NORMALIZERS = ("sum", "exp", "none")
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
# Learned log-normalisers are kept within these bounds, so that no input makes exp overflow.
LIMIT = 30.0


def normalized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: Tensor,
    *,
    state: LinearState | None = None,
    backend: str | None = None,
) -> tuple[Tensor, LinearState]:
    """``y_i = exp(-n_i) q_i . sum_{j <= i} k_j v_j^T``, and the state ``(batch, heads, d, d_v)`` after the last token.

    query ``(batch, heads, length, d)``, key and value ``(batch, kv_heads, length, ...)``, normalizer ``n (batch, heads,
    length)``, of which values beyond 30 in size count as 30. No feature map, no sum of scores.
    """
    if normalizer.shape != query.shape[:3]:
        raise ShapeError(f"normalizer is {tuple(query.shape[:3])} for these queries, got {tuple(normalizer.shape)}.")
    out, state = linear_attention(query, key, value, causal=True, state=state, backend=backend)
    factor = (-normalizer.to(state.sum.dtype).clamp(-LIMIT, LIMIT)).exp()
    return (out * factor[..., None]).to(query.dtype), state


class SeparableCore(nn.Module):
    """Causal attention of ``(batch, length, dim)`` with scores ``phi(q) . psi(k)``; options as in
    :class:`SeparableAttention`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        state_dim: int | None,
        kernel: str,
        normalizer: str,
        degree: int,
        bias: bool,
        eps: float,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise OptionError(f"{num_heads} heads do not divide {dim} channels.")
        if kernel not in KERNELS or normalizer not in NORMALIZERS:
            raise OptionError(
                f"kernel is one of {', '.join(KERNELS)} and normalizer one of {', '.join(NORMALIZERS)}; got {kernel!r} "
                f"and {normalizer!r}."
            )
        if kernel == "softmax" and normalizer != "sum":
            raise OptionError(
                f"Softmax divides by the sum of scores; normalizer={normalizer!r} goes with another kernel."
            )
        width = dim // num_heads if state_dim is None else state_dim
        if width < 1 or degree < 0 or eps < 0:
            raise OptionError(f"Need state_dim >= 1, degree >= 0 and eps >= 0; got {width}, {degree} and {eps}.")
        self.dim, self.num_heads, self.state_dim = dim, num_heads, width
        self.kernel, self.normalizer, self.degree, self.eps = kernel, normalizer, degree, eps
        self.query = nn.Linear(dim, num_heads * width, bias=bias)
        self.key = nn.Linear(dim, num_heads * width, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.log_eta = nn.Linear(dim, num_heads, bias=bias) if normalizer == "exp" else None

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, normalizer={self.normalizer!r}, state_dim={self.state_dim}"

    @property
    def expansion(self) -> int | None:
        """Features ``n`` of a head; None where no finite number gives these scores."""
        if self.kernel == "softmax":
            return None
        return poly_width(self.state_dim, self.degree) if self.kernel == "taylor" else self.state_dim

    @property
    def state_size(self) -> int | None:
        """Elements that a sequence keeps, ``n dim`` (and ``n`` a head for a sum of keys); None where they grow."""
        if self.expansion is None:
            return None
        return self.expansion * (self.dim + (self.num_heads if self.normalizer == "sum" else 0))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``(batch, heads, length, state_dim)``, values ``(batch, heads, length, dim / heads)``."""
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return query, key, value

    def features(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``phi(q)``, ``psi(k)`` and values, in the accumulation dtype; hidden keys are zero."""
        query, key, value = (t.to(accumulation_dtype(x.dtype)) for t in self.project(x))
        if self.kernel == "elu":
            query, key = F.elu(query) + 1, F.elu(key) + 1
        elif self.kernel == "taylor":
            query, key = (poly_features(t, self.degree) for t in (query * self.state_dim**-0.5, key))
        if keys is not None:
            key, value = (t.masked_fill(~keys[:, None, :, None], 0) for t in (key, value))
        return query, key, value

    def forward(self, x: Tensor, state: Any = None, *, keys: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mixed values ``(batch, length, dim)`` and the state: a :class:`~regard.kernels.LinearState`; of softmax keys,
        values and which are real. keys: boolean ``(batch | 1, length)``, False where a token is not there."""
        if self.kernel == "softmax":
            out, state = self._softmax(x, state, keys)
        else:
            query, key, value = self.features(x, keys)
            if self.log_eta is not None:
                eta = self.log_eta(x).to(query.dtype).transpose(1, 2)
                out, state = normalized_attention(query, key, value, eta, state=state)
            else:
                out, state = linear_attention(
                    query, key, value, causal=True, normalize=self.normalizer == "sum", eps=self.eps, state=state
                )
        return out.transpose(1, 2).flatten(2).to(x.dtype), state

    def _softmax(
        self, x: Tensor, state: tuple[Tensor, Tensor, Tensor | None] | None, keys: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
        query, key, value = self.project(x)
        real = None if keys is None else keys.expand(x.shape[:2])
        if state is not None:
            key, value = torch.cat((state[0], key), 2), torch.cat((state[1], value), 2)
            before = state[2]
            if real is not None or before is not None:
                seen = (x.shape[0], state[0].shape[2])
                before = torch.ones(seen, dtype=torch.bool, device=x.device) if before is None else before
                real = torch.ones_like(before[:, : x.shape[1]]) if real is None else real
                real = torch.cat((before, real), 1)
        mask = None if real is None else KeyPadding(real)
        return dense_attention(query, key, value, causal=True, mask=mask), (key, value, real)


@dataclass(frozen=True)
class MixerState:
    """Decoding state of one layer: the last inputs of its convolution, and what its recurrence keeps."""

    tail: Tensor | None = None
    inner: Any = None


class StateMixer(Layer):
    """The frame around a core ``(x, state, keys=) -> (y, state)``; causal always.

    inner_dim: channels inside. kernel_size: of the causal convolution, 0 for none. activation: SiLU after it. gate:
    ``"silu"`` or ``"gelu"`` of a second branch, which multiplies the core's output, or None. With neither a gate nor
    other channels inside, there is no linear map in.
    """

    patterns = frozenset({"causal-self"})
    needs_training = True
    growth = "N"

    def __init__(
        self,
        embed_dim: int,
        core: nn.Module,
        inner_dim: int,
        *,
        kernel_size: int,
        gate: str | None,
        activation: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if gate is not None and gate not in _GATES:
            raise OptionError(f"gate is None or one of {', '.join(_GATES)}; got {gate!r}.")
        if kernel_size < 0:
            raise OptionError(f"kernel_size is at least 0, got {kernel_size}.")
        self.embed_dim, self.inner_dim, self.gate, self.activation = embed_dim, inner_dim, gate, activation
        branches = 1 if gate is None else 2
        bare = gate is None and inner_dim == embed_dim
        self.enter = None if bare else nn.Linear(embed_dim, branches * inner_dim, bias=bias)
        self.conv = CausalConv(inner_dim, kernel_size) if kernel_size else None
        self.core = core
        self.out = nn.Linear(inner_dim, embed_dim, bias=bias)

    @property
    def state_size(self) -> int | None:
        """Elements that the recurrence keeps of a sequence, beside the convolution's last inputs; None where they grow
        with length."""
        return cast("int | None", self.core.state_size)

    def drive(
        self, x: Tensor, tail: Tensor | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the core reads, the gate's branch, and the convolution's last inputs."""
        inner, gate = x if self.enter is None else self.enter(x), None
        if self.gate is not None:
            inner, gate = inner.chunk(2, -1)
        if keys is not None:
            inner = inner.masked_fill(~keys[..., None], 0)
        if self.conv is not None:
            inner, tail = self.conv(inner, tail)
            inner = F.silu(inner) if self.activation else inner
        return inner, gate, tail

    def readout(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's output from the core's."""
        if gate is not None and self.gate is not None:
            mixed = mixed * _GATES[self.gate](gate)
        return cast(Tensor, self.out(mixed))

    def forward(self, x: Tensor, *, causal: bool = True, mask: Mask | None = None) -> Tensor:
        """``(batch, length, embed_dim)`` in and out. mask: of keys alone (``KeyPadding``); what it hides leaves the
        state as it was."""
        if not causal:
            raise UnsupportedPatternError(f"{type(self).__name__} is a recurrence and has no form that is not causal.")
        keys = layer_keys(mask, x.shape[1], x.device, type(self).__name__)
        return self._run(x, MixerState(), None if keys is None else keys[:, 0])[0]

    def init_state(self, batch: int, *, like: Tensor) -> MixerState:
        """The state before the first token."""
        return MixerState()

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """The next token or tokens ``(batch, tokens, embed_dim)``; gives the numbers of :meth:`forward`."""
        return self._run(x, state, None)

    def _run(self, x: Tensor, state: MixerState, keys: Tensor | None) -> tuple[Tensor, MixerState]:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"{type(self).__name__} takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
        inner, gate, tail = self.drive(x, state.tail, keys)
        mixed, kept = self.core(inner, state.inner, keys=keys)
        return self.readout(mixed, gate), MixerState(tail, kept)


@register("separable_attention")
class SeparableAttention(StateMixer):
    """Causal attention whose scores are inner products of features, or softmax to compare with.

    state_dim: channels of queries and keys per head, whatever the width (default ``embed_dim / num_heads``). kernel:
    ``"elu"`` (``elu + 1`` of queries and keys), ``"identity"``, ``"taylor"`` (softmax's exponential cut off after
    ``degree``, with ``C(state_dim + degree, degree)`` features) or ``"softmax"``. normalizer: ``"sum"`` of scores (plus
    ``eps``), ``"exp"`` (learned) or ``"none"``. kernel_size, gate: of the frame, by default without.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        state_dim: int | None = None,
        kernel: str = "elu",
        normalizer: str = "sum",
        degree: int = 2,
        kernel_size: int = 0,
        gate: str | None = None,
        bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        core = SeparableCore(embed_dim, num_heads, state_dim, kernel, normalizer, degree, bias, eps)
        super().__init__(embed_dim, core, embed_dim, kernel_size=kernel_size, gate=gate, bias=bias)


@register("dsf")
class NormalizedAttention(SeparableAttention):
    """The paper's normalized attention: no feature map, divided by ``eta_i = exp(w . u_i + b)`` per head, learned apart
    from the keys. Options as in :class:`SeparableAttention`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        state_dim: int | None = None,
        kernel_size: int = 0,
        gate: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            state_dim,
            kernel="identity",
            normalizer="exp",
            kernel_size=kernel_size,
            gate=gate,
            bias=bias,
        )


@register("s6")
class S6(StateMixer):
    """Mamba's layer (Gu and Dao, 2023, arXiv 2312.00752): S6 on ``expansion * embed_dim`` channels behind a causal
    convolution, with a gate. ``expansion=1, kernel_size=0, gate=None`` is the bare recurrence."""

    def __init__(
        self,
        embed_dim: int,
        state_dim: int = 16,
        expansion: int = 2,
        kernel_size: int = 4,
        gate: str | None = "silu",
        dt_rank: int | None = None,
    ) -> None:
        rank = math.ceil(embed_dim / 16) if dt_rank is None else dt_rank
        core = SelectiveSSM(expansion * embed_dim, state_dim, rank)
        super().__init__(embed_dim, core, expansion * embed_dim, kernel_size=kernel_size, gate=gate)


@register("ssd")
class SSD(StateMixer):
    """SSD, Mamba-2's recurrence (Dao and Gu, 2024, arXiv 2405.21060), in Mamba's frame: options as in :class:`S6`.

    num_heads: heads with a decay each; a_range: from which ``a`` is drawn at first. The paper compares one head and
    ``a = 1``. Mamba-2 itself also norms before the map out.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        state_dim: int = 16,
        expansion: int = 2,
        kernel_size: int = 4,
        gate: str | None = "silu",
        a_range: tuple[float, float] = (1.0, 16.0),
    ) -> None:
        core = ScalarSSM(expansion * embed_dim, num_heads, state_dim, a_range)
        super().__init__(embed_dim, core, expansion * embed_dim, kernel_size=kernel_size, gate=gate)


@register("rg_lru")
class RGLRU(StateMixer):
    """Griffin's recurrent layer (De et al., 2024, arXiv 2402.19427): RG-LRU behind a causal convolution, with a gate.

    num_heads: blocks of the gates' weights. expansion: channels inside over ``embed_dim``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        expansion: int = 1,
        kernel_size: int = 4,
        gate: str | None = "gelu",
    ) -> None:
        core = RealGatedLRU(expansion * embed_dim, num_heads)
        super().__init__(embed_dim, core, expansion * embed_dim, kernel_size=kernel_size, gate=gate, activation=False)


@register("qlstm")
class QLSTM(StateMixer):
    """The quasi-LSTM layer: on ``expansion * embed_dim`` channels behind a causal convolution, with a gate.

    reversed_sigmoid: as in :class:`QuasiLSTM`.
    """

    def __init__(
        self,
        embed_dim: int,
        expansion: int = 2,
        kernel_size: int = 4,
        reversed_sigmoid: bool = True,
        gate: str | None = "gelu",
    ) -> None:
        inner = expansion * embed_dim
        core = QuasiLSTM(inner, reversed_sigmoid)
        super().__init__(embed_dim, core, inner, kernel_size=kernel_size, gate=gate, activation=False)
        for linear in (self.enter, self.out):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
