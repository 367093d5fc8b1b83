"""The frame of dense attention, with the dot product taken apart: score pairs, normalise rows, read out.

A mechanism is a choice at some of these places; what its paper adds is the only code in its file.
:class:`ScoredMechanism` runs the frame around :meth:`~ScoredMechanism.score`, :meth:`~ScoredMechanism.normalize` and
:meth:`~ScoredMechanism.read`; :func:`regard.dense.compose` builds a mechanism from named steps that no paper combined.

Everything here goes row by row, in tiles of queries that the backward pass computes again, so that memory is linear in
length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.kernels.scored import Tile, scored_attention, scored_weights
from regard.layers.normalizers import NORMALIZERS
from regard.mechanism import Mechanism, Request

__all__ = ["ScoredMechanism"]


class ScoredMechanism(Mechanism):
    """A mechanism with weights ``normalize(score(q, k))`` of all visible pairs."""

    decodes = True
    per_pair: int = 1
    """Numbers that the score forms for each pair."""
    rows: int | None = None
    """Queries that are taken at a time; None for as many as fit a tile."""

    @abstractmethod
    def score(self, query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        """Scores ``(batch, heads, rows, k_len)`` of ``query (batch, heads, rows, d)`` and ``key (batch, heads, k_len,
        d)``, in the accumulation dtype."""

    def normalize(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """Weights from scores, zero where not visible; softmax unless overridden."""
        return NORMALIZERS["softmax"](scores, visible)

    def read(self, weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
        """The output; the weighted sum of values unless overridden."""
        return weights @ value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return scored_attention(
            query,
            key,
            value,
            self._score(request.scale),
            self.normalize,
            rule=request.visible,
            read=self.read,
            per_pair=self.per_pair,
            rows=self.rows,
        )

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        self._require_value_linear()
        if type(self).read is not ScoredMechanism.read:
            return super().implied(query, key, value, request)
        return scored_weights(query, key, self._score(request.scale), self.normalize, rule=request.visible)

    def cost(self, shape: AttentionShape) -> Cost:
        return dense_cost(shape)

    def _score(self, scale: float | None) -> Callable[[Tensor, Tensor, Tile], Tensor]:
        if scale is None:
            return self.score
        # The score has its usual 1 / sqrt(head_dim) already, which ``scale`` stands in for.
        return lambda query, key, tile: self.score(query, key, tile) * (scale * query.shape[-1] ** 0.5)
