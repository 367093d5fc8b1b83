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
from typing import Literal

from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.dense.frame import ScoredMechanism
from regard.errors import OptionError
from regard.kernels.scored import Tile
from regard.layers.scorers import MLPScorer, Scorer
from regard.masks import Mask
from regard.registry import register

__all__ = ["MLPScorer", "NeuralAttention", "attention_with_scorer", "layer_schedule", "score_memory"]


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
        return self.scorer.at(query, key, tile.positions(query.device))

    def cost(self, shape: AttentionShape) -> Cost:
        return dense_cost(shape, extra_flops=self.scorer.extra_flops(shape))


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
