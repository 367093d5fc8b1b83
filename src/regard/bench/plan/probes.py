"""Short measurements that make a :class:`~regard.bench.plan.machine.Machine` of the one at hand.

Kernels are timed as :mod:`regard.parallel` calls them: partial attention over whole and over causal blocks of a few
sizes, causal linear attention with its gradient, a matrix product as wide as a head, a copy. Ranks of one machine share
it, so their probes run at once, and the slowest counts.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.bench.kept import load_kept, save_kept
from regard.bench.measure import seconds
from regard.bench.plan.job import Job
from regard.bench.plan.linear import linear_flops
from regard.bench.plan.local_ranks import run_local
from regard.bench.plan.machine import Curve, Kernel, Link, Machine
from regard.bench.plan.quantities import parse_quantity, parse_tokens
from regard.errors import OptionError
from regard.kernels.linear import linear_attention
from regard.kernels.native import cache_folder
from regard.kernels.partial import KeyRanges, partial_attention, partial_attention_backward
from regard.parallel.group import Group

__all__ = [
    "Together",
    "conditions_of",
    "job_and_machine",
    "kept_link",
    "kept_machine",
    "machine_for",
    "probe",
    "probe_link",
]

VERSION = 1
_ROUNDS = 5
_SIZES = {"cpu": (256, 1024, 2048), "cuda": (1024, 4096, 16384)}
_COPIED, _SENT = (1 << 18, 1 << 22, 1 << 24, 1 << 25, 1 << 26), 1 << 22


class Together:
    """The ranks that probe at the same time: nobody else, or a group of them."""

    def __init__(self, group: Group | None = None) -> None:
        self._group = group if group is not None and group.size > 1 else None

    def meet(self) -> None:
        """Return when all have come here."""
        if self._group is not None:
            self._group.barrier()

    def slowest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of all ranks, one by one."""
        if self._group is None:
            return list(numbers)
        own = torch.tensor([list(numbers)], dtype=torch.float64)
        found: list[float] = torch.cat(self._group.all_gather(own, sizes=[1] * self._group.size)).amax(0).tolist()
        return found

    def time(self, *calls: Callable[[], Any], rounds: int = _ROUNDS) -> list[float]:
        """Median seconds of calls that follow one another, after a round that does not count."""
        taken = []
        for _ in range(rounds + 1):
            self.meet()
            taken.append(self.slowest([seconds(call) for call in calls]))
        return [statistics.median(column) for column in zip(*taken[1:], strict=True)]


def probe(job: Job, link: Link, together: Together | None = None, device: str = "cpu") -> Machine:
    """This machine's rates for the kernels of a job; its link is given or from :func:`probe_link`."""
    here = together or Together()
    group = job.heads // job.kv_heads
    # Heads run one after the other on a CPU's thread; a few tell the rate.
    kv_heads = job.kv_heads if device != "cpu" else max(1, min(job.kv_heads, 4 // group))
    heads, dim = kv_heads * group, job.head_dim
    generator = torch.Generator().manual_seed(0)

    def random(count: int, length: int) -> Tensor:
        return torch.randn(1, count, length, dim, generator=generator).to(device, job.type)

    curves: dict[tuple[bool, bool], list[float]] = {(c, b): [] for c in (False, True) for b in (False, True)}
    sizes = _SIZES[torch.device(device).type]
    for size in sizes:
        query, key, value = random(heads, size), random(kv_heads, size), random(kv_heads, size)
        for causal in (False, True):
            place = torch.arange(size)
            ranges = KeyRanges.causal(place, place) if causal else KeyRanges.everything(size, size)
            out, lse = partial_attention(query, key, value, ranges)
            forward, backward = here.time(
                lambda q=query, k=key, v=value, r=ranges: partial_attention(q, k, v, r),  # type: ignore[misc]
                lambda q=query, k=key, v=value, r=ranges, o=out, stat=lse: (  # type: ignore[misc]
                    partial_attention_backward(o, q, k, v, o, stat, r)
                ),
            )
            for way, flops, spent in ((False, 4, forward), (True, 10, backward)):
                curves[causal, way].append(flops * heads * ranges.pairs * dim / spent)
    whole, triangle = (
        Kernel(*(Curve(tuple(map(float, sizes)), tuple(curves[causal, way])) for way in (False, True)))
        for causal in (False, True)
    )
    left, right = random(heads, 4 * sizes[1]), random(heads, 4 * sizes[1])
    (product,) = here.time(lambda: left.mT @ right)
    moved = []
    for size_of in _COPIED:
        source = torch.ones(size_of // 4, device=device)
        (spent,) = here.time(lambda tensor=source: tensor.clone())  # type: ignore[misc]
        moved.append(2.0 * size_of / spent)
    return Machine(
        whole,
        triangle,
        _probe_linear(job, here, random, sizes, device),
        2.0 * left.numel() * dim / product,
        Curve(tuple(map(float, _COPIED)), tuple(moved)),
        link,
    )


def _probe_linear(
    job: Job, here: Together, random: Callable[[int, int], Tensor], sizes: Sequence[int], device: str
) -> Kernel:
    # Long ones too: large results are written to memory that the system has yet to give.
    lengths, heads = [4 * sizes[0], *(factor * sizes[-1] for factor in (4, 8, 16))], min(job.heads, 8)
    forward: list[float] = []
    backward: list[float] = []
    decay = -torch.linspace(0.001, 0.1, heads, device=device)
    for length in lengths:
        inputs = [random(heads, length).requires_grad_() for _ in range(3)]
        made: list[Tensor] = []

        def run(inputs: list[Tensor] = inputs, made: list[Tensor] = made) -> None:
            made[:] = [linear_attention(*inputs, causal=True, log_decay=decay, chunk_size=job.chunk)[0]]

        def back(inputs: list[Tensor] = inputs, made: list[Tensor] = made) -> None:
            torch.autograd.grad(made[0], inputs, made[0].detach())

        for way, found, spent in zip((False, True), (forward, backward), here.time(run, back), strict=True):
            found.append(linear_flops(heads, length, job.head_dim, job.chunk, way) / spent)
    places = tuple(map(float, lengths))
    return Kernel(Curve(places, tuple(forward)), Curve(places, tuple(backward)))


def probe_link(group: Group) -> Link:
    """Latency and bandwidth while every rank sends to the next."""
    if group.size == 1:
        return Link(float("inf"))
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    small, large = torch.ones(1), torch.ones(_SENT // 4)
    latency, taken = Together(group).time(
        lambda: group.exchange([small], to=after, source=before),
        lambda: group.exchange([large], to=after, source=before),
    )
    return Link(_SENT / max(taken - latency, 1e-9), latency)


def conditions_of(job: Job, device: str) -> dict[str, Any]:
    """What a machine's rates hold for."""
    return {
        "device": torch.cuda.get_device_name(device) if device != "cpu" else platform.machine(),
        "host": platform.node(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": job.dtype,
        "head_dim": job.head_dim,
        "group": job.heads // job.kv_heads,
        "chunk": job.chunk,
    }


def kept_machine(job: Job, link: Link, device: str) -> tuple[Machine, Path]:
    """:func:`probe`'s result for a job of this kind, measured once and kept in the user's cache; and the file."""
    conditions = conditions_of(job, device)
    file = _file(conditions)
    found = load_kept(file, VERSION, lambda raw: Machine.of(raw["machine"]), "a measured machine")
    if found is None:
        found = probe(job, link, device=device)
        save_kept(file, {"version": VERSION, "conditions": conditions, "machine": found.content()})
    return replace(found, link=link), file


def kept_link() -> tuple[Link, Path]:
    """:func:`probe_link` between two processes of this machine, measured once and kept."""
    conditions = {"link": "two local ranks, gloo", "host": platform.node(), "torch": torch.__version__}
    file = _file(conditions)
    found = load_kept(file, VERSION, lambda raw: Link(**raw["link"]), "a measured link")
    if found is None:
        found = run_local(2, probe_link)
        content = {"bandwidth": found.bandwidth, "latency": found.latency}
        save_kept(file, {"version": VERSION, "conditions": conditions, "link": content})
    return found, file


def machine_for(
    job: Job,
    *,
    bandwidth: float | None = None,
    latency: float | None = None,
    rate: float | None = None,
    memory_bandwidth: float | None = None,
    node: int = 1,
    node_bandwidth: float | None = None,
) -> Machine:
    """What is given, the rest measured here: rates of kernels unless there is a ``rate``, links unless there is a
    ``bandwidth`` (or one rank). ``said`` tells which is which."""
    said = []
    if bandwidth is not None:
        link = Link(bandwidth, latency or 0.0)
        said.append("The links are as given" + (", their latency taken as none." if latency is None else "."))
    elif job.ranks == 1:
        link = Link(float("inf"))
    else:
        measured, file = kept_link()
        link = replace(measured, latency=measured.latency if latency is None else latency)
        said.append(f"The links are those between two processes of this machine over gloo, measured: {file}.")
    if rate is not None:
        machine = Machine.assumed(rate, link, memory=memory_bandwidth or float("inf"))
        said.append("The rate is as given and holds for every kernel and size; nothing was measured.")
        if memory_bandwidth is None:
            said.append("No memory bandwidth is given, so copies and memory-bound kernels count as free beyond it.")
    else:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        machine, file = kept_machine(job, link, device)
        if memory_bandwidth is not None:
            machine = replace(machine, memory=Curve.flat(memory_bandwidth))
        what = torch.cuda.get_device_name(device) if device != "cpu" else "this CPU"
        said.append(f"Rates were measured on {what}; remove {file} to measure anew.")
    near = None if node_bandwidth is None else Link(node_bandwidth, link.latency)
    return replace(machine, node=node, near=near, said=tuple(said))


def job_and_machine(
    *,
    length: str | None,
    ranks: int | None,
    bandwidth: str | None,
    latency: str | None,
    node: int,
    node_bandwidth: str | None,
    memory: str | None,
    rate: str | None,
    memory_bandwidth: str | None,
    **shape: Any,
) -> tuple[Job, Machine]:
    """From what a person writes: ``"1M"``, ``"50GB/s"``; shape: further fields of the job."""
    if length is None or ranks is None:
        raise OptionError(
            "A plan needs --length and --ranks, e.g. --length 1M --ranks 64 --bandwidth 50GB/s; or ask for --measure."
        )
    if (node > 1) != (node_bandwidth is not None):
        raise OptionError("--node 8 and --node-bandwidth 400GB/s say one thing together: give both or neither.")

    def read(text: str | None, unit: str, option: str) -> float | None:
        return None if text is None else parse_quantity(text, unit, option)

    job = Job(parse_tokens(length, "--length"), ranks, memory=read(memory, "B", "--memory"), **shape)
    machine = machine_for(
        job,
        bandwidth=read(bandwidth, "B/s", "--bandwidth"),
        latency=read(latency, "s", "--latency"),
        rate=read(rate, "FLOP/s", "--rate"),
        memory_bandwidth=read(memory_bandwidth, "B/s", "--memory-bandwidth"),
        node=node,
        node_bandwidth=read(node_bandwidth, "B/s", "--node-bandwidth"),
    )
    return job, machine


def _file(conditions: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "plan" / f"{name}.json"
