"""The frame of block selectors: score blocks, select among them, lay out, execute, correct.

A selector is a choice at each step; what its paper adds is the only code in its file. :class:`BlockSelector` runs the
frame around one method, :meth:`~BlockSelector.choose`; :func:`compose` builds a selector from steps that no paper
combined::

    compose(score="max", select=TopP(0.9) | TopK(4), sinks=1, local=2, correct="pooled")
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, UnknownNameError
from regard.kernels import block_sparse_attention, score_scale
from regard.layout import BlockLayout, num_blocks
from regard.masks import Causal
from regard.mechanism import Request, SparseMechanism
from regard.registry import register
from regard.sparse.compensation import pooled_remainder
from regard.sparse.scoring import SCORES, BlockView, Score
from regard.sparse.selection import Selection, TopK, TopP, settle_mask

__all__ = ["BlockSelector", "ComposedSelector", "compose"]


class BlockSelector(SparseMechanism):
    """A mechanism that chooses blocks of ``block_q`` queries by ``block_k`` keys.

    What is chosen for a query depends on the tokens of its own block of queries, later ones included, and on nothing
    behind them.
    """

    growth = "share of N^2"

    def __init__(self, block_q: int, block_k: int) -> None:
        super().__init__()
        if block_q < 1 or block_k < 1:
            raise OptionError(f"Block sizes must be at least 1, got {block_q} and {block_k}.")
        self.block_q, self.block_k = block_q, block_k

    @property
    def strictly_causal(self) -> bool:
        return False

    def extra_repr(self) -> str:
        return f"block_q={self.block_q}, block_k={self.block_k}"

    def view(self, query: Tensor, key: Tensor, request: Request) -> BlockView:
        """What the steps know of a call."""
        visible, keys = settle_mask(request, query.shape[2], key.shape[2])
        layout = BlockLayout.of(visible, query.shape[2], key.shape[2], self.block_q, self.block_k, query.device)
        return BlockView(layout, keys, request.causal, score_scale(query, request.scale))

    @abstractmethod
    def choose(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        """The blocks to compute, boolean ``(batch | 1, heads | 1, num_q_blocks, num_k_blocks)``; those that
        ``view.seen`` rules out are left out in any case."""

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        return self.chosen(query, key, self.view(query, key, request))

    @torch.no_grad()
    def chosen(self, query: Tensor, key: Tensor, view: BlockView) -> BlockLayout:
        """The layout of the chosen blocks."""
        return view.layout.only(self.choose(query, key, view) & view.seen)

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound where only the input tells the density."""
        nk = num_blocks(shape.k_len, self.block_k)
        rule = Causal() if shape.causal else None
        share = BlockLayout.of(rule, shape.q_len, shape.k_len, self.block_q, self.block_k).density()
        return dense_cost(shape, min(share, self.most_blocks(nk) / nk), self.scoring_flops(shape))

    def scoring_flops(self, shape: AttentionShape) -> int:
        """Operations of the choice; by default one product of vectors per pair of blocks."""
        nq, nk = num_blocks(shape.q_len, self.block_q), num_blocks(shape.k_len, self.block_k)
        return 2 * shape.batch * shape.num_heads * nq * nk * shape.head_dim

    def most_blocks(self, num_k_blocks: int) -> float:
        """How many key blocks a block of queries visits at most, by the options alone."""
        return num_k_blocks


@dataclass(frozen=True)
class _Steps:
    """score, select: the first two steps. sinks: first key blocks that are always kept; local: nearest ones, the own
    included. correct: what stands for the blocks left out."""

    score: Score
    select: Selection
    sinks: int
    local: int
    correct: Literal["pooled"] | None


@register("block_select")
class ComposedSelector(BlockSelector):
    """score: name of a way to score blocks (see :data:`regard.sparse.scoring.SCORES`). top_k, top_p, ratio: how many
    blocks a block of queries keeps: so many, the largest that carry a share of the softmax over block scores, or a
    share of all blocks; where several are given, those that any of them keeps. sinks: so many first key blocks are
    always kept; local: so many nearest, the query's own included. correct: ``"pooled"`` lets each block left out, if
    the mask hides nothing of it, stand for itself by the mean of its keys and values. More ways: :func:`compose`."""

    def __init__(
        self,
        score: str = "mean",
        top_p: float | None = 0.9,
        top_k: int | None = None,
        ratio: float | None = None,
        sinks: int = 1,
        local: int = 1,
        correct: Literal["pooled"] | None = None,
        block_q: int = 128,
        block_k: int = 64,
    ) -> None:
        super().__init__(block_q, block_k)
        parts: list[Selection] = []
        if top_p is not None:
            parts.append(TopP(top_p))
        if top_k is not None or ratio is not None:
            parts.append(TopK(top_k, ratio))
        if not parts:
            raise OptionError("Say how many blocks to keep: give top_p, top_k or ratio.")
        select = parts[0] if len(parts) == 1 else parts[0] | parts[1]
        self.steps = _steps(score, select, sinks, local, correct)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, select={self.steps.select}, correct={self.steps.correct!r}"

    def choose(self, query: Tensor, key: Tensor, view: BlockView) -> Tensor:
        scores = self.steps.score(query, key, view).masked_fill(~view.seen, float("-inf"))
        chosen = self.steps.select(scores)
        if self.steps.sinks:
            chosen = chosen | view.first(self.steps.sinks)
        return chosen | view.nearest(self.steps.local) if self.steps.local else chosen

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        view = self.view(query, key, request)
        layout = self.chosen(query, key, view)
        if self.steps.correct is None:
            return block_sparse_attention(query, key, value, layout, scale=request.scale)
        return pooled_remainder(query, key, value, layout, view)

    def most_blocks(self, num_k_blocks: int) -> float:
        # The queries of a block may stand in several key blocks, with neighbours on both sides.
        near = 2 * self.steps.local - 1 + -(-self.block_q // self.block_k) if self.steps.local else 0
        return min(self.steps.select.most(num_k_blocks) + self.steps.sinks + near, num_k_blocks)


def compose(
    score: str | Score = "mean",
    select: Selection | Callable[[Tensor], Tensor] | None = None,
    *,
    sinks: int = 1,
    local: int = 1,
    correct: Literal["pooled"] | None = None,
    block_q: int = 128,
    block_k: int = 64,
) -> ComposedSelector:
    """A block-sparse mechanism from steps of one's own choice.

    score: a name, or a function ``(query, key, view) -> (batch, heads, num_q_blocks, num_k_blocks)`` (see
    :class:`~regard.sparse.scoring.BlockView`). select: a :class:`~regard.sparse.selection.Selection` such as
    ``TopP(0.9) | TopK(4)``, or a function from scores, ``-inf`` for blocks out of sight, to booleans; by default
    ``TopP(0.9)``. The other options as in :class:`ComposedSelector`.
    """
    if select is not None and not callable(select):
        raise OptionError(f"select is a Selection such as TopP(0.9), or a function of scores; got {select!r}.")
    rule = TopP(0.9) if select is None else select if isinstance(select, Selection) else _Own(select)
    built = ComposedSelector(block_q=block_q, block_k=block_k)
    built.steps = _steps(score, rule, sinks, local, correct)
    return built


@dataclass(frozen=True)
class _Own(Selection):
    """A caller's own function as a selection."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, scores: Tensor) -> Tensor:
        return self.function(scores)


def _steps(score: str | Score, select: Selection, sinks: int, local: int, correct: Literal["pooled"] | None) -> _Steps:
    if sinks < 0 or local < 0:
        raise OptionError(f"sinks and local count blocks, so they cannot be {sinks} and {local}.")
    if correct not in (None, "pooled"):
        raise OptionError(f"correct is 'pooled' or None, got {correct!r}.")
    if isinstance(score, str):
        if score not in SCORES:
            raise UnknownNameError("block score", score, SCORES, f"There are: {', '.join(SCORES)}.")
        score = SCORES[score]
    return _Steps(score, select, sinks, local, correct)
