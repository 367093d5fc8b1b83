"""What the planner knows of a machine: how fast its kernels compute, its memory moves and its links carry.

A kernel's rate depends on how large its blocks are, so it is a :class:`Curve` over block sizes; with the memory's
bandwidth this makes a roofline, ``seconds = max(work / rate, bytes / bandwidth)``. Rates are measured by
:mod:`regard.bench.plan.probes`, or assumed: :meth:`Machine.assumed` plans for hardware that is not here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regard.errors import OptionError

__all__ = ["Curve", "Kernel", "Link", "Machine"]


@dataclass(frozen=True)
class Curve:
    """A rate by size, as FLOP/s by a block's tokens: interpolated over the size's logarithm, level beyond both ends."""

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in itertools.pairwise(self.sizes))
        if not self.sizes or len(self.sizes) != len(self.rates) or not rising or min(*self.rates, *self.sizes) <= 0:
            raise OptionError(
                f"A curve has a rate above zero for each of its ascending sizes; got {self.sizes} and {self.rates}."
            )

    @classmethod
    def flat(cls, rate: float) -> Curve:
        """One rate for every size."""
        return cls((1.0,), (rate,))

    def at(self, size: float) -> float:
        """The rate at a size."""
        if size <= self.sizes[0]:
            return self.rates[0]
        points = itertools.pairwise(zip(self.sizes, self.rates, strict=True))
        for (left, low), (right, high) in points:
            if size <= right:
                return low + (high - low) * math.log(size / left) / math.log(right / left)
        return self.rates[-1]


@dataclass(frozen=True)
class Kernel:
    """A kernel's two passes."""

    forward: Curve
    backward: Curve


@dataclass(frozen=True)
class Link:
    """How one rank sends: bytes a second while all ranks do, and seconds that each message takes besides."""

    bandwidth: float
    latency: float = 0.0

    def seconds(self, size: float, messages: float = 1) -> float:
        """Time of some messages of so many bytes together."""
        return messages * self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """One rank's hardware, and its links.

    attention: blocks that are seen whole; triangle: causal ones, both of the partial-attention kernel; linear: causal
    linear attention; product: FLOP/s of a matrix product as wide as a head; memory: bytes a second by a tensor's bytes,
    where results are written to new memory (infinite: copies count as free). node: so many ranks that follow one
    another share ``near``, a faster link. said: where these figures are from.
    """

    attention: Kernel
    triangle: Kernel
    linear: Kernel
    product: float
    memory: Curve
    link: Link
    node: int = 1
    near: Link | None = None
    said: tuple[str, ...] = ()

    @classmethod
    def assumed(cls, rate: float, link: Link, *, memory: float = math.inf, said: tuple[str, ...] = ()) -> Machine:
        """Every kernel at one sustained rate."""
        kernel = Kernel(Curve.flat(rate), Curve.flat(rate))
        return cls(kernel, kernel, kernel, rate, Curve.flat(memory), link, said=said)

    def moving(self, passes: float, size: float) -> float:
        """Seconds of reading or writing a tensor of ``size`` bytes so many times."""
        return passes * size / self.memory.at(size)

    def between(self, one: int, other: int) -> Link:
        """The link from one rank to another."""
        return self.near if self.near is not None and one // self.node == other // self.node else self.link

    def among(self, first: int, count: int) -> Link:
        """The slowest link among ``count`` ranks that follow one another from ``first``."""
        return self.between(first, first + count - 1)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = _finite(asdict(self))
        return found

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Machine:
        """From :meth:`content`."""
        kernels = {
            name: Kernel(_curve(content[name]["forward"]), _curve(content[name]["backward"]))
            for name in ("attention", "triangle", "linear")
        }
        near = content["near"]
        return cls(
            **kernels,
            product=_number(content["product"]),
            memory=_curve(content["memory"]),
            link=_link(content["link"]),
            node=int(content["node"]),
            near=None if near is None else _link(near),
            said=tuple(content["said"]),
        )


def _curve(content: Mapping[str, Any]) -> Curve:
    return Curve(tuple(content["sizes"]), tuple(_number(rate) for rate in content["rates"]))


def _link(content: Mapping[str, Any]) -> Link:
    return Link(_number(content["bandwidth"]), _number(content["latency"]))


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if value == math.inf else value


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)
