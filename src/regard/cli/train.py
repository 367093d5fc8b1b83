"""``regard train | language``: small models trained side by side."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from regard.cli.arguments import leave_stopped, read_numbers, read_options, save_figure, table_of
from regard.cli.group import console, main
from regard.errors import MissingExtraError, OptionError

if TYPE_CHECKING:
    from rich.progress import Progress

    from regard.bench.study import Outcome, Study, StudyResult

__all__ = ["language_command", "study_table", "train_command"]

_PLAIN: dict[str, Any] = {"box": None, "header_style": "bold", "pad_edge": False}


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
    tasks, names, options = task_names(task), mechanism_names(mechanisms), read_options(settings)
    tests = None if test_lengths is None else read_numbers(test_lengths, "--test-lengths")
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
        leave_stopped()


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
            cells = [(row[0], *row[part : part + 5]) for row in rows]
            console.print(table_of((head[0], *head[part : part + 5]), cells, **_PLAIN))
            console.print()
        if out is not None:
            console.print(f"wrote {out}")
        if report is not None:
            console.print(f"wrote {report}")
    if stopped:
        leave_stopped()


def study_table(result: StudyResult) -> Table:
    """The task's score by length."""
    from regard.bench.study_page import rows_of
    from regard.bench.study_tasks import TASKS

    facts = result.fingerprint
    score = TASKS[facts["task"]].at(facts["length"]).metric
    title = f"{facts['task']}: {score} after {facts['seconds']:.0f} s at {facts['length']} tokens"
    return table_of(*rows_of(result), title=title)


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
    variants = variants_of(mechanism_names(mechanisms), read_options(settings), plan.length)
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
        console.print(table_of(*language_rows(result), wrap=True, **_PLAIN))
        if report is not None:
            save_figure(draw_languages(result), report.parent / "pictures" / f"{report.stem}.png")
            console.print(f"wrote {report}")
    if stopped:
        leave_stopped()
