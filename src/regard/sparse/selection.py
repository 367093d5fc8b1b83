"""How selectors choose: top-k and top-p over scores, what is forced and what is forbidden, and masks made definite.

Scores carry both: ``+inf`` is always chosen, ``-inf`` never.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.layout import num_blocks
from regard.masks import Boolean, Bounds, Causal, Mask, MaskMod
from regard.mechanism import Request

__all__ = [
    "Lifetime",
    "PrefixTopK",
    "Selection",
    "Threshold",
    "TopK",
    "TopP",
    "prefix_top_k",
    "reordered_request",
    "settle_mask",
    "top_k_mask",
    "top_p_mask",
]

Scope = Literal["query", "head", "all"]


def settle_mask(request: Request, q_len: int, k_len: int) -> tuple[Mask | None, Tensor | None]:
    """What a selector must know of the mask: the rule (causality included), and the keys that any query may see.

    Keys ``(batch | 1, heads | 1, k_len)`` boolean, or None for all. A mask that speaks of more than keys is evaluated
    once, so that what is selected depends on what it hides and not on how it is written.
    """
    mask, keys = request.mask, request.keys
    if mask is not None and keys is None:
        mask = Boolean(mask.dense(q_len, k_len))
        keys = mask.tensor.any(-2)
    if request.causal:
        return (Causal() if mask is None else mask & Causal()), keys
    return mask, keys


def reordered_request(request: Request, place: Tensor) -> Request:
    """The request for self-attention over reordered tokens: at place ``i`` stands token ``place[i]``."""
    changes: dict[str, Any] = {}
    if request.mask is not None:
        changes["mask"] = request.mask.permuted(place, place)
    if request.keys is not None:
        changes["keys"] = request.keys[..., place]
    return dataclasses.replace(request, **changes)


def top_k_mask(scores: Tensor, top_k: int | Tensor) -> Tensor:
    """True for the ``top_k`` largest of each row (fewer where fewer are above ``-inf``).

    ``top_k`` may be an integer tensor that broadcasts to ``scores``, a number for each row.
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(top_k, Tensor):
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(scores.shape[-1], device=scores.device)
        return chosen.scatter_(-1, order, (rank < top_k) & (ordered > float("-inf")))
    if top_k >= scores.shape[-1]:
        return scores > float("-inf")
    best = scores.topk(top_k, dim=-1)
    return chosen.scatter_(-1, best.indices, best.values > float("-inf"))


def top_p_mask(
    shares: Tensor,
    top_p: float | Tensor,
    crossing: Literal["include", "exclude"] = "include",
    minimum: int = 1,
) -> Tensor:
    """True for the largest entries of each row whose running sum stays at or below ``top_p``.

    ``shares`` are non-negative, rows sum to 1 (or to 0: nothing is chosen). ``crossing``: whether the entry that
    carries the sum past ``top_p`` is taken too. At least ``minimum`` non-zero entries are taken. ``top_p`` may be a
    tensor that broadcasts to ``shares``; a row with ``top_p >= 1`` takes all that is not zero, whatever rounding
    makes of the sum.
    """
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    running = ordered.cumsum(-1)
    if crossing == "include":
        running = running - ordered
        kept = running < top_p
    else:
        kept = running <= top_p
    kept[..., :minimum] = True
    kept = (kept | torch.as_tensor(top_p, device=shares.device).ge(1)) & (ordered > 0)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


class Selection(ABC):
    """Which blocks to keep, given scores ``(..., num_q_blocks, num_k_blocks)`` that are ``-inf`` out of sight.

    Combine with ``|`` (kept by either) and ``&`` (by both): of choices by the same scores, the larger or the smaller.
    """

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """Boolean, the shape of ``scores``."""

    def most(self, num_k_blocks: int) -> float:
        """How many blocks a row keeps at most, as far as the options tell."""
        return num_k_blocks

    def __or__(self, other: Selection) -> Selection:
        return _Joined(self, other, True)

    def __and__(self, other: Selection) -> Selection:
        return _Joined(self, other, False)


@dataclass(frozen=True)
class _Joined(Selection):
    first: Selection
    second: Selection
    either: bool

    def __call__(self, scores: Tensor) -> Tensor:
        first, second = self.first(scores), self.second(scores)
        return first | second if self.either else first & second

    def most(self, num_k_blocks: int) -> float:
        both = self.first.most(num_k_blocks), self.second.most(num_k_blocks)
        return max(both) if self.either else min(both)


def _in_scope(scores: Tensor, scope: Scope) -> Tensor:
    """Rows that are chosen from together: those of a query block, of a head, or all."""
    if scope == "query":
        return scores
    return scores.flatten(-2) if scope == "head" else scores.flatten(-3)


@dataclass(frozen=True)
class TopK(Selection):
    """The ``top_k`` largest scores of a row, or the share ``ratio`` of its blocks (rounded down, at least one).

    scope: a row is that of a block of queries, all of a head (``top_k`` blocks a query block on average), or all heads.
    """

    top_k: int | None = None
    ratio: float | None = None
    scope: Scope = "query"

    def __post_init__(self) -> None:
        if (self.top_k is None) == (self.ratio is None):
            raise OptionError("TopK takes one of top_k and ratio.")
        if (self.top_k is not None and self.top_k < 1) or (self.ratio is not None and not 0 < self.ratio <= 1):
            raise OptionError(f"Need top_k >= 1 or 0 < ratio <= 1; got {self.top_k} and {self.ratio}.")

    def most(self, num_k_blocks: int) -> float:
        kept = self._count(num_k_blocks)
        return kept if self.scope == "query" else num_k_blocks

    def _count(self, num_k_blocks: int) -> int:
        return self.top_k if self.top_k is not None else max(int((self.ratio or 0) * num_k_blocks), 1)

    def __call__(self, scores: Tensor) -> Tensor:
        rows = _in_scope(scores, self.scope)
        per_row = rows.shape[-1] // scores.shape[-1]
        return top_k_mask(rows, self._count(scores.shape[-1]) * per_row).view(scores.shape)


@dataclass(frozen=True)
class TopP(Selection):
    """The largest shares of the softmax over a row's scores that carry ``top_p`` of it (see :func:`top_p_mask`)."""

    top_p: float
    crossing: Literal["include", "exclude"] = "include"
    scope: Scope = "query"

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p is a share between 0 and 1, got {self.top_p}.")

    def __call__(self, scores: Tensor) -> Tensor:
        rows = _in_scope(scores, self.scope)
        some = (rows > float("-inf")).any(-1, keepdim=True)
        shares = torch.where(some, rows, 0).softmax(-1) * some
        return top_p_mask(shares, self.top_p, self.crossing).view(scores.shape)


@dataclass(frozen=True)
class Threshold(Selection):
    """Blocks whose share of the row's softmax is at least ``value`` times the largest one's (``relative``), or whose
    score itself is at least ``value``."""

    value: float
    relative: bool = True

    def __call__(self, scores: Tensor) -> Tensor:
        if not self.relative:
            return scores >= self.value
        top = scores.amax(-1, keepdim=True)
        return (scores - torch.where(top.isfinite(), top, 0)).exp() >= self.value


@dataclass(frozen=True, eq=False)
class Lifetime(Mask):
    """A causal rule in which keys die: query at position ``i`` sees key ``j`` iff ``j <= i < death[j]``.

    ``death`` ``(batch | 1, heads | 1, k_len)`` integers; a key with ``death <= j`` is never seen.
    """

    death: Tensor

    @property
    def batch(self) -> int:
        return self.death.shape[0]

    @property
    def heads(self) -> int:
        return self.death.shape[1]

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        offset, death = k_len - q_len, self.death
        return lambda b, h, q, k: (k <= q + offset) & (q + offset < death[b, h, k])

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        position = (q_blocks + (k_len - q_len))[:, None]  # (query blocks, 1, members)
        first, last = position.amin(-1), position.amax(-1)
        death = self.death[:, :, k_blocks][:, :, None]  # (batch, heads, 1, key blocks, members)
        early, late = k_blocks.amin(-1), k_blocks.amax(-1)
        return (early <= last) & (death.amax(-1) > first), (late <= first) & (death.amin(-1) > last)

    def to(self, device: torch.device | str) -> Mask:
        return Lifetime(self.death.to(device))


@dataclass(frozen=True)
class PrefixTopK:
    """The ``keep`` best keys of every prefix.

    ``lists`` ``(batch, heads, query blocks, keep + block)`` int64: keys that any query of a block keeps (-1: empty), of
    which the first ``settled`` are kept by all its queries; ``rule``: which query keeps which key.
    """

    lists: Tensor
    settled: int
    rule: Lifetime


@torch.no_grad()
def prefix_top_k(scores: Tensor, keep: int, q_len: int, block_q: int, keys: Tensor | None = None) -> PrefixTopK:
    """The ``keep`` keys of largest score among those up to each query, ties to the more recent.

    ``scores`` ``(batch, heads, k_len)`` do not depend on the query, so a key that falls out never returns and the
    choice is a life from ``j`` to ``death[j]``: it is found in one sweep over blocks of queries, in time ``O(k_len /
    block_q * (keep + block_q) log)``. ``keys`` ``(batch | 1, heads | 1, k_len)`` boolean: candidates.
    """
    batch, heads, k_len = scores.shape
    device, keep = scores.device, min(keep, k_len)
    # Ranks turn "larger score, then later" into one order without ties; -1 is no candidate.
    order = scores.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(k_len, device=device).expand_as(order))
    if keys is not None:
        rank = rank.masked_fill(~keys, -1)
    rank = torch.cat((rank, rank.new_full((batch, heads, 1), -1)), -1)  # an empty slot, k_len, has the lowest rank
    death = torch.full_like(rank, k_len).masked_fill_(rank < 0, 0)
    start, none = k_len - q_len, order.new_full((batch, heads, keep), k_len)
    alive = none
    if start > 0:
        best = rank[..., :start].topk(min(keep, start), -1)
        alive = torch.cat((best.indices, none[..., best.indices.shape[-1] :]), -1)
        fallen = torch.ones_like(rank[..., :start], dtype=torch.bool).scatter_(-1, best.indices, False)
        death[..., :start].masked_fill_(fallen, 0)
    lists = order.new_full((batch, heads, num_blocks(q_len, block_q), keep + block_q), -1)
    for block in range(lists.shape[2]):
        first, last = start + block * block_q, min(start + (block + 1) * block_q, k_len)
        if last <= 0:
            continue
        new = torch.arange(max(first, 0), last, device=device).expand(batch, heads, -1)
        both = torch.cat((alive, new), -1)
        lists[:, :, block, : both.shape[-1]] = torch.where(rank.gather(-1, both) < 0, -1, both)
        ordered, place = rank.gather(-1, both).sort(dim=-1, descending=True)
        members = both.gather(-1, place)
        # A key falls when the older better ones and the new better ones that have come make `keep`.
        old = (place < keep).long()
        older = (old.cumsum(-1) - old)[..., keep:]
        better = rank.gather(-1, new)[..., None, :] > ordered[..., keep:, None]
        fall = new[..., :1] + ((older[..., None] + better.cumsum(-1)) < keep).sum(-1)
        death.scatter_(-1, members[..., keep:], fall)
        alive = members[..., :keep]
    return PrefixTopK(lists, max(keep - block_q, 0), Lifetime(death[..., :k_len].masked_fill(rank[..., :k_len] < 0, 0)))
