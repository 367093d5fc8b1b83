"""Predicted time, messages and memory of linear attention over ranks: ZeCO, LASP and LASP-2.

Their schedules are those of :mod:`regard.parallel.recurrence`: the rank's own state first, then the states' travel
beside the local recurrence (``zeco``, ``lasp2``) or before it (``lasp1``), then what the incoming state adds. The
travel's time and bytes are those of :func:`~regard.parallel.zeco.sp_cost`, for a decay per head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from regard.bench.plan.job import Job, Memory, Pass, Prediction, Work
from regard.bench.plan.machine import Machine
from regard.parallel.zeco import sp_cost

__all__ = ["WITHOUT", "Method", "linear_flops", "linear_predictions"]

Method = Literal["zeco", "lasp1", "lasp2"]
_METHODS: tuple[tuple[Method, bool], ...] = (("zeco", True), ("zeco", False), ("lasp2", True), ("lasp2", False))
"""With their ``overlap``; LASP has none."""
WITHOUT = "overlap=False"
_AROUND = {(False, False): (1, 2), (False, True): (1, 2), (True, False): (2, 6), (True, True): (4, 16)}
"""By overlap and backward: products of length x dk x dv beyond the local recurrence, and how often the operations
around them (decays, sums of gradients) read or write a tensor as large as the query."""


def linear_flops(heads: float, tokens: int, dim: int, chunk: int, backward: bool) -> float:
    """Operations of causal linear attention in chunks, the unit that its kernel's rate is counted in: products inside
    chunks, with states and into states; backward each product has two."""
    return (4.0 if backward else 2.0) * heads * tokens * (chunk * dim + 2 * dim * dim)


def linear_predictions(job: Job, machine: Machine) -> list[Prediction]:
    """Every method; where attention is not causal none can be used."""
    if not job.causal:
        reason = "a state passed from rank to rank is causal attention"
        return [Prediction("linear", method, reason=reason) for method in get_args(Method)]
    if job.ranks == 1:
        return [replace(_predict(job, machine, "zeco", False), strategy="linear attention", deal="")]
    found = [_predict(job, machine, *method) for method in _METHODS if job.overlap or not method[1]]
    return [*found, replace(_predict(job, machine, "lasp1", False), deal="")]


def _predict(job: Job, machine: Machine, method: Method, overlap: bool) -> Prediction:
    forward, backward = (_pass(job, machine, method, overlap, backward) for backward in (False, True))
    label = "" if overlap else WITHOUT
    return Prediction("linear", method, label, 0, forward, backward, _memory(job, method, overlap)).within(job)


def _pass(job: Job, machine: Machine, method: Method, overlap: bool, backward: bool) -> Pass:
    rows, dim = job.batch * job.heads * job.local, job.head_dim
    curve = machine.linear.backward if backward else machine.linear.forward
    flops = linear_flops(job.batch * job.heads, job.local, dim, job.chunk, backward)
    size, wide = rows * dim * job.itemsize, rows * dim * job.summed
    local = Work(flops, (8.0 if backward else 4.0) * size).seconds(curve.at(job.local), machine.memory.at(size))
    if job.kv_heads < job.heads:  # keys and values are repeated for their query heads
        local += machine.moving(2.0 * (1 + job.kv_heads / job.heads), size)
    if job.ranks == 1:
        return Pass(local, local)
    product = 2.0 * rows * dim * dim / machine.product
    products, passes = _AROUND[overlap, backward]
    around = products * product + machine.moving(passes, wide)
    carry, sent, messages = _carry(job, machine, method, backward)
    both = max(local, carry) if overlap else local + carry
    return Pass(around + both, around + local, sent, messages)


def _carry(job: Job, machine: Machine, method: Method, backward: bool) -> tuple[float, int, int]:
    """Seconds until the last rank has its incoming state, bytes and messages that a rank sends at most."""
    link = machine.among(0, job.ranks)
    cost = sp_cost(
        method,
        job.ranks,
        job.head_dim,
        job.head_dim,
        blocks=job.blocks,
        tau=lambda numbers: link.seconds(numbers * job.summed),
        itemsize=job.summed,
        states=job.batch * job.heads,
        decay_dim=0 if backward else 1,
    )
    more = 0.0
    if method == "lasp2":
        # A message of decays to each besides, and a prefix of all states that every rank forms by itself.
        state = job.batch * job.heads * job.head_dim**2 * job.summed
        more = link.seconds(0, cost.messages_sent - (job.ranks - 1)) + machine.moving(3 * (job.ranks - 1), state)
    return cost.latency + more, cost.bytes_sent, cost.messages_sent


def _memory(job: Job, method: Method, overlap: bool) -> Memory:
    rows, wide = float(job.batch * job.local * job.head_dim), job.summed
    state = float(job.batch * job.heads * job.head_dim**2 * wide)
    held = rows * 2 * (job.heads + job.kv_heads) * job.itemsize
    query = rows * job.heads
    # The kernel keeps its operands as it computes with them, a state every 32 chunks, and the states passed on.
    kept = 3 * query * wide if (job.itemsize < wide or job.kv_heads < job.heads) else 0.0
    kept += state * (job.local / (32 * job.chunk) + 2)
    if overlap:  # queries as they meet the incoming state, and the kernel's own output
        kept += 2 * query * wide
    states = state * (job.ranks if method == "lasp2" else 2)
    flight = states + query * wide * ((3 if job.backward else 0) + overlap)
    return Memory(held, kept if job.backward else 0.0, flight + (0.0 if job.backward else kept))
