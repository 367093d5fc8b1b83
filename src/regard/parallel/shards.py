"""How a sequence is dealt to ranks, and what each of them then has to compute.

A :class:`Sharding` says which tokens of a sequence each rank holds. Causal attention makes late tokens dearer than
early ones, so how they are dealt decides who waits for whom (``work`` counts the pairs of each rank):

* ``contiguous``: equal stretches; the last rank computes about ``2 - 1 / ranks`` times the mean.
* ``zigzag``: ``2 * ranks`` stretches, rank ``r`` holds number ``r`` and the ``r``-th from the end (as in "The Llama 3
  Herd of Models", 2024, arXiv 2407.21783, section 3.3.2): equal work.
* ``striped``: token ``t`` goes to rank ``t mod ranks`` (Brandon et al., "Striped Attention", 2023, arXiv 2311.09431),
  or stripes of several tokens in turn: near to equal work, also inside packed documents.

Lengths need not divide: ranks then differ by a token or a stretch. Packed documents travel with the sharding, and no
token sees another document. Tokens of a rank always stand in ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.partial import KeyRanges

__all__ = ["Deal", "Sharding", "Sight"]

Deal = Literal["contiguous", "zigzag", "striped"]


class Sight(NamedTuple):
    """Whom a token sees inside its document: causal, those up to itself; window, those nearer than that many places."""

    causal: bool = False
    window: int | None = None


class Sharding:
    """Which positions of a sequence of ``length`` tokens each of ``ranks`` ranks holds.

    parts: for each rank its positions, ascending; together every position once. Mostly made by :meth:`contiguous`,
    :meth:`zigzag`, :meth:`striped` or, by name, :meth:`of`. documents: ids of packed documents, integers ``(length,)``
    or ``(batch, length)``, each document one stretch of equal ids; padding may be a document of its own.
    cumulative_lengths: the same for all sequences as their limits ``[0, 5, 12, ..., length]``, as flash attention's
    ``cu_seqlens``.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        *,
        documents: Tensor | Sequence[int] | None = None,
        cumulative_lengths: Tensor | Sequence[int] | None = None,
    ) -> None:
        self.parts = tuple(torch.as_tensor(part, dtype=torch.int64, device="cpu") for part in parts)
        self.lengths = tuple(len(part) for part in self.parts)
        self.length, self.ranks = sum(self.lengths), len(self.parts)
        every = torch.cat(self.parts) if self.parts else torch.zeros(0, dtype=torch.int64)
        if not self.length or not torch.equal(every.sort().values, torch.arange(self.length)):
            raise OptionError(
                f"A sharding's parts hold each position from 0 to {max(self.length - 1, 0)} exactly once; these do not."
            )
        for rank, part in enumerate(self.parts):
            if not len(part) or bool((part.diff() < 0).any()):
                raise OptionError(
                    f"Rank {rank} needs at least one token, in ascending order, got {part[:8].tolist()}. Give fewer "
                    "ranks to a short sequence, and sort the positions."
                )
        self._owner = torch.empty(self.length, dtype=torch.int64)
        for rank, part in enumerate(self.parts):
            self._owner[part] = rank
        self._back = every.argsort()
        self._start, self._stop = _documents(self.length, documents, cumulative_lengths)
        self._ranges: dict[tuple[int, int, Sight], KeyRanges] = {}
        self._pairs: dict[Sight, Tensor] = {}
        self._hops: dict[Sight, list[tuple[int, int]]] = {}
        self._teams: dict[int, Sharding] = {}

    @classmethod
    def contiguous(
        cls,
        length: int,
        ranks: int,
        *,
        documents: Tensor | Sequence[int] | None = None,
        cumulative_lengths: Tensor | Sequence[int] | None = None,
    ) -> Sharding:
        """Equal stretches in order; the first ones have a token more where it does not come out even."""
        _enough(length, ranks)
        parts = torch.arange(length).tensor_split(ranks)
        return cls(parts, documents=documents, cumulative_lengths=cumulative_lengths)

    @classmethod
    def zigzag(
        cls,
        length: int,
        ranks: int,
        *,
        documents: Tensor | Sequence[int] | None = None,
        cumulative_lengths: Tensor | Sequence[int] | None = None,
    ) -> Sharding:
        """``2 * ranks`` stretches: rank ``r`` holds number ``r`` and number ``2 * ranks - 1 - r``."""
        _enough(length, ranks)
        chunks = torch.arange(length).tensor_split(2 * ranks)
        parts = [torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank])) for rank in range(ranks)]
        return cls(parts, documents=documents, cumulative_lengths=cumulative_lengths)

    @classmethod
    def striped(
        cls,
        length: int,
        ranks: int,
        *,
        stripe: int = 1,
        documents: Tensor | Sequence[int] | None = None,
        cumulative_lengths: Tensor | Sequence[int] | None = None,
    ) -> Sharding:
        """Stripes of ``stripe`` tokens in turn."""
        _enough(length, ranks)
        if stripe < 1 or (ranks - 1) * stripe >= length:
            raise OptionError(
                f"Stripes of {stripe} tokens leave some of {ranks} ranks without any of {length} tokens; stripe is at "
                f"least 1 and at most {(length - 1) // max(ranks - 1, 1)} here."
            )
        owner = torch.arange(length).div(stripe, rounding_mode="floor") % ranks
        parts = [(owner == rank).nonzero()[:, 0] for rank in range(ranks)]
        return cls(parts, documents=documents, cumulative_lengths=cumulative_lengths)

    @classmethod
    def of(
        cls,
        deal: Deal,
        length: int,
        ranks: int,
        *,
        documents: Tensor | Sequence[int] | None = None,
        cumulative_lengths: Tensor | Sequence[int] | None = None,
    ) -> Sharding:
        """By name: ``"contiguous"``, ``"zigzag"`` or ``"striped"``."""
        if deal not in get_args(Deal):
            raise OptionError(f"A sequence is dealt {', '.join(get_args(Deal))}; got {deal!r}.")
        make = {"contiguous": cls.contiguous, "zigzag": cls.zigzag, "striped": cls.striped}[deal]
        return make(length, ranks, documents=documents, cumulative_lengths=cumulative_lengths)

    def __repr__(self) -> str:
        packed = "" if self._start is None else ", packed documents"
        return f"Sharding({self.length} tokens over {self.ranks} ranks: {list(self.lengths)}{packed})"

    @property
    def batch(self) -> int:
        """How many sequences of documents of their own it tells apart; 1 when all are alike."""
        return 1 if self._start is None else len(self._start)

    def positions(self, rank: int, *, restart: bool = False, device: torch.device | str | None = None) -> Tensor:
        """Where the tokens of ``rank`` stand in the sequence, ``(local_len,)``: what rotary and other positional
        encodings take. restart: counted from the start of the token's own document, ``(batch | 1, local_len)``."""
        own = self.parts[self._rank(rank)]
        if restart:
            own = own[None] if self._start is None else own - self._start[:, own]
        return own.to(device) if device is not None else own.clone()

    def shard(self, tensor: Tensor, rank: int, dim: int) -> Tensor:
        """The part of ``rank`` of a tensor whose axis ``dim`` is the whole sequence; differentiable."""
        self._check_length(tensor, dim, self.length, "the whole sequence")
        return tensor.index_select(dim, self.parts[self._rank(rank)].to(tensor.device))

    def gather(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole sequence from the parts of all ranks, in order; the inverse of :meth:`shard`."""
        if len(parts) != self.ranks:
            raise ShapeError(f"The sequence has {self.ranks} parts, got {len(parts)}.")
        for rank, part in enumerate(parts):
            self._check_length(part, dim, self.lengths[rank], f"rank {rank}'s part")
        return torch.cat(list(parts), dim).index_select(dim, self._back.to(parts[0].device))

    def ranges(self, rank: int, source: int, causal: bool = False, window: int | None = None) -> KeyRanges:
        """Which keys of rank ``source`` each query of ``rank`` sees. Made once and kept.

        causal: those up to its own position. window: those nearer than so many positions, on either side.
        """
        sight = Sight(causal, window)
        known = (self._rank(rank), self._rank(source), sight)
        if known not in self._ranges:
            start, stop = self._seen(sight)
            queries, keys = self.parts[rank], self.parts[source]
            first = torch.searchsorted(keys, start[:, queries])
            last = torch.searchsorted(keys, stop[:, queries])
            self._ranges[known] = KeyRanges(first, last, len(keys))
        return self._ranges[known]

    def pairs(self, causal: bool = True, window: int | None = None) -> Tensor:
        """Visible pairs between the queries of one rank and the keys of another, ``(ranks, ranks)`` int64, per head;
        for documents that differ between sequences, of all of them together. Made once and kept."""
        sight = Sight(causal, window)
        if sight not in self._pairs:
            start, stop = self._seen(sight)
            found = torch.zeros(self.ranks, self.ranks, dtype=torch.int64)
            for source in range(self.ranks):
                before = torch.zeros(self.length + 1, dtype=torch.int64)
                before[1:] = (self._owner == source).cumsum(0)
                seen = (before[stop] - before[start]).sum(0)
                found[:, source].scatter_add_(0, self._owner, seen)
            self._pairs[sight] = found
        return self._pairs[sight]

    def work(self, rank: int, causal: bool = True, window: int | None = None) -> int:
        """Visible pairs of the queries of ``rank``, per head: what its attention costs."""
        return int(self.pairs(causal, window)[self._rank(rank)].sum())

    def imbalance(self, causal: bool = True, window: int | None = None) -> float:
        """The largest work of a rank over the mean: the factor by which all wait for one."""
        work = self.pairs(causal, window).sum(1).double()
        return float(work.max() / work.mean())

    def hops(self, causal: bool = True, window: int | None = None) -> list[tuple[int, int]]:
        """For each rank's block of keys, how many ranks onwards on the ring are the first and the last one that see any
        of it; ``(0, 0)`` where none does but its owner."""
        sight = Sight(causal, window)
        if sight not in self._hops:
            seen, ranks = (self.pairs(causal, window) > 0).tolist(), self.ranks
            steps = [[s for s in range(1, ranks) if seen[(b + s) % ranks][b]] or [0] for b in range(ranks)]
            self._hops[sight] = [(found[0], found[-1]) for found in steps]
        return self._hops[sight]

    def merged(self, size: int) -> Sharding:
        """The sharding of teams: ``size`` ranks that follow one another put their tokens together, in order."""
        if size < 1 or self.ranks % size:
            raise OptionError(f"{self.ranks} ranks do not form teams of {size}.")
        if size == 1:
            return self
        if size not in self._teams:
            teams = Sharding([torch.cat(self.parts[i : i + size]).sort().values for i in range(0, self.ranks, size)])
            teams._start, teams._stop = self._start, self._stop
            self._teams[size] = teams
        return self._teams[size]

    def _seen(self, sight: Sight) -> tuple[Tensor, Tensor]:
        """The positions ``start <= p < stop`` that each position sees, ``(batch, length)``."""
        place, window = torch.arange(self.length), sight.window
        if self._start is None or self._stop is None:
            start, stop = torch.zeros(1, self.length, dtype=torch.int64), torch.full((1, self.length), self.length)
        else:
            start, stop = self._start, self._stop
        if window is not None:
            if window < 1:
                raise OptionError(f"A window holds at least the token itself, so at least 1; got {window}.")
            start, stop = torch.maximum(start, place - window + 1), torch.minimum(stop, place + window)
        return start, torch.minimum(stop, place + 1) if sight.causal else stop

    def _rank(self, rank: int) -> int:
        if not 0 <= rank < self.ranks:
            raise OptionError(f"This sharding has the ranks 0 to {self.ranks - 1}, not {rank}.")
        return rank

    def _check_length(self, tensor: Tensor, dim: int, length: int, what: str) -> None:
        if not -tensor.dim() <= dim < tensor.dim() or tensor.shape[dim] != length:
            raise ShapeError(f"Axis {dim} of {what} needs {length} tokens; got shape {tuple(tensor.shape)}.")


def _enough(length: int, ranks: int) -> None:
    if ranks < 1 or length < ranks:
        raise OptionError(f"{length} tokens cannot be dealt to {ranks} ranks: each needs at least one.")


def _documents(
    length: int, documents: Tensor | Sequence[int] | None, limits: Tensor | Sequence[int] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Where the document of each position begins and ends, ``(batch | 1, length)`` each; None without documents."""
    if documents is None and limits is None:
        return None, None
    if documents is not None and limits is not None:
        raise OptionError("Packed documents are given as documents or as cumulative_lengths, not both.")
    if limits is not None:
        cuts = torch.as_tensor(limits, dtype=torch.int64, device="cpu")
        if cuts.dim() != 1 or not len(cuts) or cuts[0] != 0 or cuts[-1] != length or bool((cuts.diff() < 0).any()):
            raise OptionError(f"cumulative_lengths ascend from 0 to the length {length}, got {cuts.tolist()[:12]}.")
        ids = torch.searchsorted(cuts, torch.arange(length), right=True)[None]
    else:
        ids = torch.as_tensor(documents, device="cpu")
        if ids.dim() not in (1, 2) or ids.shape[-1] != length or ids.is_floating_point():
            raise ShapeError(
                f"documents are integer ids (length,) or (batch, length) of {length} tokens; got {ids.dtype} of shape "
                f"{tuple(ids.shape)}."
            )
        ids = ids.reshape(-1, length)
    edge = torch.ones(len(ids), length + 1, dtype=torch.bool)
    edge[:, 1:-1] = ids[:, 1:] != ids[:, :-1]
    for row, edges in zip(ids, edge, strict=True):
        if len(row.unique()) != int(edges[:-1].sum()):
            raise OptionError(
                "Each document is one stretch of equal ids, but an id comes back later. Number the documents anew."
            )
    place = torch.arange(length + 1)
    start = torch.where(edge[:, :-1], place[:-1], 0).cummax(1).values
    stop = torch.where(edge[:, 1:], place[1:], length).flip(1).cummin(1).values.flip(1)
    return start, stop
