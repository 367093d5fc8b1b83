"""The command: ``regard list | show | draw | simulate | plan | compare | reproduce | env``."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from regard.errors import MissingExtraError, OptionError, RegardError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.progress import Progress

    from regard.bench.compare import Comparison
    from regard.bench.frontier import Frontier
    from regard.bench.study import Outcome, Study, StudyResult
    from regard.catalogue import Entry

__all__ = ["main"]

console = Console()


class _Commands(click.Group):
    """Shows this library's errors as one readable line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RegardError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="regard")
def main() -> None:
    """Every attention mechanism behind one PyTorch interface."""


@main.command("list")
@click.option("--kind", help="mechanism, layer, feature, ...")
@click.option("--home", help="dense, local, sparse, linear, ...")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--markdown", is_flag=True, help="As the table of the README.")
def list_command(kind: str | None, home: str | None, as_json: bool, markdown: bool) -> None:
    """List what there is."""
    from regard.registry import catalogue

    found = catalogue(kind, home)
    if not found:
        raise OptionError(f"Nothing is of kind {kind!r} and home {home!r}. Run `regard list` to see all.")
    if as_json:
        click.echo(
            json.dumps([{"key": e.key, "title": e.title, "kind": e.kind, "home": e.home} for e in found], indent=1)
        )
        return
    rows = [_facts(entry) for entry in found]
    if markdown:
        click.echo(markdown_table(rows))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in rows[0]:
        table.add_column(column, no_wrap=column != "what it is", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _facts(entry: Entry) -> dict[str, str]:
    from regard.registry import get

    cls: Any = get(entry.key) if entry.module else None
    evidence = entry.evidence
    return {
        "key": entry.key,
        "kind": entry.kind,
        "causal": "yes" if "causal-self" in getattr(cls, "patterns", ()) else "no",
        "training": "" if cls is None else "needed" if getattr(cls, "needs_training", False) else "free",
        "growth": getattr(cls, "growth", ""),
        "evidence": "" if evidence is None else "holds" if evidence["holds"] else "does not hold",
        "what it is": entry.summary,
    }


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as a Markdown table."""
    from regard.bench.markdown import table

    return "\n".join(table(list(rows[0]), [list(row.values()) for row in rows])[:-1])


@main.command()
@click.argument("key")
def show(key: str) -> None:
    """Show one: what it is, formula, options, patterns, cost, claim, evidence, its map."""
    from regard.bench.pictures import implied_map, text_map
    from regard.cost import AttentionShape
    from regard.mechanism import Mechanism
    from regard.registry import build, describe, get, options

    entry = describe(key)
    source = f"{entry.year}, arXiv {entry.arxiv}" if entry.paper else "no paper of its own"
    console.print(f"[bold]{entry.key}[/bold]  {entry.title} ({source})\n")
    console.print(entry.summary + "\n")
    if entry.formula:
        console.print("[bold]Formula[/bold]\n" + entry.formula.strip() + "\n", highlight=False, markup=True)
    if entry.module:
        cls: Any = get(key)
        console.print("[bold]Options[/bold]")
        for name, parameter in options(key).items():
            default = "required" if parameter.default is inspect.Parameter.empty else repr(parameter.default)
            console.print(f"  {name} = {default}", highlight=False)
        console.print(f"\n[bold]Patterns[/bold]  {', '.join(sorted(cls.patterns))}")
        console.print(f"[bold]Exact[/bold] {cls.exact}   [bold]Needs training[/bold] {cls.needs_training}")
        console.print(f"[bold]Growth[/bold]  {cls.growth}")
        if issubclass(cls, Mechanism):
            module = build(key, entry.compare, num_heads=8, num_kv_heads=8, head_dim=64, layer_index=0, num_layers=2)
            assert isinstance(module, Mechanism)
            causal = "causal-self" in cls.patterns
            cost = module.cost(AttentionShape(4096, 4096, num_heads=8, causal=causal))
            state = f", {cost.state_bytes / 1e6:.2f} MB of state" if module.decodes else ""
            console.print(f"[bold]Cost[/bold]  {cost.flops / 1e9:.2f} GFLOP at 4096 tokens, 8 heads of 64{state}")
            console.print("\n[bold]Implied attention[/bold] (head 0, small random input)")
            console.print(text_map(implied_map(key)[0]), highlight=False)
    if entry.claim:
        console.print(f"\n[bold]Claim[/bold]\n{entry.claim.strip()}", highlight=False, markup=True)
    evidence = entry.evidence
    if evidence is not None:
        verdict = "holds" if evidence["holds"] else "does not hold"
        console.print(f"\n[bold]Evidence[/bold] ({evidence['date']}, `{evidence['command']}`): {verdict}")
        console.print_json(data=evidence["measured"])
        console.print(evidence.get("note", ""), highlight=False)
        if entry.picture is not None:
            console.print(f"[bold]Picture[/bold]  {entry.picture}", highlight=False, soft_wrap=True)


@main.command("draw")
@click.argument("key")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="PNG or SVG file [default: KEY.png]")
@click.option("--length", default=64, show_default=True, help="Tokens of the small input, without --grid.")
@click.option("--grid", metavar="NxM", help="Draw what one query sees on this grid: 64, 16x16 or 4x8x8.")
@click.option("--query", metavar="N,M", help="That query's position, from 0 [default: the middle].")
@click.option("--causal/--no-causal", default=None, help="With --grid [default: causal where nothing else is defined].")
@click.option("--option", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the mechanism.")
def draw_command(
    key: str,
    out: Path | None,
    length: int,
    grid: str | None,
    query: str | None,
    causal: bool | None,
    settings: tuple[str, ...],
) -> None:
    """Draw the implied attention map of KEY, or with --grid what one query sees."""
    from regard.bench.pictures import draw, draw_field
    from regard.bench.simulate import parse_sides

    options = dict(_setting(setting) for setting in settings)
    target = _picture(out or Path(f"{key}.png"))
    if grid is None:
        if query is not None or causal is not None:
            raise OptionError("--query and --causal speak of one query's view: give its --grid too, e.g. --grid 16x16.")
        figure = draw(key, length, **options)
    else:
        space = parse_sides(grid, "The grid")
        place = None if query is None else _position(query, space)
        figure = draw_field(key, space, place, causal=causal, **options)
    _save(figure, target)


@main.command("reproduce")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the result.")
def reproduce_command(keys: tuple[str, ...], out: Path | None) -> None:
    """Run the smallest honest experiment of a paper's claim, and keep what it measured."""
    from regard.reproduce import reproduce

    for key in keys:
        console.print(f"[bold]{key}[/bold]")
        result = reproduce(key, lambda line: console.print(f"  {line}", style="dim", highlight=False), out)
        console.print(f"\nThe paper: {result['paper_claim']}", highlight=False)
        console.print_json(data=result["measured"])
        verdict = "[green]holds[/green]" if result["holds"] else "[yellow]does not hold[/yellow]"
        console.print(f"The effect {verdict} here ({result['seconds']} s). {result['note']}\n", highlight=False)


@main.command("inspect")
@click.option("--model", default="nano", show_default=True, help="nano, a folder, or a hub id.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to look at [default: held-out source of the standard library].",
)
@click.option(
    "--image", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Image, for a vision model."
)
@click.option("--max-tokens", default=1024, show_default=True, type=click.IntRange(2, 16384), help="Of the text.")
@click.option("--mechanism", metavar="KEY", help="Give the model this attention first [default: its own].")
@click.option("--option", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the mechanism.")
@click.option(
    "--ablate-tokens", default=512, show_default=True, type=click.IntRange(0), help="To ablate heads on; 0: not at all."
)
@click.option("--out", default="runs/inspect", show_default=True, type=click.Path(file_okay=False, path_type=Path))
def inspect_command(
    model: str,
    text: Path | None,
    image: Path | None,
    max_tokens: int,
    mechanism: str | None,
    settings: tuple[str, ...],
    ablate_tokens: int,
    out: Path,
) -> None:
    """Write explore.html: a page on which to explore a model's attention."""
    from regard.inspect.exploration import explore_image, explore_text
    from regard.inspect.explore_page import write_explore
    from regard.inspect.loading import load_image, load_text_model, load_vision_model
    from regard.retrofit import retrofit

    if text is not None and image is not None:
        raise OptionError("Give --text or --image, one of the two.")
    if settings and mechanism is None:
        raise OptionError("--option sets options of a mechanism: name it with --mechanism.")
    name = Path(model).name if mechanism is None else f"{Path(model).name} with {mechanism}"
    with console.status("loading") as status:
        network, reader = load_text_model(model) if image is None else load_vision_model(model)
        if mechanism is not None:
            retrofit(network, mechanism, **dict(_setting(setting) for setting in settings))
        if image is not None:
            pixels, picture = load_image(image, reader)
            found = explore_image(network, pixels, picture, name=name, ablate=ablate_tokens > 0, progress=status.update)
        else:
            from regard.bench.subjects import read_text

            given = text.read_text(encoding="utf-8") if text is not None else max(read_text(None), key=len)
            found = explore_text(
                network,
                reader,
                given,
                name=name,
                max_tokens=max_tokens,
                ablate_tokens=ablate_tokens,
                progress=status.update,
            )
    target = write_explore(found, out)
    console.print(f"wrote {target} ({target.stat().st_size / 2**20:.1f} MB): open it in a browser")


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

    options = _options_by_key(settings)
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
        _leave_stopped()


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

    sizes = _numbers(lengths, "--lengths")
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
        _save(figure, out / "frontier.png")
        console.print(f"wrote {out / 'frontier.json'}")
        if report is not None:
            picture = report.parent / "pictures" / "frontier.png"
            _save(figure, picture)
            command = f"regard frontier --lengths {lengths} --report {report}"
            report.write_text(page(result, "pictures/frontier.png", command), encoding="utf-8")
            console.print(f"wrote {report}")
    if stopped:
        _leave_stopped()


def frontier_table(result: Frontier, workload: str) -> Table:
    """Quality and recalled mass at a few densities, read off the measured curves."""
    from rich.table import Table

    from regard.bench.frontier_page import curves

    head, rows = curves(result, workload)
    base = f", full attention {result.full[workload]:.3f}" if workload in result.full else ""
    table = Table(title=f"{workload}: at a share of the pairs{base}")
    for column in head:
        table.add_column(column, justify="left" if column == head[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


@main.command("train")
@click.option("--task", required=True, help="Comma-separated tasks, or all; a wrong name shows them.")
@click.option("--mechanisms", required=True, help="Comma-separated names; a home such as linear is all of it and full.")
@click.option("--length", type=click.IntRange(min=1), help="Tokens in training [default: the task's].")
@click.option("--test-lengths", help="Tokens in tests, comma-separated [default: the task's].")
@click.option("--budget", default="60s", show_default=True, help="Training time of each mechanism: 90s, 3m, 1h.")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each, seeds from 0 on."
)
@click.option("--option", "settings", multiple=True, metavar="KEY.NAME=VALUE", help="e.g. moba.top_k=4")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for study.json and checkpoints; what is there is gone on from. Several tasks or seeds have folders of "
    "their own in it.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Page (.md) of this study and of those whose folders stand beside --out; of several tasks, their table.",
)
def train_command(
    task: str,
    mechanisms: str,
    length: int | None,
    test_lengths: str | None,
    budget: str,
    seeds: int,
    settings: tuple[str, ...],
    out: Path | None,
    report: Path | None,
) -> None:
    """Train small models that differ in their attention alone, on one task or many, and test them."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from regard.bench.study import Study, StudyResult, parse_seconds, run_study
    from regard.bench.study_batch import mechanism_names
    from regard.bench.study_page import page
    from regard.bench.study_tasks import task_names

    if report is not None and out is None:
        raise OptionError("--report is a page of what is kept: give --out as well.")
    tasks, names, options = task_names(task), mechanism_names(mechanisms), _options_by_key(settings)
    tests = None if test_lengths is None else _numbers(test_lengths, "--test-lengths")
    if len(tasks) > 1 and (length, tests) != (None, None):
        raise OptionError("Lengths are of one task: give --length and --test-lengths with a single --task.")
    seconds = parse_seconds(budget)
    studies = [
        Study.of(name, names, length, tests, seconds=seconds, seed=seed, options=options)
        for name in tasks
        for seed in range(seeds)
    ]
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    if len(studies) > 1:
        command = f"regard train --task {task} --mechanisms {mechanisms} --budget {budget}"
        command += f" --seeds {seeds}" * (seeds > 1) + "".join(f" --option {setting}" for setting in settings)
        _train_many(
            studies, out, report, f"{command} --out {out} --report {report}", Progress(*columns, console=console)
        )
        return
    stopped, result, study = False, None, studies[0]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("loading", total=1.0)
        try:
            result = run_study(study, out, lambda line, share: progress.update(bar, completed=share, description=line))
        except KeyboardInterrupt:
            stopped, result = True, None if out is None else StudyResult.load(out)
    if result is not None:
        console.print(study_table(result))
        for outcome in result.outcomes:
            if outcome.reason:
                console.print(f"{outcome.mechanism}: {outcome.reason}", style="dim", highlight=False)
        if out is not None:
            console.print(f"wrote {out / 'study.json'}")
            if report is not None:
                found = [StudyResult.load(file.parent) for file in sorted(out.parent.glob("*/study.json"))]
                report.write_text(page([study for study in found if study is not None]), encoding="utf-8")
                console.print(f"wrote {report}")
    if stopped:
        _leave_stopped()


def _train_many(studies: list[Study], out: Path | None, report: Path | None, command: str, progress: Progress) -> None:
    """``regard train`` for several tasks or seeds: runs, their table and page."""
    from regard.bench.batch_page import batch_page, batch_rows
    from regard.bench.study_batch import kept_results, run_batch

    stopped, results = False, []

    def tell(study: Study, outcome: Outcome) -> None:
        found = ", ".join(f"{score:.3f} at {length}" for length, score in outcome.scores.items())
        line = f"{study.task}, seed {study.seed}, {outcome.mechanism}: {found or outcome.reason}"
        progress.console.print(line, style="dim", highlight=False, soft_wrap=True)
        # After every run, as all of them may take hours.
        if report is not None and out is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(batch_page(kept_results(studies, out), command), encoding="utf-8")

    with progress:
        bar = progress.add_task("loading", total=sum(len(study.mechanisms) for study in studies))
        try:
            results = run_batch(
                studies, out, lambda line, done: progress.update(bar, completed=done, description=line), tell
            )
        except KeyboardInterrupt:
            stopped, results = True, [] if out is None else kept_results(studies, out)
    if results:
        head, rows = batch_rows(results)
        for part in range(1, len(head), 5):
            table = Table(box=None, header_style="bold", pad_edge=False)
            for column in (head[0], *head[part : part + 5]):
                table.add_column(column, justify="left" if column == head[0] else "right", no_wrap=True)
            for row in rows:
                table.add_row(row[0], *row[part : part + 5])
            console.print(table)
            console.print()
        if out is not None:
            console.print(f"wrote {out}")
        if report is not None:
            console.print(f"wrote {report}")
    if stopped:
        _leave_stopped()


def study_table(result: StudyResult) -> Table:
    """The task's score by length."""
    from regard.bench.study_page import rows_of
    from regard.bench.study_tasks import TASKS

    facts = result.fingerprint
    score = TASKS[facts["task"]].at(facts["length"]).metric
    table = Table(title=f"{facts['task']}: {score} after {facts['seconds']:.0f} s at {facts['length']} tokens")
    head, rows = rows_of(result)
    for column in head:
        table.add_column(column, justify="left" if column == "mechanism" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


@main.command("language")
@click.option("--mechanisms", required=True, help="Comma-separated names; a home such as dense is all of it.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each, from 0 on.")
@click.option("--steps", type=click.IntRange(min=20), default=600, show_default=True, help="Of training.")
@click.option("--option", "settings", multiple=True, metavar="KEY.NAME=VALUE", help="e.g. gda.num_noise_heads=2")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for language.json and checkpoints; what is there is not trained again.",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Page (.md) with table and picture.")
def language_command(
    mechanisms: str, seeds: int, steps: int, settings: tuple[str, ...], out: Path | None, report: Path | None
) -> None:
    """Train small language models that differ in their attention alone, at equal parameters and at equal FLOPs."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from regard.bench.language_comparison import (
        LanguageResult,
        LanguageRun,
        LanguageSettings,
        run_languages,
        variants_of,
    )
    from regard.bench.language_page import language_page, language_rows
    from regard.bench.language_picture import draw_languages
    from regard.bench.study_batch import mechanism_names

    if report is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("The page's picture", "plot")
    plan = LanguageSettings(steps=steps)
    variants = variants_of(mechanism_names(mechanisms), _options_by_key(settings), plan.length)
    command = f"regard language --mechanisms {mechanisms}" + f" --seeds {seeds}" * (seeds != 3)
    command += f" --steps {steps}" * (steps != 600) + "".join(f" --option {setting}" for setting in settings)
    command += ("" if out is None else f" --out {out}") + f" --report {report}"
    found: list[LanguageResult] = []

    def tell(result: LanguageResult, run: LanguageRun) -> None:
        found[:] = [result]
        bits = ", ".join(f"{value:.3f} bits at equal {name}" for name, value in run.bits.items())
        line = f"{run.label}, seed {run.seed}: {run.reason or bits}"
        progress.console.print(line, style="dim", highlight=False, soft_wrap=True)
        # After every run, as all of them may take hours.
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(language_page(result, command, f"pictures/{report.stem}.png"), encoding="utf-8")

    stopped = False
    with Progress(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("loading", total=seeds * len(variants))

        def update(line: str, done: float) -> None:
            progress.update(bar, completed=done, description=line)

        try:
            run_languages(plan, variants, seeds, out, update, tell)
        except KeyboardInterrupt:
            stopped = True
    for result in found:
        head, rows = language_rows(result)
        shown = Table(box=None, header_style="bold", pad_edge=False)
        for column in head:
            shown.add_column(column, justify="left" if column == head[0] else "right", no_wrap=column == head[0])
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        if report is not None:
            _save(draw_languages(result), report.parent / "pictures" / f"{report.stem}.png")
            console.print(f"wrote {report}")
    if stopped:
        _leave_stopped()


@main.command("simulate")
@click.option("--grid", metavar="NxM", help="Tokens per axis: 4096, 64x64 or 30x48x80.")
@click.option("--window", metavar="NxM", help="Keys per axis that a query sees; one number for all axes.")
@click.option("--stride", default="1", show_default=True, metavar="NxM", help="Queries per axis that share a window.")
@click.option("--tile", metavar="Q[:K]", help="Tiles of queries and of keys, e.g. 4x8x8:2x8x8 [default: as gna's own].")
@click.option("--causal", metavar="AXES", help="Causal axes, counted from 0, e.g. 0 or 0,1.")
@click.option("--dynamic", is_flag=True, help="Search and draw with tiles of keys that begin with the window.")
@click.option("--search", "searching", is_flag=True, help="Search stride and tile for this window.")
@click.option("--tile-volume", metavar="Q[:K]", help="Tokens of a tile in the search [default: those of --tile].")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Settings to show of a search.")
@click.option("--query", metavar="N,M", help="Position whose tile --out shows [default: the middle].")
@click.option("--measure", "measuring", is_flag=True, help="Time many settings beside what is predicted for them.")
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("runs/simulate.json"),
    show_default=True,
    help="Where --measure keeps its timings; what is there is not measured again.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Picture: visited tiles, or of --measure.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Page of what --measure found (.md).")
def simulate_command(
    grid: str | None,
    window: str | None,
    stride: str,
    tile: str | None,
    causal: str | None,
    dynamic: bool,
    searching: bool,
    tile_volume: str | None,
    top: int,
    query: str | None,
    measuring: bool,
    results: Path,
    out: Path | None,
    report: Path | None,
) -> None:
    """Count what tiles make of a neighbourhood's sparsity: bounds, the best stride and tile, the tiles visited."""
    from functools import partial

    from rich.progress import track

    from regard.bench.simulate import bounds, parse_sides, parse_tile, search, sides, visited_tiles
    from regard.bench.tile_tables import bounds_table, search_tables
    from regard.layers.tiles import balanced_tile

    if out is not None:
        _picture(out)
    if measuring:
        if grid or window or searching:
            raise OptionError("--measure times settings of its own: give it no --grid, --window or --search.")
        _measure_tiles(results, out, report)
        return
    if grid is None or window is None:
        raise OptionError(
            "A simulation needs --grid and --window, e.g. --grid 64x64 --window 13; or ask for --measure."
        )
    if report is not None:
        raise OptionError("--report writes what --measure found: give both.")
    space = parse_sides(grid, "The grid")
    axes = len(space)
    wide, step = parse_sides(window, "The window", axes), parse_sides(stride, "The stride", axes)
    q_tile, kv_tile = (balanced_tile(space),) * 2 if tile is None else parse_tile(tile, axes)
    flags = _causal_axes(causal, axes)
    title = f"grid {sides(space)}, window {sides(wide)}"
    if searching:
        volumes = [math.prod(t) for t in (q_tile, kv_tile)]
        if tile_volume is not None:
            parts = [parse_sides(part, "The tile volume", 1)[0] for part in tile_volume.split(":")]
            volumes = [parts[0], parts[-1]]
        progress = partial(track, description="strides and tiles", console=console, transient=True)
        found = search(
            space,
            wide,
            *volumes,
            causal=flags,
            kv_start="dynamic" if dynamic else "static",
            progress=progress,
        )
        for shown in search_tables(found, top, f"{title}, tiles of {volumes[0]} queries and {volumes[1]} keys"):
            console.print(shown)
        step, q_tile, kv_tile = found[0].stride, found[0].q_tile, found[0].kv_tile
    else:
        what = f"{title}, stride {sides(step)}, tiles of {sides(q_tile)} queries and {sides(kv_tile)} keys"
        console.print(bounds_table(bounds(space, wide, step, q_tile, kv_tile, flags), what))
    if out is not None:
        from regard.bench.tile_pictures import draw_visited

        visited = visited_tiles(
            space,
            wide,
            step,
            q_tile,
            kv_tile,
            query=None if query is None else _position(query, space),
            causal=flags,
            kv_start="dynamic" if dynamic else "static",
        )
        tiles = f"tiles of {sides(q_tile)} queries and {sides(kv_tile)} keys"
        _save(draw_visited(visited, f"{title}, stride {sides(step)}, {tiles}"), out)


def _measure_tiles(results: Path, out: Path | None, report: Path | None) -> None:
    """``regard simulate --measure``: timings, their table, the rank correlation, picture and page."""
    import os
    from functools import partial

    from rich.progress import track

    from regard.bench.tile_page import page
    from regard.bench.tile_tables import timed_table
    from regard.bench.tile_timing import correlations, measure

    rows = measure(results, progress=partial(track, description="timing", console=console, transient=True))
    console.print(timed_table(rows))
    figures = correlations(rows)
    told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    console.print(f"Spearman rank correlation of mean visited tiles and measured time: {told}", highlight=False)
    console.print(f"timings in {results}")
    if out is not None:
        from regard.bench.tile_pictures import draw_timed

        _save(draw_timed(rows, figures["all"]), out)
    if report is not None:
        picture = None if out is None else Path(os.path.relpath(out, report.parent)).as_posix()
        arguments = [f"--out {out.as_posix()}"] if out is not None else []
        command = " ".join(["regard simulate --measure", *arguments, f"--report {report.as_posix()}"])
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(page(rows, picture, command), encoding="utf-8")
        console.print(f"wrote {report}")


def _causal_axes(text: str | None, axes: int) -> tuple[bool, ...]:
    if text is None:
        return (False,) * axes
    named = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) < axes for part in named):
        raise OptionError(
            f"--causal {text!r} names no axes of the grid: write numbers from 0 to {axes - 1}, as in 0,1."
        )
    return tuple(str(axis) in named for axis in range(axes))


def _position(text: str, grid: tuple[int, ...]) -> tuple[int, ...]:
    """``"5,7"`` as a place on ``grid``."""
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    if len(parts) != len(grid) or not all(part.isdigit() for part in parts):
        raise OptionError(
            f"--query {text!r} is no position on a grid of {len(grid)} axes: write {','.join('5' * len(grid))} or so, "
            "counting from 0."
        )
    place = tuple(int(part) for part in parts)
    if any(at >= length for at, length in zip(place, grid, strict=True)):
        last = ",".join(str(length - 1) for length in grid)
        raise OptionError(f"--query {text!r} is not on the grid; its last position is {last}.")
    return place


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
        _save(draw_sweep(sweep(job, machine)), out / "plan.png")
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
        _save(draw_measured(timing.rows), out / "measured.png")
    if report is not None:
        timing.save(report.with_suffix(".json"), {"example": found.content()})
        pictures = [report.parent / "pictures" / f"{report.stem}{which}.png" for which in ("_measured", "")]
        _save(draw_measured(timing.rows), pictures[0])
        _save(draw_sweep(sweep(job, machine)), pictures[1])
        asked = " ".join(["regard plan", *(_flag(name, value) for name, value in given.items())])
        command = "regard plan --measure" + ("" if given == EXAMPLE else asked.removeprefix("regard plan"))
        places = [f"pictures/{picture.name}" for picture in pictures]
        text = page(timing, found, asked, f"{command} --report {report.as_posix()}", (places[0], places[1]))
        report.write_text(text, encoding="utf-8")
        console.print(f"wrote {report} and {report.with_suffix('.json')}")


def _flag(name: str, value: Any) -> str:
    """An option as it is written."""
    flag = name.replace("_", "-")
    return f"--{flag} {value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"


@main.command()
@click.option(
    "--tuning", is_flag=True, help="What was measured here to choose among forms of kernels, and where it is."
)
def env(tuning: bool) -> None:
    """Show what this machine offers: versions, devices, optional parts."""
    if tuning:
        _show_tuning()
        return
    import platform

    import torch

    import regard
    from regard.kernels import native

    kernels = native.status()
    rows = {
        "regard": regard.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "native": f"{kernels.state} ({kernels.detail})",
    }
    for extra in ("transformers", "matplotlib", "natten", "sklearn"):
        rows[extra] = "yes" if importlib.util.find_spec(extra) is not None else "not installed"
    for name, value in rows.items():
        console.print(f"{name:14}{value}", highlight=False)


def _show_tuning() -> None:
    from regard.kernels.tuning import records, tuning_file

    console.print(str(tuning_file()), highlight=False, soft_wrap=True)
    found = records()
    if not found:
        console.print(
            "Nothing is measured yet: call .tune(query, key, value) of a regard.program, or build it with tune=True."
        )
    for kernel, classes in found.items():
        for shapes, record in classes.items():
            console.print(f"\n[bold]{kernel}[/bold]  {shapes}  ({record.date})", highlight=False, soft_wrap=True)
            for name, seconds in sorted(record.seconds.items(), key=lambda item: item[1]):
                mark = "*" if name == record.best else " "
                console.print(f"  {mark} {name:16}{1e3 * seconds:10.2f} ms", highlight=False)
            for name, why in record.failed.items():
                console.print(f"    {name:16}{why}", style="dim", highlight=False, soft_wrap=True)


def _leave_stopped() -> NoReturn:
    """After Ctrl-C, with what was done shown and kept."""
    console.print("Stopped. The same command with the same --out goes on from here.", style="yellow")
    sys.exit(130)


def _options_by_key(settings: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """``KEY.NAME=VALUE``, several times, by key."""
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, value = _setting(setting)
        if "." not in name:
            raise OptionError(f"--option {setting!r} names no mechanism: write KEY.NAME=VALUE, e.g. moba.top_k=4.")
        key, _, option = name.partition(".")
        options.setdefault(key, {})[option] = value
    return options


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise OptionError(f"{option} {text!r} are no numbers: write e.g. {option} 2048,8192.") from error


def _setting(text: str) -> tuple[str, Any]:
    """``name=value`` with the value read as JSON where it is (numbers, true, lists), else as a word."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise OptionError(f"{text!r} is no setting: write NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _picture(target: Path) -> Path:
    """Refuse a name that no picture has, before work is spent on it."""
    if target.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OptionError(f"{target.name!r} is no picture file: end it in .png, .svg or .pdf.")
    return target


def _save(figure: Figure, target: Path) -> None:
    _picture(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160)
    console.print(f"wrote {target}")
