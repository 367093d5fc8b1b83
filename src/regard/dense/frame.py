"""The frame of dense attention, with the dot product taken apart: score pairs, change the map, normalise, read out.

A mechanism is a choice at some of these places; what its paper adds is the only code in its file.
:class:`ScoredMechanism` runs the frame around :meth:`~ScoredMechanism.score`, :meth:`~ScoredMechanism.normalize` and
:meth:`~ScoredMechanism.read`; :func:`compose` builds a mechanism from steps that no paper combined, and says which
executor runs it::

    mine = compose(score="distance", normalizer="entmax")
    mine.executor(query_len=16384, key_len=16384)     # 'tiled': scores and normaliser go row by row

Everything that goes row by row (score, normaliser, read-out) runs in tiles of queries that the backward pass computes
again, so that memory is linear in length. A transform of the map itself (a convolution over queries, a mixture of
heads) needs rows or heads beside each other: mixtures of heads stay tiled, others keep the whole map.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention
from regard.kernels.scored import Tile, scored_attention, scored_weights, tile_rows
from regard.layers.normalizers import NORMALIZERS, normalizer
from regard.layers.scorers import DotScore, Scorer, scorer
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = ["ComposedDense", "ScoredMechanism", "compose"]


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


@register("dense_attention")
class ComposedDense(ScoredMechanism):
    """Attention from a score and a normaliser of one's own choice, softmax of the dot product by default.

    score: a name in :data:`regard.layers.scorers.SCORERS` or a :class:`~regard.layers.scorers.Scorer`; score_options:
    of a named one. normalizer: a name in :data:`regard.layers.normalizers.NORMALIZERS`, or ``(scores, visible) ->
    weights``. heads: None, ``"pre"`` or ``"post"``: a learned linear mixture of the heads' scores before the
    normaliser, or of their weights after it (Shazeer et al., "Talking-Heads Attention", 2020, arXiv 2003.02436), which
    begins as the identity.
    """

    needs_training = True

    def __init__(
        self,
        score: str | Scorer = "dot",
        normalizer: str | Callable[[Tensor, Tensor | None], Tensor] = "softmax",
        heads: Literal["pre", "post"] | None = None,
        score_options: Mapping[str, Any] | None = None,
        num_heads: int = 1,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if heads not in (None, "pre", "post"):
            raise OptionError(f"heads is None, 'pre' or 'post', got {heads!r}.")
        self.scorer = score if isinstance(score, Scorer) else scorer(score, head_dim, **(score_options or {}))
        self.normalizer, self.num_heads, self.heads = _normalizer(normalizer), num_heads, heads
        self.names = (type(self.scorer).__name__, normalizer if isinstance(normalizer, str) else "own")
        self.per_pair = self.scorer.per_pair
        self.mixture = None if heads is None else nn.Parameter(torch.eye(num_heads))

    def extra_repr(self) -> str:
        return f"normalizer={self.names[1]!r}, heads={self.heads!r}"

    def executor(self, query_len: int, key_len: int, num_heads: int | None = None, batch: int = 1) -> str:
        """Which executor runs a call of these lengths: ``"fused"`` (torch's softmax kernel), ``"whole"`` (the map is
        kept) or ``"tiled"`` (queries in tiles, memory linear in length)."""
        if self._fused:
            return "fused"
        rows = tile_rows(batch * (num_heads or self.num_heads), key_len, self.per_pair)
        return "whole" if rows >= query_len else "tiled"

    @property
    def _fused(self) -> bool:
        return isinstance(self.scorer, DotScore) and self.names[1] == "softmax" and self.mixture is None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if self._fused and isinstance(self.scorer, DotScore):
            scale = self.scorer.scale if request.scale is None else request.scale
            return dense_attention(query, key, value, causal=request.causal, mask=request.mask, scale=scale)
        return super().attend(query, key, value, request)

    def score(self, query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        scores: Tensor = self.scorer(query, key)
        return self._mixed(scores) if self.heads == "pre" else scores

    def normalize(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        weights = self.normalizer(scores, visible)
        if self.heads != "post":
            return weights
        mixed = self._mixed(weights)
        # Heads may see different keys.
        return mixed if visible is None else mixed.masked_fill(~visible, 0)

    def _mixed(self, maps: Tensor) -> Tensor:
        assert self.mixture is not None
        if maps.shape[1] != self.num_heads:
            raise ShapeError(
                f"This mechanism mixes {self.num_heads} heads and got {maps.shape[1]}; build it with "
                f"num_heads={maps.shape[1]}."
            )
        return torch.einsum("gh,bhqk->bgqk", self.mixture.to(maps.dtype), maps)


def _normalizer(choice: str | Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    return normalizer(choice) if isinstance(choice, str) else choice


def compose(
    score: str | Scorer = "dot",
    *,
    normalizer: str | Callable[[Tensor, Tensor | None], Tensor] = "softmax",
    heads: Literal["pre", "post"] | None = None,
    num_heads: int = 1,
    head_dim: int = 64,
    **score_options: Any,
) -> ComposedDense:
    """Dense attention from a score, a normaliser and a mixture of heads; options as in :class:`ComposedDense`.

    Raises UnknownNameError for unknown names, OptionError for options out of range.
    """
    return ComposedDense(score, normalizer, heads, score_options, num_heads=num_heads, head_dim=head_dim)
