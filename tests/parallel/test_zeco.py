from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.parallel.processes import run_ranks
from torch import Tensor

from regard.errors import CommunicationError, OptionError, ShapeError
from regard.kernels.linear import linear_attention
from regard.parallel import recurrence
from regard.parallel.group import DistributedGroup, Group, Traffic, simulate
from regard.parallel.lasp import lasp1, lasp2
from regard.parallel.zeco import AllScan, all_scan, chunked_gla, sp_cost, zeco

BATCH, HEADS, DK, DV = 2, 3, 5, 4
DRIVERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "zeco": zeco,
    "lasp1": lasp1,
    "lasp2": lasp2,
    "zeco that waits": partial(zeco, overlap=False),
    "lasp2 that waits": partial(lasp2, overlap=False),
}
DECAYS = ("channel", "token", "head", "none")
LENGTHS = {1: [19], 2: [8, 11], 3: [7, 0, 12], 4: [5, 1, 9, 4]}  # uneven, and one empty


def draw(length: int, decay: str = "channel", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = {"channel": (BATCH, HEADS, length, DK), "token": (BATCH, HEADS, length), "head": (HEADS,)}
    inputs = {
        "query": normal(BATCH, HEADS, length, DK),
        "key": normal(BATCH, HEADS, length, DK),
        "value": normal(BATCH, HEADS, length, DV),
    }
    if decay != "none":
        inputs["log_decay"] = -torch.nn.functional.softplus(normal(*shapes[decay]))
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def loop(inputs: dict[str, Tensor], start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence, a token at a time: outputs, and the states after every token (the first is the start)."""
    query, key, value, decay = (inputs.get(name) for name in ("query", "key", "value", "log_decay"))
    assert query is not None and key is not None and value is not None
    state = query.new_zeros(BATCH, HEADS, DK, DV) if start is None else start
    states, outs = [state], []
    for t in range(query.shape[2]):
        if decay is not None:
            here = {1: lambda d: d[None, :, None], 3: lambda d, t=t: d[:, :, t, None], 4: lambda d, t=t: d[:, :, t]}
            state = here[decay.dim()](decay).exp()[..., None] * state
        state = state + torch.einsum("bhc,bhe->bhce", key[:, :, t], value[:, :, t])
        states.append(state)
        outs.append(torch.einsum("bhc,bhce->bhe", query[:, :, t], state))
    return torch.stack(outs, 2), torch.stack(states, 2)


def seeds(length: int, ranks: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(BATCH, HEADS, length, DV, generator=generator, dtype=torch.float64),
        torch.randn(ranks, BATCH, HEADS, DK, DV, generator=generator, dtype=torch.float64),
    )


def shard(group: Group, inputs: dict[str, Tensor], lengths: list[int]) -> tuple[dict[str, Tensor], slice]:
    """This rank's tokens, as leaves of its own."""
    start = sum(lengths[: group.rank])
    rows = slice(start, start + lengths[group.rank])
    cut = {name: tensor if tensor.dim() == 1 else tensor[:, :, rows] for name, tensor in inputs.items()}
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in cut.items()}, rows


def one_rank(
    group: Group, driver: str, inputs: dict[str, Tensor], lengths: list[int], options: dict[str, Any]
) -> dict[str, Any]:
    """Outputs, the state that leaves the rank, gradients of a loss of all of them, and the traffic of both passes."""
    mine, rows = shard(group, inputs, lengths)
    before = group.traffic.copy()
    out, final = DRIVERS[driver](group, **mine, **options)
    forward = group.traffic - before
    seed_out, seed_state = seeds(sum(lengths), group.size)
    ((out * seed_out[:, :, rows]).sum() + (final * seed_state[group.rank]).sum()).backward()
    return {
        "out": out.detach(),
        "final": final.detach(),
        "forward": forward,
        "backward": group.traffic - before - forward,
        **{name: tensor.grad for name, tensor in mine.items()},
    }


def reference(inputs: dict[str, Tensor], lengths: list[int]) -> dict[str, Any]:
    out, states = loop(inputs)
    ends = torch.tensor(lengths).cumsum(0)
    seed_out, seed_state = seeds(sum(lengths), len(lengths))
    loss = (out * seed_out).sum() + sum(
        (states[:, :, end] * seed).sum() for end, seed in zip(ends, seed_state, strict=True)
    )
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {
        "out": out.detach(),
        "finals": [states[:, :, end].detach() for end in ends],
        **dict(zip(inputs, grads, strict=True)),
    }


def check(ranks: list[dict[str, Any]], expected: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    def close(ours: Tensor, theirs: Tensor, atol: float = 1e-12) -> None:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)

    close(torch.cat([rank["out"] for rank in ranks], 2), expected["out"])
    for rank, final in zip(ranks, expected["finals"], strict=True):
        close(rank["final"], final)
    for name, tensor in inputs.items():
        grads = [rank[name] for rank in ranks]
        close(sum(grads) if tensor.dim() == 1 else torch.cat(grads, 2), expected[name], 1e-11)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_values_and_gradients_are_those_of_the_recurrence(driver: str, decay: str) -> None:
    inputs = draw(19, decay)
    for ranks, lengths in LENGTHS.items():
        found = simulate(ranks, one_rank, driver, inputs, lengths, {"chunk_size": 4}).results
        check(found, reference(inputs, lengths), inputs)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize(("blocks", "chunk_size"), [(1, 64), (2, 3), (3, 1), (5, 8)])
def test_slices_and_chunks_change_nothing(blocks: int, chunk_size: int) -> None:
    """Five key channels: the slices of 2 and 3 are uneven."""
    inputs, lengths = draw(19), [4, 6, 9]
    options = {"blocks": blocks, "chunk_size": chunk_size}
    check(simulate(3, one_rank, "zeco", inputs, lengths, options).results, reference(inputs, lengths), inputs)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize("decay", DECAYS)
def test_chunked_gla(decay: str) -> None:
    inputs = draw(19, decay)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(BATCH, HEADS, DK, DV, generator=generator, dtype=torch.float64)
    expected, states = loop(inputs, start)
    from_zero = loop(inputs)[1][:, :, -1]
    for chunk in (1, 4, 64):
        out, final, total = chunked_gla(**inputs, chunk_size=chunk, initial_state=start)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(final, states[:, :, -1], rtol=0, atol=1e-12)
        assert total.shape == (BATCH, HEADS, DK)
        # What the total decay is for: the state is its own part and what is left of the start.
        torch.testing.assert_close(final, from_zero + total[..., None] * start, rtol=0, atol=1e-12)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize("driver", DRIVERS)
def test_without_decay_it_is_causal_linear_attention(driver: str) -> None:
    inputs = {name: tensor.detach() for name, tensor in draw(19, "none").items()}
    zero = {**inputs, "log_decay": torch.zeros(BATCH, HEADS, 19, DK, dtype=torch.float64)}
    mask = torch.ones(19, 19, dtype=torch.float64).tril()
    expected = (inputs["query"] @ inputs["key"].mT * mask) @ inputs["value"]
    for case in (inputs, zero):
        found = simulate(4, one_rank, driver, case, LENGTHS[4], {}).results
        torch.testing.assert_close(torch.cat([rank["out"] for rank in found], 2), expected, rtol=0, atol=1e-12)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_packed_documents_do_not_mix(driver: str, per_channel: bool) -> None:
    """A decay of -inf at its first token makes a document the same as if it were alone, in value and gradient."""
    inputs = draw(19, "channel" if per_channel else "token")
    starts, lengths = [0, 3, 9, 10, 16], [5, 1, 9, 4]  # within ranks, and at the start of one
    with torch.no_grad():
        inputs["log_decay"][:, :, starts] = -torch.inf
    found = simulate(4, one_rank, driver, inputs, lengths, {"chunk_size": 4}).results
    check(found, reference(inputs, lengths), inputs)
    out = torch.cat([rank["out"] for rank in found], 2)
    for start, stop in zip(starts, [*starts[1:], 19], strict=True):
        alone, _ = loop({name: tensor[:, :, start:stop] for name, tensor in inputs.items()})
        torch.testing.assert_close(out[:, :, start:stop], alone.detach(), rtol=0, atol=1e-12)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_sequence_is_continued_from_a_state(driver: str) -> None:
    inputs, lengths = draw(19), [8, 11]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(BATCH, HEADS, DK, DV, generator=generator, dtype=torch.float64, requires_grad=True)
    seed_out, seed_state = seeds(19, 2)

    def work(group: Group) -> tuple[Tensor, Tensor, Tensor | None]:
        mine, rows = shard(group, inputs, lengths)
        own = start.detach().clone().requires_grad_() if group.rank == 0 else None
        out, final = DRIVERS[driver](group, **mine, initial_state=own)
        ((out * seed_out[:, :, rows]).sum() + (final * seed_state[group.rank]).sum()).backward()
        return out.detach(), final.detach(), None if own is None else own.grad

    found = simulate(2, work).results
    out, states = loop(inputs, start)
    torch.testing.assert_close(torch.cat([rank[0] for rank in found], 2), out.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1][1], states[:, :, -1].detach(), rtol=0, atol=1e-12)
    loss = (out * seed_out).sum() + (states[:, :, 8] * seed_state[0]).sum() + (states[:, :, 19] * seed_state[1]).sum()
    torch.testing.assert_close(found[0][2], torch.autograd.grad(loss, start)[0], rtol=0, atol=1e-11)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("decay", ["channel", "token", "none"])
def test_bytes_and_messages_are_those_of_the_formulas(ranks: int, decay: str) -> None:
    inputs, lengths = draw(4 * ranks, decay), [4] * ranks
    states, size = BATCH * HEADS, BATCH * HEADS * DK * DV * 8
    for driver, blocks in (("zeco", 1), ("zeco", 3), ("zeco that waits", 3)):
        found = simulate(ranks, one_rank, driver, inputs, lengths, {"blocks": blocks}).results
        cost = sp_cost("zeco", ranks, DK, DV, blocks=blocks, itemsize=8, states=states)
        for rank, one in enumerate(found):
            sent, received = one["forward"], one["backward"]
            assert sent.bytes_sent == received.bytes_received == (size if rank < ranks - 1 else 0)
            assert sent.bytes_received == received.bytes_sent == (size if rank else 0)
            assert sent.messages_sent == received.messages_received == (blocks if rank < ranks - 1 else 0)
        assert (cost.bytes_sent, cost.bytes_received, cost.messages_sent) == (size, size, blocks)
    decay_dim = {"channel": DK, "token": 1, "none": 0}[decay]
    gathered = sp_cost("lasp2", ranks, DK, DV, itemsize=8, states=states, decay_dim=decay_dim)
    for one in simulate(ranks, one_rank, "lasp2", inputs, lengths, {}).results:
        assert one["forward"].bytes_received == (ranks - 1) * (size + states * decay_dim * 8) == gathered.bytes_received
        assert one["forward"].messages_sent == gathered.messages_sent
        assert one["backward"].bytes_received == (ranks - 1) * size, "decays are gathered once"
    ring = sp_cost("lasp1", ranks, DK, DV, itemsize=8, states=states)
    one = simulate(ranks, one_rank, "lasp1", inputs, lengths, {}).results[0]["forward"]
    assert (one.bytes_sent, one.messages_sent) == (ring.bytes_sent, ring.messages_sent) == (size, 1)


def scan_alone(group: Group, carry: Any, dk: int, dv: int) -> None:
    carry(group, torch.ones(1, dk, dv), torch.ones(1, dk), None, False)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize("ranks", [2, 3, 4, 9])
@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_the_pipeline_takes_k_plus_p_minus_2_hops(ranks: int, blocks: int) -> None:
    assert simulate(ranks, scan_alone, AllScan(blocks), 8, 2).ticks == blocks + ranks - 2
    # In the model the last rank's own update of the last slice is one step more.
    slice_time = sp_cost("zeco", ranks, 8, 2, blocks=blocks, tau=lambda numbers: numbers / (16 / blocks)).latency
    assert slice_time == pytest.approx(blocks + ranks - 1)
    assert simulate(ranks, scan_alone, AllScan(1), 8, 2).ticks == ranks - 1, "LASP's ring: whole states, serially"


@pytest.mark.paper("zeco")
def test_modelled_latency_at_256_ranks() -> None:
    assert sp_cost("zeco", 256, 128, 128, blocks=32).latency == pytest.approx(1 + 255 / 32)
    for method in ("lasp1", "lasp2"):
        assert sp_cost(method, 256, 128, 128).latency == 255  # type: ignore[arg-type]
    one = sp_cost("zeco", 256, 128, 128, blocks=32)
    assert sp_cost("lasp2", 256, 128, 128).bytes_received == 255 * one.bytes_received == 255 * 128 * 128 * 4
    # A fixed cost per message, which the plain formula lacks, makes ever finer slices no gain.
    cost = [sp_cost("zeco", 16, 128, 128, blocks=k, tau=lambda n: 1.0 + n / 1000).latency for k in (1, 8, 128)]
    assert cost[1] < min(cost[0], cost[2])
    assert sp_cost("zeco", 1, 8, 8) == sp_cost("lasp2", 1, 8, 8)
    with pytest.raises(OptionError, match="'zeco', 'lasp1' or 'lasp2'"):
        sp_cost("ring", 2, 8, 8)  # type: ignore[arg-type]


@pytest.mark.paper("zeco")
def test_all_scan_is_a_prefix_of_decayed_states() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 2, DK, DV, generator=generator, dtype=torch.float64)
    decays = torch.rand(5, 2, DK, generator=generator, dtype=torch.float64)

    def work(group: Group) -> tuple[Tensor, Tensor]:
        return all_scan(group, states[group.rank], decays[group.rank], blocks=3)

    passed = torch.zeros(2, DK, DV, dtype=torch.float64)
    for rank, (incoming, outgoing) in enumerate(simulate(5, work).results):
        torch.testing.assert_close(incoming, passed, rtol=0, atol=1e-14)
        passed = states[rank] + decays[rank][..., None] * passed
        torch.testing.assert_close(outgoing, passed, rtol=0, atol=1e-14)


@pytest.mark.paper("zeco")
def test_layers_stacked_on_one_another() -> None:
    """Several scans in one graph: their backward passes follow one another in the same order on every rank."""
    inputs, lengths = draw(19), LENGTHS[4]

    def stack(run: Callable[..., Tensor], parts: dict[str, Tensor]) -> Tensor:
        first = run(**parts)
        second = run(**{**parts, "value": first.tanh()})
        return run(**{**parts, "query": parts["query"] * first.mean(-1, keepdim=True), "value": second})

    def work(group: Group) -> dict[str, Tensor | None]:
        mine, _ = shard(group, inputs, lengths)
        stack(lambda **parts: zeco(group, **parts, blocks=2)[0], mine).square().sum().backward()
        return {name: tensor.grad for name, tensor in mine.items()}

    found = simulate(4, work).results
    loss = stack(lambda **parts: loop(parts)[0], inputs).square().sum()
    for (name, tensor), grad in zip(inputs.items(), torch.autograd.grad(loss, list(inputs.values())), strict=True):
        ours = torch.cat([rank[name] for rank in found], 2)
        torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-10, msg=f"{name} {tensor.shape}")


@pytest.mark.paper("zeco")
def test_the_scan_runs_beside_the_local_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward the scan has begun, and has not ended, when the rank computes its own part."""
    begun, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    class Waiting(AllScan):
        def __call__(self, *args: Any) -> Tensor:
            begun.set()
            assert go_on.wait(20), "the local computation never came"
            go_on.clear()
            return super().__call__(*args)

    class Witness(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, out: Tensor) -> Tensor:
            assert begun.wait(20)
            begun.clear()
            seen.append("forward")
            go_on.set()
            return out.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert begun.wait(20)
            begun.clear()
            seen.append("backward")
            go_on.set()
            return grad

    def local(*args: Any, **options: Any) -> tuple[Tensor, Any]:
        out, state = linear_attention(*args, **options)
        return (Witness.apply(out) if threading.current_thread().name == "rank 0" else out), state

    monkeypatch.setattr(recurrence, "linear_attention", local)
    inputs = draw(12)

    def work(group: Group) -> None:
        mine, _ = shard(group, inputs, [6, 6])
        carry = AllScan(2) if group.rank else Waiting(2)  # the other rank is an ordinary one
        parts = (mine["query"], mine["key"], mine["value"], mine["log_decay"])
        options = {"scale": 1.0, "chunk_size": 4, "initial_state": None, "overlap": True}
        out, _ = recurrence.sequence_parallel(carry, group, *parts, **options)
        out.sum().backward()

    simulate(2, work)
    assert seen == ["forward", "backward"]


def test_graphs_are_freed_without_a_collection() -> None:
    class Named(AllScan):
        pass

    def work(group: Group) -> weakref.ref[Any]:
        mine, _ = shard(group, inputs, [6, 6])
        carry = Named(1)
        out, _ = recurrence.carry_states(carry, group, mine["key"].mT @ mine["value"], None)
        out.sum().backward()
        return weakref.ref(carry)

    inputs = draw(12)
    assert all(ref() is None for ref in simulate(2, work).results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Half precision is rounded once, at the end: states and sums are float32."""
    inputs = {name: tensor.detach() for name, tensor in draw(19, dtype=dtype).items()}
    wide = {name: tensor.double() for name, tensor in inputs.items()}

    def work(group: Group) -> tuple[Tensor, Tensor]:
        mine, _ = shard(group, inputs, LENGTHS[4])
        return zeco(group, **{name: tensor.detach() for name, tensor in mine.items()})

    found = simulate(4, work).results
    out, states = loop(wide)
    assert found[0][0].dtype is dtype and found[0][1].dtype is torch.float32
    ours = torch.cat([rank[0] for rank in found], 2)
    torch.testing.assert_close(ours.double(), out, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(found[-1][1].double(), states[:, :, -1], rtol=1e-4, atol=1e-5)


def test_grouped_keys_and_values() -> None:
    inputs = {name: tensor.detach() for name, tensor in draw(12, "none").items()}
    shared = {**inputs, "key": inputs["key"][:, :1], "value": inputs["value"][:, :1]}
    spread = {name: tensor.expand(-1, HEADS, -1, -1) for name, tensor in shared.items()}

    def work(group: Group) -> Tensor:
        mine, _ = shard(group, shared, [6, 6])
        return zeco(group, **mine, scale=0.5)[0].detach()

    ours = torch.cat(simulate(2, work).results, 2)
    torch.testing.assert_close(ours, 0.5 * loop(spread)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"blocks": 0}, OptionError, "at least 1, got 0"),
        ({"log_decay": torch.zeros(4)}, ShapeError, r"none of \(heads,\)"),
        (
            {"value": torch.zeros(BATCH, HEADS, 5, DV)},
            ShapeError,
            "same tokens of query, key and value, got 6, 6 and 5",
        ),
        ({"initial_state": torch.zeros(BATCH, HEADS, DK, DV)}, OptionError, "only rank 0 has it, but rank 1"),
    ],
)
def test_wrong_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    inputs = draw(12, dtype=torch.float32)

    def work(group: Group) -> None:
        mine, _ = shard(group, inputs, [6, 6])
        zeco(group, **{**mine, **change})

    with pytest.raises(error, match=words):
        simulate(2, work)


def test_a_decay_that_does_not_fit_the_state() -> None:
    def work(group: Group) -> None:
        all_scan(group, torch.zeros(2, DK, DV), torch.zeros(2, DK - 1))

    with pytest.raises(ShapeError, match=r"decays by \(..., dk\) = \(2, 5\)"):
        simulate(2, work)


def test_ranks_that_disagree_on_slices_are_told() -> None:
    def work(group: Group) -> None:
        all_scan(group, torch.zeros(2, 4, DV), blocks=2 if group.rank else 1)

    with pytest.raises(CommunicationError, match=r"Rank 1 of 2 expected \(2, 2, 4\).*slice 1 of 2 of the all-scan"):
        simulate(2, work)


def real(group: Group) -> dict[str, Any]:
    """Everything that the real ranks do, in one life of their processes."""
    assert isinstance(group, DistributedGroup)
    found: dict[str, Any] = {}
    pair = group.split([[0, 1], [2, 3]])
    for driver in DRIVERS:
        for decay in ("channel", "head", "none"):
            found[driver, decay, 4] = one_rank(group, driver, draw(19, decay), LENGTHS[4], {"chunk_size": 4})
        found[driver, "channel", 2] = one_rank(pair, driver, draw(19), LENGTHS[2], {"chunk_size": 4})
    group.barrier()
    impatient = DistributedGroup(pair._group, timeout=0.3)
    began = time.monotonic()
    try:
        if group.rank == 0:  # its partner never sends
            impatient.receive((2,), torch.float32, "cpu", 1, step="the second half")
    except CommunicationError as error:
        found["late"] = (time.monotonic() - began, str(error))
    group.barrier()
    if group.rank == 3:
        time.sleep(0.2)  # the others are waiting by then
        return found  # and this process ends
    began = time.monotonic()
    try:
        one_rank(group, "lasp2", draw(19), LENGTHS[4], {})
    except CommunicationError as error:
        found["dead"] = (time.monotonic() - began, str(error))
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, real, tmp_path_factory.mktemp("store"), timeout=10.0)


@pytest.mark.paper("zeco")
@pytest.mark.parametrize("driver", DRIVERS)
def test_real_processes_find_the_same(driver: str, processes: list[dict[str, Any]]) -> None:
    for decay in ("channel", "head", "none"):
        inputs = draw(19, decay)
        check([rank[driver, decay, 4] for rank in processes], reference(inputs, LENGTHS[4]), inputs)
    inputs = draw(19)
    for pair in (processes[:2], processes[2:]):
        check([rank[driver, "channel", 2] for rank in pair], reference(inputs, LENGTHS[2]), inputs)


@pytest.mark.paper("zeco")
def test_real_processes_move_the_bytes_that_the_simulation_counts(processes: list[dict[str, Any]]) -> None:
    def counts(traffic: Traffic) -> tuple[int, ...]:
        return traffic.bytes_sent, traffic.bytes_received, traffic.messages_sent, traffic.messages_received

    for driver in DRIVERS:
        for decay in ("channel", "head", "none"):
            simulated = simulate(4, one_rank, driver, draw(19, decay), LENGTHS[4], {}).results
            for ours, theirs in zip(processes, simulated, strict=True):
                for way in ("forward", "backward"):
                    assert counts(ours[driver, decay, 4][way]) == counts(theirs[way])


def test_a_rank_that_ends_or_does_not_come(processes: list[dict[str, Any]]) -> None:
    took, message = processes[0]["late"]
    assert took < 5
    for words in ("Rank 0 of 2", "rank 1", "the second half", "a timeout of 0.3 s", "longer timeout"):
        assert words in message
    for rank in (0, 1, 2):
        took, message = processes[rank]["dead"]
        assert took < 10
        for words in (f"Rank {rank} of 4", "rank 3", "LASP-2", "a timeout of 10 s", "it has ended, is late"):
            assert words in message, message
