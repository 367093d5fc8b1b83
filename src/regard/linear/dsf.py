"""The dynamical systems framework: attention, state-space models and recurrent networks as one linear time-varying
system.

Sieber et al., "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", 2024, arXiv 2405.15731, sections 3 and 4.

    h_i = A_i h_{i-1} + B_i u_i,    y_i = C_i h_i + D_i u_i,    h_0 = 0,    h in R^(n d)

for ``d`` channels and state expansion ``n``. In all models compared ``A`` is diagonal or a multiple of the identity,
and no channel reads another's state, so :class:`LTV` keeps ``A_i``, ``B_i`` and ``C_i`` as ``n`` numbers per channel,
or per head where its channels share them; the map of values ``W_V`` is applied to the inputs beforehand. What a model
is:

    attention, scores phi(q).psi(k)   A = 1,                  B = psi(k_i),           C = phi(q_i) / eta_i
      or, the same map                A = eta_{i-1} / eta_i,  B = psi(k_i) / eta_i,   C = phi(q_i)
    S6, SSD                           A = exp(Delta_i A),     B = Delta_i b_i,        C = c_i
    RG-LRU                            A = a_i,                B = sqrt(1-a_i^2) g_i,  C = 1
    qLSTM                             A = sigmoid(f_i),       B = sigmoid(g_i),       C = sigmoid(o_i)

``exp(q . k)`` is a sum over all degrees, so softmax needs an infinite ``n``; cut off after degree ``p`` it needs the
``C(d_k + p, p)`` distinct monomials of ``d_k`` channels. :func:`to_ltv` gives the system of a layer on an input: by it
layers are compared, pictured (:meth:`LTV.attention_matrix`) and counted (:attr:`LTV.state_size`). The layers themselves
(:mod:`regard.linear.dsf_mixers`) run on the kernels; a system costs ``O(L d n)`` token by token, ``O(L log L d n)`` as
a scan and ``O(L^2 d n)`` as a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype
from regard.layers.feature_maps import poly_features
from regard.layers.gated_recurrence import QuasiLSTM, RealGatedLRU
from regard.layers.ssm import ScalarSSM, SelectiveSSM
from regard.linear.dsf_mixers import LIMIT, SeparableCore, StateMixer

__all__ = ["LTV", "separable_ltv", "to_ltv"]

MODES = ("recurrent", "scan", "matrix")
PLACEMENTS = ("readout", "state")


@dataclass(frozen=True)
class LTV:
    """``A``, ``B``, ``C`` broadcastable to ``(batch, length, heads, channels, n)``, ``D`` (None: zero) to ``(batch,
    length, heads, channels)``, and the inputs ``u (batch, length, heads, channels)`` that drive it."""

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    u: Tensor

    def __post_init__(self) -> None:
        if self.u.dim() != 4:
            raise ShapeError(f"u is (batch, length, heads, channels), got {tuple(self.u.shape)}.")
        full = (*self.u.shape, self.expansion)
        for name, tensor, shape in (
            ("A", self.A, full),
            ("B", self.B, full),
            ("C", self.C, full),
            ("D", self.D, full[:4]),
        ):
            if tensor is None:
                continue
            fits = tensor.dim() == len(shape) and all(a in (1, b) for a, b in zip(tensor.shape, shape, strict=True))
            if not fits:
                raise ShapeError(f"{name} {tuple(tensor.shape)} does not broadcast to {shape}; each size is that or 1.")

    @property
    def expansion(self) -> int:
        """State expansion ``n``."""
        return max(tensor.shape[-1] for tensor in (self.A, self.B, self.C))

    @property
    def state_size(self) -> int:
        """Elements of the state of one sequence: ``n d``."""
        return self.expansion * self.u.shape[2] * self.u.shape[3]

    @property
    def structure(self) -> str:
        """Of ``A``: ``"identity"`` where it is one everywhere, ``"scalar"`` where a head's state shares one number,
        else ``"diagonal"``."""
        if self.A.shape[3:] != (1, 1):
            return "diagonal"
        return "identity" if bool((self.A == 1).all()) else "scalar"

    def run(self, mode: str = "scan", u: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Outputs ``(batch, length, heads * channels)`` for the system's own inputs, or others of their shape.

        mode: ``"recurrent"`` (a token at a time), ``"scan"`` (all states, by doubling) or ``"matrix"`` (the implied
        attention matrix). state: ``(batch, heads, channels, n)`` before the first token.
        """
        return self.advance(mode, u, state)[0]

    def advance(
        self, mode: str = "scan", u: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`run`, with the state after the last token (None of mode ``"matrix"``)."""
        u = self.u if u is None else u
        if u.shape != self.u.shape:
            raise ShapeError(f"This system was written for inputs {tuple(self.u.shape)}, got {tuple(u.shape)}.")
        if mode not in MODES:
            raise OptionError(f"mode is one of {', '.join(MODES)}; got {mode!r}.")
        if mode == "matrix":
            if state is not None:
                raise OptionError("The implied matrix starts from nothing; pass a state to mode 'recurrent' or 'scan'.")
            y = torch.einsum("bhcij,bjhc->bihc", self.attention_matrix().expand(-1, -1, u.shape[3], -1, -1), u)
            return y.flatten(2), None
        states = self._recur(u, state) if mode == "recurrent" else self._scan(u, state)
        y = (self.C * states).sum(-1)
        return (y if self.D is None else y + self.D * u).flatten(2), states[:, -1]

    def init_state(self) -> Tensor:
        """Zeros ``(batch, heads, channels, n)``."""
        return self.u.new_zeros(self.u.shape[0], *self.u.shape[2:], self.expansion)

    def _recur(self, u: Tensor, state: Tensor | None) -> Tensor:
        h = self.init_state() if state is None else state
        decay = self.A.expand(-1, u.shape[1], -1, -1, -1)
        drive = self.B.expand(-1, u.shape[1], -1, -1, -1)
        states = []
        for t in range(u.shape[1]):
            h = decay[:, t] * h + drive[:, t] * u[:, t, ..., None]
            states.append(h)
        return torch.stack(states, 1)

    def _scan(self, u: Tensor, state: Tensor | None) -> Tensor:
        # Any real A, so no logarithms as in regard.kernels.scan; each pass sees twice as far back.
        decay = self.A.expand(-1, u.shape[1], -1, -1, -1)
        states = (self.B * u[..., None]).expand(*u.shape, self.expansion)
        if state is not None:
            states = torch.cat((states[:, :1] + decay[:, :1] * state[:, None], states[:, 1:]), 1)
        reach = 1
        while reach < u.shape[1]:
            later = states[:, reach:] + decay[:, reach:] * states[:, :-reach]
            states = torch.cat((states[:, :reach], later), 1)
            decay = torch.cat((decay[:, :reach], decay[:, reach:] * decay[:, :-reach]), 1)
            reach *= 2
        return states

    def attention_matrix(self) -> Tensor:
        """The implied attention ``(batch, heads, channels, L, L)``: ``M_ij = C_i A_i ... A_{j+1} B_j`` for ``j <= i``,
        plus ``D_i`` where ``i = j``. ``channels`` is 1 where a head's channels share it."""
        batch, length, heads = self.u.shape[:3]
        decay, drive, show = torch.broadcast_tensors(
            *(t.expand(batch, length, heads, -1, -1) for t in (self.A, self.B, self.C))
        )
        rows, reach = [], drive[:, :0]  # reach: A_i ... A_{j+1} B_j for all j up to i
        for i in range(length):
            reach = torch.cat((decay[:, i, None] * reach, drive[:, i, None]), 1)
            row = (show[:, i, None] * reach).sum(-1).movedim(1, -1)
            rows.append(F.pad(row, (0, length - 1 - i)))
        matrix = torch.stack(rows, -2)
        if self.D is None:
            return matrix
        return matrix + torch.diag_embed(self.D.expand(batch, length, heads, -1).movedim(1, -1))


def separable_ltv(
    query: Tensor, key: Tensor, value: Tensor, eta: Tensor | None = None, *, placement: str = "readout"
) -> LTV:
    """Attention with scores ``query . key``, divided by ``eta``, as a system.

    query and key: features ``(batch, heads, length, n)``; value ``(batch, heads, length, channels)``; eta ``(batch,
    heads, length)`` or None for one. placement: ``"readout"`` (``A`` is the identity, ``1 / eta`` in ``C``) or
    ``"state"`` (``A_i = eta_{i-1} / eta_i``, the paper's form); both are the same map.
    """
    if placement not in PLACEMENTS:
        raise OptionError(f"placement is one of {', '.join(PLACEMENTS)}; got {placement!r}.")
    if query.dim() != 4 or query.shape != key.shape or query.shape[:3] != value.shape[:3]:
        raise ShapeError(
            "query and key are (batch, heads, length, n) and value (batch, heads, length, channels); got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    show, drive, u = (t.transpose(1, 2) for t in (query, key, value))
    show, drive, decay = show[..., None, :], drive[..., None, :], query.new_ones(1, 1, 1, 1, 1)
    if eta is not None:
        if eta.shape != query.shape[:3]:
            raise ShapeError(f"eta is (batch, heads, length) = {tuple(query.shape[:3])}, got {tuple(eta.shape)}.")
        eta = eta.transpose(1, 2)[..., None, None]
        if placement == "readout":
            show = show / eta
        else:
            # What stands before the first token is multiplied by h_0 = 0.
            decay, drive = torch.cat((eta[:, :1], eta[:, :-1]), 1) / eta, drive / eta
    return LTV(decay, drive, show, None, u)


def to_ltv(layer: nn.Module, x: Tensor, *, degree: int | None = None, placement: str = "readout") -> LTV:
    """The system that ``layer`` is on ``x (batch, length, channels)``.

    layer: any of :mod:`regard.linear.dsf_mixers` (the convolution, the gate and the linear maps in and out stay
    outside: ``layer.readout(system.run(), gate)`` is the layer's output), or a core, of which ``x`` is then the input.
    degree: of the Taylor series that stands for softmax, which has no finite system itself. placement: of the
    normaliser of attention, see :func:`separable_ltv`.
    """
    core = layer
    if isinstance(layer, StateMixer):
        core, x = layer.core, layer.drive(x)[0]
    if isinstance(core, SeparableCore):
        return _separable(core, x, degree, placement)
    if degree is not None or placement != "readout":
        raise OptionError(f"degree and placement speak of attention; {type(core).__name__} takes neither.")
    u = x.to(accumulation_dtype(x.dtype))
    if isinstance(core, SelectiveSSM):
        delta, a, b, c = core.dynamics(x)
        decay = (delta[..., None] * a).exp()
        drive = delta[..., None] * b[:, :, None].to(u.dtype)
        return LTV(
            decay[:, :, None], drive[:, :, None], _shared(c, u), core.skip.to(u.dtype)[None, None, None], u[:, :, None]
        )
    if isinstance(core, ScalarSSM):
        delta, a, b, c = core.dynamics(x)
        step = delta[..., None, None]
        decay = (delta * a).exp()[..., None, None]
        skip = core.skip.to(u.dtype).view(1, 1, -1, 1)
        return LTV(decay, step * _shared(b, u), _shared(c, u), skip, u.unflatten(-1, (core.num_heads, -1)))
    if isinstance(core, RealGatedLRU):
        log_decay, kept = core.dynamics(x)
        return LTV(
            _single(log_decay.exp()), _single(kept), torch.ones_like(u[:1, :1, None, :1, None]), None, u[:, :, None]
        )
    if isinstance(core, QuasiLSTM):
        log_decay, admit, show = core.dynamics(x)
        return LTV(_single(log_decay.exp()), _single(admit), _single(show), None, u[:, :, None])
    raise OptionError(
        f"{type(core).__name__} is known as no linear time-varying system. There are: separable attention, S6, SSD, "
        "RG-LRU and qLSTM (regard.linear.dsf_mixers); build others as LTV(A, B, C, D, u)."
    )


def _separable(core: SeparableCore, x: Tensor, degree: int | None, placement: str) -> LTV:
    query, key, value = core.features(x)
    eps = core.eps
    if core.kernel == "softmax":
        if degree is None:
            raise OptionError("Softmax needs an infinite state; give degree= to cut its Taylor series off.")
        query, key, eps = poly_features(query * core.state_dim**-0.5, degree), poly_features(key, degree), 0.0
    elif degree is not None:
        raise OptionError(f"degree cuts off softmax; the kernel {core.kernel!r} is finite as it is.")
    eta = None
    if core.normalizer == "sum":
        eta = (query * key.cumsum(2)).sum(-1) + eps
    elif core.log_eta is not None:
        eta = core.log_eta(x).to(query.dtype).transpose(1, 2).clamp(-LIMIT, LIMIT).exp()
    return separable_ltv(query, key, value, eta, placement=placement)


def _shared(t: Tensor, u: Tensor) -> Tensor:
    """``(batch, length, n)``, the same for all heads and channels."""
    return t.to(u.dtype)[:, :, None, None]


def _single(t: Tensor) -> Tensor:
    """``(batch, length, channels)``, one number of state each, a single head."""
    return t[:, :, None, :, None]
