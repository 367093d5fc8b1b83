"""Local linear attention: each query fits an affine map from keys to values around itself, instead of a mean of values.

Zuo et al., "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time
Regression", 2025, arXiv 2510.01450. Softmax attention is the local constant (Nadaraya-Watson) estimate of the map from
keys to values, linear attention a global linear one; this is the local linear one. With ``p_ij = softmax_j(q_i . k_j /
bandwidth)`` over the visible keys, query i minimises over ``b`` and ``W``

    sum_j p_ij |v_j - b - W (k_j - q_i)|^2 + ridge |W|^2,   o_i = b

so that, with ``z_ij = k_j - q_i``, ``mu_i = sum_j p_ij z_ij``, ``rho_i = (sum_j p_ij z_ij z_ij^T + ridge I)^-1 mu_i``,

    o_i = sum_j s_ij v_j,   s_ij = p_ij (1 - z_ij . rho_i) / (1 - mu_i . rho_i)

Rows of ``s`` sum to 1 and may hold negative weights. ``ridge`` to infinity gives softmax attention; ``bandwidth`` to
infinity and ``ridge`` to 0 least squares with intercept. The ridge stands against weights of sum 1, not against raw
exponentials, whose size depends on the largest score. :mod:`regard.kernels.local_linear` has the solvers, and a form
of ``s`` without the quotient.

Cost: ``N^2 d^2 + N d^3 / 3`` products for solver "dense", ``4 N^2 d^2`` for the ``2 d`` iterations of "cg"; memory
linear in ``N``, with ``d^2`` numbers for each query of a tile ("dense") or none ("cg"). Decoding solves one ``d x d``
system a head and token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, masked_softmax
from regard.kernels.local_linear import blockwise_local_linear
from regard.kernels.scored import Score, Tile, scored_attention
from regard.layers.norms import srms_norm
from regard.layers.read_outs import local_linear, local_linear_flops, local_linear_numbers, positive_start
from regard.masks import Boolean, Causal, Mask
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = ["LocalLinearAttention", "flash_lla", "local_linear_attention"]


def local_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = True,
    mask: Mask | Tensor | None = None,
    *,
    bandwidth: float | None = None,
    ridge: float | Tensor = 1e-2,
    solver: Literal["dense", "cg"] = "dense",
    cg_iterations: int | None = None,
    kernel: Literal["dot", "rbf"] = "dot",
) -> Tensor:
    """Output ``(batch, heads, q_len, value_dim)`` for query ``(batch, heads, q_len, d)``, key and value ``(batch,
    kv_heads, k_len, ...)``.

    bandwidth: what scores are divided by (default ``sqrt(d)``; infinity weighs all keys alike). ridge: positive, one
    number or one a head. cg_iterations: of solver "cg", default ``2 d``; ``d`` are exact but for rounding. With
    so few that the output is not exact, gradients are those of the exact solution, solved as coarsely. kernel: "rbf"
    weighs by ``exp(-|q - k|^2 / (2 bandwidth))``, which is "dot" where keys have one norm.
    """
    _check(bandwidth, solver, cg_iterations, kernel)
    dim, k_len, per_head = query.shape[-1], key.shape[2], _ridge(ridge, query)

    return scored_attention(
        query,
        key,
        value,
        _score(bandwidth or math.sqrt(dim), kernel),
        masked_softmax,
        rule=_rule(causal, mask),
        read=local_linear(per_head, solver, cg_iterations),
        per_pair=1 + local_linear_numbers(dim, k_len, solver),
    )


def flash_lla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = True,
    mask: Mask | Tensor | None = None,
    *,
    bandwidth: float | None = None,
    ridge: float | Tensor = 1e-2,
    cg_iterations: int | None = None,
    kernel: Literal["dot", "rbf"] = "dot",
    block_q: int = 64,
    block_k: int = 64,
) -> Tensor:
    """:func:`local_linear_attention` with solver "cg" in blocks of queries and keys, forward: the reference of a
    kernel that keeps only ``block_q x block_k`` weights at a time."""
    _check(bandwidth, "cg", cg_iterations, kernel)
    if min(block_q, block_k) < 1:
        raise OptionError(f"Blocks hold at least one query and one key, got {block_q} and {block_k}.")
    return blockwise_local_linear(
        query,
        key,
        value,
        _score(bandwidth or math.sqrt(query.shape[-1]), kernel),
        _ridge(ridge, query),
        rule=_rule(causal, mask),
        iterations=cg_iterations,
        block_q=block_q,
        block_k=block_k,
    )


@register("lla")
class LocalLinearAttention(Mechanism):
    """:func:`local_linear_attention` with a learned ridge for each head, ``softplus`` of a parameter.

    ridge: its value at first. normalize: scale queries and keys to a root mean square of 1 (rotary positions may come
    before it: they keep norms), so that a ridge means the same for every key and weights decrease with distance.
    bandwidth: what scores are divided by (default ``sqrt(head_dim)``). solver, cg_iterations, kernel: as there. For a
    layer with projections: ``regard.nn.MultiHeadAttention(embed_dim, num_heads, "lla", rotary=True)``.
    """

    needs_training = True
    growth = "N^2 d^2"
    decodes = True

    def __init__(
        self,
        ridge: float = 1e-2,
        bandwidth: float | None = None,
        normalize: bool = True,
        solver: Literal["dense", "cg"] = "dense",
        cg_iterations: int | None = None,
        kernel: Literal["dot", "rbf"] = "dot",
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        _check(bandwidth, solver, cg_iterations, kernel)
        if not ridge > 0 or not math.isfinite(ridge):
            raise OptionError(f"ridge is positive and finite, got {ridge}; a large one approaches softmax attention.")
        self.bandwidth, self.normalize, self.solver = bandwidth, normalize, solver
        self.cg_iterations, self.kernel = cg_iterations, kernel
        self.raw_ridge = positive_start(ridge, num_heads)

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth}, normalize={self.normalize}, solver={self.solver!r}"

    @property
    def ridge(self) -> Tensor:
        """Of each head, ``(num_heads,)``."""
        return F.softplus(self.raw_ridge)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        work, scale = accumulation_dtype(query.dtype), request.scale
        wide_q, wide_k = query.to(work), key.to(work)
        if self.normalize:
            wide_q, wide_k = srms_norm(wide_q), srms_norm(wide_k)
        out = local_linear_attention(
            wide_q,
            wide_k,
            value.to(work),
            causal=False,
            mask=request.visible,
            bandwidth=self.bandwidth if scale is None else 1 / scale if scale else math.inf,
            ridge=self.ridge,
            solver=self.solver,
            cg_iterations=self.cg_iterations,
            kernel=self.kernel,
        )
        return out.to(query.dtype)

    def cost(self, shape: AttentionShape) -> Cost:
        queries = shape.batch * shape.num_heads * shape.q_len
        return dense_cost(
            shape,
            extra_flops=local_linear_flops(queries, shape.k_len, shape.head_dim, self.solver, self.cg_iterations),
        )


def _check(bandwidth: float | None, solver: str, cg_iterations: int | None, kernel: str) -> None:
    if bandwidth is not None and not bandwidth > 0:
        raise OptionError(f"bandwidth is positive (math.inf weighs all keys alike), got {bandwidth}.")
    if solver not in ("dense", "cg") or kernel not in ("dot", "rbf"):
        raise OptionError(f"solver is 'dense' or 'cg' and kernel 'dot' or 'rbf', got {solver!r} and {kernel!r}.")
    if cg_iterations is not None and cg_iterations < 1:
        raise OptionError(f"cg_iterations is at least 1, got {cg_iterations}; None takes 2 head_dim, which is exact.")


def _ridge(ridge: float | Tensor, query: Tensor) -> Tensor:
    """``(1, heads | 1, 1, 1)``, in the dtype that queries are computed in."""
    given = torch.as_tensor(ridge, device=query.device).to(torch.promote_types(query.dtype, torch.float32))
    if given.numel() not in (1, query.shape[1]):
        raise ShapeError(
            f"There is one ridge for all heads or one for each; got {given.numel()} for {query.shape[1]} heads. "
            f"Build the mechanism with num_heads={query.shape[1]}."
        )
    if not isinstance(ridge, Tensor) and not ridge > 0:
        raise OptionError(f"ridge is positive, got {ridge}; take a small one such as 1e-8 for plain least squares.")
    return given.view(1, -1, 1, 1)


def _rule(causal: bool, mask: Mask | Tensor | None) -> Mask | None:
    rule = Boolean(mask) if isinstance(mask, Tensor) else mask
    if not causal:
        return rule
    return Causal() if rule is None else rule & Causal()


def _score(bandwidth: float, kernel: str) -> Score:
    def score(query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        scores = (query / bandwidth) @ key.transpose(-1, -2)
        return scores if kernel == "dot" else scores - key.square().sum(-1)[..., None, :] / (2 * bandwidth)

    return score
