"""What attention heads compute that learnt linear regression in context: debiased gradient descent.

Examples are rows ``z_l = [x_l | y_l]`` with ``y = beta x + noise``, a ``beta`` for each prompt; the question is
``[x_q | 0]``. Heads ``h`` give ``sum_h OV_h sum_l softmax_l(z_l^T KQ_h z_q) z_l``. Trained from random weights, they
come to

    KQ_h = omega_h diag(I_d, 0),   OV_h = mu_h in the last entry, 0 elsewhere
    y_hat = sum_h mu_h sum_l softmax_l(omega_h x_l . x_q) y_l

with ``|omega_h|`` alike for all heads and ``sum_h mu_h = 0``. Two such heads, ``+omega`` and ``-omega``, are to first
order in omega a step of gradient descent from zero with the means taken out,

    2 mu omega (1/L sum_l y_l x_l . x_q  -  mean(y) mean(x) . x_q) + O(omega^3);

one head keeps a share of ``mean(y)``. In high dimension the loss over normal x is about

    1 + s2 - 2 mu.omega + mu^T (omega omega^T + (1 + s2)/L exp(d omega omega^T)) mu        (exp of each entry)

whose least in ``mu`` is :func:`optimal_mu`; ``s2`` is the variance of the noise, omega is in units of one over the
variance of x. Entries that no input reaches (labels of the question, coordinates that nobody reads) are not trained and
count in no pattern.

Source: "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head
Softmax Attention", 2025, arXiv 2503.12734. The layer is :class:`regard.models.icl_linear_heads.ICLHeads`; inspectors
read any attention layer whose projections :mod:`regard.inspect.projections` finds. Cost: a product of ``(D, D)``
matrices a head; estimators are linear in ``n L d``, ridge has ``d^3`` a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.projections import HeadProjections, head_projections
from regard.retrofit.sites import Site, discover

__all__ = [
    "KQPattern",
    "OVPattern",
    "approximate_loss",
    "debiased_gd_predict",
    "gd_predict",
    "head_sum_predict",
    "icl_linear_regression",
    "kq_matrix",
    "kq_pattern",
    "optimal_mu",
    "ov_matrix",
    "ov_pattern",
    "ridge_predict",
]


def icl_linear_regression(
    n: int,
    L: int,
    d: int,
    noise_std: float = 0.1,
    cov: Literal["identity"] | float | Tensor = "identity",
    tasks: int = 1,
    supports: Sequence[Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``n`` prompts: examples ``z`` ``(n, L, d + tasks)``, questions ``z_q`` ``(n, 1, d + tasks)`` whose labels are 0,
    and the labels asked for, ``y_q`` ``(n, tasks)``, which have noise as all have.

    x is normal with covariance ``cov``: the identity, a number ``rho`` for ``rho^|i-j|``, or ``(d, d)``. Each task has
    a ``beta`` of its own, normal with variance ``1/d``; with ``supports``, one on these coordinates alone.
    """
    if min(n, L, d, tasks) < 1 or noise_std < 0:
        raise OptionError(f"Need n, L, d and tasks >= 1 and noise_std >= 0; got {n}, {L}, {d}, {tasks}, {noise_std}.")
    if supports is not None and (len(supports) != tasks or not all(0 <= i < d for kept in supports for i in kept)):
        raise OptionError(f"Give coordinates, 0 to {d - 1}, of each of the {tasks} tasks; got {supports}.")
    x = torch.randn(n, L + 1, d, generator=generator) @ _root(cov, d).mT
    beta = torch.randn(n, d, tasks, generator=generator) / math.sqrt(d)
    if supports is not None:
        kept = torch.zeros(d, tasks)
        for task, places in enumerate(supports):
            kept[list(places), task] = 1
        beta = beta * kept
    y = x @ beta + noise_std * torch.randn(n, L + 1, tasks, generator=generator)
    rows = torch.cat((x, y), -1)
    question = torch.cat((x[:, L:], torch.zeros(n, 1, tasks)), -1)
    return rows[:, :L], question, y[:, L]


def _root(cov: Literal["identity"] | float | Tensor, d: int) -> Tensor:
    """A matrix whose product with its transpose is the covariance."""
    if isinstance(cov, str):
        if cov != "identity":
            raise OptionError(f"cov is 'identity', a number rho for rho^|i-j|, or a matrix; got {cov!r}.")
        return torch.eye(d)
    if not isinstance(cov, Tensor):
        if not -1 < cov < 1:
            raise OptionError(f"rho lies between -1 and 1; got {cov}.")
        place = torch.arange(d)
        cov = torch.tensor(float(cov)) ** (place[:, None] - place).abs()
    if cov.shape != (d, d):
        raise ShapeError(f"A covariance of {d} coordinates is ({d}, {d}); got {tuple(cov.shape)}.")
    root, failed = torch.linalg.cholesky_ex(cov.double())
    if int(failed) or not torch.allclose(cov, cov.mT):
        raise OptionError("A covariance is symmetric with positive eigenvalues, and this matrix is not.")
    return root.float()


def kq_matrix(layer: nn.Module | Site, scale: float | None = None) -> Tensor:
    """``KQ`` ``(heads, D, D)`` of an attention layer: scores are ``z_key^T KQ z_query``, with their factor ``scale``
    (``1 / sqrt(head_dim)`` by default); what biases and rotary positions add to scores is left out. layer: a module
    that holds one attention layer, or a site of ``discover``."""
    found = _projections(layer)
    factor = found.query.shape[1] ** -0.5 if scale is None else scale
    return factor * found.qk.mT


def ov_matrix(layer: nn.Module | Site) -> Tensor:
    """``OV`` ``(heads, D, D)``: a head adds ``OV z`` for a key that it attends to."""
    return _projections(layer).ov


def _projections(layer: nn.Module | Site) -> HeadProjections:
    if isinstance(layer, Site):
        return head_projections(layer)
    sites = discover(layer)
    if len(sites) != 1:
        raise OptionError(f"This module holds {len(sites)} attention layers; give one site of discover(model).")
    return head_projections(sites[0])


@dataclass(frozen=True, eq=False)
class KQPattern:
    """``omega`` ``(heads,)``: mean of the first ``d`` entries of the diagonal. ``diagonality`` ``(heads,)``: their
    share of all squared entries that an input reaches, 0 to 1 (NaN for a head of zeros). ``homogeneity``: smallest over
    largest ``|omega|`` of the heads, 0 to 1."""

    omega: Tensor
    diagonality: Tensor
    homogeneity: float


@dataclass(frozen=True, eq=False)
class OVPattern:
    """``mu`` ``(heads, tasks)``: the label's entry for each task. ``last_entry_only`` ``(heads,)``: the labels' share
    of all squared entries that are read, 0 to 1. ``zero_sum``: ``|sum_h mu_h|`` over the largest ``|mu_h|``, the
    largest of the tasks; 0 where heads cancel."""

    mu: Tensor
    last_entry_only: Tensor
    zero_sum: float


def kq_pattern(kq: Tensor, d: int) -> KQPattern:
    """How near ``KQ`` ``(heads, D, D)`` is to ``omega diag(I_d, 0)``."""
    _check_matrices(kq, d)
    reached = kq[:, :, :d]
    diagonal = kq.diagonal(dim1=1, dim2=2)[:, :d]
    omega = diagonal.mean(-1)
    share = diagonal.square().sum(-1) / reached.square().sum((1, 2))
    sizes = omega.abs()
    return KQPattern(omega, share, float(sizes.min() / sizes.max()))


def ov_pattern(ov: Tensor, d: int) -> OVPattern:
    """How near ``OV`` ``(heads, D, D)`` is to labels alone, with a sum of zero."""
    _check_matrices(ov, d)
    read = ov[:, d:]
    mu = ov.diagonal(dim1=1, dim2=2)[:, d:]
    share = read[:, :, d:].square().sum((1, 2)) / read.square().sum((1, 2))
    return OVPattern(mu, share, float((mu.sum(0).abs() / mu.abs().amax(0)).max()))


def _check_matrices(matrices: Tensor, d: int) -> None:
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2] or not 0 < d < matrices.shape[1]:
        raise ShapeError(f"Need matrices (heads, D, D) with 0 < d < D; got {tuple(matrices.shape)} and d = {d}.")


def head_sum_predict(z: Tensor, z_q: Tensor, omega: Tensor, mu: Tensor) -> Tensor:
    """``sum_h mu_h sum_l softmax_l(omega_h x_l . x_q) y_l``, ``(n, tasks)``; omega ``(heads,)``, mu ``(heads,)`` or
    ``(heads, tasks)``."""
    if omega.dim() != 1 or mu.dim() not in (1, 2) or len(mu) != len(omega):
        raise ShapeError(
            f"omega is (heads,), mu (heads,) or (heads, tasks); got {tuple(omega.shape)}, {tuple(mu.shape)}."
        )
    tasks = 1 if mu.dim() == 1 else mu.shape[1]
    x, y, x_q = _parts(z, z_q, tasks)
    weights = (omega[:, None] * (x @ x_q[..., None])[:, None, :, 0]).softmax(-1)
    return ((weights @ y) * mu.view(len(omega), tasks)).sum(1)


def gd_predict(z: Tensor, z_q: Tensor, lr: float | None = None, *, noise_var: float = 0.0) -> Tensor:
    """One step of gradient descent on squared error from zero: ``lr / L sum_l y_l x_l . x_q``, ``(n, 1)``.

    lr: by default the best for x of covariance one, ``L / (L + d + 1 + d noise_var)``.
    """
    x, y, x_q = _parts(z, z_q)
    length, d = x.shape[1:]
    rate = length / (length + d + 1 + d * noise_var) if lr is None else lr
    return rate * (x.mT @ y / length * x_q[..., None]).sum(1)


def debiased_gd_predict(z: Tensor, z_q: Tensor, lr: float | None = None, *, noise_var: float = 0.0) -> Tensor:
    """The same with the examples' means taken out of x and y, ``(n, 1)``.

    lr: by default the best for x of covariance one, ``L / (L + d + d noise_var)``.
    """
    x, y, x_q = _parts(z, z_q)
    length, d = x.shape[1:]
    rate = length / (length + d + d * noise_var) if lr is None else lr
    step = (x - x.mean(1, keepdim=True)).mT @ (y - y.mean(1, keepdim=True)) / length
    return rate * (step * x_q[..., None]).sum(1)


def ridge_predict(z: Tensor, z_q: Tensor, noise_var: float = 0.01) -> Tensor:
    """The mean of ``y_q`` given the examples, for ``beta`` of variance ``1/d``: ridge regression with ``d noise_var``.
    ``(n, 1)``; no estimator has a smaller mean squared error."""
    if not noise_var > 0:
        raise OptionError(f"noise_var is above 0; got {noise_var}.")
    x, y, x_q = _parts(z, z_q)
    d = x.shape[-1]
    gram = x.mT @ x + d * noise_var * torch.eye(d, dtype=x.dtype, device=x.device)
    return (torch.linalg.solve(gram, x.mT @ y) * x_q[..., None]).sum(1)


def _parts(z: Tensor, z_q: Tensor, tasks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """``x (n, L, d)``, ``y (n, L, tasks)``, ``x_q (n, d)``."""
    if z.dim() != 3 or z_q.shape != (len(z), 1, z.shape[-1]) or z.shape[-1] <= tasks:
        raise ShapeError(
            f"Examples are (n, L, d + {tasks}) and questions (n, 1, d + {tasks}); got {tuple(z.shape)} and "
            f"{tuple(z_q.shape)}."
        )
    return z[..., :-tasks], z[..., -tasks:], z_q[:, 0, :-tasks]


def approximate_loss(omega: Tensor, mu: Tensor, L: int, d: int, noise_var: float) -> Tensor:
    """Mean squared error of :func:`head_sum_predict` on normal x of covariance one, about; ``omega`` and ``mu``
    ``(heads,)`` to a number."""
    if mu.shape != omega.shape:
        raise ShapeError(f"omega and mu are (heads,); got {tuple(omega.shape)} and {tuple(mu.shape)}.")
    return 1 + noise_var - 2 * mu @ omega + mu @ _curvature(omega, L, d, noise_var) @ mu


def optimal_mu(omega: Tensor, L: int, d: int, noise_var: float) -> Tensor:
    """The ``mu`` ``(heads,)`` of least :func:`approximate_loss`. Heads of one omega share what is theirs."""
    return torch.linalg.pinv(_curvature(omega, L, d, noise_var), hermitian=True) @ omega


def _curvature(omega: Tensor, L: int, d: int, noise_var: float) -> Tensor:
    if omega.dim() != 1 or min(L, d) < 1 or noise_var < 0:
        raise OptionError(f"Need omega (heads,), L and d >= 1, noise_var >= 0; got {tuple(omega.shape)}, {L}, {d}.")
    pairs = omega[:, None] * omega
    return pairs + (1 + noise_var) / L * (d * pairs).exp()
