"""The documentation's page of many studies: tasks as columns, mechanisms as rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from regard.bench.markdown import paragraph, table
from regard.bench.regression_tasks import InContextRegression
from regard.bench.study import Outcome, StudyResult
from regard.bench.study_tasks import TASKS

__all__ = ["batch_page", "batch_rows"]

Column = tuple[str, int]


def batch_rows(results: Sequence[StudyResult], emphasis: str = "") -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of scores, that of chance first: mean and, of several seeds, standard deviation.

    emphasis: put around the best of a column. A star: without causality.
    """
    columns = _columns(results)
    names = _names(results)
    scores = {
        (name, column): [
            outcome.scores[str(column[1])]
            for outcome in _outcomes(results, name, column[0])
            if str(column[1]) in outcome.scores
        ]
        for name in names
        for column in columns
    }
    head, chance, best = ["mechanism"], ["chance"], {}
    for task, length in columns:
        example = TASKS[task].at(length)
        head.append(f"{task} {length}" + ("" if example.higher_is_better else " (error)"))
        chance.append(f"{example.chance:.3f}")
        means = [statistics.fmean(found) for name in names if (found := scores[name, (task, length)])]
        if means:
            best[task, length] = f"{(max if example.higher_is_better else min)(means):.3f}"
    rows = [chance]
    for name in names:
        row = [name]
        for column in columns:
            found = scores[name, column]
            cell = f"{statistics.fmean(found):.3f}" if found else ""
            mark = emphasis if found and cell == best[column] else ""
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            star = "" if all(o.causal for o in _outcomes(results, name, column[0])) or not found else " *"
            row.append(f"{mark}{cell}{mark}{spread}{star}")
        rows.append(row)
    return head, rows


def batch_page(results: Sequence[StudyResult], command: str) -> str:
    """The page, with the command that makes it."""
    facts = results[0].fingerprint
    seeds = sorted({result.fingerprint["seed"] for result in results})
    outcomes = [outcome for result in results for outcome in result.outcomes if outcome.scores]
    sizes = [outcome.parameters for outcome in outcomes] or [0]
    lines = ["# Mechanisms by task", ""]
    lines += [f"Written by `{command}`; no figure is typed by hand.", ""]
    lines += paragraph(
        f"Small models that differ in their attention alone, trained from scratch on each task for "
        f"{facts['seconds']:g} s {_threads()}: {facts['depth']} layers of "
        f"{facts['num_heads']} heads, {facts['embed_dim']} channels, {min(sizes)} to {max(sizes)} parameters. "
        f"{_seeds(seeds)} Equal time means more steps for a faster mechanism (second table); with more time the order "
        "may be another. Lengths, batches and learning rates were settled by trials with `full` and "
        "`lightning_attention` alone; every other mechanism runs at the same, with its own default options where the "
        "end of this page names no others."
    )
    lines += paragraph(
        "Share of right answers, or squared error relative to that of telling the mean where the head says error; "
        "the best of a column is bold. Numbers in the head: tokens of a test. A star: without causality, for want of "
        "a causal form. Empty: see below the tables."
    )
    lines += table(*batch_rows(results, "**"))
    lines += ["Steps of training:", ""]
    lines += table(*_steps(results))
    lines += ["## Tasks", ""]
    for result in _each_task(results):
        lines += _about(result)
    reasons = _grouped(results, lambda outcome: outcome.reason)
    if reasons:
        lines += ["", "## What has no figure", "", *reasons]
    options = _grouped(
        results, lambda o: ", ".join(f"{name}={value}" for name, value in o.options.items()), tasks=False
    )
    if options:
        lines += ["", "## Options", "", *options]
    return "\n".join(lines) + "\n"


def _threads() -> str:
    threads = torch.get_num_threads()
    return f"with {threads} threads" if threads > 1 else "of one processor"


def _seeds(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return f"One seed ({seeds[0]}), so that small differences mean nothing."
    return f"Mean and standard deviation over {len(seeds)} seeds."


def _about(result: StudyResult) -> list[str]:
    """A task as an item of a list."""
    facts = result.fingerprint
    name, length = facts["task"], facts["length"]
    task = TASKS[name].at(length)
    stages = [length >> halvings for halvings in range(5, -1, -1) if length >> halvings >= facts["shortest"]] or [
        length
    ]
    trained = f"{stages[0]} to {length}" if len(stages) > 1 else str(length)
    positions = {"none": "no positions", "learned": "a learned vector for each position"}[facts["positions"]]
    text = (
        f"- **{name}**: {TASKS[name].about} Trained at {trained} tokens, {facts['tokens']} a batch, learning rate "
        f"{facts['lr']:g}, {positions}; tests of {facts['tested']} tokens. Chance: {task.chance:.3f}."
    )
    if isinstance(task, InContextRegression):
        text += f" A Kalman filter that is told how the sequences are made: {task.reference():.3f}."
    first, *others = paragraph(text)[:-1]
    return [first, *(f"  {line}" for line in others)]


def _steps(results: Sequence[StudyResult]) -> tuple[list[str], list[list[str]]]:
    tasks = [result.fingerprint["task"] for result in _each_task(results)]
    rows = []
    for name in _names(results):
        counts = [[o.steps for o in _outcomes(results, name, task) if o.scores] for task in tasks]
        rows.append([name, *(f"{statistics.fmean(count):.0f}" if count else "" for count in counts)])
    return ["mechanism", *tasks], rows


def _grouped(results: Sequence[StudyResult], say: Callable[[Outcome], str], tasks: bool = True) -> list[str]:
    """Items of a list: what is said of a mechanism, once for all tasks of which the same is said."""
    said: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for outcome in result.outcomes:
            if text := say(outcome):
                said.setdefault((outcome.mechanism, text), []).append(result.fingerprint["task"])
    return [
        f"- {name}" + (f" ({', '.join(dict.fromkeys(where))})" if tasks else "") + f": {text}"
        for (name, text), where in said.items()
    ]


def _each_task(results: Sequence[StudyResult]) -> list[StudyResult]:
    """One result a task."""
    return list({result.fingerprint["task"]: result for result in reversed(results)}.values())[::-1]


def _columns(results: Sequence[StudyResult]) -> list[Column]:
    columns: list[Column] = []
    for result in _each_task(results):
        task = result.fingerprint["task"]
        lengths = {int(n) for r in results if r.fingerprint["task"] == task for o in r.outcomes for n in o.scores}
        columns += [(task, length) for length in sorted(lengths)]
    return columns


def _names(results: Sequence[StudyResult]) -> list[str]:
    return list(dict.fromkeys(outcome.mechanism for result in results for outcome in result.outcomes))


def _outcomes(results: Sequence[StudyResult], name: str, task: str) -> list[Outcome]:
    """One for each seed."""
    found = (result for result in results if result.fingerprint["task"] == task)
    return [outcome for result in found for outcome in result.outcomes if outcome.mechanism == name]
