"""The context-parallel planner: for one job and machine, time and memory of every strategy, and which to use.

In the manner of a roofline: kernels' rates, the memory's and the links' bandwidths are measured or given
(:mod:`regard.bench.plan.machine`), work, bytes and messages are counted (:mod:`regard.bench.plan.exact`,
:mod:`regard.bench.plan.linear`), and what can run at once does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from regard.bench.plan.exact import break_even, exact_predictions
from regard.bench.plan.job import Job, Kind, Prediction
from regard.bench.plan.linear import linear_predictions
from regard.bench.plan.machine import Machine
from regard.bench.plan.quantities import show_quantity, show_seconds

__all__ = ["Plan", "advice", "plan", "sweep"]

_CLOSE = 1.05
"""Predictions nearer than this are not told apart."""


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found. break_even: the link's bandwidth above which a balanced ring's transfers are hidden."""

    job: Job
    machine: Machine
    predictions: tuple[Prediction, ...]
    break_even: float

    def ranked(self, kind: Kind) -> list[Prediction]:
        """Those of a kind that can be used, the fastest first."""
        usable = [one for one in self.predictions if one.kind == kind and one.reason is None]
        return sorted(usable, key=lambda one: one.seconds(self.job))

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "job": asdict(self.job),
            "machine": self.machine.content(),
            "predictions": [one.content() for one in self.predictions],
            "break_even": None if self.break_even == float("inf") else self.break_even,
        }

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Plan:
        """From :meth:`content`."""
        even = content["break_even"]
        return cls(
            Job(**content["job"]),
            Machine.of(content["machine"]),
            tuple(Prediction.of(one) for one in content["predictions"]),
            float("inf") if even is None else even,
        )


def plan(job: Job, machine: Machine) -> Plan:
    """Predict every strategy of exact and of linear attention."""
    found = (*exact_predictions(job, machine), *linear_predictions(job, machine))
    return Plan(job, machine, found, break_even(job, machine))


def advice(found: Plan) -> list[str]:
    """What to use, as sentences."""
    job, lines = found.job, []
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        ranked = found.ranked(kind)
        if not ranked:
            lines.append(f"{kind} attention: no strategy can be used; the table says why.")
            continue
        best, seconds = ranked[0], ranked[0].seconds(job)
        text = f"{kind} attention: use {best.name}, {show_seconds(seconds)}"
        if job.ranks == 1:
            lines.append(f"{kind} attention on one rank: {show_seconds(seconds)}.")
            continue
        close = [one.name for one in ranked[1:] if one.seconds(job) <= _CLOSE * seconds]
        others = [one for one in ranked[1:] if one.name not in close]
        if close:
            text += f", as good as {' and '.join(close)} (within {100 * (_CLOSE - 1):.0f} %)"
        if others:
            text += f"; {others[0].name} takes {others[0].seconds(job) / seconds:.2f} times as long"
        lines.append(text + ".")
    if job.ranks > 1 and found.break_even == float("inf"):
        lines.append("A ring cannot hide its messages at any bandwidth: their latency is longer than a block's work.")
    elif job.ranks > 1:
        bandwidth = found.machine.link.bandwidth
        state = "hidden" if bandwidth >= found.break_even else "not all hidden"
        lines.append(
            f"A balanced ring hides its transfers from {show_quantity(found.break_even, 'B/s')} on; with "
            f"{show_quantity(bandwidth, 'B/s')} they are {state}."
        )
    return lines


def sweep(job: Job, machine: Machine) -> list[Plan]:
    """Plans for numbers of ranks from 1 to four times the job's, by powers of two, and the job's own."""
    counts = {job.ranks} | {1 << power for power in range(11) if 1 << power <= 4 * job.ranks}
    return [plan(replace(job, ranks=count), machine) for count in sorted(counts) if 2 * count <= job.length]
