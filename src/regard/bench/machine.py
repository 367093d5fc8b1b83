"""What the planner knows of a machine: how fast its kernels compute, its memory moves and its links carry.

A kernel's rate depends on how large its blocks are, so it is a :class:`Curve` over block sizes; with the memory's
bandwidth this makes a roofline, ``seconds = max(work / rate(size), bytes / memory)``. Rates are measured by
:mod:`regard.bench.probes`, or assumed: :meth:`Machine.assumed` plans for hardware that is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regard.errors import OptionError

__all__ = ["Curve", "Kernel", "Link", "Machine"]


@dataclass(frozen=True)
class Curve:
    """FLOP/s by block size in tokens: interpolated over the logarithm of the size, level beyond what was measured."""

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
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
        for left, right in zip(range(len(self.sizes)), range(1, len(self.sizes)), strict=False):
            if size <= self.sizes[right]:
                part = math.log(size / self.sizes[left]) / math.log(self.sizes[right] / self.sizes[left])
                return self.rates[left] + part * (self.rates[right] - self.rates[left])
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
    linear attention; product: FLOP/s of a matrix product as wide as a head; memory: bytes a second (infinite: copies
    count as free). node: so many ranks that follow one another share ``near``, a faster link. said: where each of these
    figures is from.
    """

    attention: Kernel
    triangle: Kernel
    linear: Kernel
    product: float
    memory: float
    link: Link
    node: int = 1
    near: Link | None = None
    said: tuple[str, ...] = ()

    @classmethod
    def assumed(cls, rate: float, link: Link, *, memory: float = math.inf, said: tuple[str, ...] = ()) -> Machine:
        """Every kernel at one sustained rate."""
        kernel = Kernel(Curve.flat(rate), Curve.flat(rate))
        return cls(kernel, kernel, kernel, rate, memory, link, said=said)

    def between(self, one: int, other: int) -> Link:
        """The link from one rank to another."""
        return self.near if self.near is not None and one // self.node == other // self.node else self.link

    def among(self, first: int, count: int) -> Link:
        """The slowest link among ``count`` ranks that follow one another from ``first``."""
        return self.between(first, first + count - 1)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {name: _finite(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Machine:
        """From :meth:`content`."""
        kernels = {
            name: Kernel(*(Curve(*(tuple(content[name][way][part]) for part in ("sizes", "rates"))) for way in _WAYS))
            for name in ("attention", "triangle", "linear")
        }
        near = content["near"]
        return cls(
            **kernels,
            product=_number(content["product"]),
            memory=_number(content["memory"]),
            link=_link(content["link"]),
            node=int(content["node"]),
            near=None if near is None else _link(near),
            said=tuple(content["said"]),
        )


_WAYS = ("forward", "backward")


def _link(content: Mapping[str, Any]) -> Link:
    return Link(_number(content["bandwidth"]), _number(content["latency"]))


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {name: None if item == math.inf else item for name, item in value.items()}
    return None if value == math.inf else value


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)
