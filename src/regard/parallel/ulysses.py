"""Ulysses: between the layers a rank holds some tokens of all heads, inside attention all tokens of some heads.

One all-to-all leads there and one back (Jacobs et al., "DeepSpeed Ulysses", 2023, arXiv 2309.14509), so that each rank
runs ordinary attention on whole rows, for its share of the heads. Query heads are shared out as evenly as they go. A
rank is sent those key/value heads that its query heads read: where there are fewer of them than ranks, several ranks
get the same one, and their gradients add up at home.

With ``n_i`` query heads and ``m_i`` key/value heads of rank ``i`` and ``l_i`` tokens, rank ``r`` sends each other rank
``i`` one message of ``batch * l_r * (n_i * head_dim + m_i * (head_dim + value_dim))`` numbers before attention and one
of ``batch * l_i * n_r * value_dim`` after it; backward the same numbers go the other way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.errors import OptionError
from regard.kernels.shapes import accumulation_dtype
from regard.parallel.group import Group
from regard.parallel.shards import Sharding

__all__ = ["HeadShare", "head_shares", "heads_to_tokens", "tokens_to_heads"]


class HeadShare(NamedTuple):
    """The heads of one rank: query heads, the key/value heads that these read, and for each of the query heads which
    of those, unless they share them evenly (None)."""

    query: slice
    key: slice
    reads: tuple[int, ...] | None

    @property
    def num_heads(self) -> int:
        return self.query.stop - self.query.start

    @property
    def num_kv_heads(self) -> int:
        return self.key.stop - self.key.start


def head_shares(num_heads: int, num_kv_heads: int, ranks: int) -> list[HeadShare]:
    """Who computes which heads."""
    if num_heads < ranks:
        raise OptionError(
            f"Ulysses deals heads to ranks, and {num_heads} heads are too few for {ranks} ranks. Use strategy='ring', "
            "or a mesh whose Ulysses part is at most as large as the number of heads."
        )
    group, shares, start = num_heads // num_kv_heads, [], 0
    for heads in torch.arange(num_heads).tensor_split(ranks):
        stop = start + len(heads)
        first, last = start // group, (stop - 1) // group + 1
        reads = tuple(head // group - first for head in range(start, stop))
        even, odd = divmod(stop - start, last - first)
        evenly = not odd and reads == tuple(head // even for head in range(stop - start))
        shares.append(HeadShare(slice(start, stop), slice(first, last), None if evenly else reads))
        start = stop
    return shares


class _Team(NamedTuple):
    """A group that puts its tokens together: ``places[i]`` says where the tokens of its rank ``i`` stand there."""

    group: Group
    places: tuple[Tensor, ...]
    shares: list[HeadShare]

    @property
    def share(self) -> HeadShare:
        return self.shares[self.group.rank]

    @property
    def length(self) -> int:
        return sum(len(place) for place in self.places)


def tokens_to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: Group, sharding: Sharding, team: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of the team for this rank's heads, in ascending order of their positions.

    query ``(batch, num_heads, local_len, head_dim)``, key and value ``(batch, kv_heads, local_len, ...)``; ``group`` is
    the ``team``-th of the teams of ``group.size`` ranks that follow one another in ``sharding``.
    """
    made = _team(group, sharding, team, query.shape[1], key.shape[1])
    tensors: tuple[Tensor, Tensor, Tensor] = _ToHeads.apply(query, key, value, made)
    query, key, value = tensors
    if made.share.reads is not None:
        reads = torch.tensor(made.share.reads, device=key.device)
        key, value = key.index_select(1, reads), value.index_select(1, reads)
    return query, key, value


def heads_to_tokens(
    out: Tensor, group: Group, sharding: Sharding, team: int, num_heads: int, num_kv_heads: int
) -> Tensor:
    """The way back for the output: ``(batch, own heads, tokens of the team, dim)`` to ``(batch, num_heads, local_len,
    dim)``."""
    whole: Tensor = _ToTokens.apply(out, _team(group, sharding, team, num_heads, num_kv_heads))
    return whole


def _team(group: Group, sharding: Sharding, team: int, num_heads: int, num_kv_heads: int) -> _Team:
    own = sharding.merged(group.size).parts[team]
    members = sharding.parts[team * group.size : (team + 1) * group.size]
    places = tuple(torch.searchsorted(own, part) for part in members)
    return _Team(group, places, head_shares(num_heads, num_kv_heads, group.size))


def _take(tensor: Tensor, place: Tensor) -> Tensor:
    return tensor.index_select(2, place.to(tensor.device))


def _put(into: Tensor, place: Tensor, tensor: Tensor) -> None:
    into.index_copy_(2, place.to(into.device), tensor)


def _apart(message: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The tensors of these shapes that a message holds one after the other."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    return [part.view(shape) for part, shape in zip(message.split(sizes), shapes, strict=True)]


def _together(*tensors: Tensor) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _shapes(batch: int, share: HeadShare, length: int, head_dim: int, value_dim: int) -> list[tuple[int, ...]]:
    """Query, key and value of some heads and tokens."""
    kv = share.num_kv_heads
    return [
        (batch, share.num_heads, length, head_dim),
        (batch, kv, length, head_dim),
        (batch, kv, length, value_dim),
    ]


def _flat(shapes: list[tuple[int, ...]]) -> tuple[int]:
    return (sum(int(torch.Size(shape).numel()) for shape in shapes),)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, team: _Team) -> tuple[Tensor, ...]:
        batch, dims = query.shape[0], (query.shape[3], value.shape[3])
        ctx.team, ctx.shapes = team, [t.shape for t in (query, key, value)]
        parts = [_together(query[:, s.query], key[:, s.key], value[:, s.key]) for s in team.shares]
        coming = [_shapes(batch, team.share, len(place), *dims) for place in team.places]
        received = team.group.all_to_all(parts, [_flat(shapes) for shapes in coming], step="Ulysses, to heads")
        whole = tuple(query.new_empty(shape) for shape in _shapes(batch, team.share, team.length, *dims))
        for message, shapes, place in zip(received, coming, team.places, strict=True):
            for into, tensor in zip(whole, _apart(message, shapes), strict=True):
                _put(into, place, tensor)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        team: _Team = ctx.team
        batch, _, length, head_dim = ctx.shapes[0]
        coming = [_shapes(batch, share, length, head_dim, ctx.shapes[2][3]) for share in team.shares]
        parts = [_together(*(_take(grad, place) for grad in grads)) for place in team.places]
        received = team.group.all_to_all(
            parts, [_flat(shapes) for shapes in coming], step="Ulysses, gradients to tokens"
        )
        dtype = grads[0].dtype
        home = [grads[0].new_zeros(shape, dtype=accumulation_dtype(dtype)) for shape in ctx.shapes]
        for message, shapes, share in zip(received, coming, team.shares, strict=True):
            for into, tensor, heads in zip(
                home, _apart(message, shapes), (share.query, share.key, share.key), strict=True
            ):
                into[:, heads] += tensor
        return *(grad.to(dtype) for grad in home), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, team: _Team) -> Tensor:
        ctx.team = team
        batch, dim, own = out.shape[0], out.shape[3], len(team.places[team.group.rank])
        parts = [_take(out, place) for place in team.places]
        shapes = [(batch, share.num_heads, own, dim) for share in team.shares]
        return torch.cat(team.group.all_to_all(parts, shapes, step="Ulysses, to tokens"), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        team: _Team = ctx.team
        parts = [grad[:, share.query] for share in team.shares]
        shapes = [(len(grad), team.share.num_heads, len(place), grad.shape[3]) for place in team.places]
        received = team.group.all_to_all(parts, shapes, step="Ulysses, gradients to heads")
        whole = grad.new_empty(len(grad), team.share.num_heads, team.length, grad.shape[3])
        for place, tensor in zip(team.places, received, strict=True):
            _put(whole, place, tensor)
        return whole, None
