"""What normalising attention weights costs: they vanish with length, stop selecting, and react harder when sharper.

Mudarisov et al., "Limitations of Normalization in Attention Mechanism", 2025, arXiv 2508.17821. Weights are ``alpha =
F(l) / sum F(l)`` of ``L`` logits ``l``.

- Vanishing: with ``|l_i| <= a`` and an ``F`` that is continuous and above 0 on ``[-a, a]`` and does not depend on
  ``L``, ``min F / (L max F) <= alpha_i <= max F / (L min F)``; for softmax at temperature ``T`` these are ``exp(-2a/T)
  / L`` and ``exp(2a/T) / L`` (:func:`weight_bounds`). Where one logit is ``g`` above all others, other forms keep more
  than a share of ``1/L`` on it: sparsemax at least ``min(g/T, 1)``, 1.5-entmax ``min(g/(2T), 1)^2``, at any ``L``;
  scalable softmax, ``softmax(c log(L) l / T)``, at least ``1 / (1 + (L - 1) L^(-c g/T))``, which tends to 1 if ``c g >
  T``, to 1/2 if equal, to 0 if less.
- Selection: ``I`` are the ``N`` largest weights and ``s`` the sum of ``alpha_i x_i`` over them. ``D(N)`` is the mean of
  ``|s - alpha_j x_j|^2`` over the others (:func:`selection_distance`). For independent tokens of mean zero and
  ``E |x|^2 = v``, and weights that do not depend on them, it is ``v (sum_I alpha_i^2 + mean alpha_j^2)`` on average,
  for uniform weights ``v (N + 1) / L^2``.
- Separability: the share of the selected ``alpha_i x_i`` that are nearer to ``s`` than all others are
  (:func:`separability`).
- Sensitivity: the Jacobian of softmax is ``J = (diag(alpha) - alpha alpha^T) / T``. Its entries are at most ``1/(4T)``,
  reached where a weight is 1/2, and its spectral norm at most ``1/(2T)``, reached where two weights are. So a step of
  the logits of length ``eps`` moves the weights by at most ``eps/(2T)``, and by less than ``sqrt(2)``, which a step
  that turns all weight from one token to another comes near. (Summaries of the paper give ``1/(4T)`` for the norm,
  which two equal logits refute.)

All functions take any leading dimensions and cost ``O(L d)`` memory; no ``L x L`` matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.kernels.shapes import accumulation_dtype
from regard.layers.normalizers import (
    NORMALIZERS,
    Normalizer,
    entmax,
    length_scaled_softmax,
    row_normalized,
    self_adjusted_softmax,
    sparsemax,
)

__all__ = [
    "KINDS",
    "critical_top_n",
    "expected_selection_distance",
    "finite_difference_sensitivity",
    "jacobian_norm",
    "need_shares",
    "normalise",
    "selection_distance",
    "selection_distances",
    "selection_ratios",
    "separability",
    "weight_bounds",
]

KINDS: dict[str, Normalizer] = {
    "softmax": NORMALIZERS["softmax"],
    "sparsemax": sparsemax,
    "entmax15": partial(entmax, alpha=1.5),
    "scalable_softmax": length_scaled_softmax,
    "self_adjusted": self_adjusted_softmax,
    "uniform": NORMALIZERS["uniform"],
}
"""Normalisers whose weights sum to one, by name."""


def normalise(
    logits: Tensor,
    kind: str | Callable[[Tensor], Tensor] = "softmax",
    temperature: float = 1.0,
    length: int | None = None,
    *,
    scale: float | Tensor = 0.43,
) -> Tensor:
    """Weights that sum to one over the last axis, of ``logits / temperature``.

    kind: a name of :data:`KINDS`, or a positive function ``F`` of each logit, divided by its sum. length, scale: ``n``
    (by default the number of logits) and ``c`` of scalable softmax, ``softmax(c log(n) l)``; give a parameter as
    ``scale`` to learn it.
    """
    _need_temperature(temperature)
    if length is not None and length < 1:
        raise OptionError(f"length is a number of logits, at least 1; got {length}.")
    if not logits.is_floating_point():
        logits = logits.float()
    scores = logits.to(accumulation_dtype(logits.dtype)) / temperature
    if callable(kind):
        shares = kind(scores.detach())
        total = shares.sum(-1)
        if not bool((shares >= 0).all() and (total > 0).all() and total.isfinite().all()):
            raise OptionError(
                "A function that gives weights is positive and finite; of these logits it is negative for one, or adds "
                f"up to between {float(total.min()):.3g} and {float(total.max()):.3g}."
            )
        weights = row_normalized(scores, None, kind, eps=torch.finfo(scores.dtype).tiny)
    elif kind not in KINDS:
        raise UnknownNameError(
            "normaliser", kind, KINDS, f"There are {', '.join(KINDS)}; or give a positive function of each logit."
        )
    elif kind == "scalable_softmax":
        weights = length_scaled_softmax(scores, None, scale, length)
    else:
        weights = KINDS[kind](scores, None)
    return weights.to(logits.dtype)


def weight_bounds(bound: float, length: int, temperature: float = 1.0) -> tuple[float, float]:
    """Bounds ``exp(-2a/T) / L`` and ``exp(2a/T) / L`` of every softmax weight of ``length`` logits of size at most
    ``bound``. As ``L`` grows, one logit at one end with all others at the other comes arbitrarily near."""
    _need_temperature(temperature)
    if not bound >= 0 or length < 1:
        raise OptionError(f"Need a bound of at least 0 and at least one logit; got {bound} and {length}.")
    reach = 2 * bound / temperature
    return math.exp(-reach) / length, math.exp(reach) / length if reach < 700 else math.inf


def selection_distance(
    x: Tensor,
    alpha: Tensor,
    top_n: int,
    *,
    weighted: bool = True,
    reduce: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """``D(N)``, squared distance from the weighted sum of the ``top_n`` tokens to the others: ``x (..., L, d)`` and
    ``alpha (..., L)`` to ``(...)``.

    weighted: to ``alpha_j x_j`` of the others, otherwise to ``x_j``. reduce: their mean or their sum.
    """
    _need_top_n(top_n, alpha)
    return selection_distances(x, alpha, weighted, reduce)[..., top_n - 1].to(x.dtype)


def selection_distances(x: Tensor, alpha: Tensor, weighted: bool = True, reduce: str = "mean") -> Tensor:
    """``D(1), ..., D(L - 1)``, ``(..., L - 1)`` in double precision: one sort, then running sums."""
    if reduce not in ("mean", "sum"):
        raise OptionError(f"reduce is 'mean' or 'sum'; got {reduce!r}.")
    tokens, weights = _ordered(x, alpha)
    selected = tokens * weights[..., None]
    others = selected if weighted else tokens
    total = selected.cumsum(-2)[..., :-1, :]
    left = others.sum(-2, keepdim=True) - others.cumsum(-2)[..., :-1, :]
    size = others.square().sum(-1)
    left_size = size.sum(-1, keepdim=True) - size.cumsum(-1)[..., :-1]
    length = alpha.shape[-1]
    count = length - torch.arange(1, length, device=x.device)
    distance = count * total.square().sum(-1) - 2 * (total * left).sum(-1) + left_size
    return (distance / count if reduce == "mean" else distance).clamp_min(0)


def expected_selection_distance(alpha: Tensor, top_n: int, variance: float = 1.0) -> Tensor:
    """``D(N)`` that independent tokens of mean zero with ``E |x|^2 = variance`` have on average under weights that do
    not depend on them: ``(..., L)`` to ``(...)``."""
    _need_top_n(top_n, alpha)
    squares = alpha.sort(-1, descending=True).values.square()
    return variance * (squares[..., :top_n].sum(-1) + squares[..., top_n:].mean(-1))


def separability(x: Tensor, alpha: Tensor, top_n: int) -> Tensor:
    """Share of the ``top_n`` selected ``alpha_i x_i`` that lie nearer to their sum than every token that was not
    selected: ``x (..., L, d)`` and ``alpha (..., L)`` to ``(...)``."""
    _need_top_n(top_n, alpha)
    tokens, weights = _ordered(x, alpha)
    vectors = tokens * weights[..., None]
    distance = (vectors[..., :top_n, :].sum(-2, keepdim=True) - vectors).square().sum(-1)
    nearest = distance[..., top_n:].amin(-1, keepdim=True)
    return (distance[..., :top_n] < nearest).to(x.dtype).mean(-1)


def critical_top_n(x: Tensor, alpha: Tensor, tol: float = 2.0) -> Tensor:
    """The first ``N`` at which the selection stands apart less than ``tol`` times as far as one with uniform weights on
    the same tokens would, ``(...)``; ``L`` where it never does. tol: a ratio of ``D(N)``, above 0."""
    if not tol > 0:
        raise OptionError(f"tol is a ratio of distances above 0; got {tol}.")
    _need_top_n(1, alpha)
    lost = selection_ratios(x, alpha) < tol
    return torch.where(lost.any(-1), lost.to(torch.int8).argmax(-1) + 1, alpha.shape[-1])


def selection_ratios(x: Tensor, alpha: Tensor) -> Tensor:
    """``D(N)`` over that of uniform weights with the same tokens selected, ``(..., L - 1)``."""
    tokens, weights = _ordered(x, alpha)
    flat = selection_distances(tokens, torch.full_like(weights, 1 / weights.shape[-1]))
    return selection_distances(tokens, weights) / flat.clamp_min(torch.finfo(flat.dtype).tiny)


def _ordered(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and weights in double precision, the largest weight first."""
    if x.dim() < 2 or x.shape[:-1] != alpha.shape:
        raise ShapeError(
            f"Tokens are (..., L, d) and their weights (..., L); got {tuple(x.shape)} and {tuple(alpha.shape)}."
        )
    if not bool(x.isfinite().all() and alpha.isfinite().all()):
        raise OptionError(
            "Tokens or weights hold NaN or infinity, so no distance is defined; look where they come from."
        )
    weights, order = alpha.double().sort(dim=-1, descending=True, stable=True)
    return x.double().gather(-2, order[..., None].expand(x.shape)), weights


def jacobian_norm(
    alpha: Tensor, temperature: float = 1.0, ord: Literal["spectral", "fro", "max"] = "spectral"
) -> Tensor:
    """A norm of softmax's Jacobian where it gives weights ``alpha (..., L)``, to ``(...)``: the spectral or Frobenius
    norm or the largest entry. The weights are at least 0 and sum to 1 (within 1 percent, for half precision)."""
    _need_temperature(temperature)
    if ord not in ("spectral", "fro", "max"):
        raise OptionError(f"ord is 'spectral', 'fro' or 'max'; got {ord!r}.")
    a = alpha.double()
    need_shares(a, "These weights")
    if ord == "max":
        # Off the diagonal it is a_i a_j <= a_i (1 - a_i).
        norm = (a * (1 - a)).amax(-1)
    elif ord == "fro":
        squares = a.square().sort(-1).values
        pairs = (squares[..., 1:] * squares.cumsum(-1)[..., :-1]).sum(-1)
        norm = ((a * (1 - a)).square().sum(-1) + 2 * pairs).sqrt()
    else:
        norm = _largest_eigenvalue(a)
    return (norm / temperature).to(alpha.dtype)


def _largest_eigenvalue(a: Tensor) -> Tensor:
    """Of ``diag(a) - a a^T``: it lies between the two largest weights, where ``sum a_i^2 / (a_i - x) = 1``."""
    if a.shape[-1] == 1:
        return torch.zeros_like(a[..., 0])
    top, at = a.max(-1, keepdim=True)
    rest = a.scatter(-1, at, 0)
    low, high = rest.amax(-1, keepdim=True), top
    for _ in range(60):
        x = (low + high) / 2
        gap = rest - x
        terms = torch.where(gap.abs() > 0, rest.square() / torch.where(gap.abs() > 0, gap, 1), 0)
        above = top.square() / (top - x).clamp_min(torch.finfo(a.dtype).tiny) + terms.sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, low, x), torch.where(above, x, high)
    return low[..., 0]


def finite_difference_sensitivity(
    logits: Tensor,
    eps: float = 1e-4,
    temperature: float = 1.0,
    *,
    kind: str | Callable[[Tensor], Tensor] = "softmax",
    steps: int = 100,
    seed: int = 0,
) -> Tensor:
    """Change of the weights for a step of size ``eps`` of the logits, over ``eps``: ``(..., L)`` to ``(...)``.

    The step is the most telling one that ``steps`` power iterations find, each of one step of ``eps`` to either side,
    so that the result tends to the Jacobian's spectral norm for small ``eps`` (for kinds whose Jacobian is symmetric,
    which are all in :data:`KINDS` but 'self_adjusted'; of others it is a lower bound).
    """
    if not eps > 0 or steps < 1:
        raise OptionError(f"eps is above 0 and steps at least 1; got {eps} and {steps}.")
    start = logits.detach().double()
    weights = normalise(start, kind, temperature)
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start.device)
    for _ in range(steps):
        size = change.norm(dim=-1, keepdim=True)
        step = change / size.clamp_min(torch.finfo(size.dtype).tiny)
        ahead, back = (normalise(start + side * eps * step, kind, temperature) - weights for side in (1, -1))
        further = ahead.norm(dim=-1, keepdim=True) >= back.norm(dim=-1, keepdim=True)
        change = torch.where(further, ahead, back) / eps
    return change.norm(dim=-1).to(logits.dtype)


def _need_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise OptionError(f"A temperature is above 0; got {temperature}.")


def need_shares(alpha: Tensor, whose: str) -> None:
    """OptionError where weights are no shares: negative, or not of sum 1; ``whose`` they are is said."""
    whole = alpha.sum(-1)
    if not bool((alpha >= 0).all() and ((whole - 1).abs() <= 0.01).all()):
        raise OptionError(
            f"{whose} are not at least 0 with a sum of 1 in each row (the sums are {float(whole.min()):.3g} to "
            f"{float(whole.max()):.3g}), so no normaliser gave them."
        )


def _need_top_n(top_n: int, alpha: Tensor) -> None:
    if not 1 <= top_n < alpha.shape[-1]:
        raise OptionError(f"top_n leaves at least one of {alpha.shape[-1]} tokens out and is at least 1; got {top_n}.")
