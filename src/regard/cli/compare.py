"""``regard compare | frontier``: what mechanisms cost and keep in a trained model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from regard.cli.arguments import leave_stopped, read_numbers, read_options, save_figure, table_of
from regard.cli.group import console, main
from regard.errors import MissingExtraError

if TYPE_CHECKING:
    from regard.bench.compare import Comparison
    from regard.bench.frontier import Frontier

__all__ = ["compare_command", "comparison_table", "frontier_command", "frontier_table"]


@main.command("compare")
@click.option("--model", default="nano", show_default=True, help="nano, a folder, or a hub id.")
@click.option("--text", help="File or folder of text [default: held-out source of the standard library].")
@click.option("--mechanisms", help="Comma-separated names [default: all].")
@click.option("--training-free", is_flag=True, help="By default only those that a trained model can be given as it is.")
@click.option("--length", default=2048, show_default=True, help="Tokens in a window of text.")
@click.option("--windows", default=8, show_default=True, help="Windows of text.")
@click.option("--option", "settings", multiple=True, metavar="KEY.NAME=VALUE", help="e.g. moba.top_k=4")
@click.option("--train", default=0, show_default=True, help="Fine-tuning steps for those that need training.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for results.json and report.html."
)
def compare_command(
    model: str,
    text: str | None,
    mechanisms: str | None,
    training_free: bool,
    length: int,
    windows: int,
    settings: tuple[str, ...],
    train: int,
    out: Path | None,
) -> None:
    """Measure what mechanisms cost and change on a real model and real text."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("regard compare", "transformers")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from regard.bench.compare import Comparison, Plan, compare, default_mechanisms
    from regard.bench.report import write_report

    options = read_options(settings)
    names = (
        tuple(part.strip() for part in mechanisms.split(","))
        if mechanisms
        else tuple(default_mechanisms(training_free))
    )
    plan = Plan(model, text, names, length, windows, options, train)
    stopped = False
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading", total=len(names))

        def tell(line: str) -> None:
            name = line.split(":")[0]
            progress.update(task, description=line, completed=names.index(name) if name in names else None)
            if not console.is_terminal and line.endswith((": measuring", "an earlier run")):
                click.echo(line)

        try:
            result: Comparison | None = compare(plan, out=out, report=tell)
            progress.update(task, description="done", completed=len(names))
        except KeyboardInterrupt:
            stopped, result = True, None if out is None else Comparison.load(out)
    if result is not None:
        console.print(comparison_table(result))
        for row in result.rows:
            if row.reason:
                console.print(f"{row.mechanism}: {row.group}. {row.reason}", style="dim", highlight=False)
        if out is not None:
            console.print(f"wrote {out / 'results.json'} and {write_report(result, out)}")
    if stopped:
        leave_stopped()


def comparison_table(result: Comparison) -> Table:
    """The comparison as a terminal table."""
    from rich import box

    about = result.fingerprint
    table = Table(
        title=f"{about['model']} on {about['windows']} windows of {about['length']} tokens ({about['text']})",
        caption="pairs, prefill, decode, memory: ratios to full attention, measured in turn in this run",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("mechanism", no_wrap=True)
    for column in ("bits/byte", "change", "KL", "pairs", "prefill", "decode", "memory"):
        table.add_column(column, justify="right", no_wrap=True)

    def cell(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    for group in ("exact", "training-free", "trained", "untrained", "failed"):
        rows = [row for row in result.rows if row.group == group]
        if rows:
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        for row in rows:
            table.add_row(
                f"  {row.mechanism}",
                cell(row.bits_per_byte, "{:.3f}"),
                cell(row.change, "{:+.3f}"),
                cell(row.kl, "{:.4f}"),
                cell(row.pairs, "{:.2f}"),
                cell(row.prefill_ratio, "{:.2f}"),
                cell(row.decode_ratio, "{:.2f}"),
                cell(row.memory_ratio, "{:.2f}"),
            )
    return table


@main.command("frontier")
@click.option("--model", default="nano", show_default=True, help="nano, a folder or a hub id.")
@click.option("--text", type=click.Path(), help="File or folder to read [default: held-out standard library].")
@click.option("--mechanisms", help="Comma-separated names [default: all that have settings to sweep].")
@click.option("--lengths", default="2048,8192", show_default=True, help="Tokens in a window of text; '' for none.")
@click.option("--tokens", default=8192, show_default=True, help="Tokens of text at each length.")
@click.option("--interpolate", is_flag=True, help="Squeeze positions of windows beyond the model's context into it.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/frontier"),
    show_default=True,
    help="Folder for frontier.json and frontier.png; what is there is not measured again.",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Page of what was found (.md).")
def frontier_command(
    model: str,
    text: str | None,
    mechanisms: str | None,
    lengths: str,
    tokens: int,
    interpolate: bool,
    out: Path,
    report: Path | None,
) -> None:
    """Measure what sparse mechanisms keep against what they compute, on text, smooth fields and white noise."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from regard.bench.frontier import Frontier, Plan, frontier
    from regard.bench.frontier_page import page
    from regard.bench.frontier_picture import draw_frontier

    sizes = read_numbers(lengths, "--lengths")
    if sizes and importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("regard frontier on text", "transformers")
    names = tuple(part.strip() for part in mechanisms.split(",")) if mechanisms else ()
    plan = Plan(model, text, names, sizes, tokens, interpolate)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    stopped, result = False, None
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading", total=None)
        try:
            result = frontier(
                plan,
                out=out,
                report=lambda done, total, line: progress.update(task, completed=done, total=total, description=line),
            )
        except KeyboardInterrupt:
            stopped, result = True, Frontier.load(out)
    if result is not None:
        for workload in result.workloads:
            console.print(frontier_table(result, workload))
        figure = draw_frontier(result)
        save_figure(figure, out / "frontier.png")
        console.print(f"wrote {out / 'frontier.json'}")
        if report is not None:
            picture = report.parent / "pictures" / "frontier.png"
            save_figure(figure, picture)
            command = f"regard frontier --lengths {lengths} --report {report}"
            report.write_text(page(result, "pictures/frontier.png", command), encoding="utf-8")
            console.print(f"wrote {report}")
    if stopped:
        leave_stopped()


def frontier_table(result: Frontier, workload: str) -> Table:
    """Quality and recalled mass at a few densities, read off the measured curves."""

    from regard.bench.frontier_page import curves

    head, rows = curves(result, workload)
    base = f", full attention {result.full[workload]:.3f}" if workload in result.full else ""
    return table_of(head, rows, title=f"{workload}: at a share of the pairs{base}")
