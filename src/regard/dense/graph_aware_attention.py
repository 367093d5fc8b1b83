"""Graph-aware attention: the attention map as a weighted graph, its read-out as the layer of a graph network.

Buehler, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", 2025, arXiv 2501.02393. Per head h
with d = embed_dim / num_heads channels, and X_h for the h-th slice of d channels of the layer's input X:

    A_h = edges(softmax(alpha q k^T / sqrt(d))),  alpha one learned number, begun at 1
    GIN   Z_h = MLP_h(eps_h X_h + A_h X_h),  MLP: linear to mlp_mult d, dropout, RMSNorm, SiLU, linear to d; eps from 0
    PNA   Z_h = MLP_h([sum ; mean ; max ; var] of v_j over j with A_ij > 0),  MLP: linear, SiLU, linear; then W_O

``edges`` may threshold the map (:func:`regard.layers.graph.process_adjacency`). GIN projects no values: its nodes are
slices of the input, heads stand side by side without an output projection. Softmax rows sum to one, so sum and mean are
the same until a threshold or ``adjacency="relu"`` sets the sums free; then a row's degree can be told from its output,
which a mean cannot do. Options: a difference of two maps, ``A_1 - lam A_2``, and a network that scores pairs of inputs.
The paper's adapter for frozen models is :class:`regard.train.graph_aware_attention.SparseGINAdapter`.

``(batch, length, embed_dim)`` in and out. Cost: that of attention; scores go in tiles of queries, so that memory is
linear in length, of PNA too, whose maximum forms d numbers for each pair. GIN without a threshold runs through the
fused softmax kernel. In the released code the first value of lambda counts layers from -1, where the Differential
Transformer counts from 1, and ``top_k`` takes a share of the whole length, so that a row depends on how many tokens
come after it; here layers count from 1, and the share is of what a row sees.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention, expand_groups
from regard.kernels.scored import Tile, scored_attention, scored_weights
from regard.layers.graph import aggregate, check_aggregators, check_mode, process_adjacency
from regard.layers.head_output import lambda_init
from regard.layers.heads import head_sizes
from regard.layers.linear import HeadLinear
from regard.layers.maps import merge_heads
from regard.layers.normalizers import NORMALIZERS
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean, Causal, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["GINAttention", "HeadGIN", "PNAAttention", "PairScore"]

Adjacency = Literal["softmax", "relu", "none"]


class _GraphAttention(Layer):
    """What GIN and PNA share: queries and keys, and the graph that their scores make.

    adjacency: what scores become before the threshold: ``"softmax"``, ``"relu"`` or ``"none"`` (themselves).
    threshold_mode: one of :data:`regard.layers.graph.ADJACENCY_MODES`; threshold, beta, fraction, binary_scale: its
    numbers. learn_threshold: make the threshold a parameter.
    """

    patterns = frozenset(("self", "causal-self"))
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        adjacency: Adjacency,
        threshold_mode: str,
        threshold: float,
        learn_threshold: bool,
        beta: float,
        fraction: float,
        binary_scale: float,
        rotary: bool,
    ) -> None:
        super().__init__()
        if adjacency not in ("softmax", "relu", "none"):
            raise OptionError(f"adjacency is 'softmax', 'relu' or 'none', got {adjacency!r}.")
        check_mode(threshold_mode, fraction)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads)
        self.adjacency, self.threshold_mode, self.rotary = adjacency, threshold_mode, rotary
        self.beta, self.fraction, self.binary_scale = beta, fraction, binary_scale
        self.threshold = nn.Parameter(torch.tensor(threshold)) if learn_threshold else threshold

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, adjacency={self.adjacency!r}, threshold_mode={self.threshold_mode!r}"

    @abstractmethod
    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What scores are made of: query and key, ``(batch, maps, length, ...)``."""

    def maps(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """The graphs ``A_h``, ``(batch, num_heads, length, length)``."""
        self.check(x)
        return scored_weights(*self.features(x), self.score, self.normalize, rule=_rule(causal, mask))

    def check(self, x: Tensor) -> None:
        """ShapeError for what is no ``(batch, length, embed_dim)``."""
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"{type(self).__name__} takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")

    def hidden(self, mult: float) -> int:
        """Units of a head's network."""
        units = int(mult * self.head_dim)
        if units < 1:
            raise OptionError(f"mlp_mult {mult} of head_dim {self.head_dim} leaves no hidden unit; raise it.")
        return units

    def heads(self, x: Tensor, linear: nn.Linear | None = None, turn: bool = False) -> Tensor:
        """``(batch, heads, length, head_dim)``: slices of the input or of a projection, with ``turn`` rotated."""
        split = (x if linear is None else linear(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if not (turn and self.rotary):
            return split
        return apply_rotary(split, *rotary_angles(x.shape[1], self.head_dim, device=x.device, dtype=x.dtype))

    def score(self, query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        """Scores of a tile, in the accumulation dtype."""
        return self._dot(query, key)

    def _dot(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT * self.head_dim**-0.5

    def normalize(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """Edges of a tile."""
        return self.edges(self.weigh(scores, visible), visible)

    def weigh(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """Weights before the threshold."""
        if self.adjacency == "softmax":
            return NORMALIZERS["softmax"](scores, visible)
        return F.relu(scores) if self.adjacency == "relu" else scores

    def edges(self, weights: Tensor, visible: Tensor | None) -> Tensor:
        """Weights past the threshold, zero where not visible."""
        return process_adjacency(
            weights,
            self.threshold_mode,
            threshold=self.threshold,
            beta=self.beta,
            fraction=self.fraction,
            binary_scale=self.binary_scale,
            visible=weights.new_ones((), dtype=torch.bool) if visible is None else visible,
        )


def _own(mask: Mask | Tensor | None) -> Mask | None:
    return Boolean(mask) if isinstance(mask, Tensor) else mask


def _rule(causal: bool, mask: Mask | Tensor | None) -> Mask | None:
    rule = _own(mask)
    if not causal:
        return rule
    return Causal() if rule is None else rule & Causal()


class PairScore(nn.Module):
    """Scores of pairs of inputs by a network of its own for all heads together: ``W_2 silu(W_1 [x_i ; x_j])``, biases
    left out here, from ``embed_dim`` channels each to one score a head. The first map is formed once a token."""

    def __init__(self, embed_dim: int, num_heads: int, hidden: int = 512) -> None:
        super().__init__()
        if hidden < 1:
            raise OptionError(f"A score's network has at least 1 hidden unit, got {hidden}.")
        self.first, self.second = nn.Linear(2 * embed_dim, hidden), nn.Linear(hidden, num_heads)
        self.per_pair = 2 * hidden + num_heads

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What each token brings as a query and as a key, ``(batch, 1, length, hidden)``."""
        of_query, of_key = self.first.weight.chunk(2, -1)
        return F.linear(x, of_query, self.first.bias)[:, None], F.linear(x, of_key)[:, None]

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Of features ``(batch, 1, rows, hidden)`` and ``(batch, 1, k_len, hidden)``: ``(batch, heads, rows,
        k_len)``."""
        pairs = F.silu(query[:, 0, :, None] + key[:, 0, None])
        scores = F.linear(pairs, self.second.weight.to(pairs.dtype), self.second.bias.to(pairs.dtype))
        return scores.movedim(-1, 1)


class HeadGIN(nn.Module):
    """The network of each head: linear, dropout, RMSNorm, SiLU, linear; ``(batch, num_heads, length, head_dim)`` in and
    out."""

    def __init__(self, num_heads: int, head_dim: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.up, self.down = HeadLinear(num_heads, head_dim, hidden), HeadLinear(num_heads, hidden, head_dim)
        self.gain = nn.Parameter(torch.ones(num_heads, 1, hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(self.up(x))
        out: Tensor = self.down(F.silu(F.rms_norm(inner, inner.shape[-1:], eps=1e-5) * self.gain))
        return out


@register("graph_aware_attention")
class GINAttention(_GraphAttention):
    """Attention whose read-out is a graph isomorphism network: ``Z_h = MLP_h(eps_h X_h + A_h X_h)``.

    mlp_mult: hidden units over head_dim (the paper takes 0.5 to 2). eps_init: of the learned eps of each head; the
    classical network has ``1 + eps``, so 1 begins as it does. sharpen: the learned alpha. out_proj: project the heads
    afterwards. differential: ``A_1 - lam A_2`` with queries, keys of their own and one learned lam. scorer: ``"dot"``,
    or ``"mlp"``, a :class:`PairScore` of ``scorer_hidden`` units in place of queries and keys, without positions.
    num_kv_heads: of keys. Further options as in :class:`_GraphAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_mult: float = 0.5,
        eps_init: float = 0.0,
        sharpen: bool = True,
        out_proj: bool = False,
        adjacency: Adjacency = "softmax",
        threshold_mode: str = "none",
        *,
        threshold: float = 0.2,
        learn_threshold: bool = False,
        beta: float = 10.0,
        fraction: float = 0.1,
        binary_scale: float = 1.0,
        differential: bool = False,
        scorer: Literal["dot", "mlp"] = "dot",
        scorer_hidden: int = 512,
        rotary: bool = True,
        dropout: float = 0.1,
        num_kv_heads: int | None = None,
        layer_index: int = 0,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads,
            adjacency,
            threshold_mode,
            threshold,
            learn_threshold,
            beta,
            fraction,
            binary_scale,
            rotary and scorer == "dot",
        )
        if scorer not in ("dot", "mlp"):
            raise OptionError(f"scorer is 'dot' or 'mlp', got {scorer!r}.")
        if scorer == "mlp" and (differential or (num_kv_heads or num_heads) != num_heads):
            raise OptionError(
                "A pair scorer scores inputs, so it has no second map and no key heads; set scorer='dot', or leave "
                "differential and num_kv_heads out."
            )
        self.pairs = PairScore(embed_dim, num_heads, scorer_hidden) if scorer == "mlp" else None
        maps = 0 if scorer == "mlp" else 2 if differential else 1
        kv_width = self.num_kv_heads * self.head_dim
        self.query = nn.ModuleList(nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(maps))
        self.key = nn.ModuleList(nn.Linear(embed_dim, kv_width, bias=False) for _ in range(maps))
        self.alpha = nn.Parameter(torch.tensor(1.0)) if sharpen and maps else None
        self.lam = nn.Parameter(torch.tensor(lambda_init(layer_index + 1))) if differential else None
        self.eps = nn.Parameter(torch.full((num_heads, 1, 1), eps_init))
        self.mlp: nn.Module = HeadGIN(num_heads, self.head_dim, self.hidden(mlp_mult), dropout)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False) if out_proj else None

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend. mask: a regard mask or a boolean tensor, True where visible."""
        self.check(x)
        nodes = self.heads(x)
        heads: Tensor = self.mlp(self.eps * nodes + self._neighbours(x, nodes, causal, mask))
        merged = merge_heads(heads)
        return merged if self.out is None else cast(Tensor, self.out(merged))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What scores are made of; with a difference of maps, those of both side by side."""
        if self.pairs is not None:
            return self.pairs.features(x)
        query, key = (
            torch.cat([self.heads(x, cast(nn.Linear, linear), turn=True) for linear in linears], -1)
            for linears in (self.query, self.key)
        )
        return query if self.alpha is None else query * self.alpha, key

    def score(self, query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        if self.pairs is not None:
            return cast(Tensor, self.pairs(query, key))
        if self.lam is None:
            return super().score(query, key, tile)
        both = zip(query.chunk(2, -1), key.chunk(2, -1), strict=True)
        return torch.stack([self._dot(q, k) for q, k in both])

    def weigh(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        weights = super().weigh(scores, visible)
        return weights if self.lam is None else weights[0] - self.lam.to(weights.dtype) * weights[1]

    def _neighbours(self, x: Tensor, nodes: Tensor, causal: bool, mask: Mask | Tensor | None) -> Tensor:
        """``A_h X_h``."""
        query, key = self.features(x)
        if self.pairs is not None:
            # One map of features serves all heads, so the nodes come whole and are cut when they are read.
            return scored_attention(
                query,
                key,
                x[:, None],
                self.score,
                self.normalize,
                rule=_rule(causal, mask),
                read=lambda weights, query, key, value, tile: weights @ self.heads(value[:, 0]),
                per_pair=self.pairs.per_pair,
            )
        key = expand_groups(key, self.num_heads)
        if self.adjacency == "softmax" and self.threshold_mode == "none" and self.lam is None:
            return dense_attention(query, key, nodes, causal=causal, mask=_own(mask))
        per_pair = 1 if self.lam is None else 3
        return scored_attention(
            query, key, nodes, self.score, self.normalize, rule=_rule(causal, mask), per_pair=per_pair
        )


@register("graph_aware_pna")
class PNAAttention(_GraphAttention):
    """Attention that reads several things of its neighbours at once, for a network per head to put together.

    aggregators: of :data:`regard.layers.graph.AGGREGATORS`. mlp_mult: hidden units over head_dim. num_kv_heads: of keys
    and values. Further options as in :class:`_GraphAttention`; the released code has ``adjacency="relu"`` by default.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        aggregators: Sequence[str] = ("sum", "mean", "max", "var"),
        mlp_mult: float = 2.0,
        adjacency: Adjacency = "softmax",
        threshold_mode: str = "none",
        *,
        threshold: float = 0.2,
        learn_threshold: bool = False,
        beta: float = 10.0,
        fraction: float = 0.1,
        binary_scale: float = 1.0,
        rotary: bool = True,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads,
            adjacency,
            threshold_mode,
            threshold,
            learn_threshold,
            beta,
            fraction,
            binary_scale,
            rotary,
        )
        check_aggregators(aggregators)
        self.aggregators = tuple(aggregators)
        hidden = self.hidden(mlp_mult)
        kv_width = self.num_kv_heads * self.head_dim
        self.query, self.out = (nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(embed_dim, kv_width, bias=False) for _ in range(2))
        self.up = HeadLinear(num_heads, len(self.aggregators) * self.head_dim, hidden, bias=False)
        self.down = HeadLinear(num_heads, hidden, self.head_dim, bias=False)

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend. mask: a regard mask or a boolean tensor, True where visible."""
        heads: Tensor = self.down(F.silu(self.up(self.neighbours(x, causal=causal, mask=mask))))
        out: Tensor = self.out(merge_heads(heads))
        return out

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key, rotated."""
        return self.heads(x, self.query, turn=True), self.heads(x, self.key, turn=True)

    def neighbours(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """What the aggregators read, ``(batch, num_heads, length, aggregators * head_dim)``."""
        self.check(x)
        extremes = {"max", "min"} & set(self.aggregators)
        return scored_attention(
            *self.features(x),
            self.heads(x, self.value),
            self.score,
            self.normalize,
            rule=_rule(causal, mask),
            read=lambda weights, query, key, value, tile: aggregate(weights, value, self.aggregators),
            per_pair=1 + len(extremes) * self.head_dim,
        )
