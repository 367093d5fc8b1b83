"""Does context parallelism compute the right thing on these machines, what does it send, and how long does it take?

    torchrun --nproc-per-node 4 -m regard.parallel.check --length 8192

runs every strategy and deal on real ranks (NCCL where each has a GPU, else gloo), compares output and gradients with
one process' attention over the whole sequence, and the messages with the formula of :mod:`regard.parallel.traffic`.
``python -m regard.parallel.check --simulate 4`` does so with simulated ranks. It ends with status 1 if anything is off.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from regard.parallel.context import context_parallel_attention
from regard.parallel.group import DistributedGroup, Group, simulate
from regard.parallel.mesh import Mesh
from regard.parallel.shards import Deal, Sharding
from regard.parallel.traffic import PassTraffic, Strategy, traffic

__all__ = ["Problem", "Row", "examine", "main"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest distance from the exact result, relative to its norm."""


@dataclass(frozen=True)
class Problem:
    """One causal call on a whole sequence."""

    length: int = 2048
    batch: int = 1
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    repeats: int = 3

    def tensors(self) -> list[Tensor]:
        """Query, key, value and a gradient of the output, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        shapes = [(self.batch, count, self.length, self.head_dim) for count in heads]
        return [torch.randn(shape, generator=generator).to(self.device, self.dtype) for shape in shapes]


@dataclass(frozen=True)
class Row:
    """What one strategy and deal did: relative error of the worst of output and gradients, whether every rank's traffic
    was that of the formula, megabytes that the busiest rank sent, milliseconds forward and with the backward pass."""

    strategy: str
    deal: str
    error: float
    counted: bool
    sent: float
    forward: float
    both: float


def examine(group: Group, problem: Problem) -> list[Row]:
    """Every strategy and deal that the group's size and the number of heads allow; the same rows on every rank."""
    tensors = problem.tensors()
    whole = _alone(tensors)
    strategies: list[tuple[Strategy, int]] = [("ring", 1)]
    if group.size <= problem.num_heads:
        strategies.append(("ulysses", group.size))
    teams = [size for size in range(2, group.size) if group.size % size == 0 and size <= problem.num_heads]
    if teams:
        strategies.append(("mesh", teams[0]))
    rows = []
    for strategy, size in strategies:
        where = Mesh.split(group, size) if strategy == "mesh" else group
        deals: tuple[Deal, ...] = ("zigzag",) if strategy == "ulysses" else ("contiguous", "zigzag", "striped")
        for deal in deals:
            sharding = Sharding.of(deal, problem.length, group.size)
            rows.append(_row(group, where, strategy, size, deal, sharding, problem, tensors, whole))
    return rows


def _alone(tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients of one process, in twice the precision."""
    wide = torch.float64 if tensors[0].dtype in (torch.float32, torch.float64) else torch.float32
    query, key, value, grad = (t.to(wide) for t in tensors)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _row(
    group: Group,
    where: Group | Mesh,
    strategy: Strategy,
    size: int,
    deal: Deal,
    sharding: Sharding,
    problem: Problem,
    tensors: list[Tensor],
    whole: list[Tensor],
) -> Row:
    *inputs, grad = (sharding.shard(t, group.rank, 2) for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]

    def forward() -> Tensor:
        return context_parallel_attention(*inputs, group=where, sharding=sharding, strategy=strategy, causal=True)

    began = group.traffic.copy()
    out = forward()
    between = group.traffic.copy()
    found = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    counted = PassTraffic(between - began, group.traffic.copy() - between)
    formula = traffic(
        strategy,
        sharding,
        group.rank,
        batch=problem.batch,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        dtype=problem.dtype,
        causal=True,
        ulysses_size=size if strategy == "mesh" else None,
    )
    same = all(
        (a.messages_sent, a.messages_received, a.bytes_sent, a.bytes_received)
        == (b.messages_sent, b.messages_received, b.bytes_sent, b.bytes_received)
        for a, b in zip(counted, formula, strict=True)
    )
    exact = [sharding.shard(t, group.rank, 2) for t in whole]
    error = max(float((a.to(b.dtype) - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    times: list[tuple[float, float]] = []
    for _ in range(problem.repeats):
        start = _meet(group, problem.device)
        out = forward()
        middle = _now(problem.device)
        torch.autograd.grad(out, inputs, grad)
        times.append((middle - start, _now(problem.device) - start))
    sent = sum(passes.bytes_sent for passes in counted) / 1e6
    best = [1e3 * min(column) for column in zip(*times, strict=True)]
    numbers = torch.tensor([[error, float(not same), sent, *best]], dtype=torch.float64, device=problem.device)
    worst = torch.cat(group.all_gather(numbers, sizes=[1] * group.size)).amax(0).tolist()
    return Row(strategy, deal, worst[0], not worst[1], *worst[2:])


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _meet(group: Group, device: str) -> float:
    group.barrier()
    return _now(device)


def _report(rows: list[Row], problem: Problem, ranks: int) -> bool:
    """Print the table; whether all is as it should be."""
    click.echo(
        f"{ranks} ranks, {problem.device.partition(':')[0]}: {problem.length} tokens, causal, batch {problem.batch}, "
        f"{problem.num_heads} heads ({problem.num_kv_heads} of keys), head_dim {problem.head_dim}, {problem.dtype}"
    )
    click.echo(
        f"{'strategy':9} {'deal':11} {'error':>9} {'traffic':>8} {'MB sent':>9} {'forward':>9} {'+backward':>10}"
    )
    right = True
    for row in rows:
        fine = row.error <= TOLERANCE[problem.dtype]
        right = right and fine and row.counted
        click.echo(
            f"{row.strategy:9} {row.deal:11} {row.error:9.1e} {'formula' if row.counted else 'DIFFERS':>8} "
            f"{row.sent:9.2f} {row.forward:6.1f} ms {row.both:7.1f} ms{'' if fine else '  WRONG'}"
        )
    click.echo("equal to one process, messages as by formula" if right else "NOT equal: see the rows marked")
    return right


@click.command()
@click.option("--length", default=2048, help="Tokens of the whole sequence.")
@click.option("--batch", default=1, help="Sequences.")
@click.option("--heads", default=8, help="Query heads.")
@click.option("--kv-heads", default=4, help="Key/value heads.")
@click.option("--head-dim", default=64, help="Width of a head.")
@click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]), help="Default: by device.")
@click.option("--repeats", default=3, help="Timed runs; the best is shown.")
@click.option("--simulate", "simulated", default=0, help="So many simulated ranks in this process, without torchrun.")
def main(
    length: int, batch: int, heads: int, kv_heads: int, head_dim: int, dtype: str | None, repeats: int, simulated: int
) -> None:
    """Verify context parallelism on this machine, or on all that torchrun starts."""
    if not simulated and "RANK" not in os.environ:
        raise click.UsageError(
            "Start it with torchrun, e.g. torchrun --nproc-per-node 4 -m regard.parallel.check, or add --simulate 4."
        )
    local = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = not simulated and torch.cuda.is_available() and torch.cuda.device_count() > local
    device = f"cuda:{local}" if on_gpu else "cpu"
    kind = getattr(torch, dtype or ("bfloat16" if on_gpu else "float32"))
    problem = Problem(length, batch, heads, kv_heads, head_dim, kind, device, repeats)
    if simulated:
        rows, ranks, first = simulate(simulated, examine, problem, timeout=600.0).results[0], simulated, True
    else:
        if on_gpu:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if on_gpu else "gloo")
        group = DistributedGroup()
        rows, ranks, first = examine(group, problem), group.size, group.rank == 0
        group.barrier()
        dist.destroy_process_group()
    fine = all(row.error <= TOLERANCE[kind] and row.counted for row in rows)
    if first:
        fine = _report(rows, problem, ranks)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
