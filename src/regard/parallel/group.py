"""Groups of ranks that pass tensors to one another: real ones, and simulated ones that count.

A :class:`Group` knows this process' ``rank`` among ``size`` and has point-to-point messages (``send``, ``receive``),
what is made of them (``exchange``, ``all_to_all``, ``all_gather``), ``barrier``, ``flush`` and ``split``; its
:class:`Traffic` counts messages and bytes. Two implementations run the very same code:

* :class:`DistributedGroup` over a ``torch.distributed`` process group (gloo for CPU tensors, NCCL for GPU tensors);
* :class:`SimulatedGroup`, the ranks of :func:`simulate`: threads of one process, with a clock of pipeline ticks.

Messages between two ranks arrive in the order they were sent, and carry no header: the receiver states shape and dtype.
A send returns at once; the tensor must not be changed before ``flush``. What is received must not be changed in place:
simulated ranks may share it. Empty tensors are not sent at all.
Every failure is a :class:`regard.errors.CommunicationError` that names rank, peer, step and timeout.
Functions with gradients call groups from ``torch.autograd.Function`` on detached tensors; groups know no gradients.
"""

from __future__ import annotations

import contextvars
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from regard.errors import CommunicationError, OptionError, PlacementError, ShapeError

__all__ = ["DistributedGroup", "Group", "Pending", "SimulatedGroup", "Simulation", "Traffic", "simulate"]


@dataclass
class Traffic:
    """What one rank moved through a group and the groups split from it.

    Bytes are ``numel * itemsize`` of the tensors handed over. ``ticks`` is the rank's logical clock, which only a
    simulation has: sending one message takes one tick, and a message is there when its sender's tick is over.
    """

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    ticks: int = 0
    within: Traffic | None = field(default=None, repr=False, compare=False)

    def count(self, *, sent: Tensor | None = None, received: Tensor | None = None, ticks: int = 0) -> None:
        """Add one message here and in the groups this one was split from."""
        if sent is not None:
            self.messages_sent += 1
            self.bytes_sent += sent.numel() * sent.element_size()
        if received is not None:
            self.messages_received += 1
            self.bytes_received += received.numel() * received.element_size()
        self.ticks = max(self.ticks, ticks)
        if self.within is not None:
            self.within.count(sent=sent, received=received, ticks=ticks)

    def copy(self) -> Traffic:
        """The counts so far, to be subtracted later."""
        return replace(self, within=None)

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(
            self.messages_sent - earlier.messages_sent,
            self.messages_received - earlier.messages_received,
            self.bytes_sent - earlier.bytes_sent,
            self.bytes_received - earlier.bytes_received,
            self.ticks - earlier.ticks,
        )


class Arrival(NamedTuple):
    """What a receiver states of a message to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source: int


class Pending:
    """Messages under way; :meth:`wait` gives what was received, in the order it was asked for, and waits only once."""

    def __init__(self, finish: Callable[[], list[Tensor]]) -> None:
        self._finish: Callable[[], list[Tensor]] | None = finish
        self._received: list[Tensor] = []

    def wait(self) -> list[Tensor]:
        """The received tensors, once all of them are there and what was sent with them is on its way."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._received = finish()
        return self._received


class Group(ABC):
    """``rank`` of ``size`` that pass messages; ranks are numbered within the group.

    Every rank of a group makes the same calls in the same order. ``step`` names a call in errors.
    """

    rank: int
    size: int
    traffic: Traffic

    @abstractmethod
    def _post(self, outgoing: Sequence[tuple[Tensor, int]], incoming: Sequence[Arrival], step: str) -> Pending:
        """Start all messages at once; no order of them can block."""

    @abstractmethod
    def flush(self) -> None:
        """Return when everything sent has been taken over: then its memory may change and the rank may end."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has come here."""

    @abstractmethod
    def split(self, partition: Sequence[Sequence[int]]) -> Group:
        """This rank's part of a partition of the group's ranks, e.g. the rows of a mesh: ``[[0, 1], [2, 3]]``."""

    def send(self, tensor: Tensor, to: int, *, step: str = "send") -> None:
        """Hand a tensor to rank ``to`` without waiting for it."""
        self._post(self._outgoing([tensor], [to], step), [], step)

    def receive(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        source: int,
        *,
        step: str = "receive",
    ) -> Tensor:
        """The next tensor from rank ``source``, of a shape and dtype both ranks know."""
        return self._post([], [self._arrival(shape, dtype, device, source, step)], step).wait()[0]

    def start_exchange(
        self,
        tensors: Sequence[Tensor],
        *,
        to: int,
        source: int,
        received_shapes: Sequence[Sequence[int]] | None = None,
        step: str = "exchange",
    ) -> Pending:
        """:meth:`exchange` whose result is waited for later, so that computation may go on meanwhile."""
        shapes = [tensor.shape for tensor in tensors] if received_shapes is None else received_shapes
        if len(shapes) != len(tensors):
            raise ShapeError(f"{step}: {len(tensors)} tensors are exchanged for {len(shapes)} received_shapes.")
        if to == source == self.rank:
            kept = list(tensors)
            return Pending(lambda: kept)
        arrivals = [
            self._arrival(shape, tensor.dtype, tensor.device, source, step)
            for tensor, shape in zip(tensors, shapes, strict=True)
        ]
        return self._post(self._outgoing(tensors, [to] * len(tensors), step), arrivals, step)

    def exchange(
        self,
        tensors: Sequence[Tensor],
        *,
        to: int,
        source: int,
        received_shapes: Sequence[Sequence[int]] | None = None,
        step: str = "exchange",
    ) -> list[Tensor]:
        """A shift: send these tensors to one rank and receive as many from another, without ever blocking each other.

        Where shards are uneven, ``received_shapes`` says what comes. To oneself it hands the tensors back.
        """
        return self.start_exchange(tensors, to=to, source=source, received_shapes=received_shapes, step=step).wait()

    def all_to_all(
        self, parts: Sequence[Tensor], received_shapes: Sequence[Sequence[int]], *, step: str = "all-to-all"
    ) -> list[Tensor]:
        """Part ``i`` goes to rank ``i``; the result's entry ``j`` came from rank ``j``. Each pair has one message."""
        if not len(parts) == len(received_shapes) == self.size:
            raise ShapeError(
                f"{step}: a group of {self.size} needs {self.size} parts and received_shapes, "
                f"got {len(parts)} and {len(received_shapes)}."
            )
        own = parts[self.rank]
        if tuple(own.shape) != tuple(received_shapes[self.rank]):
            raise ShapeError(
                f"{step}: rank {self.rank} keeps its own part of shape {tuple(own.shape)}, "
                f"but received_shapes says {tuple(received_shapes[self.rank])}."
            )
        ahead = [(self.rank + shift) % self.size for shift in range(1, self.size)]
        behind = [(self.rank - shift) % self.size for shift in range(1, self.size)]
        incoming = [self._arrival(received_shapes[j], own.dtype, own.device, j, step) for j in behind]
        outgoing = self._outgoing([parts[i] for i in ahead], ahead, step)
        arrived = dict(zip(behind, self._post(outgoing, incoming, step).wait(), strict=True))
        return [own if j == self.rank else arrived[j] for j in range(self.size)]

    def all_gather(
        self, tensor: Tensor, *, sizes: Sequence[int] | None = None, step: str = "all-gather"
    ) -> list[Tensor]:
        """Every rank's tensor, by rank. First sizes may differ: where they are known they are given as ``sizes``, else
        each rank first sends its own, eight bytes to each other rank."""
        if not tensor.dim():
            raise ShapeError(f"{step}: a tensor without axes cannot be gathered along its first; use tensor[None].")
        if sizes is None:
            own = torch.tensor([len(tensor)], dtype=torch.int64, device=tensor.device)
            told = self.all_to_all([own] * self.size, [(1,)] * self.size, step=f"{step}, sizes")
            sizes = [int(size) for size in told]
        shapes = [(size, *tensor.shape[1:]) for size in sizes]
        return self.all_to_all([tensor] * self.size, shapes, step=step)

    def _outgoing(self, tensors: Sequence[Tensor], to: Sequence[int], step: str) -> list[tuple[Tensor, int]]:
        return [
            (tensor.detach().contiguous(), self._peer(rank, step))
            for tensor, rank in zip(tensors, to, strict=True)
            if tensor.numel()
        ]

    def _arrival(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, source: int, step: str
    ) -> Arrival:
        return Arrival(tuple(shape), dtype, torch.device(device), self._peer(source, step))

    def _peer(self, rank: int, step: str) -> int:
        if not 0 <= rank < self.size or rank == self.rank:
            raise OptionError(
                f"{step}: rank {self.rank} of {self.size} cannot exchange messages with rank {rank}; "
                f"peers are the other ranks from 0 to {self.size - 1}."
            )
        return rank

    def _part(self, partition: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The part this rank is in, once the partition is known to be one."""
        if sorted(rank for part in partition for rank in part) != list(range(self.size)):
            raise OptionError(
                f"split needs each rank from 0 to {self.size - 1} in exactly one part, got "
                f"{[list(part) for part in partition]}."
            )
        return next(tuple(part) for part in partition if self.rank in part)


class DistributedGroup(Group):
    """A ``torch.distributed`` process group: ``DistributedGroup()`` is the default one, ``DistributedGroup(group)``
    another, ``DistributedGroup(mesh["name"])`` a dimension of a ``DeviceMesh``.

    ``timeout`` in seconds bounds every wait; without it the process group's own does. With gloo a wait that fails
    raises here; NCCL watches its operations itself and ends the process, as its environment variables say.
    """

    def __init__(self, group: Any = None, *, timeout: float | None = None, within: Traffic | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise CommunicationError(
                "There is no process group: call torch.distributed.init_process_group first (torchrun sets what it "
                "needs), or try things out in one process with regard.parallel.group.simulate."
            )
        if hasattr(group, "get_group"):
            if group.ndim != 1:
                raise OptionError(f"A device mesh of {group.ndim} dimensions: pass one of them, e.g. mesh['sequence'].")
            group = group.get_group()
        self._group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        if self.rank < 0:
            raise CommunicationError("This process is not a member of the group that was passed.")
        if timeout is not None and timeout <= 0:
            raise OptionError(f"timeout is in seconds and positive, got {timeout}.")
        self._world = dist.get_process_group_ranks(self._group)
        self._timeout = timeout
        self._limit = timeout if timeout is not None else _own_timeout(self._group)
        self._unsent: list[tuple[Any, list[Tensor], str]] = []
        self.traffic = Traffic(within=within)

    def _post(self, outgoing: Sequence[tuple[Tensor, int]], incoming: Sequence[Arrival], step: str) -> Pending:
        arrived = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in incoming]
        expected = [(t, a.source) for t, a in zip(arrived, incoming, strict=True) if t.numel()]
        self._check_devices([t for t, _ in (*outgoing, *expected)], step)
        operations = [
            *((dist.isend, t, to, "send to") for t, to in outgoing),
            *((dist.irecv, t, source, "receive from") for t, source in expected),
        ]
        on_gpu = bool(operations) and operations[0][1].is_cuda
        works: list[tuple[Any, list[Tensor], str]] = []
        if on_gpu:
            # On one stream a send would wait for a receive behind it: NCCL has to see the operations as one. So has a
            # single one, whose other end may be one of several: batches go through a communicator of their own.
            ops = [dist.P2POp(op, t, self._world[peer], self._group) for op, t, peer, _ in operations]
            peers = f"ranks {sorted({peer for _, _, peer, _ in operations})}"
            whole = self._call(lambda: dist.batch_isend_irecv(ops), f"exchange with {peers}", step)
            # One work stands for all; the tensors stay with it for as long as it is under way.
            works = [(work, [t for _, t, _, _ in operations], f"exchange with {peers}") for work in whole]
        else:
            for op, t, peer, what in operations:
                work = self._call(self._starter(op, t, peer), f"{what} rank {peer}", step)
                works.append((work, [t], f"{what} rank {peer}"))
        for tensor, _ in outgoing:
            self.traffic.count(sent=tensor)
        if not incoming:
            self._unsent += works
            return Pending(list)

        def finish() -> list[Tensor]:
            for work, _, what in works:
                self._wait(work, what, step)
            for tensor, _ in expected:
                self.traffic.count(received=tensor)
            return arrived

        return Pending(finish)

    def _starter(self, operation: Any, tensor: Tensor, peer: int) -> Callable[[], Any]:
        return lambda: operation(tensor, self._world[peer], group=self._group)

    def flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        for work, _, what in unsent:
            self._wait(work, what, "flush")

    def barrier(self) -> None:
        self.flush()
        self._wait(self._call(lambda: dist.barrier(self._group, async_op=True), "meet", "barrier"), "meet", "barrier")

    def split(self, partition: Sequence[Sequence[int]]) -> DistributedGroup:
        part = self._part(partition)
        ranks = [self._world[rank] for rank in part]
        wait = None if self._limit is None else timedelta(seconds=self._limit)
        made = self._call(
            lambda: dist.new_group(ranks, timeout=wait, use_local_synchronization=True), f"form {list(part)}", "split"
        )
        return DistributedGroup(made, timeout=self._timeout, within=self.traffic)

    def _check_devices(self, tensors: Sequence[Tensor], step: str) -> None:
        kinds = {tensor.device.type for tensor in tensors}
        if len(kinds) > 1:
            raise PlacementError(f"{step}: one exchange has tensors on {' and '.join(sorted(kinds))}.")
        if kinds and "cpu" not in kinds and dist.get_backend(self._group) == "gloo":
            raise PlacementError(f"{step}: gloo passes CPU tensors only, got one on {kinds.pop()}; use backend 'nccl'.")
        if kinds == {"cpu"} and dist.get_backend(self._group) == "nccl":
            raise PlacementError(f"{step}: NCCL passes GPU tensors only, got one on the CPU; use backend 'gloo'.")

    def _wait(self, work: Any, what: str, step: str) -> None:
        if self._timeout is None:
            self._call(work.wait, what, step)
        else:
            limit = timedelta(seconds=self._timeout)
            self._call(lambda: work.wait(limit), what, step)

    def _call(self, action: Callable[[], Any], what: str, step: str) -> Any:
        began = time.monotonic()
        try:
            return action()
        except RuntimeError as error:  # torch.distributed's own errors are all of this kind
            limit = "the process group's timeout" if self._limit is None else f"a timeout of {self._limit:g} s"
            raise CommunicationError(
                f"Rank {self.rank} of {self.size} could not {what} ({step}) within {limit}; it failed after "
                f"{time.monotonic() - began:.1f} s: {str(error).splitlines()[0]} Look at the other rank's own output: "
                "it has ended, is late, or is making another call; every rank has to make the same calls in the same "
                "order. If it is only slow, give DistributedGroup or init_process_group a longer timeout."
            ) from error


def _own_timeout(group: Any) -> float | None:
    """The timeout a process group was made with, where this version of PyTorch says it."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    try:
        limit: timedelta = group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return limit.total_seconds()


class _World:
    """What simulated ranks share: the mailboxes, the clocks, who has ended and why."""

    def __init__(self, size: int, timeout: float) -> None:
        self.changed = threading.Condition()
        self.timeout = timeout
        self.mail: dict[tuple[Any, int, int], deque[tuple[Tensor, int]]] = {}
        self.meetings: dict[Any, dict[int, int]] = {}
        self.clocks = [0] * size
        self.ended: set[int] = set()
        self.failure: tuple[int, BaseException] | None = None

    def wait_until(self, ready: Callable[[], bool], needs: Sequence[int], rank: int, what: str) -> None:
        """With the lock held: return once ``ready``, or say why it will not be. ``needs``: the world ranks awaited."""
        deadline = time.monotonic() + self.timeout
        while not ready():
            if self.failure is not None:
                first, error = self.failure
                raise CommunicationError(
                    f"Rank {rank} stopped while it was to {what}: rank {first} of the simulation failed with "
                    f"{type(error).__name__}: {error}"
                ) from error
            if gone := [peer for peer in needs if peer in self.ended]:
                raise CommunicationError(
                    f"Rank {rank} was to {what}, but rank {gone[0]} of the simulation has returned already; every rank "
                    "has to make the same calls in the same order."
                )
            left = deadline - time.monotonic()
            if left <= 0:
                raise CommunicationError(
                    f"Rank {rank} waited {self.timeout:g} s to {what}. Either ranks wait for one another (each has to "
                    "make the same calls in the same order, backward passes included, and those on CPU tensors), or "
                    "one computes for long: then give simulate a longer timeout."
                )
            self.changed.wait(left)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What tells apart contiguous tensors in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype


class SimulatedGroup(Group):
    """One rank of :func:`simulate`: a thread whose messages are queued in memory and counted, with a logical clock.

    Each thread runs the backward pass of its own graph. On CPU tensors, that is: a GPU's backward passes share one
    thread of the process, in which ranks cannot wait for one another.
    """

    def __init__(self, world: _World, members: tuple[int, ...], rank: int, name: Any, within: Traffic | None) -> None:
        self._shared, self._members, self._name = world, members, name
        self._calls = 0
        self.rank, self.size = rank, len(members)
        self.traffic = Traffic(within=within)

    def _post(self, outgoing: Sequence[tuple[Tensor, int]], incoming: Sequence[Arrival], step: str) -> Pending:
        world, me = self._shared, self._members[self.rank]
        # Copied as by a wire, since the sender's may change; once only, where many ranks get the same.
        copies = {_place(tensor): tensor.clone() for tensor, _ in outgoing}
        with world.changed:
            for original, to in outgoing:
                tensor = copies[_place(original)]
                world.clocks[me] += 1
                box = world.mail.setdefault((self._name, self.rank, to), deque())
                box.append((tensor, world.clocks[me]))
                self.traffic.count(sent=tensor, ticks=world.clocks[me])
            world.changed.notify_all()
        return Pending(lambda: [self._take(arrival, step) for arrival in incoming])

    def _take(self, arrival: Arrival, step: str) -> Tensor:
        if 0 in arrival.shape:
            return torch.empty(arrival.shape, dtype=arrival.dtype, device=arrival.device)
        world, me, peer = self._shared, self._members[self.rank], self._members[arrival.source]
        with world.changed:
            box = world.mail.setdefault((self._name, arrival.source, self.rank), deque())
            world.wait_until(lambda: bool(box), [peer], me, f"receive from rank {arrival.source} ({step})")
            tensor, sent = box.popleft()
            world.clocks[me] = max(world.clocks[me], sent)
            self.traffic.count(received=tensor, ticks=world.clocks[me])
        if (tuple(tensor.shape), tensor.dtype) != (arrival.shape, arrival.dtype):
            raise CommunicationError(
                f"Rank {self.rank} of {self.size} expected {arrival.shape} of {arrival.dtype} from rank "
                f"{arrival.source} ({step}), but {tuple(tensor.shape)} of {tensor.dtype} came: the ranks are making "
                "different calls, or disagree on the shards' lengths."
            )
        return tensor.to(arrival.device)

    def flush(self) -> None:
        """Nothing to wait for: what is sent was copied."""

    def barrier(self) -> None:
        world, me = self._shared, self._members[self.rank]
        self._calls += 1
        with world.changed:
            here = world.meetings.setdefault((self._name, self._calls), {})
            here[me] = world.clocks[me]
            world.changed.notify_all()
            while missing := [peer for peer in self._members if peer not in here]:
                late = missing[0]
                world.wait_until(lambda late=late: late in here, [late], me, f"meet rank {late} (barrier)")  # type: ignore[misc]
            world.clocks[me] = max(here.values())
            self.traffic.count(ticks=world.clocks[me])

    def split(self, partition: Sequence[Sequence[int]]) -> SimulatedGroup:
        part = self._part(partition)
        self._calls += 1
        members = tuple(self._members[rank] for rank in part)
        name = (self._name, self._calls, part)
        return SimulatedGroup(self._shared, members, part.index(self.rank), name, self.traffic)


class Simulation(NamedTuple):
    """What :func:`simulate` gives: each rank's result and traffic, by rank."""

    results: list[Any]
    traffic: list[Traffic]

    @property
    def ticks(self) -> int:
        """The tick at which the last message arrived."""
        return max(traffic.ticks for traffic in self.traffic)


def simulate(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> Simulation:
    """Run ``function(group, *args)`` as each of ``ranks`` ranks, one thread each, and wait for all.

    If one raises, the others end at their next message, and its error is raised here. ``timeout`` in seconds bounds
    each wait for a message.
    """
    if ranks < 1:
        raise OptionError(f"A simulation needs at least one rank, got {ranks}.")
    world, grad = _World(ranks, timeout), torch.is_grad_enabled()
    groups = [SimulatedGroup(world, tuple(range(ranks)), rank, "all", None) for rank in range(ranks)]
    results: list[Any] = [None] * ranks

    def work(rank: int) -> None:
        try:
            with torch.set_grad_enabled(grad):
                results[rank] = function(groups[rank], *args)
        except BaseException as error:  # whatever it is, the other ranks must not wait for this one
            with world.changed:
                world.failure = world.failure or (rank, error)
        finally:
            with world.changed:
                world.ended.add(rank)
                world.changed.notify_all()

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(work, rank), name=f"rank {rank}", daemon=True)
        for rank in range(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failure is not None:
        raise world.failure[1]
    return Simulation(results, [group.traffic for group in groups])
