"""Combined attention: similarity says add or subtract a token's value, dissimilarity says how much of it; no softmax.

Li, Liang and Zhang, "Comateformer: Combined Attention Transformer for Semantic Sentence Matching", 2024, arXiv
2412.07220, on top of Tay et al., "Compositional De-Attention Networks", NeurIPS 2019. Two affinities of each pair,

    E_ij = alpha q_i . k_j / sqrt(d),   N_ij = -beta |q_i - k_j|_1 / d,   M = tanh(E) * gate(N),   o_i = sum_j M_ij v_j

``tanh(E)`` in (-1, 1) adds, leaves out or subtracts a value; the gate of ``N <= 0`` shrinks those of tokens far off.
``sigmoid(N)`` is at most 1/2: ``centre="scale2"`` doubles it, so that equal vectors give 1, and ``centre="mean"`` takes
the mean over the row's visible keys from N first. The paper does not say which it uses. Rows do not sum to 1 and
outputs grow with length, so a norm has to follow (:class:`regard.models.comateformer.ComateEncoderLayer`); hidden keys
have weight zero. Cost: a product of queries and keys, ``N M d`` absolute differences that no matrix product forms, and
the read-out; in tiles of queries, memory linear in length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost, linear_layer_flops
from regard.dense.frame import ScoredMechanism
from regard.errors import OptionError, UnknownNameError
from regard.kernels.scored import Tile
from regard.layers.attention_functions import ACTIVATIONS
from regard.layers.normalizers import pointwise
from regard.layers.read_outs import compositional_gate
from regard.layers.scorers import DistanceScore
from regard.masks import Mask
from regard.registry import register

__all__ = ["CombinedAttention", "CombinedMaps", "dual_affinity"]

FUNCTIONS = {name: ACTIVATIONS[name] for name in ("tanh", "sigmoid", "arctan")}


class CombinedMaps(NamedTuple):
    """Similarity ``E``, dissimilarity ``N`` (before centring) and weights ``M``, each ``(batch, heads, q_len,
    k_len)``."""

    similarity: Tensor
    dissimilarity: Tensor
    weights: Tensor


def dual_affinity(
    query: Tensor, key: Tensor, alpha: float = 1.0, beta: float = 1.0, norm: bool = True
) -> tuple[Tensor, Tensor]:
    """``E = alpha q . k / sqrt(d)`` and ``N = -beta |q - k|_1``, the latter over ``d`` with ``norm``; ``(..., q_len,
    k_len)`` for query ``(..., q_len, d)`` and key ``(..., k_len, d)``, without ``q_len k_len d`` numbers."""
    dim = query.shape[-1]
    similarity = (query * (alpha * dim**-0.5)) @ key.transpose(-1, -2)
    return similarity, beta * DistanceScore(dim, p=1, scale=dim if norm else 1)(query, key)


@register("comateformer")
class CombinedAttention(ScoredMechanism):
    """Weights ``similarity(E) * gate(N)``, see the module's formulas.

    alpha, beta: scales of the two affinities. centre: ``"scale2"`` (double the sigmoid), ``"mean"`` (subtract the row's
    mean of N) or ``"none"``. similarity: ``"tanh"``, ``"sigmoid"`` or ``"arctan"``; gate likewise (of N <= 0, the last
    two are 0 where vectors are equal and negative elsewhere). norm: divide the distance by ``head_dim``, so that it
    does not grow with it. distance_projections: whether the distance has projections of its own, ``head_dim x
    head_dim`` for queries and for keys, shared by heads and the identity at first.
    """

    needs_training = True
    per_pair = 4

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        centre: Literal["none", "mean", "scale2"] = "scale2",
        dissimilarity: Literal["l1"] = "l1",
        similarity: str = "tanh",
        gate: str = "sigmoid",
        norm: bool = True,
        distance_projections: bool = False,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if centre not in ("none", "mean", "scale2") or dissimilarity != "l1":
            raise OptionError(
                f"centre is 'none', 'mean' or 'scale2' and dissimilarity 'l1', got {centre!r} and {dissimilarity!r}."
            )
        if beta < 0:
            raise OptionError(f"beta is not negative (the gate shrinks what is far), got {beta}.")
        for name in (similarity, gate):
            if name not in FUNCTIONS:
                raise UnknownNameError("function", name, FUNCTIONS, f"There are: {', '.join(FUNCTIONS)}.")
        self.alpha, self.beta, self.centre, self.norm = alpha, beta, centre, norm
        self.similarity, self.gate, self.head_dim = similarity, gate, head_dim
        self.distance_query, self.distance_key = (
            _identity(head_dim) if distance_projections else None for _ in range(2)
        )

    def extra_repr(self) -> str:
        return f"{self.similarity}({self.alpha} E) * {self.gate}({self.beta} N), centre={self.centre!r}"

    def score(self, query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        """Both affinities, ``(2, batch, heads, rows, k_len)``."""
        similarity, dissimilarity = dual_affinity(query, key, self.alpha, self.beta, self.norm)
        if self.distance_query is not None and self.distance_key is not None:
            # In the dtype of the scores, which may be wider than the parameters'.
            moved_query = query @ self.distance_query.weight.to(query.dtype).T
            moved_key = key @ self.distance_key.weight.to(key.dtype).T
            dissimilarity = dual_affinity(moved_query, moved_key, self.alpha, self.beta, self.norm)[1]
        return torch.stack((similarity, dissimilarity))

    def normalize(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        similarity, dissimilarity = scores
        # Only a sigmoid's gate of equal vectors is one half, which doubling makes one.
        centre = "none" if self.centre == "scale2" and self.gate != "sigmoid" else self.centre
        gate = compositional_gate(dissimilarity, visible, centre, FUNCTIONS[self.gate])
        return pointwise(similarity, visible, lambda e: FUNCTIONS[self.similarity](e) * gate)

    @torch.no_grad()
    def maps(
        self, query: Tensor, key: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None
    ) -> CombinedMaps:
        """E, N and M for query ``(batch, heads, q_len, d)`` and key ``(batch, kv_heads, k_len, d)``, to look at."""
        weights = self.weights(query, key, causal=causal, mask=mask)
        wide = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        tile = Tile(0, query.shape[2], query.shape[2], key.shape[2])
        similarity, dissimilarity = self.score(query, wide, tile)
        return CombinedMaps(similarity, dissimilarity, weights)

    def cost(self, shape: AttentionShape) -> Cost:
        # Distances are elementwise work, which counts zero.
        rows = shape.batch * shape.num_heads * (shape.q_len + shape.k_len)
        dim = shape.head_dim
        return dense_cost(shape, extra_flops=0 if self.distance_query is None else linear_layer_flops(rows, dim, dim))

    def _score(self, scale: float | None) -> Callable[[Tensor, Tensor, Tile], Tensor]:
        if scale is None:
            return self.score

        def scaled(query: Tensor, key: Tensor, tile: Tile) -> Tensor:
            similarity, dissimilarity = self.score(query, key, tile)
            return torch.stack((similarity * (scale * math.sqrt(query.shape[-1])), dissimilarity))

        return scaled


def _identity(dim: int) -> nn.Linear:
    linear = nn.Linear(dim, dim, bias=False)
    nn.init.eye_(linear.weight)
    return linear
