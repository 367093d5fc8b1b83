"""The planner's predictions beside measurements: every strategy on 1, 2 and 4 ranks of this machine.

Local ranks share the processor, so the rates that a prediction is made from are probed by as many ranks at once, in the
same processes, right before the strategies are timed. Nothing is fitted.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.bench.kept import load_kept, save_kept
from regard.bench.measure import peak_bytes, seconds
from regard.bench.plan.job import Job, Kind, Prediction
from regard.bench.plan.linear import WITHOUT
from regard.bench.plan.local_ranks import run_local
from regard.bench.plan.machine import Link, Machine
from regard.bench.plan.planner import plan
from regard.bench.plan.probes import Together, probe, probe_link
from regard.kernels import native
from regard.parallel.context import context_parallel_attention
from regard.parallel.group import Group
from regard.parallel.lasp import lasp1, lasp2
from regard.parallel.mesh import Mesh
from regard.parallel.shards import Sharding
from regard.parallel.zeco import zeco

__all__ = ["JOB", "LENGTHS", "RANKS", "Timed", "Timing", "measure"]

VERSION = 1
RANKS = (1, 2, 4)
ROUNDS = 5
LENGTHS: dict[Kind, tuple[int, ...]] = {"exact": (1024, 4096), "linear": (8192, 32768)}
JOB = Job(4096, 1, heads=8, kv_heads=4, head_dim=64, layers=1, dtype="float32")
"""What is measured, but for length and ranks."""


@dataclass(frozen=True)
class Timed:
    """A prediction and what was measured of the same: seconds until the last rank was done, medians over the rounds;
    memory: most bytes that a rank held beyond its inputs."""

    ranks: int
    length: int
    prediction: Prediction
    forward: float
    both: float
    memory: int

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Measured over predicted: forward, with the backward pass, memory."""
        said = self.prediction
        return self.forward / said.forward.seconds, self.both / self.predicted_both, self.memory / self.predicted_memory

    @property
    def kind(self) -> Kind:
        return self.prediction.kind

    @property
    def predicted_both(self) -> float:
        return self.prediction.forward.seconds + self.prediction.backward.seconds

    @property
    def predicted_memory(self) -> float:
        """Beyond the inputs: the output, what is kept, what is under way."""
        memory, job = self.prediction.memory, JOB
        assert memory is not None
        return memory.held * job.heads / (2 * (job.heads + job.kv_heads)) + memory.kept + memory.flight


@dataclass(frozen=True)
class Timing:
    """All of them, the rates that so many ranks at once were probed with, and what they hold for."""

    conditions: dict[str, Any]
    machines: dict[int, Machine]
    rows: list[Timed]

    def save(self, file: Path, more: Mapping[str, Any] | None = None) -> None:
        """As JSON, beside whatever else belongs there."""
        content = {
            "version": VERSION,
            "conditions": self.conditions,
            "machines": {str(ranks): machine.content() for ranks, machine in self.machines.items()},
            "rows": [asdict(row) for row in self.rows],
            **(more or {}),
        }
        save_kept(file, content)

    @classmethod
    def load(cls, file: Path) -> Timing | None:
        """What :meth:`save` wrote; None where there is nothing."""
        return load_kept(file, VERSION, cls._of, "measurements of the planner")

    @classmethod
    def _of(cls, raw: dict[str, Any]) -> Timing:
        machines = {int(ranks): Machine.of(content) for ranks, content in raw["machines"].items()}
        rows = [Timed(**{**row, "prediction": Prediction.of(row["prediction"])}) for row in raw["rows"]]
        return cls(raw["conditions"], machines, rows)


class _Subject(NamedTuple):
    """What one strategy is timed with: the forward call, and the backward pass of its result."""

    job: Job
    prediction: Prediction
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any]


def measure(
    lengths: Mapping[Kind, Sequence[int]] | None = None,
    ranks: Sequence[int] = RANKS,
    rounds: int = ROUNDS,
    report: Callable[[str], None] = lambda line: None,
) -> Timing:
    """Probe and time on so many local ranks, one after another."""
    lengths = LENGTHS if lengths is None else lengths
    native.available(build=True)  # once, and not by every rank
    machines, rows = {}, []
    for count in ranks:
        report(f"{count} local rank{'s' * (count > 1)}")
        jobs = {kind: [replace(JOB, length=length, ranks=count) for length in some] for kind, some in lengths.items()}
        machine, taken = run_local(count, _measure_ranks, jobs, rounds)
        machines[count] = machine
        predictions = _predictions(jobs, machine)
        for (job, prediction), (forward, both, memory) in zip(predictions, taken, strict=True):
            rows.append(Timed(count, job.length, prediction, forward, both, memory))
    conditions = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "native": native.status().state == "ready",
        "rounds": rounds,
        "job": asdict(JOB),
    }
    return Timing(conditions, machines, rows)


def _predictions(jobs: Mapping[Kind, Sequence[Job]], machine: Machine) -> list[tuple[Job, Prediction]]:
    """What there is to be measured."""
    found = [(kind, job, plan(job, machine).predictions) for kind, some in jobs.items() for job in some]
    return [(job, one) for kind, job, some in found for one in some if one.kind == kind and one.reason is None]


def _measure_ranks(
    group: Group, jobs: Mapping[Kind, Sequence[Job]], rounds: int
) -> tuple[Machine, list[tuple[float, float, int]]]:
    """In each rank: the machine, and forward, both passes and memory of every prediction."""
    together = Together(group)
    machine = probe(JOB, probe_link(group), together)
    # Which there are does not depend on rates but for the best mesh, and four ranks have but one.
    named = _predictions(jobs, Machine.assumed(1.0, Link(1.0)))
    meshes = {size: Mesh.split(group, size) for size in sorted({one.teams for _, one in named if one.teams})}
    subjects = [_subject(group, meshes, job, one) for job, one in named]
    found: list[list[tuple[float, float]]] = [[] for _ in subjects]
    for turn in range(rounds + 1):
        for place, subject in enumerate(subjects):
            made: list[Tensor] = []
            together.meet()
            forward = seconds(lambda s=subject, m=made: m.append(s.forward()))  # type: ignore[misc]
            backward = seconds(lambda s=subject, m=made: s.backward(m.pop()))  # type: ignore[misc]
            worst = together.slowest([forward, forward + backward])
            if turn:
                found[place].append((worst[0], worst[1]))
    result = []
    for subject, times in zip(subjects, found, strict=True):
        together.meet()
        memory = peak_bytes(lambda s=subject: s.backward(s.forward()))  # type: ignore[misc]
        forward, both = (statistics.median(column) for column in zip(*times, strict=True))
        result.append((forward, both, int(together.slowest([float(memory)])[0])))
    return machine, result


def _subject(group: Group, meshes: Mapping[int, Mesh], job: Job, one: Prediction) -> _Subject:
    generator = torch.Generator().manual_seed(0)
    wide = [job.heads, job.kv_heads, job.kv_heads]
    whole = [torch.randn(job.batch, heads, job.length, job.head_dim, generator=generator) for heads in wide]
    exact = one.kind == "exact"
    deal = one.deal if one.deal in ("contiguous", "zigzag", "striped") else "zigzag" if exact else "contiguous"
    sharding = Sharding.of(deal, job.length, group.size)  # type: ignore[arg-type]
    inputs = [sharding.shard(t, group.rank, 2).to(job.type).requires_grad_() for t in whole]
    grad = torch.ones_like(inputs[0])

    def attention() -> Tensor:
        where: Group | Mesh = meshes[one.teams] if one.strategy == "mesh" else group
        strategy: Any = one.strategy
        return context_parallel_attention(*inputs, group=where, sharding=sharding, strategy=strategy, causal=job.causal)

    def linear() -> Tensor:
        query, key, value = inputs
        rows, overlap = (group, query, key, value, -torch.linspace(0.001, 0.1, job.heads)), one.deal != WITHOUT
        if one.strategy == "lasp1":
            return lasp1(*rows, chunk_size=job.chunk)[0]
        if one.strategy == "lasp2":
            return lasp2(*rows, chunk_size=job.chunk, overlap=overlap)[0]
        return zeco(*rows, chunk_size=job.chunk, blocks=job.blocks, overlap=overlap)[0]

    return _Subject(job, one, attention if exact else linear, lambda out: torch.autograd.grad(out, inputs, grad))
