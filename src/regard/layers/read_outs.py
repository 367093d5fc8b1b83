"""Read-outs: what is made of a query's weights, ``(weights, query, key, value, tile) -> (batch, heads, rows, d_v)``.

The weighted sum of values is the usual one. Most are linear in the values: another weight for every pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels.local_linear import local_linear_weights
from regard.kernels.scored import ReadOut, Tile, weighted_sum
from regard.layers.alignment import AlignmentRead
from regard.layers.attention_functions import activation
from regard.layers.normalizers import seen_count
from regard.layers.scorers import DistanceScore
from regard.layers.steps import build_step

__all__ = [
    "READ_OUTS",
    "Alignment",
    "Compositional",
    "LocalLinear",
    "Reader",
    "compositional_gate",
    "local_linear",
    "local_linear_flops",
    "local_linear_numbers",
    "positive_start",
    "read_out",
]


class Reader(nn.Module):
    """A read-out as a step of a frame; by default the weighted sum."""

    of_distribution: bool = False
    """Whether it needs weights that are a distribution: not negative, of sum 1."""
    value_linear: bool = True
    """Whether it is linear in the values."""
    true_gradient: bool = True
    """Whether its gradient is the derivative of its output."""

    def forward(self, weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
        return weighted_sum(weights, query, key, value, tile)

    def numbers(self, head_dim: int, k_len: int) -> int:
        """Numbers that it forms for each pair."""
        return 0

    def flops(self, queries: int, k_len: int, head_dim: int) -> int:
        """FLOPs of so many queries (over batch and heads) beyond those of the weighted sum."""
        return 0


def local_linear(ridge: Tensor, solver: str = "dense", iterations: int | None = None) -> ReadOut:
    """The read-out of :func:`~regard.kernels.local_linear.local_linear_weights`: an affine map from keys to values is
    fitted around the query by the weights, and taken at it. ridge: positive, broadcasts to the query."""

    def read(weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
        return local_linear_weights(weights, query, key, ridge, solver, iterations) @ value

    return read


def local_linear_numbers(head_dim: int, k_len: int, solver: str) -> int:
    """Numbers that it forms for each pair: some maps and, with covariances, ``d^2`` numbers for each query besides."""
    return 3 + (2 * head_dim * head_dim // max(k_len, 1) if solver == "dense" else 0)


def local_linear_flops(queries: int, k_len: int, head_dim: int, solver: str, iterations: int | None) -> int:
    """FLOPs of the fits, beyond scores and read-out."""
    # The mean key and the tilt of the weights.
    passes = 2 * 2 * queries * k_len * head_dim
    if solver == "dense":
        return passes + 2 * queries * k_len * head_dim**2 + queries * (head_dim**3 // 3 + 4 * head_dim**2)
    return passes + 4 * queries * k_len * head_dim * (iterations or 2 * head_dim)


def positive_start(value: float, count: int) -> nn.Parameter:
    """``count`` learned numbers whose softplus begins as ``value > 0``."""
    return nn.Parameter(torch.full((count,), value + math.log(-math.expm1(-value))))


class LocalLinear(Reader):
    """Local linear regression in place of the weighted mean (Zuo et al., "Local Linear Attention", 2025, arXiv
    2510.01450): exact for values that are an affine function of keys.

    ridge: where each head's learned one begins; scores that fall with distance make sense of the fit, as those of keys
    of one length do. solver: ``"dense"`` or ``"cg"``, with ``iterations``.
    """

    of_distribution = True

    def __init__(
        self,
        num_heads: int,
        ridge: float = 1e-2,
        solver: Literal["dense", "cg"] = "dense",
        iterations: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < ridge < float("inf") or solver not in ("dense", "cg") or (iterations is not None and iterations < 1):
            raise OptionError(
                "ridge is positive and finite, solver 'dense' or 'cg', iterations at least 1; got "
                f"{ridge}, {solver!r}, {iterations}."
            )
        self.solver, self.iterations = solver, iterations
        self.raw_ridge = positive_start(ridge, num_heads)

    def extra_repr(self) -> str:
        return f"solver={self.solver!r}, iterations={self.iterations}"

    @property
    def ridge(self) -> Tensor:
        """Of each head, ``(num_heads,)``."""
        return F.softplus(self.raw_ridge)

    def forward(self, weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
        if weights.shape[1] != len(self.raw_ridge):
            raise ShapeError(
                f"This read-out has a ridge for each of {len(self.raw_ridge)} heads and got {weights.shape[1]}; build "
                f"it with num_heads={weights.shape[1]}."
            )
        ridge = self.ridge.to(weights.dtype).view(-1, 1, 1)
        return local_linear(ridge, self.solver, self.iterations)(weights, query, key, value, tile)

    def numbers(self, head_dim: int, k_len: int) -> int:
        return local_linear_numbers(head_dim, k_len, self.solver)

    def flops(self, queries: int, k_len: int, head_dim: int) -> int:
        return local_linear_flops(queries, k_len, head_dim, self.solver, self.iterations)


def compositional_gate(
    dissimilarity: Tensor,
    visible: Tensor | None = None,
    centre: str = "scale2",
    function: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """``function(N)`` of a dissimilarity ``N <= 0``, ``(..., rows, k_len)``: how much of a value passes.

    centre: ``"scale2"`` doubles it (a sigmoid's gate of equal vectors is then 1), ``"mean"`` takes the mean over the
    row's visible keys from N first. Tay et al., "Compositional De-Attention Networks", NeurIPS 2019, section 2.2.
    """
    if centre == "mean":
        seen = dissimilarity if visible is None else dissimilarity.masked_fill(~visible, 0)
        dissimilarity = dissimilarity - seen.sum(-1, keepdim=True) / seen_count(dissimilarity, visible)
    gate = function(dissimilarity)
    return 2 * gate if centre == "scale2" else gate


class Compositional(Reader):
    """``sum_j w_ij g(-beta |q_i - k_j|_1 / d) v_j``: the weight says whether to add or subtract a value (the ``"tanh"``
    normaliser has both signs), a gate on the distance how much of it. gate: a name in
    :data:`~regard.layers.attention_functions.ACTIVATIONS`; centre: ``"scale2"`` doubles it, so that a sigmoid's is 1
    where query and key are equal, ``"none"`` does not."""

    def __init__(self, beta: float = 1.0, gate: str = "sigmoid", centre: Literal["scale2", "none"] = "scale2") -> None:
        super().__init__()
        if beta < 0 or centre not in ("scale2", "none"):
            raise OptionError(
                "beta is not negative (the gate shrinks what is far) and centre 'scale2' or 'none'; got "
                f"{beta} and {centre!r}."
            )
        self.beta, self.gate, self.centre, self.function = beta, gate, centre, activation(gate)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gate={self.gate!r}, centre={self.centre!r}"

    def forward(self, weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
        distance = self.beta * DistanceScore(query.shape[-1], p=1)(query, key)
        return (weights * compositional_gate(distance, None, self.centre, self.function)) @ value

    def numbers(self, head_dim: int, k_len: int) -> int:
        return 3


class Alignment(Reader):
    """Weights as the distribution of a latent alignment, which one key the output comes from; see
    :class:`~regard.layers.alignment.AlignmentRead`.

    mode: ``"soft"``, the mean over alignments; ``"hard"``, one key, drawn in training and the likeliest else;
    ``"gumbel"``, a relaxed draw in training; ``"exact"``, the log-likelihood over all alignments of values that are
    each key's log-likelihoods. temperature: of draws. For another inference pass ``read=`` a :class:`Reader` of one's
    own, which is given the prior weights (a row that sees nothing is all zeros) and may draw from a posterior instead
    (:func:`~regard.layers.alignment.read_drawn`).
    """

    def __init__(self, mode: AlignmentRead.Mode = "soft", temperature: float = 1.0) -> None:
        super().__init__()
        self.read = AlignmentRead(mode, temperature)
        self.of_distribution, self.true_gradient = mode != "soft", mode in ("soft", "exact")
        self.value_linear = mode != "exact"

    def forward(self, weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
        out: Tensor = self.read(weights, query, key, value, tile)
        return out

    def numbers(self, head_dim: int, k_len: int) -> int:
        return self.read.per_pair(head_dim)


READ_OUTS: dict[str, Callable[..., Reader]] = {
    "sum": Reader,
    "local_linear": LocalLinear,
    "compositional": Compositional,
    "alignment": Alignment,
}
"""By name, each built from ``num_heads`` where it needs it, and options."""


def read_out(name: str, *, num_heads: int = 1, **options: Any) -> Reader:
    """A read-out by name; UnknownNameError shows the names, OptionError the options."""
    return build_step("read-out", READ_OUTS, name, options, num_heads=num_heads)
