"""``regard list | show | draw | reproduce``: what there is, and the evidence that it is built right."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from regard.cli.arguments import picture_file, read_position, read_setting, save_figure
from regard.cli.group import console, main
from regard.errors import OptionError

if TYPE_CHECKING:
    from regard.catalogue import Entry

__all__ = ["draw_command", "list_command", "markdown_table", "reproduce_command", "show"]


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

    options = dict(read_setting(setting) for setting in settings)
    target = picture_file(out or Path(f"{key}.png"))
    if grid is None:
        if query is not None or causal is not None:
            raise OptionError("--query and --causal speak of one query's view: give its --grid too, e.g. --grid 16x16.")
        figure = draw(key, length, **options)
    else:
        space = parse_sides(grid, "The grid")
        place = None if query is None else read_position(query, space)
        figure = draw_field(key, space, place, causal=causal, **options)
    save_figure(figure, target)


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
