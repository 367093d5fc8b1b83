"""What a strategy of context parallelism sends: messages and bytes of one rank, by formula.

For ``ranks`` equal shards of ``n`` tokens that all see each other, with ``w = head_dim + value_dim`` and numbers of
``e`` bytes (``a`` bytes where gradients of keys and values are added up: at least four), one rank sends

=========  ==============================  ====================================================================
strategy   forward                         backward
=========  ==============================  ====================================================================
ring       ranks - 1 messages,             2 (ranks - 1) messages,
           (ranks - 1) B H_kv n w e bytes  (ranks - 1) B H_kv n w (e + a) bytes
ulysses    2 (ranks - 1) messages,         the same
           (1 - 1 / ranks) B n (H + H_kv)
           w e bytes (H_kv >= ranks)
=========  ==============================  ====================================================================

A ring sends the less the fewer key/value heads there are, and all of the sequence whatever the number of ranks; Ulysses
sends the less the more ranks there are. A mesh is Ulysses among the ranks of a team, plus a ring of teams for this
rank's heads. :func:`traffic` has the exact figures for any sharding: uneven lengths, blocks that travel less far since
nobody sees them, heads that do not divide.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from regard.errors import OptionError
from regard.kernels.shapes import accumulation_dtype
from regard.parallel.group import Traffic
from regard.parallel.shards import Sharding, Sight
from regard.parallel.ulysses import HeadShare, head_shares

__all__ = ["PassTraffic", "Strategy", "traffic"]

Strategy = Literal["ring", "ulysses", "mesh"]


class PassTraffic(NamedTuple):
    """One call and its backward pass."""

    forward: Traffic
    backward: Traffic


def traffic(
    strategy: Strategy,
    sharding: Sharding,
    rank: int,
    *,
    batch: int,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    window: int | None = None,
    ulysses_size: int | None = None,
) -> PassTraffic:
    """What ``rank`` sends and receives in one call of :func:`regard.parallel.context_parallel_attention`.

    ulysses_size: ranks of a team, for ``"mesh"``.
    """
    if strategy not in get_args(Strategy):
        raise OptionError(f"The strategies are {', '.join(get_args(Strategy))}; got {strategy!r}.")
    if (strategy == "mesh") != (ulysses_size is not None):
        raise OptionError("ulysses_size, the number of ranks of a team, belongs to strategy='mesh', which needs it.")
    size = {"ring": 1, "ulysses": sharding.ranks}.get(strategy, ulysses_size or 1)
    team, place = divmod(sharding._rank(rank), size)
    kv_heads, wide = num_kv_heads or num_heads, value_dim or head_dim
    shares = head_shares(num_heads, kv_heads, size)
    forward, backward = Traffic(), Traffic()
    lengths = sharding.lengths[team * size : (team + 1) * size]
    _ulysses(forward, backward, shares, lengths, place, batch * dtype.itemsize, head_dim, wide)
    share = shares[place]
    kept = share.num_kv_heads if share.reads is None else share.num_heads
    width, summed = batch * kept * (head_dim + wide), accumulation_dtype(dtype).itemsize
    _ring(forward, backward, sharding.merged(size), team, Sight(causal, window), width * dtype.itemsize, width * summed)
    return PassTraffic(forward, backward)


def _ulysses(
    forward: Traffic,
    backward: Traffic,
    shares: list[HeadShare],
    lengths: tuple[int, ...],
    own: int,
    unit: int,
    head_dim: int,
    value_dim: int,
) -> None:
    def width(share: HeadShare) -> int:
        return unit * (share.num_heads * head_dim + share.num_kv_heads * (head_dim + value_dim))

    def out(share: HeadShare) -> int:
        return unit * share.num_heads * value_dim

    for other, (share, length) in enumerate(zip(shares, lengths, strict=True)):
        if other == own:
            continue
        there = width(share) * lengths[own] + out(shares[own]) * length
        here = width(shares[own]) * length + out(share) * lengths[own]
        for one, sent, received in ((forward, there, here), (backward, here, there)):
            one.messages_sent += 2
            one.messages_received += 2
            one.bytes_sent += sent
            one.bytes_received += received


def _ring(
    forward: Traffic, backward: Traffic, sharding: Sharding, own: int, sight: Sight, width: int, summed: int
) -> None:
    """width: bytes of one token's keys and values; summed: of their gradients."""
    for block, (length, (near, far)) in enumerate(zip(sharding.lengths, sharding.hops(*sight), strict=True)):
        step = (own - block) % sharding.ranks
        home = own == block and far > 0
        moves = (
            ((forward, backward), width, step < far, 1 <= step <= far),
            ((backward,), summed, 1 <= near <= step <= far, home or near < step <= far),
        )
        for passes, unit, sends, receives in moves:
            for one in passes:
                one.messages_sent += sends
                one.bytes_sent += sends * unit * length
                one.messages_received += receives
                one.bytes_received += receives * unit * length
