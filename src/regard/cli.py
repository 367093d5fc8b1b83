"""The command: ``regard list | show | draw | compare | reproduce | env``."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from regard.errors import MissingExtraError, OptionError, RegardError

if TYPE_CHECKING:
    from regard.bench.compare import Comparison
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
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


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


@main.command("draw")
@click.argument("key")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="PNG or SVG file [default: KEY.png]")
@click.option("--length", default=64, show_default=True, help="Tokens of the small input.")
@click.option("--option", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the mechanism.")
def draw_command(key: str, out: Path | None, length: int, settings: tuple[str, ...]) -> None:
    """Draw the implied attention map of KEY."""
    from regard.bench.pictures import draw

    figure = draw(key, length, **dict(_setting(setting) for setting in settings))
    target = out or Path(f"{key}.png")
    if target.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OptionError(f"{target.name!r} is no picture file: end it in .png, .svg or .pdf.")
    figure.savefig(target, dpi=160)
    console.print(f"wrote {target}")


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

    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, value = _setting(setting)
        if "." not in name:
            raise OptionError(f"--option {setting!r} names no mechanism: write KEY.NAME=VALUE, e.g. moba.top_k=4.")
        key, _, option = name.partition(".")
        options.setdefault(key, {})[option] = value
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
        console.print("Stopped. The same command with the same --out goes on from here.", style="yellow")
        sys.exit(130)


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


@main.command()
def env() -> None:
    """Show what this machine offers: versions, devices, optional parts."""
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


def _setting(text: str) -> tuple[str, Any]:
    """``name=value`` with the value read as JSON where it is (numbers, true, lists), else as a word."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise OptionError(f"{text!r} is no setting: write NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
