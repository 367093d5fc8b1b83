"""Predicted time, messages and memory of exact attention over ranks: ring, Ulysses and the meshes between them.

All three are one: an all-to-all inside teams before and after, and a ring of teams for what is computed between. The
ring is followed rank by rank and step by step (:mod:`regard.bench.plan.ring_time`), since with causal attention who
waits for whom is what matters. Visible pairs and hops are those of :class:`~regard.parallel.shards.Sharding`,
messages and bytes those of :func:`~regard.parallel.traffic.traffic`; both are asked about a short sequence: with
stretches of ``m`` tokens bytes are proportional to ``m`` and pairs are ``a m^2 + b m``, so that one and two tell all
others exactly.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from regard.bench.plan.job import Job, Memory, Pass, Prediction, Work
from regard.bench.plan.machine import Curve, Kernel, Link, Machine
from regard.bench.plan.ring_time import ring_seconds
from regard.errors import OptionError
from regard.parallel.shards import Deal, Sharding
from regard.parallel.traffic import PassTraffic, Strategy, traffic
from regard.parallel.ulysses import HeadShare, head_shares

__all__ = ["break_even", "exact_predictions", "pair_counts", "rank_traffic"]

# How often a merge of two parts reads or writes an output, and a backward step its gradients.
_MERGE, _ADD_QUERY, _ADD_KEYS = 11, 3, 5


def exact_predictions(job: Job, machine: Machine) -> list[Prediction]:
    """Every strategy and deal, those that cannot be used with their reason; of meshes the best."""
    deals: tuple[Deal, ...] = get_args(Deal) if job.causal and job.ranks > 1 else ("contiguous",)
    found = [_predict(job, machine, "ring", deal, 1) for deal in deals]
    if job.ranks == 1:
        return found
    found.append(_predict(job, machine, "ulysses", "zigzag", job.ranks))
    sizes = [size for size in range(2, job.ranks) if job.ranks % size == 0]
    meshes = [_predict(job, machine, "mesh", "zigzag" if job.causal else "contiguous", size) for size in sizes]
    if not meshes:
        reason = f"{job.ranks} ranks do not split into a ring of teams"
        return [*found, Prediction("exact", "mesh", reason=reason)]
    usable = [mesh for mesh in meshes if mesh.reason is None]
    return [*found, min(usable or meshes, key=lambda mesh: mesh.seconds(job) or float("inf"))]


@lru_cache(maxsize=64)
def _short(deal: Deal, ranks: int, stretch: int) -> Sharding:
    return Sharding.of(deal, 2 * ranks * stretch, ranks)


def pair_counts(deal: Deal, ranks: int, size: int, causal: bool, stretch: int) -> Tensor:
    """Visible pairs between teams of ``size`` ranks, ``(teams, teams)`` float64, for stretches of so many tokens."""
    one, two = (_short(deal, ranks, m).merged(size).pairs(causal).double() for m in (1, 2))
    return (two / 2 - one) * stretch**2 + (2 * one - two / 2) * stretch


def rank_traffic(job: Job, strategy: Strategy, deal: Deal, size: int, rank: int) -> PassTraffic:
    """What a rank sends and receives in one layer."""
    found = traffic(
        strategy,
        _short(deal, job.ranks, 1),
        rank,
        batch=job.batch,
        num_heads=job.heads,
        num_kv_heads=job.kv_heads,
        head_dim=job.head_dim,
        dtype=job.type,
        causal=job.causal,
        ulysses_size=size if strategy == "mesh" else None,
    )
    for one in found:
        one.bytes_sent *= job.stretch
        one.bytes_received *= job.stretch
    return found


def _ring_part(job: Job, deal: Deal, size: int, rank: int, shares: list[HeadShare]) -> PassTraffic:
    """The ring of teams alone."""
    share = shares[rank % size]
    found = traffic(
        "ring",
        _short(deal, job.ranks, 1).merged(size),
        rank // size,
        batch=job.batch,
        num_heads=share.num_heads,
        num_kv_heads=_travelling(share),
        head_dim=job.head_dim,
        dtype=job.type,
        causal=job.causal,
    )
    for one in found:
        one.bytes_sent *= job.stretch
        one.bytes_received *= job.stretch
    return found


def _travelling(share: HeadShare) -> int:
    """Key/value heads of a rank's kernel and ring: repeated where query heads do not share them evenly."""
    return share.num_kv_heads if share.reads is None else share.num_heads


def _looked_at(ranks: int) -> list[int]:
    """All ranks, or those that can be the busiest: both ends and the middle."""
    return list(range(ranks)) if ranks <= 64 else [0, 1, ranks // 2 - 1, ranks // 2, ranks - 2, ranks - 1]


class _Team(NamedTuple):
    """The busiest rank of a team: heads, key/value heads that it computes with, tokens of the team."""

    heads: int
    kv_heads: int
    tokens: int
    dim: int

    def numbers(self, job: Job) -> tuple[float, float]:
        """Of its query (or output), and of its keys and values."""
        rows = job.batch * self.tokens * self.dim
        return rows * self.heads, 2.0 * rows * self.kv_heads


def _predict(job: Job, machine: Machine, strategy: Strategy, deal: Deal, size: int) -> Prediction:
    teams = size if strategy == "mesh" else 0
    label = "" if strategy == "ulysses" or not (job.causal and job.ranks > 1) else deal
    try:
        shares = head_shares(job.heads, job.kv_heads, size)
    except OptionError:
        reason = f"{job.heads} heads are too few for {'teams of ' * bool(teams)}{size} ranks"
        return Prediction("exact", strategy, label, teams, reason=reason)
    team = _Team(
        max(share.num_heads for share in shares),
        max(_travelling(share) for share in shares),
        job.local * size,
        job.head_dim,
    )
    memory = _memory(job, team, shares, size)
    passes = []
    for backward in (False, True):
        compute, waited = _ring(job, machine, deal, size, team, backward)
        shuffle, copies = _shuffle(job, machine, strategy, deal, size, shares, backward)
        sent = [rank_traffic(job, strategy, deal, size, rank)[backward] for rank in _looked_at(job.ranks)]
        passes.append(
            Pass(
                waited + shuffle + copies,
                compute + copies,
                max(one.bytes_sent for one in sent),
                max(one.messages_sent for one in sent),
            )
        )
    return Prediction("exact", strategy, label, teams, passes[0], passes[1], memory).within(job)


def _ring(job: Job, machine: Machine, deal: Deal, size: int, team: _Team, backward: bool) -> tuple[float, float]:
    """Seconds of the busiest team's kernels, and until the last team is done."""
    steps = _step_seconds(job, machine, deal, size, team, backward)
    count = len(steps)
    hops = _short(deal, job.ranks, 1).merged(size).hops(job.causal)
    key_values = team.numbers(job)[1]
    links = [machine.between(t * size, (t + 1) * size % job.ranks) for t in range(count)]
    home = machine.among(0, job.ranks)
    waited = ring_seconds(
        steps,
        hops,
        [link.seconds(key_values * job.itemsize) for link in links],
        [link.seconds(key_values * job.summed) for link in links] if backward else None,
        home=home.seconds(key_values * job.summed),
        overlap=job.overlap,
    )
    return float(steps.sum(0).max()), waited


def _step_seconds(job: Job, machine: Machine, deal: Deal, size: int, team: _Team, backward: bool) -> Tensor:
    """Compute ``(steps, teams)``: at step ``s`` team ``t`` has the block of team ``t - s``."""
    pairs = pair_counts(deal, job.ranks, size, job.causal, job.stretch)
    count = len(pairs)
    index = torch.arange(count)
    stepped = pairs[index, (index[None] - index[:, None]) % count]
    seconds = torch.zeros_like(stepped)
    query, key_values = team.numbers(job)
    for first in (True, False):
        rows = slice(0, 1) if first else slice(1, None)
        part = stepped[rows]
        triangle = job.causal and (first or deal == "striped")
        kernel = machine.triangle if triangle else machine.attention
        for seen in part.unique().tolist():
            if not seen:
                continue
            block = float(team.tokens) if triangle else seen**0.5
            spent = _kernel(job, machine, kernel, team, seen, block, backward)
            if not first:
                query_size, key_size = query * job.summed, key_values * job.summed
                spent += machine.moving(_ADD_QUERY if backward else _MERGE, query_size)
                spent += machine.moving(_ADD_KEYS, key_size) if backward else 0.0
            seconds[rows] = torch.where(part == seen, spent, seconds[rows])
    return seconds


def _kernel(
    job: Job, machine: Machine, kernel: Kernel, team: _Team, pairs: float, block: float, backward: bool
) -> float:
    query, key_values = team.numbers(job)
    curve: Curve = kernel.backward if backward else kernel.forward
    flops = (10 if backward else 4) * job.batch * team.heads * pairs * team.dim
    size = (4 if backward else 2) * query * job.itemsize + key_values * (job.itemsize + job.summed * backward)
    return Work(flops, size).seconds(curve.at(block), machine.memory.at(query * job.itemsize))


def _shuffle(
    job: Job,
    machine: Machine,
    strategy: Strategy,
    deal: Deal,
    size: int,
    shares: list[HeadShare],
    backward: bool,
) -> tuple[float, float]:
    """Seconds of a pass' two all-to-alls, and of the copies into and out of their messages."""
    if size == 1:
        return 0.0, 0.0
    slowest = 0.0
    for rank in _looked_at(job.ranks):
        whole, ring = rank_traffic(job, strategy, deal, size, rank), _ring_part(job, deal, size, rank, shares)
        alone = whole[backward] - ring[backward]
        link: Link = machine.among(rank // size * size, size)
        most = max(alone.bytes_sent, alone.bytes_received)
        slowest = max(slowest, link.seconds(most, alone.messages_sent))
    item = job.summed if backward else job.itemsize
    gathered, sent, out = _shuffled(job, shares, size)
    copied = sum(machine.moving(2, numbers * item) for numbers in (gathered, sent, out, out))
    return slowest, copied


def _shuffled(job: Job, shares: list[HeadShare], size: int) -> tuple[float, float, float]:
    """Numbers of a rank's query, key and value with all its team's tokens, and as sent; of its output."""
    rows = job.batch * job.local * job.head_dim
    gathered = max(size * (share.num_heads + 2 * share.num_kv_heads) for share in shares)
    sent = sum(share.num_heads + 2 * share.num_kv_heads for share in shares)
    return float(rows * gathered), float(rows * sent), float(rows * job.heads)


def _memory(job: Job, team: _Team, shares: list[HeadShare], size: int) -> Memory:
    local, item, wide = job.batch * job.local * job.head_dim, job.itemsize, job.summed
    query, key_values = team.numbers(job)
    stat = job.batch * team.heads * team.tokens * wide
    held = local * 2.0 * (job.heads + job.kv_heads) * item
    rings = job.ranks > size
    kept, shuffling = float(stat), 0.0
    if size > 1:
        gathered, sent, out = _shuffled(job, shares, size)
        kept += (gathered + out) * item
        # Messages out and in; what they are put into is kept, or freed after the call.
        shuffling = (sent + 2 * gathered + 2 * out) * item
        if job.backward:  # gradients as they come and as they add up besides
            shuffling = 2 * (sent + gathered) * wide
    # Blocks used and arriving; the running output and the merge's copies; backward the gradients: of the query so far,
    # of this step, and as the kernel gives them; of keys and values besides those at home and under way.
    blocks = 2 * key_values * item if rings else 0.0
    forward = blocks + query * (item + 6 * wide * rings)
    sums = 2 if not rings else 5 if job.ranks == 2 * size else 7
    backward = blocks + ((2 + rings + (size > 1)) * query + sums * key_values) * wide if job.backward else 0.0
    return Memory(held, kept, max(forward, backward, shuffling))


def break_even(job: Job, machine: Machine) -> float:
    """Bytes a second of a link above which a balanced ring's transfers hide behind its kernels; 0 for one rank,
    infinite where latency alone takes longer."""
    if job.ranks == 1:
        return 0.0
    deal: Deal = "zigzag" if job.causal else "contiguous"
    team = _Team(job.heads, job.kv_heads, job.local, job.head_dim)
    numbers, needed = team.numbers(job)[1], []
    for backward in (False, True)[: 1 + job.backward]:
        size = numbers * (job.itemsize + job.summed * backward)
        compute = float(_step_seconds(job, machine, deal, 1, team, backward)[:-1].amax(1).min())
        left = compute - (1 + backward) * machine.link.latency
        needed.append(size / left if left > 0 else float("inf"))
    return max(needed)
