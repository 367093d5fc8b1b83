"""Pictures of the planner: predicted time against the number of ranks, and predictions against measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from regard.bench.figures import new_figure
from regard.bench.plan.job import Kind
from regard.bench.plan.planner import Plan
from regard.bench.plan.quantities import show_bytes, show_quantity, show_tokens
from regard.bench.plan.timing import RANKS, Timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_measured", "draw_sweep"]

_STYLES = {
    "ring": ("#0072B2", "o"),
    "ulysses": ("#D55E00", "s"),
    "mesh": ("#009E73", "^"),
    "zeco": ("#0072B2", "o"),
    "lasp2": ("#D55E00", "s"),
    "lasp1": ("#009E73", "^"),
}
_DASHES = {"contiguous": ":", "striped": "--", "overlap=False": "--"}
_TITLES: dict[Kind, str] = {"exact": "exact attention", "linear": "linear attention"}


def draw_sweep(plans: Sequence[Plan]) -> Figure:
    """Seconds of each strategy by ranks, beside perfect scaling of one rank's time; those without room are left out."""
    figure = new_figure((11.0, 4.8))
    for panel, kind in zip(figure.subplots(1, 2), get_args(Kind), strict=True):
        _lines(panel, plans, kind)
        panel.set_title(_TITLES[kind], fontsize=10)
    job, machine = plans[-1].job, plans[-1].machine
    passes = "forward and backward" if job.backward else "forward"
    figure.suptitle(
        f"Predicted seconds, {passes}: {show_tokens(job.length)} tokens, {job.layers} layers, {job.heads} heads "
        f"({job.kv_heads} of keys) of {job.head_dim}, links of {show_quantity(machine.link.bandwidth, 'B/s')}"
        + ("" if job.memory is None else f"; where {show_bytes(job.memory)} a rank suffice"),
        fontsize=10,
    )
    return figure


def _lines(panel: Axes, plans: Sequence[Plan], kind: Kind) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    alone = next(
        (one for found in plans if found.job.ranks == 1 for one in found.predictions if one.kind == kind), None
    )
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for found in plans:
        for one in found.predictions:
            if one.kind == kind and one.reason is None and found.job.ranks > 1:
                series.setdefault((one.strategy, one.deal), []).append((found.job.ranks, one.seconds(found.job)))
    if alone is not None:
        seconds = alone.seconds(plans[0].job)
        counts = [found.job.ranks for found in plans]
        panel.plot(counts, [seconds / count for count in counts], color="0.6", linewidth=4, alpha=0.5, zorder=0)
        panel.annotate("one rank's time, shared out", (counts[0], seconds), fontsize=8, color="0.4", va="bottom")
    for (strategy, deal), points in series.items():
        colour, marker = _STYLES[strategy]
        label = strategy if strategy in ("ulysses", "mesh") else f"{strategy}, {deal}" if deal else strategy
        style = "-" if strategy in ("ulysses", "mesh") else _DASHES.get(deal, "-")
        panel.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("ranks", fontsize=9)
    panel.set_ylabel("seconds", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8, frameon=False)


def draw_measured(rows: Sequence[Timed]) -> Figure:
    """Predicted against measured milliseconds, forward and with the backward pass; on the line they are equal."""
    figure = new_figure((9.0, 4.6))
    colours = dict(zip(RANKS, ("#0072B2", "#D55E00", "#009E73"), strict=True))
    for panel, kind in zip(figure.subplots(1, 2), get_args(Kind), strict=True):
        own = [row for row in rows if row.kind == kind]
        ends: list[float] = []
        for ranks in sorted({row.ranks for row in own}):
            some = [row for row in own if row.ranks == ranks]
            for marker, name in (("o", "forward"), ("^", "with backward")):
                pairs = [
                    (row.prediction.forward.seconds, row.forward) if marker == "o" else (row.predicted_both, row.both)
                    for row in some
                ]
                said, took = ([1e3 * pair[i] for pair in pairs] for i in (0, 1))
                ends += [*said, *took]
                label = f"{ranks} rank{'s' * (ranks > 1)}, {name}"
                panel.scatter(said, took, s=26, marker=marker, color=colours.get(ranks, "0.3"), alpha=0.75, label=label)
        span = [min(ends, default=1.0) * 0.8, max(ends, default=1.0) * 1.25]
        panel.plot(span, span, color="0.5", linewidth=1, zorder=0)
        panel.set(xscale="log", yscale="log", xlim=span, ylim=span, aspect="equal")
        panel.set_title(_TITLES[kind], fontsize=10)
        panel.set_xlabel("predicted, ms", fontsize=9)
        panel.set_ylabel("measured, ms", fontsize=9)
        panel.tick_params(labelsize=8, which="both")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, frameon=False)
    return figure
