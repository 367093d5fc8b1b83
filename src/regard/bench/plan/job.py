"""What the planner is asked, and what it answers for one strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from regard.bench.plan.quantities import show_bytes, show_tokens
from regard.errors import OptionError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["Job", "Kind", "Memory", "Pass", "Prediction", "Work"]

Kind = Literal["exact", "linear"]
"""Softmax attention, or linear attention: the two are not the same function."""
_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    """One sequence length over some ranks, through the attention of so many layers.

    memory: bytes that a rank has for attention (None: no limit). overlap: transfers run while kernels do, as they can
    in :mod:`regard.parallel`. blocks: slices of ZeCO's state. chunk: tokens of a chunk of linear attention.
    """

    length: int
    ranks: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 32
    dtype: str = "bfloat16"
    causal: bool = True
    backward: bool = True
    memory: float | None = None
    overlap: bool = True
    blocks: int = 8
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("length", "ranks", "batch", "heads", "kv_heads", "head_dim", "layers", "blocks", "chunk"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is at least 1, got {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise OptionError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly: kv_heads divides heads."
            )
        if self.dtype not in _DTYPES:
            raise OptionError(f"dtype is one of {', '.join(_DTYPES)}; got {self.dtype!r}.")
        if 2 * self.ranks > self.length:
            raise OptionError(
                f"{self.length} tokens are too few for {self.ranks} ranks: zigzag deals two stretches to each, so at "
                f"most {self.length // 2} ranks fit."
            )

    @property
    def type(self) -> torch.dtype:
        """The dtype of queries, keys and values."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def itemsize(self) -> int:
        return self.type.itemsize

    @property
    def summed(self) -> int:
        """Bytes of a number that is accumulated."""
        return accumulation_dtype(self.type).itemsize

    @property
    def stretch(self) -> int:
        """Tokens of each of ``2 * ranks`` stretches; a length that does not come out even counts as the next that
        does."""
        return -(self.length // -(2 * self.ranks))

    @property
    def local(self) -> int:
        """Tokens of a rank."""
        return 2 * self.stretch

    def __str__(self) -> str:
        kind = "causal" if self.causal else "not causal"
        few = f" ({self.kv_heads} of keys)" if self.kv_heads != self.heads else ""
        return (
            f"{show_tokens(self.length)} tokens over {self.ranks} rank{'s' * (self.ranks > 1)}, {kind}, batch "
            f"{self.batch}, {self.heads} heads{few} of {self.head_dim}, {self.layers} "
            f"layer{'s' * (self.layers > 1)}, {self.dtype}"
        )


@dataclass(frozen=True)
class Work:
    """Operations and bytes that a step of one rank takes."""

    flops: float
    bytes: float

    def seconds(self, rate: float, memory: float) -> float:
        """The roofline: whichever takes longer."""
        return max(self.flops / rate, self.bytes / memory)


@dataclass(frozen=True)
class Pass:
    """One layer's forward or backward pass. compute: the busiest rank's kernels and copies; seconds: until the last
    rank is done; bytes and messages: most that a rank sends."""

    seconds: float = 0.0
    compute: float = 0.0
    bytes: int = 0
    messages: int = 0

    @property
    def exposed(self) -> float:
        """Waiting for others and for transfers."""
        return max(self.seconds - self.compute, 0.0)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. held: a layer's query, key, value and output; kept: what the layer keeps for its backward pass
    beyond those; flight: the most that one layer uses besides while it computes."""

    held: float
    kept: float
    flight: float

    def total(self, job: Job) -> float:
        """With all layers' share where there is a backward pass, with one's otherwise."""
        return (job.layers * (self.held + self.kept) if job.backward else self.held) + self.flight


@dataclass(frozen=True)
class Prediction:
    """One strategy. teams: ranks of a Ulysses team, for a mesh; reason: why it cannot be used, or None."""

    kind: Kind
    strategy: str
    deal: str = ""
    teams: int = 0
    forward: Pass = Pass()
    backward: Pass = Pass()
    memory: Memory | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """For tables."""
        more = [self.deal] * bool(self.deal) + [f"teams of {self.teams}"] * bool(self.teams)
        return ", ".join([self.strategy, *more])

    def seconds(self, job: Job) -> float:
        """Of all layers, both passes where there are two."""
        return job.layers * (self.forward.seconds + self.backward.seconds * job.backward)

    def within(self, job: Job) -> Prediction:
        """With its reason where a rank's memory does not suffice."""
        need = 0.0 if self.memory is None else self.memory.total(job)
        if job.memory is None or need <= job.memory:
            return self
        return replace(self, reason=f"needs {show_bytes(need)} of {show_bytes(job.memory)} a rank")

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Prediction:
        """From :meth:`content`."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in content.items() if name in known}
        for name in ("forward", "backward"):
            given[name] = Pass(**given[name])
        given["memory"] = None if given["memory"] is None else Memory(**given["memory"])
        return cls(**given)
