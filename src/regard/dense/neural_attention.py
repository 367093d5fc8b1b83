"""Neural attention: a small network, instead of a dot product, says how well a query and a key go together.

DiGiugno and Mahmood, "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models", 2025,
arXiv 2502.17206. Per head, queries and keys are brought down to d' channels, and a network scores their concatenation:

    q' = P q + p,  k' = R k + r                                          (head_dim -> d', by default head_dim / 32)
    h_1 = relu(W_1 [q' ; k'] + b_1),  h_2 = relu(W_2 h_1 + b_2),  ...,  score = w . h_last + b
    out = softmax_over_keys(score) v                                     (no 1 / sqrt(head_dim))

The paper's text has one hidden layer, ``hidden=(n,)``; its released code two, of d' and d'/2 units, which is the
default here. One network serves all heads. The paper replaces the first block's attention alone
(:func:`layer_schedule`).

``W_1 [q' ; k'] = A q' + C k'``, so both terms are formed once a token and added pair by pair. Scores depend on one
query and one key, so queries go in tiles that the backward pass computes again: memory is linear in length. A score
matrix is of no low rank, whatever d'. With one hidden layer and tanh it is additive attention.

Cost per pair: ``sum_i hidden_i hidden_(i+1)`` multiply-adds, where a dot product takes head_dim in one matrix product;
it is memory traffic that makes it slower. Units as narrow as the default's (2, then 1) may start dead: scores are then
all alike and carry no gradient, so watch for it or widen ``hidden``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost, linear_layer_flops
from regard.dense.frame import ScoredMechanism
from regard.errors import OptionError, ShapeError
from regard.kernels.scored import Tile
from regard.layers.scorers import Scorer
from regard.masks import Mask
from regard.registry import register

__all__ = ["MLPScorer", "NeuralAttention", "attention_with_scorer", "layer_schedule", "score_memory"]

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class _HeadLinear(nn.Module):
    """Linear maps, one for all heads or one each: ``weight (1 | heads, out, in)``, begun as ``nn.Linear``'s."""

    def __init__(self, heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(heads, out_features))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(in_features**-0.5), in_features**-0.5)

    def forward(self, columns: Tensor) -> Tensor:
        """``(..., heads, in, n) -> (..., heads, out, n)``: channels come before tokens or pairs, of which there are
        many."""
        return self.weight.to(columns.dtype) @ columns + self.bias.to(columns.dtype)[..., None]


class MLPScorer(Scorer):
    """Scores from a network: query ``(..., heads, rows, head_dim)`` and key ``(..., heads, k_len, head_dim)`` to
    ``(..., heads, rows, k_len)``.

    proj_dim: d' (default: ``head_dim // 32``, at least 1). hidden: units of each hidden layer (default: d' and half of
    it, at least 1). activation: ``"relu"`` or ``"tanh"``. shared_over_heads: one network for all heads; otherwise
    ``num_heads`` of them.
    """

    def __init__(
        self,
        head_dim: int,
        proj_dim: int | None = None,
        hidden: Sequence[int] | None = None,
        *,
        activation: Literal["relu", "tanh"] = "relu",
        shared_over_heads: bool = True,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        proj_dim = max(head_dim // 32, 1) if proj_dim is None else proj_dim
        units = (proj_dim, max(proj_dim // 2, 1)) if hidden is None else tuple(hidden)
        if proj_dim < 1 or not units or min(units) < 1:
            raise OptionError(
                f"proj_dim is at least 1 and hidden names one or more layers of at least 1 unit; got {proj_dim} and "
                f"{units}. Without a hidden layer the query would only add a constant, which softmax does not see."
            )
        if activation not in ACTIVATIONS:
            raise OptionError(f"activation is 'relu' or 'tanh', got {activation!r}.")
        heads = 1 if shared_over_heads else num_heads
        self.head_dim, self.proj_dim, self.hidden, self.heads = head_dim, proj_dim, units, heads
        self.activation = activation
        # Of every hidden unit, its sum and its activation.
        self.per_pair = 2 * sum(units) + 1
        self.query, self.key = _HeadLinear(heads, head_dim, proj_dim), _HeadLinear(heads, head_dim, proj_dim)
        widths = (2 * proj_dim, *units, 1)
        self.layers = nn.ModuleList(_HeadLinear(heads, wide, narrow) for wide, narrow in pairwise(widths))

    def extra_repr(self) -> str:
        return f"proj_dim={self.proj_dim}, hidden={self.hidden}, activation={self.activation!r}, networks={self.heads}"

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        if query.dim() < 3 or self.heads not in (1, query.shape[-3]):
            raise ShapeError(
                f"This scorer takes (..., heads, length, {self.head_dim}) and has {self.heads} networks for heads; got "
                f"queries {tuple(query.shape)}. Build it with num_heads as there are, or shared_over_heads=True."
            )
        rows, k_len, query, key = query.shape[-2], key.shape[-2], query.mT, key.mT
        first, function = self.layers[0], ACTIVATIONS[self.activation]
        assert isinstance(first, _HeadLinear)
        of_query, of_key = first.weight.to(query.dtype).split(self.proj_dim, -1)
        left = of_query @ self.query(query) + first.bias.to(query.dtype)[..., None]
        right = of_key @ self.key(key)
        pairs = function(left[..., :, None] + right[..., None, :]).flatten(-2)
        for layer in self.layers[1:-1]:
            pairs = function(layer(pairs))
        scores: Tensor = self.layers[-1](pairs)[..., 0, :].unflatten(-1, (rows, k_len))
        return scores

    def flops(self, shape: AttentionShape) -> int:
        """FLOPs of all scores of a call."""
        maps = shape.batch * shape.num_heads
        tokens, pairs = maps * (shape.q_len + shape.k_len), maps * shape.q_len * shape.k_len
        widths = (self.head_dim, self.proj_dim, self.hidden[0])
        once = sum(linear_layer_flops(tokens, a, b) for a, b in pairwise(widths))
        rest = (*self.hidden, 1)
        return once + sum(linear_layer_flops(pairs, a, b) for a, b in pairwise(rest))


@register("neural_attention")
class NeuralAttention(ScoredMechanism):
    """Softmax over the scores of an :class:`MLPScorer` of these options, or of another ``scorer``.

    Scores carry no ``1 / sqrt(head_dim)``; a call's ``scale`` times ``sqrt(head_dim)`` multiplies them. block_q:
    queries taken at a time (default: as many as fit a tile).
    """

    needs_training = True

    def __init__(
        self,
        proj_dim: int | None = None,
        hidden: Sequence[int] | None = None,
        activation: Literal["relu", "tanh"] = "relu",
        shared_over_heads: bool = True,
        scorer: Scorer | None = None,
        block_q: int | None = None,
        num_heads: int = 1,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if block_q is not None and block_q < 1:
            raise OptionError(f"block_q is at least 1, or None for as many queries as fit; got {block_q}.")
        if scorer is not None and not (proj_dim is None and hidden is None):
            raise OptionError("proj_dim and hidden belong to the scorer that is made here; leave them out with scorer.")
        self.scorer = scorer or MLPScorer(
            head_dim,
            proj_dim,
            hidden,
            activation=activation,
            shared_over_heads=shared_over_heads,
            num_heads=num_heads,
        )
        self.per_pair, self.rows = self.scorer.per_pair, block_q

    def score(self, query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        scores: Tensor = self.scorer(query, key)
        return scores

    def cost(self, shape: AttentionShape) -> Cost:
        if not isinstance(self.scorer, MLPScorer):
            return super().cost(shape)
        dot = linear_layer_flops(shape.batch * shape.num_heads * shape.q_len * shape.k_len, shape.head_dim, 1)
        return dense_cost(shape, extra_flops=self.scorer.flops(shape) - dot)


def attention_with_scorer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scorer: Scorer,
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    block_q: int | None = None,
) -> Tensor:
    """``softmax(scorer(q, k)) v`` for any :class:`~regard.layers.scorers.Scorer`, in tiles; shapes as in
    :class:`~regard.mechanism.Mechanism`. mask: a regard mask or a boolean tensor, True where visible."""
    return NeuralAttention(scorer=scorer, block_q=block_q)(query, key, value, causal=causal, mask=mask)


def layer_schedule(num_layers: int, neural: Sequence[int] = (0,)) -> list[str]:
    """A mechanism's name for each of ``num_layers`` layers: ``"neural_attention"`` in the layers ``neural`` (in the
    paper the first alone), ``"full"`` in the others."""
    if any(not 0 <= layer < num_layers for layer in neural):
        raise OptionError(f"Layers are numbered 0 to {num_layers - 1}; got {list(neural)}.")
    return ["neural_attention" if layer in neural else "full" for layer in range(num_layers)]


def score_memory(
    batch: int,
    num_heads: int,
    length: int,
    proj_dim: int,
    *,
    block_q: int | None = None,
    concatenated: bool = False,
    element_size: int = 4,
) -> int:
    """Bytes of the largest tensor that the scores of ``length`` tokens form: the first hidden layer of ``proj_dim``
    units of every pair, or with ``concatenated`` (the formula taken by its word) the ``[q' ; k']`` before it. block_q:
    of so many queries at a time."""
    rows = length if block_q is None else min(block_q, length)
    return batch * num_heads * rows * length * proj_dim * (2 if concatenated else 1) * element_size
