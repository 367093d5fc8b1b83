"""Feature maps ``phi`` whose inner products are a kernel, ``phi(x) . phi(y) = k(x, y)`` or its mean: what linear
attention is made of. All work on the last axis: ``(..., d)`` to ``(..., features)``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.shapes import accumulation_dtype

__all__ = [
    "poly_features",
    "poly_pullback",
    "poly_width",
    "positive_random_features",
    "taylor_exp",
    "unit_vectors",
]


def unit_vectors(x: Tensor) -> Tensor:
    """``x / |x|`` over the last axis; a zero vector stays zero. Neither huge nor tiny numbers over- or underflow."""
    work = x.to(accumulation_dtype(x.dtype))
    tiny = torch.finfo(work.dtype).tiny
    # The largest entry is taken out first, as a constant: the result does not depend on it.
    work = work / work.detach().abs().amax(-1, keepdim=True).clamp_min(tiny)
    return work / torch.linalg.vector_norm(work, dim=-1, keepdim=True).clamp_min(tiny)


def taylor_exp(scores: Tensor, p: int) -> Tensor:
    """``sum over l = 0 .. p of scores^l / l!``: exp, cut off after degree ``p``. Its derivative is that of ``p -
    1``."""
    if p < 0:
        return torch.zeros_like(scores)
    total = torch.ones_like(scores)
    for degree in range(p, 0, -1):
        total = 1 + total * scores / degree
    return total


def poly_features(x: Tensor, p: int, symmetric: bool = True) -> Tensor:
    """The features of :func:`taylor_exp`: ``poly_features(x, p) . poly_features(y, p) = sum_l (x . y)^l / l!``.

    Degree by degree: ``1``, ``x``, ``x (x) x / sqrt(2)``, ... symmetric: equal products stand once, with the root of
    their number in front, so that degree ``l`` takes ``C(d + l - 1, l)`` places in place of ``d^l``.
    """
    if p < 0:
        raise OptionError(f"The degree p is at least 0, got {p}.")
    parts = [torch.ones_like(x[..., :1]), x][: p + 1]
    if symmetric:
        for degree in range(2, p + 1):
            index, factor = _monomials(x.shape[-1], degree)
            index = index.to(x.device)
            product = x[..., index[0]]
            for row in index[1:]:
                product = product * x[..., row]
            parts.append(product * factor.to(x))
    else:
        for degree in range(2, p + 1):
            parts.append((parts[-1][..., None] * x[..., None, :]).flatten(-2) * degree**-0.5)
    return torch.cat(parts, -1)


def poly_width(dim: int, p: int) -> int:
    """Symmetric features of degree up to ``p`` of ``dim`` channels: ``C(dim + p, p)``."""
    return math.comb(dim + p, p)


def poly_pullback(x: Tensor, grad: Tensor, p: int) -> Tensor:
    """The gradient of ``x`` from that of ``poly_features(x, p)``, written out for ``p <= 2``."""
    if not 0 <= p <= 2:
        raise OptionError(f"The gradient is written out for degrees 0 to 2, got {p}; use autograd.")
    dim = x.shape[-1]
    if p == 0:
        return torch.zeros_like(x)
    total = grad[..., 1 : 1 + dim]
    if p == 2:
        index, factor = _monomials(dim, 2)
        place = (index[0] * dim + index[1]).to(x.device)
        square = grad.new_zeros(*grad.shape[:-1], dim * dim)
        square = square.index_copy(-1, place, grad[..., 1 + dim :] * factor.to(grad)).unflatten(-1, (dim, dim))
        total = total + ((square + square.transpose(-1, -2)) @ x[..., None])[..., 0]
    return total


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _monomials(dim: int, degree: int) -> tuple[Tensor, Tensor]:
    """Channels ``(degree, count)`` of each distinct product of ``degree`` channels, and ``1 / sqrt(prod m_i!)`` for
    multiplicities ``m_i``."""
    if degree == 2:
        index = torch.triu_indices(dim, dim)
        return index, torch.where(index[0] == index[1], 0.5, 1.0).double().sqrt()
    chosen = list(combinations_with_replacement(range(dim), degree))
    factors = [math.prod(math.factorial(c.count(i)) for i in set(c)) ** -0.5 for c in chosen]
    return torch.tensor(chosen).T, torch.tensor(factors, dtype=torch.float64)


def positive_random_features(x: Tensor, omega: Tensor, limit: float | None = None) -> Tensor:
    """``exp(omega_m . x - |x|^2 / 2) / sqrt(M)``: positive, and with ``omega_m ~ N(0, I)`` inner products have the mean
    ``exp(x . y)``.

    Choromanski et al., "Rethinking Attention with Performers", 2020, arXiv 2009.14794, lemma 1. x ``(..., n, d)``,
    omega ``(..., d, M)`` broadcast against it. limit: exponents are kept within ``[-limit, limit]``.
    """
    if omega.shape[-2] != x.shape[-1]:
        raise ShapeError(f"omega is (..., {x.shape[-1]}, features) for this input, got {tuple(omega.shape)}.")
    exponent = x @ omega - x.square().sum(-1, keepdim=True) / 2
    if limit is not None:
        exponent = exponent.clamp(-limit, limit)
    return exponent.exp() * omega.shape[-1] ** -0.5
