"""Adaptive filter attention: tokens are noisy observations of a linear stochastic system, and attention filters them.

Racioppo, "Attention as an Adaptive Filter", 2025, arXiv 2509.04154 (sections 2.2, 2.5 and 3.1 to 3.8), with the
released code's parametrisation. Tokens observe ``dx = A x dt + B dw``. In the eigenbasis of ``A`` queries, keys and
values are complex; a head has one decay ``mu <= 0`` and frequencies ``omega`` in conjugate pairs. A key is *pulled
forward* to the query's time, ``e^{(mu + i omega) dt} k_j`` with ``dt = t_i - t_j``, and compared there. With
``q~ = e^{-i omega t} q``, ``k~`` and ``v~`` alike, ``E = e^{mu dt}`` and d complex channels:

    |R_ij|^2 = |q_i|^2 + E^2 |k_j|^2 - 2 E Re(q~_i^* k~_j)
    V_ij     = sigma^2 (e^{2 mu dt} - 1) / (2 mu) + eta^2 e^{2 mu dt} + gamma^2
    logit    = tau^2 (-log V_ij - log(1 + |R_ij|^2 / (nu d V_ij)))       robust
               tau^2 (-log V_ij - |R_ij|^2 / (nu d V_ij))                Gaussian
    x_i      = e^{i omega t_i} sum_j A_ij E_ij v~_j,   A = softmax over the past

V solves the Lyapunov equation ``dV/dt = 2 mu V + sigma^2, V(0) = eta^2``, with the query's own noise gamma^2 on top. A
gate mixes x_i with v_i; ``predict_next`` moves the result on by ``e^{mu + i omega}``.

Complex vectors are pairs of reals, ``[real parts | imaginary parts]`` along the last axis. Times are in units in which
neighbouring tokens are about 1 apart. The order of cost is softmax attention's, ``4 N^2 (d_qk + d_v)`` operations a
head and memory linear in N: queries go in tiles, and at regular times what depends on time alone is formed once a lag.
:func:`tensor_afa` has weights per channel and keeps ``N^2 d``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedMaskError
from regard.kernels import accumulation_dtype
from regard.kernels.dense import masked_softmax
from regard.kernels.scored import Tile, scored_attention, scored_weights
from regard.layers.heads import head_sizes
from regard.layers.linear_dynamics import (
    VarianceKind,
    clock,
    decay,
    dle_variance,
    elapsed,
    isotropic_residual,
    lags,
    pull_forward,
    rotated_residual,
    spread_lags,
    turn,
)
from regard.layers.rotary import apply_rotary
from regard.masks import Boolean, Causal, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = [
    "AdaptiveFilterAttention",
    "FilterDynamics",
    "Filtered",
    "dle_variance",
    "filter_logits",
    "isotropic_residual",
    "pull_forward",
    "tensor_afa",
]

_EPSILON = 1e-5
# The log precision of a query that sees nothing.
_NOTHING = -1e4


class FilterDynamics(NamedTuple):
    """What each head believes of the system: mu, sigma2, eta2, gamma2, nu and tau ``(heads,)``, omega ``(heads, d)`` of
    queries and keys, omega_v ``(heads, d_v)`` of values. Rates are per unit of time."""

    mu: Tensor
    omega: Tensor
    omega_v: Tensor
    sigma2: Tensor
    eta2: Tensor
    gamma2: Tensor
    nu: Tensor
    tau: Tensor


class Filtered(NamedTuple):
    """output ``(batch, length, embed_dim)``; attention ``(batch, heads, length, length)``; estimates of the state in
    the eigenbasis, gate and prediction included, ``(batch, heads, length, 2 d_v)``."""

    output: Tensor
    attention: Tensor
    estimates: Tensor


def filter_logits(
    residual: Tensor,
    dt: Tensor,
    dynamics: FilterDynamics,
    *,
    robust: bool = True,
    additive: VarianceKind = "dle",
    multiplicative: VarianceKind = "dle",
) -> Tensor:
    """Logits ``(batch, heads, rows, keys)`` from squared residuals of that shape and ``dt (batch | 1, 1, rows, keys)``.

    multiplicative: the kind of variance (:func:`dle_variance`) that residuals are measured by. additive: the prior
    without residuals, ``-log V`` for ``"dle"``, none for None; ``"linear"`` is ``-nu dt`` as released, the ``-log V``
    of ``dV/dt = nu V``: a mode that grows without noise, and ALiBi's bias.
    """
    return _logits(residual, *_kernels(dt, dynamics, additive, multiplicative), robust)


def _kernels(
    dt: Tensor, dynamics: FilterDynamics, additive: VarianceKind, multiplicative: VarianceKind
) -> tuple[Tensor, Tensor, Tensor]:
    """What time alone makes of the logits: ``1 / (nu d V)``, the prior times ``tau^2``, and ``-tau^2``."""
    mu, sigma2, eta2, gamma2, nu, tau = (v[:, None, None] for v in (dynamics.mu, *dynamics[3:]))
    variance = dle_variance(mu, sigma2, eta2, gamma2, dt, multiplicative)
    if additive == "linear":
        prior = -nu * dt
    elif additive is None:
        prior = torch.zeros_like(variance)
    else:
        prior = -(variance if multiplicative == "dle" else dle_variance(mu, sigma2, eta2, gamma2, dt)).log()
    return 1 / (nu * dynamics.omega.shape[-1] * variance), tau.square() * prior, -tau.square()


def _logits(residual: Tensor, precision: Tensor, prior: Tensor, factor: Tensor, robust: bool) -> Tensor:
    misfit = residual * precision
    return torch.addcmul(prior, torch.log1p(misfit) if robust else misfit, factor)


def tensor_afa(
    query: Tensor, key: Tensor, value: Tensor, times: Tensor, dynamics: FilterDynamics, *, robust: bool = True
) -> tuple[Tensor, Tensor]:
    """The full form: every channel c has a decay and noises of its own, and so weights of its own. Causal.

        w_ij = 1 / (1 + sum_c |R_ijc|^2 / (nu d V_ijc))  (robust)   or   exp(-sum_c |R_ijc|^2 / (nu d V_ijc))
        A_ijc = (w_ij / V_ijc)^(tau^2) over its sum over j,   x_ic = sum_j A_ijc e^{lambda_c dt} v_jc

    query, key, value ``(batch, heads, length, 2 d)``. dynamics: with mu, sigma2, eta2 and gamma2 ``(heads, d)``, as
    omega is; omega_v is not read. Returns estimates ``(batch, heads, length, 2 d)`` and weights ``(batch, heads,
    length, length, d)``: for small lengths and widths.
    """
    since = clock(times, query)
    q, k, v = (torch.complex(*t.chunk(2, -1)) for t in (query, key, value))
    mu, omega, sigma2, eta2, gamma2 = (p[:, None, None] for p in (dynamics.mu, dynamics.omega, *dynamics[3:6]))
    nu, tau = (p[:, None, None] for p in dynamics[6:])
    dt = elapsed(since)[..., None]
    signed = (since[:, None, :, None] - since[:, None, None, :])[..., None]
    moved = torch.polar(torch.exp(mu * dt), omega * signed)
    variance = dle_variance(mu, sigma2, eta2, gamma2, dt)
    gap = q[:, :, :, None] - moved * k[:, :, None]
    misfit = ((gap.real.square() + gap.imag.square()) / variance).sum(-1) / (nu * q.shape[-1])
    shared = -torch.log1p(misfit) if robust else -misfit
    logits = tau[..., None].square() * (shared[..., None] - variance.log())
    future = torch.ones(dt.shape[2:4], dtype=torch.bool, device=query.device).triu(1)[..., None]
    weights = logits.masked_fill(future, -math.inf).softmax(3)
    estimates = (weights * moved * v[:, :, None]).sum(3)
    return torch.cat((estimates.real, estimates.imag), -1), weights


def _softmax_and_precision(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax, and as one more column the log of each row's total precision."""
    seen = scores if visible is None else scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    total = seen.logsumexp(-1, keepdim=True)
    if visible is not None:
        total = torch.where(visible.any(-1, keepdim=True), total, torch.full_like(total, _NOTHING))
    return torch.cat((masked_softmax(scores, visible), total), -1)


@register("afa")
class AdaptiveFilterAttention(Layer):
    """``(batch, length, embed_dim)`` in and out, always causal.

    qk_dim, v_dim: complex channels of a head, even (default: ``embed_dim / num_heads``); where they are equal, queries,
    keys and values share their frequencies. max_len: the training length, which sets the range of decays (``-5 /
    max_len`` to 0 per unit of time) and the scale of frequencies. robust: the log form of the residual.
    additive_bias, multiplicative_bias: as in :func:`filter_logits`. learn_rotations: False for the fixed frequencies of
    rotary positions. rotate_values: False leaves the result in the frame that turns with the dynamics: values are
    turned back by their times, and the sum is not turned forward again. full_residual: False keeps the inner product
    alone, ``-2 E Re(q~^* k~)`` for ``|R|^2``; it may be negative, so not with ``robust``. gate: ``"learned"``,
    ``sigmoid(p)`` per head and channel; ``"precision"``, ``sigmoid(s^2 log P_i - log(p^2))`` with the total
    ``P_i = sum_j e^logit``; None, the estimate alone. predict_next: the state one unit of time later.
    """

    patterns = frozenset(("causal-self",))
    needs_training = True
    applies_rotary = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        max_len: int = 512,
        *,
        robust: bool = True,
        additive_bias: VarianceKind = "dle",
        multiplicative_bias: VarianceKind = "dle",
        learn_rotations: bool = True,
        rotate_values: bool = True,
        full_residual: bool = True,
        gate: Literal["learned", "precision"] | None = "learned",
        predict_next: bool = False,
    ) -> None:
        super().__init__()
        if qk_dim is None or v_dim is None:
            share = head_sizes(embed_dim, num_heads)[1]
            qk_dim, v_dim = qk_dim or share, v_dim or share
        if qk_dim < 2 or v_dim < 2 or qk_dim % 2 or v_dim % 2 or max_len < 1:
            raise OptionError(
                "Frequencies come in conjugate pairs: qk_dim and v_dim are even and at least 2, and max_len at least "
                f"1; got {qk_dim}, {v_dim} and {max_len}."
            )
        if additive_bias not in ("dle", "linear", None) or multiplicative_bias not in ("dle", "linear", None):
            raise OptionError(f"A bias is 'dle', 'linear' or None, got {additive_bias!r} and {multiplicative_bias!r}.")
        if gate not in ("learned", "precision", None):
            raise OptionError(f"gate is 'learned', 'precision' or None, got {gate!r}.")
        if robust and not full_residual:
            raise OptionError(
                "The inner product alone may be negative, where log(1 + .) is not defined: give robust=False with "
                "full_residual=False."
            )
        self.embed_dim, self.num_heads, self.max_len = embed_dim, num_heads, max_len
        self.qk_dim, self.v_dim = qk_dim, v_dim
        self.robust, self.full_residual = robust, full_residual
        self.additive_bias: VarianceKind = additive_bias
        self.multiplicative_bias: VarianceKind = multiplicative_bias
        self.rotate_values, self.predict_next = rotate_values, predict_next
        self.query, self.key = (nn.Linear(embed_dim, 2 * num_heads * qk_dim) for _ in range(2))
        self.value = nn.Linear(embed_dim, 2 * num_heads * v_dim)
        self.out = nn.Linear(2 * num_heads * v_dim, embed_dim)
        for linear in (self.query, self.key, self.value, self.out):
            _complex_init(linear, into=linear is not self.out)
        self.decay = nn.Parameter(torch.randn(num_heads))
        self.process, self.measurement, self.anchor = (nn.Parameter(torch.randn(num_heads)) for _ in range(3))
        self.robustness, self.temperature = (nn.Parameter(torch.ones(num_heads)) for _ in range(2))
        # In units of 10 pi / max_len, (heads, pairs); None for those of rotary positions.
        self.frequency = nn.Parameter(torch.randn(num_heads, qk_dim // 2)) if learn_rotations else None
        separate = learn_rotations and v_dim != qk_dim
        self.value_frequency = nn.Parameter(torch.randn(num_heads, v_dim // 2)) if separate else None
        self.gate = None if gate is None else nn.Parameter(torch.rand(num_heads, 1, v_dim))
        self.gate_scale = nn.Parameter(torch.rand(num_heads, 1, v_dim)) if gate == "precision" else None

    def extra_repr(self) -> str:
        form = "robust" if self.robust else "Gaussian"
        return f"{self.num_heads} heads of {self.qk_dim} and {self.v_dim} complex channels, {form}"

    @property
    def dynamics(self) -> FilterDynamics:
        """What the heads have learned, in float32 at least; ``omega`` in pairs ``(w, -w)``."""

        def wide(parameter: Tensor) -> Tensor:
            return parameter.to(accumulation_dtype(parameter.dtype))

        def pairs(frequency: Tensor | None, channels: int) -> Tensor:
            if frequency is None:
                rates = 10000.0 ** (-2 * torch.arange(channels // 2, device=self.decay.device) / channels)
                omega = rates.to(accumulation_dtype(self.decay.dtype)).expand(self.num_heads, -1)
            else:
                omega = wide(frequency) * (10 * math.pi / self.max_len)
            return torch.stack((omega, -omega), -1).flatten(-2)

        omega = pairs(self.frequency, self.qk_dim)
        return FilterDynamics(
            mu=(torch.sigmoid(wide(self.decay)) - 1) * (5 / self.max_len) - _EPSILON,
            omega=omega,
            omega_v=omega if self.v_dim == self.qk_dim else pairs(self.value_frequency, self.v_dim),
            sigma2=F.softplus(wide(self.process)),
            eta2=F.softplus(wide(self.measurement)) + _EPSILON,
            gamma2=F.softplus(wide(self.anchor)) + _EPSILON,
            nu=F.softplus(wide(self.robustness)) + _EPSILON,
            tau=wide(self.temperature),
        )

    @classmethod
    def of_system(
        cls,
        matrix: Tensor,
        process: float,
        measurement: float,
        *,
        step: float = 1.0,
        anchor: float = 0.0,
        nu: float = 1.0,
        max_len: int = 512,
        robust: bool = True,
        predict_next: bool = False,
    ) -> AdaptiveFilterAttention:
        """The filter of a known system ``dx = A x dt + process dw``, measured every ``step`` with noise of standard
        deviation ``measurement``: one head whose projections are the eigenvectors of ``A (n, n)``, in its dtype.

        Times then count steps. anchor: standard deviation of the query's own noise. The eigenvalues need one real part
        in ``[-5 / max_len, -1e-5]`` a step (0 becomes the latter) and come in conjugate pairs; noise stays isotropic in
        the eigenbasis where ``A`` is normal.
        """
        values, vectors = torch.linalg.eig(matrix)
        # Conjugates come one after the other; what is real goes first.
        order = sorted(range(len(values)), key=lambda i: float(values[i].imag.abs()))
        values, vectors = values[order], vectors[:, order]
        mu, omega = float(values.real.mean()) * step, values.imag * step
        same = torch.allclose(values.real * step, values.real.new_tensor(mu), atol=1e-6)
        if len(values) % 2 or not same or not torch.allclose(omega[::2], -omega[1::2]):
            raise OptionError(
                "A head has one decay, and frequencies in conjugate pairs; the eigenvalues of this matrix are "
                f"{values.tolist()}."
            )
        share = 1 + (mu + _EPSILON) * max_len / 5
        if mu > 0 or share <= 0:
            raise OptionError(
                f"With max_len={max_len} a decay lies between {-5 / max_len:.3g} and 0 per step, and this system's is "
                f"{mu:.3g}; choose another max_len or step."
            )
        share = min(share, 1 - 1e-12)
        made = cls(
            len(matrix), 1, len(matrix), len(matrix), max_len, robust=robust, gate=None, predict_next=predict_next
        ).to(matrix.dtype)
        inverse = torch.linalg.inv(vectors)
        with torch.no_grad():
            for linear in (made.query, made.key, made.value):
                linear.weight.copy_(torch.cat((inverse.real, inverse.imag)))
            made.out.weight.copy_(torch.cat((vectors.real, -vectors.imag), 1))
            made.decay.fill_(math.log(share / (1 - share)))
            assert made.frequency is not None
            made.frequency.copy_(omega[None, ::2] * (max_len / (10 * math.pi)))
            for parameter, wanted in (
                (made.process, process**2 * step),
                (made.measurement, measurement**2 - _EPSILON),
                (made.anchor, anchor**2 - _EPSILON),
                (made.robustness, nu - _EPSILON),
            ):
                parameter.fill_(_softplus_inverse(wanted))
        return made

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Complex queries, keys ``(batch, heads, length, 2 qk_dim)`` and values ``(batch, heads, length, 2 v_dim)``."""
        if x.dim() != 3 or x.shape[-1] != self.embed_dim or not x.shape[1]:
            raise ShapeError(
                f"This layer takes (batch, length, {self.embed_dim}) with at least one token, got {tuple(x.shape)}."
            )

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (2, self.num_heads, -1)).permute(0, 3, 1, 2, 4).flatten(3)

        return heads(self.query(x)), heads(self.key(x)), heads(self.value(x))

    def forward(self, x: Tensor, times: Tensor | None = None, *, mask: Mask | Tensor | None = None) -> Tensor:
        """Filter. times: ``(length,)`` or ``(batch, length)``, not falling (default: 0, 1, 2, ...). mask: a regard mask
        or a boolean tensor, True where visible, on top of causality."""
        return self._run(x, times, mask)[0]

    def filtered(self, x: Tensor, times: Tensor | None = None, *, mask: Mask | Tensor | None = None) -> Filtered:
        """The output with the attention, whole, and the estimates behind it; arguments as in :meth:`forward`."""
        output, estimates, attention = self._run(x, times, mask, whole=True)
        assert attention is not None
        return Filtered(output, attention, estimates)

    def _run(
        self, x: Tensor, times: Tensor | None, mask: Mask | Tensor | None, whole: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        query, key, value = (t.to(accumulation_dtype(x.dtype)) for t in self.project(x))
        rule = _causal_and(mask)
        given = torch.arange(x.shape[1], device=x.device) if times is None else times.to(x.device)
        since, dynamics = clock(given, query), self.dynamics
        back = turn(-dynamics.omega, since)
        query, key = apply_rotary(query, *back), apply_rotary(key, *back)
        value = apply_rotary(value, *(back if self.v_dim == self.qk_dim else turn(-dynamics.omega_v, since)))

        def over_time(tile: Tile, function: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
            """Functions of elapsed time for a tile's pairs; at regular times a lag is looked at once."""
            if times is not None:
                return list(function(elapsed(since, tile.start, tile.rows)))
            found = function(lags(tile.k_len, tile.start, tile.rows, since))
            return [spread_lags(line, tile.k_len) for line in found]

        def of_pairs(dt: Tensor) -> tuple[Tensor, ...]:
            kernels = _kernels(dt, dynamics, self.additive_bias, self.multiplicative_bias)
            return decay(dynamics.mu, dt), *kernels[:2]

        def score(query: Tensor, key: Tensor, tile: Tile) -> Tensor:
            fading, precision, prior = over_time(tile, of_pairs)
            if self.full_residual:
                residual = rotated_residual(query, key, fading)
            else:
                residual = fading * ((-2 * query) @ key.transpose(-1, -2))
            return _logits(residual, precision, prior, -dynamics.tau.square()[:, None, None], self.robust)

        def read(weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
            (fading,) = over_time(tile, lambda dt: (decay(dynamics.mu, dt),))
            pulled = weights[..., : tile.k_len] * fading
            return torch.cat((pulled @ value, weights[..., tile.k_len :]), -1)

        normalize = masked_softmax if self.gate_scale is None else _softmax_and_precision
        # Elapsed time, decay, variance and logits stand beside one another.
        found = scored_attention(query, key, value, score, normalize, rule=rule, read=read, per_pair=4)
        estimates = self._gated(found[..., : value.shape[-1]], value, found[..., value.shape[-1] :])
        if self.predict_next:
            estimates = estimates * dynamics.mu.exp()[:, None, None]
        if self.rotate_values:
            estimates = apply_rotary(estimates, *turn(dynamics.omega_v, since + int(self.predict_next)))
        flat = estimates.unflatten(-1, (2, self.v_dim)).permute(0, 2, 3, 1, 4).flatten(2)
        attention = scored_weights(query, key, score, masked_softmax, rule=rule).to(x.dtype) if whole else None
        return self.out(flat.to(x.dtype)), estimates.to(x.dtype), attention

    def _gated(self, estimate: Tensor, own: Tensor, log_precision: Tensor) -> Tensor:
        """``g x + (1 - g) v``, both in the frame that turns."""
        if self.gate is None:
            return estimate
        logit = self.gate.to(estimate.dtype)
        if self.gate_scale is not None:
            prior = (logit.square() + _EPSILON).log()
            logit = self.gate_scale.to(estimate.dtype).square() * log_precision - prior
        share = torch.sigmoid(logit)
        return own + torch.cat((share, share), -1) * (estimate - own)


def _causal_and(mask: Mask | Tensor | None) -> Mask:
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise UnsupportedMaskError(f"This layer takes a boolean mask (True: visible), got {mask.dtype}.")
        mask = Boolean(mask)
    return Causal() if mask is None else mask & Causal()


def _complex_init(linear: nn.Linear, into: bool) -> None:
    """Weights of normal magnitude and uniform phase, as in the released code: ``into`` the eigenbasis the halves of the
    rows are real and imaginary parts, out of it those of the columns. No bias."""
    real, complex_ = (
        (linear.in_features, linear.out_features // 2) if into else (linear.out_features, linear.in_features // 2)
    )
    size = math.sqrt(2 / (real + complex_)) * torch.randn(complex_, real)
    phase = 2 * math.pi * torch.rand(complex_, real)
    weight = torch.cat((size * phase.cos(), size * phase.sin()))
    with torch.no_grad():
        linear.weight.copy_(weight if into else weight.T)
        linear.bias.zero_()


def _softplus_inverse(value: float) -> float:
    """The parameter whose softplus is ``value``; the least there is for zero and below."""
    return -40.0 if value < 1e-15 else value + math.log(-math.expm1(-value))
