from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tests.parallel.processes import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from regard.errors import CommunicationError, OptionError, PlacementError, ShapeError
from regard.parallel.group import DistributedGroup, Group, Traffic, simulate


def ring(group: Group) -> tuple[int, int]:
    return (group.rank + 1) % group.size, (group.rank - 1) % group.size


def everything(group: Group) -> dict[str, Any]:
    """Each operation once, in a form whose result is known; the same code for simulated and real ranks."""
    rank, size = group.rank, group.size
    after, before = ring(group)
    own = torch.full((2, 3), float(rank))
    found: dict[str, Any] = {}
    if rank == 0:
        for number in (1.0, 2.0, 3.0):
            group.send(torch.tensor([number]), 1)
        group.send(torch.empty(0, 4), 1)  # not sent at all
    if rank == 1:
        found["in order"] = [float(group.receive((1,), torch.float32, "cpu", 0)) for _ in range(3)]
        found["empty"] = group.receive((0, 4), torch.float32, "cpu", 0).shape
    group.flush()
    found["point to point"] = group.traffic.copy()
    found["exchange"] = group.exchange([own, own.int().T], to=after, source=before)
    uneven = torch.full((rank, 2), rank, dtype=torch.int64)
    found["uneven"] = group.exchange([uneven], to=after, source=before, received_shapes=[(before, 2)])
    pending = group.start_exchange([own.bfloat16()], to=after, source=before)
    found["started"] = [pending.wait(), pending.wait()]
    # Large messages in a circle: no rank may wait for its receiver before it receives.
    found["large"] = group.exchange([torch.full((1 << 20,), float(rank))], to=after, source=before)[0][[0, -1]]
    parts = [torch.full((rank + 1, to), 10.0 * rank + to) for to in range(size)]
    found["all to all"] = group.all_to_all(parts, [(source + 1, rank) for source in range(size)])
    counted = group.traffic.copy()
    found["all gather"] = group.all_gather(uneven)
    found["negotiated"] = group.traffic - counted
    counted = group.traffic.copy()
    found["gathered"] = group.all_gather(uneven, sizes=range(size))
    found["known"] = group.traffic - counted
    rows, columns = group.split([[0, 1], [2, 3]]), group.split([[0, 2], [1, 3]])
    found["row"], found["column"] = rows.all_gather(own, sizes=[2, 2]), columns.all_gather(own, sizes=[2, 2])
    found["places"] = (rows.rank, rows.size, columns.rank)
    found["row traffic"], found["traffic"] = rows.traffic.copy(), group.traffic.copy()
    group.barrier()
    return found


def same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            same(ours[name], theirs[name])
    elif isinstance(ours, (list, tuple)):
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    elif isinstance(ours, Traffic):
        ticks = theirs.ticks - ours.ticks  # only a simulation has a clock
        assert ours - theirs == Traffic(ticks=-ticks)
    else:
        assert ours == theirs


def test_every_operation() -> None:
    found = simulate(4, everything).results
    assert found[1]["in order"] == [1.0, 2.0, 3.0] and found[1]["empty"] == (0, 4)
    assert found[0]["point to point"] == Traffic(messages_sent=3, bytes_sent=12, ticks=3)
    for rank, one in enumerate(found):
        before = (rank - 1) % 4
        same(one["exchange"], [torch.full((2, 3), float(before)), torch.full((3, 2), before, dtype=torch.int32)])
        same(one["uneven"], [torch.full((before, 2), before)])
        same(one["started"], [[torch.full((2, 3), float(before)).bfloat16()]] * 2)
        same(one["large"], torch.full((2,), float(before)))
        same(one["all to all"], [torch.full((source + 1, rank), 10.0 * source + rank) for source in range(4)])
        for gathered in (one["all gather"], one["gathered"]):
            same(gathered, [torch.full((peer, 2), peer) for peer in range(4)])
        # Rank 0 has nothing to hand over; without sizes known, eight bytes to and from each peer come on top.
        others = [16 * peer for peer in range(4) if peer != rank]
        known, negotiated = one["known"], one["negotiated"]
        assert (known.bytes_sent, known.bytes_received) == (3 * 16 * rank, sum(others))
        assert negotiated.bytes_sent - known.bytes_sent == negotiated.bytes_received - known.bytes_received == 24
        same(one["row"], [torch.full((2, 3), float(peer)) for peer in ((0, 1) if rank < 2 else (2, 3))])
        same(one["column"], [torch.full((2, 3), float(peer)) for peer in (rank % 2, rank % 2 + 2)])
        assert one["places"] == (rank % 2, 2, rank // 2)
        assert (one["row traffic"].messages_sent, one["row traffic"].bytes_received) == (1, 24)


def test_a_group_counts_what_went_through_its_parts() -> None:
    def work(group: Group) -> Traffic:
        before = group.traffic.copy()
        row = group.split([[0, 1], [2, 3]])
        row.all_gather(torch.zeros(5), sizes=[5, 5])
        row.split([[0], [1]])
        return group.traffic - before

    assert all(one == Traffic(1, 1, 20, 20, 1) for one in simulate(4, work).results)


def test_the_clock() -> None:
    """A send takes one tick; a receive waits for its sender's tick and costs none; a barrier brings clocks together."""

    def work(group: Group) -> list[int]:
        clock = []
        if group.rank == 0:
            for _ in range(3):
                group.send(torch.zeros(1), 1)
        else:
            for _ in range(3):
                group.receive((1,), torch.float32, "cpu", group.rank - 1)
                if group.rank < 2:
                    group.send(torch.zeros(1), group.rank + 1)
                clock.append(group.traffic.ticks)
        group.barrier()
        return [*clock, group.traffic.ticks]

    done = simulate(3, work)
    assert done.results == [[4], [2, 3, 4, 4], [2, 3, 4, 4]] and done.ticks == 4


def test_gradients_and_modes_are_each_threads_own() -> None:
    weight = torch.ones(3, requires_grad=True)

    def work(group: Group) -> Tensor:
        out = weight * (group.rank + 1)
        return torch.autograd.grad(out.sum(), weight)[0] if torch.is_grad_enabled() else out

    assert [float(grad[0]) for grad in simulate(3, work).results] == [1.0, 2.0, 3.0]
    with torch.no_grad():
        assert not any(out.requires_grad for out in simulate(3, work).results)


def test_a_message_is_as_it_was_when_sent() -> None:
    def work(group: Group) -> Tensor:
        if group.rank == 0:
            sent = torch.ones(2)
            group.send(sent, 1)
            group.flush()
            sent.zero_()
            return sent
        return group.receive((2,), torch.float32, "cpu", 0)

    assert simulate(2, work).results[1].sum() == 2


def test_one_rank_that_fails_ends_all() -> None:
    ended: list[int] = []

    def work(group: Group) -> None:
        if group.rank == 2:
            raise ZeroDivisionError("rank 2's own error")
        try:
            group.barrier() if group.rank else group.receive((1,), torch.float32, "cpu", 1)
        except CommunicationError as error:
            ended.append(group.rank)
            assert "rank 2 of the simulation failed with ZeroDivisionError: rank 2's own error" in str(error)
            raise

    with pytest.raises(ZeroDivisionError):
        simulate(4, work)
    assert sorted(ended) == [0, 1, 3]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_ranks_that_wait_for_one_another_are_told() -> None:
    def circle(group: Group) -> None:
        group.receive((1,), torch.float32, "cpu", ring(group)[1], step="a circle")

    def early(group: Group) -> None:
        if group.rank:
            group.receive((1,), torch.float32, "cpu", 0)

    with pytest.raises(CommunicationError, match=r"waited 0.2 s to receive from rank . \(a circle\).*same order"):
        simulate(3, circle, timeout=0.2)
    with pytest.raises(CommunicationError, match="rank 0 of the simulation has returned already"):
        simulate(2, early)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: g.send(torch.zeros(1), g.rank), OptionError, "peers are the other ranks from 0 to 1"),
        (lambda g: g.receive((1,), torch.float32, "cpu", 2), OptionError, "cannot exchange messages with rank 2"),
        (
            lambda g: g.all_to_all([torch.zeros(1)], [(1,)]),
            ShapeError,
            "needs 2 parts and received_shapes, got 1 and 1",
        ),
        (lambda g: g.all_to_all([torch.zeros(1)] * 2, [(2,)] * 2), ShapeError, r"keeps its own part of shape \(1,\)"),
        (lambda g: g.all_gather(torch.zeros(())), ShapeError, r"use tensor\[None\]"),
        (lambda g: g.split([[0]]), OptionError, r"each rank from 0 to 1 in exactly one part, got \[\[0\]\]"),
        (lambda g: g.split([[0, 1], [1]]), OptionError, "exactly one part"),
        (
            lambda g: g.exchange([torch.zeros(1)], to=1 - g.rank, source=1 - g.rank, received_shapes=[]),
            ShapeError,
            "1 tensors are exchanged for 0 received_shapes",
        ),
        (
            lambda g: g.exchange([torch.zeros(1)], to=1 - g.rank, source=1 - g.rank, received_shapes=[(2,)]),
            CommunicationError,
            r"expected \(2,\) of torch.float32 from rank .*, but \(1,\)",
        ),
    ],
)
def test_wrong_calls(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        simulate(2, call)


def test_a_group_of_one_talks_to_itself() -> None:
    def work(group: Group) -> Traffic:
        own = torch.ones(2)
        assert group.exchange([own], to=0, source=0)[0] is own
        assert group.all_gather(own)[0] is own
        group.barrier()
        return group.split([[0]]).traffic

    assert simulate(1, work).results == [Traffic()]
    with pytest.raises(OptionError, match="at least one rank"):
        simulate(0, work)
    with pytest.raises(CommunicationError, match=r"init_process_group first.*simulate"):
        DistributedGroup()


def real(group: Group) -> dict[str, Any]:
    found = everything(group)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    inner = DistributedGroup(mesh["inner"])
    found["mesh"] = (inner.rank, inner.all_gather(torch.tensor([group.rank]), sizes=[1, 1]))
    for name, call in {
        "two dimensions": lambda: DistributedGroup(mesh),
        "timeout": lambda: DistributedGroup(timeout=0),
        "device": lambda: group.send(torch.zeros(1, device="meta"), (group.rank + 1) % 4),
    }.items():
        try:
            call()
        except (OptionError, PlacementError) as error:
            found[name] = str(error)
    group.barrier()
    return found


def test_real_processes_do_the_same(tmp_path: Any) -> None:
    found, simulated = run_ranks(4, real, tmp_path), simulate(4, everything).results
    for rank, one in enumerate(found):
        place, members = one.pop("mesh")
        assert place == rank % 2 and [int(m) for m in members] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert "mesh['sequence']" in one.pop("two dimensions")
        assert "positive, got 0" in one.pop("timeout")
        assert "gloo passes CPU tensors only, got one on meta" in one.pop("device")
        same(one, simulated[rank])
