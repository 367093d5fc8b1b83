"""Local linear regression on weighted keys: the weights of an attention map, corrected to first order.

For query i with weights ``p_ij`` of sum 1, mean key ``m_i = sum_j p_ij k_j`` and covariance ``C_i = sum_j p_ij (k_j -
m_i)(k_j - m_i)^T``, ridge regression of the values on the keys, evaluated at the query, has the weights

    s_ij = p_ij (1 - (k_j - m_i) . y_i),   (C_i + ridge I) y_i = m_i - q_i

This is the fit around ``q_i``, ``s_ij = p_ij (1 - z_ij . rho_i) / (1 - mu_i . rho_i)`` with ``z_ij = k_j - q_i``,
``mu_i = sum_j p_ij z_ij`` and ``rho_i = (sum_j p_ij z_ij z_ij^T + ridge I)^-1 mu_i``, after taking the rank-one part
``mu_i mu_i^T`` of the matrix out: it needs no quotient that may vanish.

Two ways to ``y_i``. ``dense`` forms the ``rows`` matrices of ``d x d`` numbers and factors them (``rows k_len d^2 +
rows d^3 / 3`` products); ``cg`` forms none, each of its iterations is one more pass like attention's (``2 rows k_len
d``); ``d`` of them are exact, with rounding up to ``2 d``. Neither forms ``k_j - q_i`` for all pairs. Gradients are
those of the exact solution and take one more solve of the same system. In float32 ``dense`` keeps a digit more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels.conjugate import conjugate_gradient
from regard.kernels.scored import Score, Tile
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.masks import Mask

__all__ = [
    "blockwise_local_linear",
    "lla_cg_solve",
    "local_linear_weights",
    "pairwise_centered_matvec",
]

# Products of keys held at a time while covariances are summed.
_PRODUCTS = 1 << 22
_REFINEMENTS = 2


def pairwise_centered_matvec(x: Tensor, key: Tensor, centre: Tensor) -> Tensor:
    """``(k_j - c_i) . x_i`` for all pairs, ``(..., rows, k_len)``, without the ``rows x k_len x d`` differences.

    x, centre: ``(..., rows, d)``; key: ``(..., k_len, d)``.
    """
    return x @ key.transpose(-1, -2) - (x * centre).sum(-1, keepdim=True)


def _covariance_product(x: Tensor, weights: Tensor, key: Tensor, centre: Tensor, ridge: Tensor) -> Tensor:
    """``(sum_j p_ij (k_j - c_i)(k_j - c_i)^T + ridge I) x_i``."""
    return _covariance_image(pairwise_centered_matvec(x, key, centre), weights, key, centre) + ridge * x


def _covariance_image(tilt: Tensor, weights: Tensor, key: Tensor, centre: Tensor) -> Tensor:
    """``sum_j p_ij t_ij (k_j - c_i)``."""
    along = weights * tilt
    return along @ key - along.sum(-1, keepdim=True) * centre


def lla_cg_solve(
    weights: Tensor, key: Tensor, centre: Tensor, right: Tensor, ridge: Tensor | float, iterations: int | None = None
) -> Tensor:
    """``x_i`` with ``(sum_j p_ij (k_j - c_i)(k_j - c_i)^T + ridge I) x_i = b_i``, without forming the matrices.

    weights: ``(..., rows, k_len)``, not negative; key: ``(..., k_len, d)``; centre, right: ``(..., rows, d)``; ridge: a
    positive number, or a tensor that broadcasts to ``right``. iterations: default ``2 d``; ``d`` are exact but for
    rounding, which takes up to as many more where the ridge is small.
    """
    positive = torch.as_tensor(ridge, dtype=right.dtype, device=right.device)
    steps = 2 * right.shape[-1] if iterations is None else iterations
    return conjugate_gradient(lambda x: _covariance_product(x, weights, key, centre, positive), right, steps)


def _factor(weights: Tensor, key: Tensor, mean: Tensor, ridge: Tensor) -> Tensor:
    """Cholesky factors of ``C_i + ridge I``, ``(..., rows, d, d)``."""
    dim = key.shape[-1]
    second = weights.new_empty(*weights.shape[:-1], dim, dim)
    step = max(_PRODUCTS // key.numel(), 1)
    for start in range(0, dim, step):
        products = key[..., start : start + step, None] * key[..., None, :]
        second[..., start : start + step, :] = (weights @ products.flatten(-2)).unflatten(-1, (-1, dim))
    # Rounding may leave a covariance slightly indefinite; this much of its size makes up for it.
    rounding = 4 * torch.finfo(key.dtype).eps * second.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    matrix = second - mean[..., :, None] * mean[..., None, :] + torch.diag_embed((ridge + rounding).expand_as(mean))
    return torch.linalg.cholesky_ex(matrix)[0]


def _solve(
    first: Tensor, shift: Tensor | None, iterations: int, factor: Tensor | None, *system: Tensor
) -> tuple[Tensor, Tensor]:
    """``x = (C_i + ridge I)^-1 first`` and ``(k_j - m_i) . x_i``; by ``iterations`` of conjugate gradients where there
    is no factor. shift: ``f_ij`` where ``first`` is ``-sum_j p_ij f_ij (k_j - m_i)``, else None."""
    weights, key, mean, ridge = system
    if factor is None:
        x = lla_cg_solve(weights, key, mean, first, ridge, iterations)
        return x, _recentred(pairwise_centered_matvec(x, key, mean), weights)
    x = torch.cholesky_solve(first[..., None], factor)[..., 0]
    tilt = pairwise_centered_matvec(x, key, mean)
    # Refinement takes out what was added to the factored matrix. Where a ridge is small, x is long across the keys and
    # its products round; each round's products are kept apart, so that the next round sees and mends their rounding.
    # A shift is fitted by the tilt: the sum of both is small and rounds little.
    for _ in range(_REFINEMENTS):
        left = -_covariance_image(tilt if shift is None else tilt + shift, weights, key, mean) - ridge * x
        more = torch.cholesky_solve((left if shift is not None else first + left)[..., None], factor)[..., 0]
        x, tilt = x + more, tilt + pairwise_centered_matvec(more, key, mean)
    return x, _recentred(tilt, weights)


def _recentred(tilt: Tensor, weights: Tensor) -> Tensor:
    """Of mean zero: where one key has nearly all weight, the mean key is known to rounding only and slopes are
    steep."""
    return tilt - (weights * tilt).sum(-1, keepdim=True)


class _LocalLinear(torch.autograd.Function):
    """``s_ij`` from ``(p_ij, q_i, k_j, ridge)``. Backward, with the gradients ``G`` of ``s``, ``g_ij = G_ij - sum_j
    p_ij G_ij``, ``(C_i + ridge I) u_i = -sum_j p_ij g_ij k_j`` and ``E_ij = g_ij + (k_j - m_i) . u_i``:

    dp_ij = E_ij (1 - t_ij),   dk_j = sum_i s_ij u_i - p_ij E_ij y_i,   dq_i = -u_i,   dridge = -sum_i u_i . y_i

    with ``t_ij = (k_j - m_i) . y_i``; ``dp`` up to a number for each row, which rows of sum 1 do not feel.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, query: Tensor, key: Tensor, ridge: Tensor, solver: str, iterations: int
    ) -> Tensor:
        mean = weights @ key
        factor = _factor(weights, key, mean, ridge) if solver == "dense" else None
        slope, tilt = _solve(mean - query, None, iterations, factor, weights, key, mean, ridge)
        ctx.save_for_backward(weights, key, ridge, mean, factor, slope, tilt)
        ctx.iterations = iterations
        return weights * (1 - tilt)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, key, ridge, mean, factor, slope, tilt = ctx.saved_tensors
        centred = grad - (weights * grad).sum(-1, keepdim=True)
        first = -_covariance_image(centred, weights, key, mean)
        back, along = _solve(first, centred, ctx.iterations, factor, weights, key, mean, ridge)
        moved, kept = centred + along, 1 - tilt
        by_key = (weights * kept).transpose(-1, -2) @ back - (weights * moved).transpose(-1, -2) @ slope
        by_ridge = -(back * slope).sum(-1, keepdim=True).sum_to_size(ridge.shape)
        return moved * kept, -back, by_key, by_ridge, None, None


def local_linear_weights(
    weights: Tensor, query: Tensor, key: Tensor, ridge: Tensor, solver: str = "dense", iterations: int | None = None
) -> Tensor:
    """The weights ``s_ij`` of the local linear fit from those of the local constant one, ``(..., rows, k_len)``.

    weights: rows of sum 1, or of zeros where nothing is seen; query ``(..., rows, d)``, key ``(..., k_len, d)``; ridge:
    positive, broadcasts to the query. solver: ``"dense"`` or ``"cg"`` with ``iterations`` (default ``2 d``).
    """
    steps = 2 * query.shape[-1] if iterations is None else iterations
    out: Tensor = _LocalLinear.apply(weights, query, key, ridge, solver, steps)
    return out


def blockwise_local_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Score,
    ridge: Tensor,
    *,
    rule: Mask | None = None,
    iterations: int | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Tensor:
    """Local linear attention with softmax weights in blocks of queries and keys: no row of the map is ever whole.

    Passes over the keys: one online softmax for log-sum-exp and mean key, one for each iteration of conjugate
    gradients, one for the values. Memory ``block_q (block_k + d)`` a head. For inference; under autograd every block
    is kept.
    """
    work, heads, (q_len, k_len) = accumulation_dtype(query.dtype), query.shape[1], (query.shape[2], key.shape[2])
    wide = query.to(work)
    keys, values = (expand_groups(t, heads).to(work).split(block_k, 2) for t in (key, value))
    steps = 2 * query.shape[-1] if iterations is None else iterations
    outs = []
    for start in range(0, q_len, block_q):
        part = wide[:, :, start : start + block_q]
        scores = _blocks(part, keys, score, Tile(start, part.shape[2], q_len, k_len), rule)
        outs.append(_block_of_queries(part, keys, values, scores, ridge, steps))
    return torch.cat(outs, 2).to(query.dtype)


def _blocks(
    query: Tensor, keys: tuple[Tensor, ...], score: Score, tile: Tile, rule: Mask | None
) -> Callable[[], Iterator[Tensor]]:
    """Scores of one block of queries against each block of keys, -inf where not visible, anew at each call."""
    row = torch.arange(tile.start, tile.start + tile.rows, device=query.device).view(1, 1, -1, 1)

    def run() -> Iterator[Tensor]:
        first = 0
        for key in keys:
            scores = score(query, key, tile)
            if rule is not None:
                column = torch.arange(first, first + key.shape[2], device=query.device).view(1, 1, 1, -1)
                seen = rule.to(query.device).at(row, column, tile.q_len, tile.k_len)
                scores = scores.masked_fill(~seen, float("-inf"))
            first += key.shape[2]
            yield scores

    return run


def _block_of_queries(
    query: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    scores: Callable[[], Iterator[Tensor]],
    ridge: Tensor,
    iterations: int,
) -> Tensor:
    top = query.new_full((*query.shape[:-1], 1), float("-inf"))
    total, moment = torch.zeros_like(top), torch.zeros_like(query)
    for block, key in zip(scores(), keys, strict=True):
        higher = top.maximum(block.amax(-1, keepdim=True))
        finite = torch.where(higher > float("-inf"), higher, 0)
        kept, weights = (top - finite).exp(), (block - finite).exp()
        total, moment = kept * total + weights.sum(-1, keepdim=True), kept * moment + weights @ key
        top = higher
    seen = total > 0
    mean = moment / torch.where(seen, total, 1)
    # A row without keys gets weights exp(-inf) of zero.
    level = torch.where(seen, top + torch.where(seen, total, 1).log(), float("inf"))

    def product(x: Tensor) -> Tensor:
        return sum(
            (
                _covariance_product(x, (s - level).exp(), k, mean, ridge * 0)
                for s, k in zip(scores(), keys, strict=True)
            ),
            ridge * x,
        )

    slope = conjugate_gradient(product, mean - query, iterations)
    centre = torch.zeros_like(total)
    average = query.new_zeros(*query.shape[:-1], values[0].shape[-1])
    tilted = torch.zeros_like(average)
    for block, key, value in zip(scores(), keys, values, strict=True):
        weights = (block - level).exp()
        along = weights * pairwise_centered_matvec(slope, key, mean)
        centre, average = centre + along.sum(-1, keepdim=True), average + weights @ value
        tilted = tilted + along @ value
    return (1 + centre) * average - tilted
