"""The context-parallel planner: units, counts, hand-computed times, what more bandwidth can and cannot do, its page."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner

from regard.bench.plan.exact import break_even, exact_predictions, pair_counts, rank_traffic
from regard.bench.plan.job import Job, Kind, Memory, Pass, Prediction
from regard.bench.plan.linear import linear_flops, linear_predictions
from regard.bench.plan.machine import Curve, Kernel, Link, Machine
from regard.bench.plan.page import page, plan_rows
from regard.bench.plan.planner import advice, plan, sweep
from regard.bench.plan.quantities import (
    parse_quantity,
    parse_tokens,
    show_bytes,
    show_quantity,
    show_seconds,
    show_tokens,
)
from regard.bench.plan.ring_time import ring_seconds
from regard.bench.plan.timing import JOB, Timed, Timing
from regard.cli import main
from regard.errors import FileFormatError, OptionError
from regard.parallel.context import context_parallel_attention
from regard.parallel.group import Group, simulate
from regard.parallel.lasp import lasp1, lasp2
from regard.parallel.mesh import Mesh
from regard.parallel.shards import Deal, Sharding
from regard.parallel.zeco import zeco

RATE = 1e9
SMALL = Job(64, 4, heads=4, kv_heads=2, head_dim=8, layers=1, dtype="float32")


def machine(bandwidth: float = math.inf, latency: float = 0.0, rate: float = RATE, **more: Any) -> Machine:
    return Machine.assumed(rate, Link(bandwidth, latency), **more)


def by_name(found: list[Prediction]) -> dict[str, Prediction]:
    return {one.name: one for one in found}


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("50GB/s", "B/s", 50e9),
        ("1.5 TB/s", "B/s", 1.5e12),
        ("10us", "s", 1e-5),
        ("2.5ms", "s", 2.5e-3),
        ("0s", "s", 0.0),
        ("80GB", "B", 80e9),
        ("80GiB", "B", 80 * 1024**3),
        ("400TFLOP/s", "FLOP/s", 4e14),
        ("1e3 GFLOPS", "FLOP/s", 1e12),
    ],
)
def test_quantities_are_read_with_their_unit(text: str, unit: str, expected: float) -> None:
    assert parse_quantity(text, unit, "--x") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "unit"), [("50", "B/s"), ("50GB", "B/s"), ("10", "s"), ("-1GB", "B"), ("fast", "B/s"), ("0GB/s", "B/s")]
)
def test_quantities_without_a_right_unit_are_refused_with_an_example(text: str, unit: str) -> None:
    with pytest.raises(OptionError, match=r"--x .*e\.g\. (50GB/s|10us|80GB)"):
        parse_quantity(text, unit, "--x")


def test_bits_are_not_taken_for_bytes() -> None:
    with pytest.raises(OptionError, match="400Gbit/s is 50GB/s"):
        parse_quantity("400Gbit/s", "B/s", "--bandwidth")


@pytest.mark.parametrize(("text", "count"), [("65536", 65536), ("128k", 131072), ("1M", 1 << 20), ("0.5M", 1 << 19)])
def test_tokens_count_in_powers_of_1024(text: str, count: int) -> None:
    assert parse_tokens(text, "--length") == count
    assert parse_tokens(show_tokens(count), "--length") == count


@pytest.mark.parametrize("text", ["", "long", "0", "1.5", "-4k", "1G"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="128k"):
        parse_tokens(text, "--length")


def test_quantities_are_shown_with_three_digits() -> None:
    assert show_quantity(50e9, "B/s") == "50.0 GB/s" and show_bytes(1.5e6) == "1.50 MB"
    assert [show_seconds(s) for s in (0, 2e-9, 1e-5, 0.0123, 1, 90, 5400)] == [
        *("0 s", "2.00 ns", "10.0 us", "12.3 ms", "1.00 s", "90.0 s", "1.50 h")
    ]
    assert show_quantity(math.inf, "B/s") == "unlimited" and show_quantity(999.9e6, "B") == "1.00 GB"


def test_rates_are_interpolated_over_the_logarithm_of_the_size() -> None:
    curve = Curve((256.0, 1024.0), (10.0, 30.0))
    assert [curve.at(size) for size in (1, 256, 512, 1024, 9999)] == pytest.approx([10, 10, 20, 30, 30])
    with pytest.raises(OptionError, match="ascending"):
        Curve((2.0, 1.0), (1.0, 1.0))


@pytest.mark.parametrize("deal", get_args(Deal))
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_of_long_sequences_follow_from_short_ones(deal: Deal, causal: bool) -> None:
    for size in (1, 2):
        exact = Sharding.of(deal, 8 * 7, 4).merged(size).pairs(causal).double()
        assert torch.equal(pair_counts(deal, 4, size, causal, 7), exact)


@pytest.mark.parametrize("deal", get_args(Deal))
@pytest.mark.parametrize(("strategy", "size"), [("ring", 1), ("ulysses", 4), ("mesh", 2)])
def test_traffic_is_what_simulated_ranks_count(strategy: Any, size: int, deal: Deal) -> None:
    sharding = Sharding.of(deal, SMALL.length, 4)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, heads, SMALL.length, SMALL.head_dim, generator=generator) for heads in (4, 2, 2)]

    def work(group: Group) -> list[tuple[int, int]]:
        where = Mesh.split(group, size) if strategy == "mesh" else group
        inputs = [sharding.shard(t, group.rank, 2).requires_grad_() for t in whole]
        counted = [group.traffic.copy()]
        out = context_parallel_attention(*inputs, group=where, sharding=sharding, strategy=strategy, causal=True)
        counted.append(group.traffic.copy())
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        counted.append(group.traffic.copy())
        passes = [after - before for before, after in itertools.pairwise(counted)]
        return [(one.messages_sent, one.bytes_sent) for one in passes]

    results = simulate(4, work).results
    for rank, counted in enumerate(results):
        said = rank_traffic(SMALL, strategy, deal, size, rank)
        assert [(one.messages_sent, one.bytes_sent) for one in said] == counted
    name = {"ring": f"ring, {deal}", "ulysses": "ulysses", "mesh": "mesh, zigzag, teams of 2"}[strategy]
    if strategy == "mesh" and deal != "zigzag":
        return
    one = by_name(exact_predictions(SMALL, machine()))[name]
    for found, sent in zip((one.forward, one.backward), zip(*results, strict=True), strict=True):
        assert found.messages == max(messages for messages, _ in sent) and found.bytes == max(size for _, size in sent)


@pytest.mark.parametrize("name", ["zeco", "zeco, overlap=False", "lasp2", "lasp2, overlap=False", "lasp1"])
def test_states_traffic_is_what_simulated_ranks_count(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, heads, SMALL.length, SMALL.head_dim, generator=generator) for heads in (4, 2, 2)]
    sharding, decay = Sharding.contiguous(SMALL.length, 4), -torch.ones(4)

    def work(group: Group) -> list[tuple[int, int]]:
        inputs = [sharding.shard(t, group.rank, 2).requires_grad_() for t in whole]
        before = group.traffic.copy()
        method, _, label = name.partition(", ")
        if method == "lasp1":
            out = lasp1(group, *inputs, decay)[0]
        else:
            call: Any = {"zeco": zeco, "lasp2": lasp2}[method]
            out = call(group, *inputs, decay, overlap=not label)[0]
        middle = group.traffic.copy()
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        passes = (middle - before, group.traffic.copy() - middle)
        return [(one.messages_sent, one.bytes_sent) for one in passes]

    counted = list(zip(*simulate(4, work).results, strict=True))
    one = by_name(linear_predictions(SMALL, machine()))[name]
    for found, sent in zip((one.forward, one.backward), counted, strict=True):
        assert (found.messages, found.bytes) == max(sent)


def test_one_rank_computes_its_pairs_at_the_rate_and_sends_nothing() -> None:
    job = replace(SMALL, ranks=1)
    (one,) = exact_predictions(job, machine(bandwidth=1.0, latency=1.0))
    pairs = 64 * 65 / 2
    assert one.forward.seconds == pytest.approx(4 * 4 * pairs * 8 / RATE)
    assert one.backward.seconds == pytest.approx(10 * 4 * pairs * 8 / RATE)
    (state,) = linear_predictions(job, machine(bandwidth=1.0, latency=1.0))
    assert state.forward.seconds == pytest.approx(2 * 4 * 64 * (64 * 8 + 2 * 8 * 8) / RATE)
    assert state.backward.seconds == pytest.approx(2 * state.forward.seconds)
    for found in (one, state):
        assert (found.forward.bytes, found.forward.messages, found.forward.exposed) == (0, 0, 0.0)


def test_a_ring_of_two_by_hand() -> None:
    """Zigzag on two ranks: 16 + 16 tokens each; a rank sees 32 * 33 / 2 pairs of its own and 2 * 16 * 16 of the
    other's."""
    job, kind = replace(SMALL, ranks=2), "ring, zigzag"
    own, other = 4 * 4 * 8 * (32 * 33 / 2) / RATE, 4 * 4 * 8 * (2 * 16 * 16) / RATE
    sent = 2 * 32 * 16 * 4  # key/value heads, tokens, two widths, bytes
    for bandwidth, latency in ((1e12, 1e-7), (1e8, 1e-4)):
        passed = latency + sent / bandwidth
        found = by_name(exact_predictions(job, machine(bandwidth, latency)))[kind].forward
        assert found.seconds == pytest.approx(max(own, passed) + other)
        assert found.compute == pytest.approx(own + other)
        waiting = by_name(exact_predictions(replace(job, overlap=False), machine(bandwidth, latency)))[kind].forward
        assert waiting.seconds == pytest.approx(own + passed + other)
        both = by_name(exact_predictions(job, machine(bandwidth, latency)))[kind].backward
        # Keys and values arrive beside the first block; the other's gradients are sent home when they are done.
        assert both.seconds == pytest.approx(max(2.5 * own, passed) + 2.5 * other + passed)


def test_a_contiguous_ring_waits_for_its_last_rank() -> None:
    found = by_name(exact_predictions(SMALL, machine()))
    even, uneven = (found[f"ring, {deal}"].forward.seconds for deal in ("zigzag", "contiguous"))
    work = [Sharding.contiguous(64, 4).work(rank) for rank in range(4)]
    assert uneven == pytest.approx(max(work) * 4 * 4 * 8 / RATE)
    assert even == pytest.approx(sum(work) / 4 * 4 * 4 * 8 / RATE)


def test_a_ring_follows_the_slowest_of_its_ranks_step_by_step() -> None:
    compute = torch.tensor([[1.0, 5.0], [1.0, 1.0]], dtype=torch.float64)
    hops = [(1, 1), (1, 1)]
    assert ring_seconds(compute, hops, [2.0, 2.0], None) == 6.0
    assert ring_seconds(compute, hops, [9.0, 9.0], None) == 10.0
    assert ring_seconds(compute, [(0, 0), (0, 0)], [9.0, 9.0], None) == 6.0  # nobody sees another's block
    assert ring_seconds(compute, hops, [2.0, 2.0], None, overlap=False) == 8.0
    # Rank 1 is done with rank 0's block at 6, and its gradients are home three later.
    assert ring_seconds(compute, hops, [2.0, 2.0], [3.0, 3.0], home=3.0) == 9.0


def test_ulysses_exposes_its_all_to_alls() -> None:
    job, bandwidth, latency = replace(SMALL, ranks=2), 1e7, 1e-3
    one = by_name(exact_predictions(job, machine(bandwidth, latency)))["ulysses"].forward
    compute = 4 * 2 * 8 * (64 * 65 / 2) / RATE  # two heads of whole rows
    sent = 32 * 8 * 4 * (2 + 1 + 1) + 32 * 8 * 4 * 2
    assert one.seconds == pytest.approx(compute + 2 * latency + sent / bandwidth)
    assert one.exposed == pytest.approx(2 * latency + sent / bandwidth)


def test_zeco_passes_its_slices_beside_the_recurrence() -> None:
    link = Link(1e8, 1e-5)
    found = by_name(linear_predictions(SMALL, replace(machine(), link=link)))
    local = linear_flops(4, 16, 8, 64, False) / RATE
    product = 2 * 4 * 16 * 8 * 8 / RATE
    state = 4 * 8 * 8 * 4
    hops = (8 + 4 - 1) * link.seconds(state / 8)
    assert found["zeco"].forward.seconds == pytest.approx(2 * product + max(local, hops))
    assert found["zeco, overlap=False"].forward.seconds == pytest.approx(product + local + hops)
    assert found["lasp1"].forward.seconds == pytest.approx(product + local + 3 * link.seconds(state))
    gathered = 3 * link.seconds(state + 4 * 4) + 3 * link.latency
    assert found["lasp2, overlap=False"].forward.seconds == pytest.approx(product + local + gathered)


@pytest.mark.parametrize("backward", [True, False])
def test_more_bandwidth_is_never_slower_and_without_limit_leaves_work_and_balance(backward: bool) -> None:
    job = replace(SMALL, ranks=8, length=4096, heads=8, backward=backward)
    last: dict[str, float] = {}
    for bandwidth in (1e6, 1e7, 1e8, 1e10, math.inf):
        for one in plan(job, machine(bandwidth, 0.0)).predictions:
            if one.reason is None:
                assert one.seconds(job) <= last.get(f"{one.kind} {one.strategy} {one.deal}", math.inf) * (1 + 1e-12)
                last[f"{one.kind} {one.strategy} {one.deal}"] = one.seconds(job)
    for one in plan(job, machine()).predictions:
        for found in (one.forward, one.backward):
            assert found.exposed == pytest.approx(0.0, abs=1e-12), one.name


def test_above_the_break_even_bandwidth_a_ring_computes_alone() -> None:
    job = replace(SMALL, ranks=8, length=8192)
    n, formula = 1024, []
    # KV bytes over a step's time: a block of zigzag has half of its pairs seen.
    for flops, size in ((4, 4), (10, 8)):
        step = flops * job.heads * job.head_dim * (n * n / 2) / RATE
        formula.append(2 * job.kv_heads * n * job.head_dim * size / step)
    assert break_even(job, machine()) == pytest.approx(max(formula))
    assert break_even(replace(job, backward=False), machine()) == pytest.approx(formula[0])
    forward = replace(job, backward=False)
    even = break_even(forward, machine())
    above, below = (by_name(exact_predictions(forward, machine(even * f)))["ring, zigzag"] for f in (1.001, 0.8))
    assert above.forward.exposed == pytest.approx(0.0, abs=1e-9)
    assert below.forward.exposed > 0.1 * below.forward.compute
    assert break_even(replace(job, ranks=1), machine()) == 0.0
    assert break_even(job, machine(latency=10.0)) == math.inf
    assert "at any bandwidth" in " ".join(advice(plan(job, machine(1e9, latency=10.0))))


def test_key_value_heads_are_replicated_where_ulysses_has_fewer_than_ranks() -> None:
    few, many = (
        by_name(exact_predictions(replace(SMALL, kv_heads=kv_heads), machine()))["ulysses"].memory
        for kv_heads in (1, 4)
    )
    assert few is not None and many is not None
    # A head for each of four ranks, whether these are the same or not; only what came in differs.
    assert few.kept == many.kept and few.held < many.held


def test_fast_links_inside_a_node_are_used_by_teams_that_fit() -> None:
    job = replace(SMALL, length=4096, heads=8, kv_heads=8, ranks=8)
    near = replace(machine(1e5), node=4, near=Link(1e12))
    best = by_name([one for one in exact_predictions(job, near) if one.reason is None])
    assert "mesh, zigzag, teams of 4" in best
    slow = machine(1e5)
    assert best["mesh, zigzag, teams of 4"].seconds(job) < min(
        one.seconds(job) for one in exact_predictions(job, slow) if one.reason is None
    )
    assert near.between(3, 4) == near.link and near.among(4, 4) == near.near


def test_what_cannot_be_used_is_listed_with_its_reason() -> None:
    found = by_name(exact_predictions(replace(SMALL, ranks=5, length=80), machine()))
    assert found["ulysses"].reason == "4 heads are too few for 5 ranks"
    assert found["mesh"].reason == "5 ranks do not split into a ring of teams"
    tight = plan(replace(SMALL, memory=20e3), machine())
    refused = [one for one in tight.predictions if one.reason]
    assert refused and all("needs" in str(one.reason) and "of 20.0 kB a rank" in str(one.reason) for one in refused)
    nothing = plan(replace(SMALL, memory=1.0), machine())
    assert nothing.ranked("exact") == [] and "no strategy can be used" in advice(nothing)[0]
    assert [row[-1] for row in plan_rows(nothing, "exact")].count("use this") == 0
    whole = plan(replace(SMALL, causal=False), machine())
    assert whole.ranked("linear") == [] and len(whole.ranked("exact")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 64}, "at most 32 ranks"),
        ({"kv_heads": 3}, "kv_heads divides heads"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"layers": 0}, "layers is at least 1"),
    ],
)
def test_a_job_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(SMALL, **change)


def test_plans_survive_json() -> None:
    found = plan(SMALL, replace(machine(1e9, 1e-5), near=Link(math.inf), node=2, said=("given",)))
    assert type(found).of(json.loads(json.dumps(found.content(), allow_nan=False))) == found
    assert [one.job.ranks for one in sweep(SMALL, machine())] == [1, 2, 4, 8, 16]


def timing() -> Timing:
    rows = []
    for ranks in (1, 2):
        for kind in get_args(Kind):
            some = [one for one in plan(replace(JOB, ranks=ranks), machine(1e9)).predictions if one.kind == kind]
            for one in some:
                if one.reason is None:
                    rows.append(Timed(ranks, JOB.length, one, 2 * one.forward.seconds, 1.0, 10**7))
    kernel = Kernel(Curve((256.0, 512.0), (1e9, 2e9)), Curve.flat(1e9))
    probed = replace(machine(1e9, 1e-4), attention=kernel)
    about = {"machine": "any", "cores": 2, "torch": "2", "native": True, "rounds": 5, "job": {}}
    return Timing(about, {1: replace(probed, link=Link(math.inf)), 2: probed}, rows)


def test_measurements_are_kept_and_read_back(tmp_path: Path) -> None:
    kept = timing()
    kept.save(tmp_path / "plan.json", {"example": {}})
    assert Timing.load(tmp_path / "plan.json") == kept and Timing.load(tmp_path / "none.json") is None
    assert all(row.ratios[0] == pytest.approx(2.0) for row in kept.rows)
    (tmp_path / "plan.json").write_text('{"version": 0}')
    with pytest.raises(FileFormatError, match="measurements of the planner"):
        Timing.load(tmp_path / "plan.json")


def test_predicted_memory_beyond_the_inputs_is_output_kept_and_flight() -> None:
    one = Prediction("exact", "ring", forward=Pass(1.0), backward=Pass(1.0), memory=Memory(24.0, 5.0, 7.0))
    # Eight of the 8 + 4 + 4 + 8 heads of queries, keys, values and outputs are outputs.
    assert Timed(1, 64, one, 1.0, 2.0, 20).predicted_memory == pytest.approx(8.0 + 5.0 + 7.0)


def test_the_page_has_predictions_beside_measurements() -> None:
    found = plan(Job(1 << 16, 8, heads=8), machine(1e9, 1e-5))
    text = page(timing(), found, "regard plan --length 64k", "regard plan --measure", ("a.png", "b.png"))
    assert "Written by `regard plan --measure`" in text and "![Predicted and measured times](a.png)" in text
    assert "| ring, zigzag | 2 | 4k |" in text and "| 2.00 |" in text and "**" not in text
    assert all(len(line) <= 120 or line.startswith("|") for line in text.splitlines())
    for one in found.predictions:
        assert f"| {one.name} |" in text


GIVEN = ["plan", "--length", "128k", "--ranks", "8", "--bandwidth", "50GB/s", "--rate", "400TFLOP/s"]


def test_the_command_plans_from_given_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(main, [*GIVEN, "--memory", "80GB", "--out", str(tmp_path / "plan")])
    assert result.exit_code == 0, result.output
    assert "exact attention: use" in result.output and "nothing was measured" in result.output
    assert not (tmp_path / "cache").exists()
    kept = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert kept["plan"]["job"]["length"] == 131072 and (tmp_path / "plan" / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "needs --length and --ranks"),
        ([*GIVEN, "--heads", "30"], "kv_heads divides heads"),
        ([*GIVEN, "--ranks", "100000"], "at most 65536 ranks"),
        ([*GIVEN, "--latency", "10"], "10us"),
        ([*GIVEN, "--node", "4"], "give both or neither"),
        ([*GIVEN, "--report", "x.md"], "give --measure as well"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_the_command_measures_writes_its_page_and_shows_an_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("regard.bench.plan.timing.measure", lambda report: timing())
    page_file = tmp_path / "docs" / "plan.md"
    page_file.parent.mkdir()
    result = CliRunner().invoke(main, ["plan", "--measure", "--report", str(page_file)])
    assert result.exit_code == 0, result.output
    text = page_file.read_text()
    assert "regard plan --length 1M --ranks 64 --bandwidth 50GB/s" in text
    assert f"`regard plan --measure --report {page_file.as_posix()}`" in " ".join(text.split())
    assert Timing.load(page_file.with_suffix(".json")) == timing()
    assert sorted(file.name for file in (tmp_path / "docs" / "pictures").iterdir()) == ["plan.png", "plan_measured.png"]
