"""What the planner found as rows of a table, and the documentation's page of it, in Markdown."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from typing import get_args

from regard.bench.markdown import paragraph, table
from regard.bench.plan.job import Job, Kind, Prediction
from regard.bench.plan.planner import Plan, advice
from regard.bench.plan.quantities import show_bytes, show_quantity, show_seconds, show_tokens
from regard.bench.plan.timing import JOB, Timed, Timing

__all__ = ["EXAMPLE", "HEAD", "MEASURED", "page", "plan_rows", "rates", "timed_rows"]

HEAD = ("strategy", "all layers", "forward", "backward", "waiting", "sent", "messages", "memory", "")
MEASURED = (
    "strategy",
    *("ranks", "tokens"),
    *("predicted", "forward", "ratio"),
    *("predicted", "both", "ratio"),
    *("predicted", "memory", "ratio"),
)
EXAMPLE = {
    "length": "1M",
    "ranks": 64,
    "bandwidth": "50GB/s",
    "latency": "10us",
    "node": 8,
    "node_bandwidth": "400GB/s",
    "rate": "400TFLOP/s",
    "memory_bandwidth": "3TB/s",
    "memory": "80GB",
}
"""What the page's example asks, as options of the command."""


def _bullets(items: Sequence[str]) -> list[str]:
    """Lines of a list, and an empty one."""
    return [*(line for item in items for line in textwrap.wrap(f"- {item}", 120, subsequent_indent="  ")), ""]


def plan_rows(found: Plan, kind: Kind) -> list[tuple[str, ...]]:
    """A row of each strategy, the fastest first and what cannot be used last."""
    job, ranked = found.job, found.ranked(kind)
    others = [one for one in found.predictions if one.kind == kind and one.reason is not None]
    return [_row(job, one, place == 0) for place, one in enumerate([*ranked, *others])]


def _row(job: Job, one: Prediction, first: bool) -> tuple[str, ...]:
    if one.memory is None:
        return (one.name, *["-"] * 7, one.reason or "")
    passes = (one.forward, one.backward)[: 1 + job.backward]
    return (
        one.name,
        show_seconds(one.seconds(job)),
        show_seconds(one.forward.seconds),
        show_seconds(one.backward.seconds) if job.backward else "-",
        show_seconds(sum(one_pass.exposed for one_pass in passes)),
        show_bytes(sum(one_pass.bytes for one_pass in passes)),
        str(sum(one_pass.messages for one_pass in passes)),
        show_bytes(one.memory.total(job)),
        one.reason or ("use this" if first and job.ranks > 1 else ""),
    )


def rates(found: Plan) -> list[str]:
    """The machine that the prediction is for, as sentences."""
    machine = found.machine
    ways = [("a block", machine.attention), ("a causal block", machine.triangle), ("linear attention", machine.linear)]
    told = []
    for name, kernel in ways:
        forward, backward = (show_quantity(curve.rates[-1], "FLOP/s") for curve in (kernel.forward, kernel.backward))
        told.append(f"{forward} for {name}" + (f", {backward} backward" if forward != backward else ""))
    text = "; ".join(told)
    if len({kernel for _, kernel in ways}) == 1:
        text = f"{show_quantity(machine.attention.forward.rates[-1], 'FLOP/s')} for every kernel"
    lines = [f"A rank computes at {text}."]
    lines.append(f"Memory moves {show_quantity(machine.memory.rates[-1], 'B/s')}.")
    if found.job.ranks > 1:
        link = machine.link
        lines.append(
            f"A link carries {show_quantity(link.bandwidth, 'B/s')} each way, {show_seconds(link.latency)} a message."
        )
        if machine.near is not None:
            near = show_quantity(machine.near.bandwidth, "B/s")
            lines.append(f"Among {machine.node} ranks of one node it carries {near}.")
    return [*lines, *machine.said]


def page(timing: Timing, example: Plan, asked: str, command: str, pictures: tuple[str, str]) -> str:
    """The page that ``command`` writes. example: what ``asked``, a command, is answered; pictures: of the measurements,
    and of the example on other numbers of ranks."""
    lines = ["# Which strategy, and how long it takes", ""]
    lines += paragraph(f"Written by `{command}`; no figure is typed by hand.")
    lines += paragraph(
        "`regard plan` predicts, for one layer's attention spread over ranks, how long each strategy of "
        "`regard.parallel` takes, what it sends and how much memory a rank needs, and says which to use. Bytes and "
        "messages are counted exactly; seconds are a roofline: work over measured rates, which depend on how large a "
        "block is, bytes over measured bandwidths, and at once what the implementation does at once."
    )
    lines += ["## An example", "", *_example(example, asked, pictures[1])]
    lines += ["## Predicted and measured", "", *_measured(timing, pictures[0])]
    lines += ["## How it predicts", "", *_bullets(_MODEL)]
    return "\n".join(lines)


def _example(found: Plan, asked: str, picture: str) -> list[str]:
    bound = re.sub(r"(--\S+) (?!--)", "\\1\0", asked)  # an option and its value stay on one line
    written = textwrap.wrap(bound, 110, subsequent_indent="    ", break_on_hyphens=False)
    lines = ["```", *" \\\n".join(written).replace("\0", " ").splitlines(), "```", ""]
    lines += paragraph(f"{found.job}. {' '.join(rates(found))}")
    for kind in get_args(Kind):
        lines += table((f"{kind} attention", *HEAD[1:]), plan_rows(found, kind))
    lines += _bullets([f"{line[0].upper()}{line[1:]}" for line in advice(found)])
    lines += [f"![Predicted seconds by number of ranks]({picture})", ""]
    return lines + paragraph(
        "*All layers* is both passes of all layers; the other times are one layer's. *Waiting* is what exceeds the "
        "busiest rank's kernels and copies: exposed transfers, and ranks that wait for one another. *Sent* and "
        "*messages* are the most of any rank, in both passes of a layer. *Memory* is a rank's, for queries, keys, "
        "values and outputs, what is kept for the backward pass, and what is under way; weights and other activations "
        "come on top."
    )


def _measured(timing: Timing, picture: str) -> list[str]:
    about, rows = timing.conditions, timing.rows
    counts = sorted(timing.machines)
    where = f"{about['machine']}, {about['cores']} cores, torch {about['torch']}, one thread each"
    lines = paragraph(
        f"{', '.join(map(str, counts))} processes of one machine ({where}) over gloo: causal, {JOB.heads} heads "
        f"({JOB.kv_heads} of keys) of {JOB.head_dim}, {JOB.dtype}, one layer. Medians of {about['rounds']} rounds in "
        "which the strategies take turns; a time ends with the last rank. Rates were probed by as many ranks at once "
        "in the same processes just before, and nothing was fitted. *Ratio* is measured over predicted; memory is the "
        "most that a rank held beyond its inputs."
    )
    for kind in get_args(Kind):
        own = [row for row in rows if row.kind == kind]
        lines += table((f"{kind} attention", *MEASURED[1:]), timed_rows(own))
        lines += paragraph(_summary(kind, own))
    lines += [f"![Predicted and measured times]({picture})", "", "Where ratios are far from 1:", "", *_bullets(_RATIOS)]
    probed = []
    for count in counts:
        found = timing.machines[count]
        probed.append(
            (
                str(count),
                *(show_quantity(kernel.forward.rates[-1], "FLOP/s") for kernel in (found.attention, found.triangle)),
                show_quantity(found.attention.backward.rates[-1], "FLOP/s"),
                show_quantity(found.linear.forward.rates[-1], "FLOP/s"),
                show_quantity(found.memory.rates[-1], "B/s"),
                "-" if count == 1 else show_quantity(found.link.bandwidth, "B/s"),
                "-" if count == 1 else show_seconds(found.link.latency),
            )
        )
    head = ("ranks at once", "block", "causal block", "block, backward", "linear", "memory", "link", "a message")
    return [*lines, *paragraph("What was probed, at the largest size:"), *table(head, probed)]


def timed_rows(rows: Sequence[Timed]) -> list[tuple[str, ...]]:
    """The measurements as rows of a table under :data:`MEASURED`."""
    return [_timed(row) for row in rows]


def _timed(row: Timed) -> tuple[str, ...]:
    forward, both, memory = (f"{ratio:.2f}" for ratio in row.ratios)
    return (
        row.prediction.name,
        str(row.ranks),
        show_tokens(row.length),
        *(show_seconds(row.prediction.forward.seconds), show_seconds(row.forward), forward),
        *(show_seconds(row.predicted_both), show_seconds(row.both), both),
        *(show_bytes(row.predicted_memory), show_bytes(row.memory), memory),
    )


def _summary(kind: Kind, rows: Sequence[Timed]) -> str:
    """Ratios in one sentence, and how often the predicted choice was the fastest."""
    text = []
    for place, what in enumerate(("forward", "both passes", "memory")):
        ratios = [row.ratios[place] for row in rows]
        text.append(f"{what} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    groups = sorted({(row.ranks, row.length) for row in rows if row.ranks > 1})
    lost = []
    for ranks, length in groups:
        some = [row for row in rows if (row.ranks, row.length) == (ranks, length)]
        chosen = min(some, key=lambda row: row.predicted_both)
        lost.append(chosen.both / min(row.both for row in some))
    chosen_text = ""
    if lost:
        right = sum(one < 1.005 for one in lost)
        chosen_text = (
            f" The strategy predicted to be the fastest was so in {right} of {len(lost)} cases; at worst it took "
            f"{max(lost):.2f} times as long as the fastest."
        )
    return f"Median ratio (range) for {kind} attention: {', '.join(text)}.{chosen_text}"


_RATIOS = [
    (
        "Local ranks are no cluster: a transfer is a copy by the same cores that compute, so it hides behind "
        "computation only where a core is idle. More ranks than cores take turns: while one waits another has its "
        "core, which makes imbalance (a contiguous ring) dearer in the prediction than in the measurement."
    ),
    (
        "Short calls are dominated by what the roofline leaves out: Python, starts of operations and threads, a "
        "message's way through the scheduler. On a GPU these are launches of kernels."
    ),
    (
        "On a CPU a result beyond some tens of megabytes is written to memory that the system first has to give. Rates "
        "by size show it, but between two probed sizes they are interpolated, and operations around a kernel that is "
        "itself as cheap as linear attention's are counted as passes over memory, not measured one by one."
    ),
    ("Probes and strategies run one after the other; whatever else the machine does in either minute is in the ratio."),
    "Memory leaves out what torch's own kernels hold while they run.",
]
_MODEL = [
    (
        "Ring: every rank and step is followed. A rank posts the next block's transfer, computes with the present "
        "block, and goes on when both are done; blocks that nobody needs are not sent, one message follows another on "
        "a rank's link, and the gradients of a block are sent on when its step is computed. Visible pairs are "
        "`Sharding.pairs`, so the busiest rank of each deal is known."
    ),
    (
        "Ulysses: two all-to-alls a pass, not hidden by anything, with whole rows of the rank's share of heads "
        "between them. A key/value head is sent to every rank that reads it."
    ),
    "Mesh: both. Every divisor of the number of ranks is tried as the size of a team; the best is shown.",
    (
        "`zeco`: a state's slices flow from rank to rank beside the local recurrence; `lasp2` gathers all states "
        "beside it; `lasp1` passes whole states before it. `overlap=False` waits for the states and saves the products "
        "that overlapping costs. Times of states are `sp_cost`'s."
    ),
    (
        "`--rate` sets one sustained rate for every kernel, for hardware that is not here; nothing is probed then. "
        "Where `--memory-bandwidth` is not given either, copies count as free. `--node 8 --node-bandwidth 400GB/s` "
        "says that so many ranks that follow one another have faster links; teams that fit into a node use them."
    ),
    (
        "A length that does not divide evenly counts as the next that does. Windows and packed documents are not "
        "planned for."
    ),
]
