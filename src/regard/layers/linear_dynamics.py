"""Vectors that a linear stochastic system moves: how states and their uncertainty are carried from one time to another.

A head's system is diagonal with one decay ``mu`` and frequencies ``omega``: ``x(t + dt) = e^{(mu + i omega) dt} x(t)``
and, for its variance, the differential Lyapunov equation ``dV/dt = 2 mu V + sigma^2``. Complex vectors are pairs of
reals, ``[real parts | imaginary parts]`` along the last axis, so that rotary embedding is their rotation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype
from regard.layers.rotary import apply_rotary

__all__ = [
    "VarianceKind",
    "clock",
    "decay",
    "dle_variance",
    "elapsed",
    "isotropic_residual",
    "lags",
    "pull_forward",
    "rotated_residual",
    "spread_lags",
    "turn",
]

VarianceKind = Literal["dle", "linear"] | None
# Exponents beyond this are clipped.
_CLIP = 10.0


def dle_variance(
    mu: Tensor, sigma2: Tensor, eta2: Tensor, gamma2: Tensor, dt: Tensor, kind: VarianceKind = "dle"
) -> Tensor:
    """Variance of a state that was measured ``dt >= 0`` ago; all broadcast. Safe at ``mu = 0``.

    sigma2: process noise per unit of time, eta2: noise of the measurement, gamma2: noise of what it is compared with.
    kind: what is left in the Lyapunov equation from ``V(0) = eta2``, plus gamma2:

        "dle"     dV/dt = 2 mu V + sigma2    sigma2 (e^{2 mu dt} - 1) / (2 mu) + eta2 e^{2 mu dt} + gamma2
        "linear"  dV/dt = sigma2             sigma2 dt + eta2 + gamma2, the first for mu -> 0
        None      dV/dt = 0                  eta2 + gamma2
    """
    if kind is None:
        return (eta2 + gamma2) + torch.zeros_like(dt)
    if kind == "linear":
        return sigma2 * dt + eta2 + gamma2
    x = 2 * mu * dt
    # Near zero both expm1(x) / x and, sooner, its derivative lose digits.
    small = x.abs() < 1e-2
    away = torch.where(small, torch.ones_like(x), x)
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    growth = dt * torch.where(small, series, torch.expm1(away) / away)
    return sigma2 * growth + eta2 * torch.exp(x) + gamma2


def clock(times: Tensor, like: Tensor) -> Tensor:
    """``times``, ``(length,)`` or ``(batch, length)``, from the first one on, ``(batch | 1, length)`` in the
    accumulation dtype of ``like (batch, heads, length, ...)``. Raises OptionError where they fall."""
    batch, length = like.shape[0], like.shape[2]
    if times.dim() not in (1, 2) or times.shape[-1] != length or (times.dim() == 2 and len(times) not in (1, batch)):
        raise ShapeError(
            f"times is (length,) or (batch, length) for {batch} sequences of {length} tokens, got {tuple(times.shape)}."
        )
    rows = times if times.dim() == 2 else times[None]
    if not torch.compiler.is_compiling() and bool((rows.diff(dim=-1) < 0).any()):
        raise OptionError("times must not fall along the sequence; sort the tokens by time first.")
    # Differences alone matter; they are taken before digits are rounded off.
    return (rows - rows[:, :1]).to(accumulation_dtype(like.dtype))


def elapsed(times: Tensor, start: int = 0, rows: int | None = None) -> Tensor:
    """``max(t_i - t_j, 0)`` ``(batch | 1, 1, rows, length)`` of a :func:`clock`, for queries from ``start`` on."""
    own = times[:, start : None if rows is None else start + rows]
    return (own[:, None, :, None] - times[:, None, None, :]).clamp_min(0)


def lags(length: int, start: int, rows: int, like: Tensor) -> Tensor:
    """What :func:`elapsed` would hold for tokens at times 0, 1, 2, ..., each number once, ``(1, 1, 1, rows + length)``:
    a function of elapsed time is taken of these alone and then spread by :func:`spread_lags`."""
    place = torch.arange(length + rows, device=like.device)
    ahead = start - torch.where(place < length, place, place - length - rows)
    return ahead.clamp_min(0).to(accumulation_dtype(like.dtype)).view(1, 1, 1, -1)


def spread_lags(line: Tensor, length: int) -> Tensor:
    """``(..., 1, rows + length)`` as of :func:`lags` to ``(..., rows, length)``: each row is the one before, moved on
    by one key."""
    wide = line.shape[-1]
    rows = wide - length
    # Rows of the line's width, read in rows that are one shorter: each begins one place earlier in the line.
    flat = line.expand(*line.shape[:-2], rows, wide).reshape(*line.shape[:-2], rows * wide)
    return flat[..., : rows * (wide - 1)].unflatten(-1, (rows, wide - 1))[..., :length]


def turn(omega: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(batch | 1, heads, length, 2 d)`` of ``omega (heads, d)`` at ``times (batch | 1, length)``,
    for :func:`~regard.layers.rotary.apply_rotary`, which then multiplies by ``e^{i omega t}``."""
    angle = times[:, None, :, None] * omega[:, None, :]
    return torch.cat((angle.cos(),) * 2, -1), torch.cat((angle.sin(),) * 2, -1)


def decay(mu: Tensor, dt: Tensor) -> Tensor:
    """``e^{mu dt}`` of ``mu (heads,)`` and ``dt (batch | 1, 1, rows, length)``."""
    return (mu[:, None, None] * dt).clamp(-_CLIP, _CLIP).exp()


def rotated_residual(query: Tensor, key: Tensor, fading: Tensor) -> Tensor:
    """``|q|^2 + E^2 |k|^2 - 2 E Re(q^* k)`` of queries and keys turned back by their times, and ``E = fading``; what
    rounding leaves below zero is zero."""
    own, other = query.square().sum(-1, keepdim=True), key.square().sum(-1)[..., None, :]
    # own + E (E other - 2 q k), in as few passes over the pairs as there can be.
    apart = torch.addcmul((-2 * query) @ key.transpose(-1, -2), fading, other)
    return torch.addcmul(own, fading, apart).clamp_min(0)


def isotropic_residual(query: Tensor, key: Tensor, omega: Tensor, mu: Tensor, times: Tensor) -> Tensor:
    """``|q_i - e^{(mu + i omega) (t_i - t_j)} k_j|^2`` ``(batch, heads, length, length)`` by one matrix product.

    query, key ``(batch, heads, length, 2 d)``; omega ``(heads, d)``; mu ``(heads,)``; times ``(length,)`` or ``(batch,
    length)``, not falling. A key of a later time is turned, but neither grows nor fades.
    """
    since = clock(times, query)
    back = turn(-omega, since)
    return rotated_residual(apply_rotary(query, *back), apply_rotary(key, *back), decay(mu, elapsed(since)))


def pull_forward(key: Tensor, omega: Tensor, mu: Tensor, times: Tensor) -> Tensor:
    """Each key at each query's time, ``(batch, heads, queries, keys, 2 d)``, to be looked at; arguments as in
    :func:`isotropic_residual`, which never forms it."""
    since = clock(times, key)
    angle = (since[:, None, :, None] - since[:, None, None, :])[..., None] * omega[:, None, None, :]
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
    return decay(mu, elapsed(since))[..., None] * apply_rotary(key[:, :, None], cos, sin)
