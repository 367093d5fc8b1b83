"""``regard plan``: one long sequence over many ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from regard.cli.arguments import save_figure, written_flag
from regard.cli.group import console, main
from regard.errors import MissingExtraError, OptionError

__all__ = ["plan_command"]


@main.command("plan")
@click.option("--length", help="Tokens of the sequence: 65536, 128k (131072) or 1M.")
@click.option("--ranks", type=int, help="Ranks that share it.")
@click.option("--bandwidth", help="What a rank sends a second, e.g. 50GB/s [default: measured between processes here].")
@click.option("--latency", help="What each message takes besides, e.g. 10us [default: 0s, or measured].")
@click.option("--node", type=click.IntRange(min=1), default=1, help="Ranks that follow one another on faster links.")
@click.option("--node-bandwidth", help="That of those links, e.g. 400GB/s.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences.")
@click.option("--heads", type=int, default=32, show_default=True, help="Query heads.")
@click.option("--kv-heads", type=int, default=8, show_default=True, help="Key/value heads.")
@click.option("--head-dim", type=int, default=128, show_default=True, help="Width of a head.")
@click.option("--layers", type=int, default=32, show_default=True, help="Layers of attention.")
@click.option("--dtype", default="bfloat16", show_default=True, help="float32, float64, bfloat16 or float16.")
@click.option("--causal/--no-causal", default=True, show_default=True)
@click.option("--backward/--no-backward", default=True, show_default=True, help="Training, or a forward pass alone.")
@click.option("--overlap/--no-overlap", default=True, show_default=True, help="Transfers run while kernels do.")
@click.option("--memory", help="What a rank has for attention, e.g. 80GB [default: no limit].")
@click.option("--rate", help="Sustained rate of a rank, e.g. 400TFLOP/s, to plan for others [default: measured here].")
@click.option("--memory-bandwidth", help="e.g. 3TB/s [default: measured here; with --rate, no limit].")
@click.option("--measure", "measuring", is_flag=True, help="Time all strategies on 1, 2 and 4 local ranks (minutes).")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for plan.json and plan.png.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --measure: page (.md) of it and of this plan, or of an example; with plan.json and pictures beside it.",
)
@click.pass_context
def plan_command(
    ctx: click.Context,
    measuring: bool,
    out: Path | None,
    report: Path | None,
    **settings: Any,
) -> None:
    """Predict time and memory of one long sequence over many ranks, for every strategy, and say which to use."""
    from regard.bench.kept import save_kept
    from regard.bench.plan.page import EXAMPLE, HEAD, MEASURED, page, plan_rows, rates, timed_rows
    from regard.bench.plan.picture import draw_measured, draw_sweep
    from regard.bench.plan.planner import advice, plan, sweep
    from regard.bench.plan.probes import job_and_machine
    from regard.bench.plan.timing import measure

    if report is not None and not measuring:
        raise OptionError("--report is a page of predictions beside measurements: give --measure as well.")
    if (out or report) and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("Drawing", "plot")
    given = {
        name: value
        for name, value in settings.items()
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if not given and measuring:
        settings, given = {**settings, **EXAMPLE}, dict(EXAMPLE)
    with console.status("what is not given is measured here, once"):
        job, machine = job_and_machine(**settings)
    found = plan(job, machine)
    console.print(f"{job}.", highlight=False)
    for line in rates(found):
        console.print(line, style="dim", highlight=False)
    for kind in ("exact", "linear"):
        table = Table(title=f"{kind} attention", header_style="bold", pad_edge=False, box=None)
        for column in HEAD:
            table.add_column(column, justify="left" if column in ("strategy", "") else "right")
        for row in plan_rows(found, "exact" if kind == "exact" else "linear"):
            table.add_row(*row)
        console.print(table)
    for line in advice(found):
        console.print(line, highlight=False)
    if out is not None:
        save_kept(out / "plan.json", {"version": 1, "plan": found.content()})
        console.print(f"wrote {out / 'plan.json'}")
        save_figure(draw_sweep(sweep(job, machine)), out / "plan.png")
    if not measuring:
        return
    timing = measure(report=lambda line: console.print(line, style="dim", highlight=False))
    table = Table(title="measured on local ranks", header_style="bold", pad_edge=False, box=None)
    for column in MEASURED:
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in timed_rows(timing.rows):
        table.add_row(*row)
    console.print(table)
    if out is not None:
        timing.save(out / "measured.json")
        console.print(f"wrote {out / 'measured.json'}")
        save_figure(draw_measured(timing.rows), out / "measured.png")
    if report is not None:
        timing.save(report.with_suffix(".json"), {"example": found.content()})
        pictures = [report.parent / "pictures" / f"{report.stem}{which}.png" for which in ("_measured", "")]
        save_figure(draw_measured(timing.rows), pictures[0])
        save_figure(draw_sweep(sweep(job, machine)), pictures[1])
        asked = " ".join(["regard plan", *(written_flag(name, value) for name, value in given.items())])
        command = "regard plan --measure" + ("" if given == EXAMPLE else asked.removeprefix("regard plan"))
        places = [f"pictures/{picture.name}" for picture in pictures]
        text = page(timing, found, asked, f"{command} --report {report.as_posix()}", (places[0], places[1]))
        report.write_text(text, encoding="utf-8")
        console.print(f"wrote {report} and {report.with_suffix('.json')}")
