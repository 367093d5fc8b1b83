"""Table and page of what :mod:`regard.bench.language_comparison` found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from regard.bench.language_comparison import BASELINE, LanguageResult, LanguageRun
from regard.bench.markdown import paragraph, table
from regard.models.decoder import positions_of

__all__ = ["language_page", "language_rows"]


def language_rows(result: LanguageResult) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: mean and, of several seeds, standard deviation."""
    above = f"above {BASELINE}"
    head = ["attention", "parameters", "GFLOP a step", "s a step", "bits, equal parameters", above]
    head += ["steps", "bits, equal FLOPs", above]
    rows = []
    for label in result.labels():
        runs = [run for run in result.runs if run.label == label]
        done = [run for run in runs if run.bits]
        row = [label + (" †" if done and positions_of(done[0].mechanism, done[0].options) == "learned" else "")]
        if not done:
            rows.append([*row, *[""] * (len(head) - 1)])
            continue
        row[0] += f" ({len(done)} of {len(runs)} seeds)" if len(done) < len(runs) else ""
        timed = [run.seconds for run in done if run.seconds is not None]
        row += [str(done[0].parameters), f"{done[0].flops / 1e9:.2f}", _spread(timed, "{:.3f}", alone=True)]
        for which in ("parameters", "flops"):
            if which == "flops":
                row.append(str(done[0].flops_steps))
            row.append(_spread(result.bits(label, which), "{:.3f}"))
            row.append("" if label == BASELINE else _spread(result.differences(label, which), "{:+.3f}"))
        rows.append(row)
    return head, rows


def _spread(values: Sequence[float], pattern: str, alone: bool = False) -> str:
    if not values:
        return ""
    mean = pattern.format(statistics.fmean(values))
    return mean if alone or len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def language_page(result: LanguageResult, command: str, picture: str | None = None) -> str:
    """The page that ``command`` writes; ``picture``: the figure's path as seen from it."""
    facts = result.settings
    seeds = len({run.seed for run in result.runs})
    base = next((run for run in result.runs if run.label == BASELINE and run.bits), None)
    size = "" if base is None else f", {base.parameters} parameters"
    tokens = facts["batch"] * facts["length"]
    lines = ["# Attention in a small language model", ""]
    lines += [f"Written by `{command}`; no figure is typed by hand. What is kept beside it is not trained again.", ""]
    over = (
        f"Mean and standard deviation over {seeds} seeds, of weights and of the order of the text; differences are "
        "taken seed by seed."
        if seeds > 1
        else "One seed, so that small differences mean nothing."
    )
    lines += paragraph(
        "Small language models that differ in their attention alone, and what they lose or gain against plain "
        f"multi-head attention (`{BASELINE}`), in bits per byte of Python modules that no training step saw: lower is "
        "better, and a negative difference is in a mechanism's favour. The model is nano's at a smaller size: "
        f"{facts['depth']} layers, {facts['embed_dim']} channels, {facts['num_heads']} heads, RMSNorm, gated MLPs of "
        f"width {facts['hidden']} with `{BASELINE}`{size}; on bytes, {facts['length']} at a time. {over}"
    )
    lines += paragraph(
        f"*Equal parameters*: the width of the MLPs brings every model within a hundredth of `{BASELINE}`'s "
        f"parameters; {facts['steps']} steps of {tokens} bytes, on the same text in the same order. *Equal FLOPs*: "
        f"that same model after as many training FLOPs as `{BASELINE}` took in its {facts['steps']} steps, three times "
        "those of the forward passes; *steps* says how many that are. FLOPs are those of products, as torch counts "
        "them: elementwise work, such as entmax's bisection, distances and gates, counts nothing, so that seconds tell "
        "another story."
    )
    lines += table(*language_rows(result))
    if picture is not None:
        lines += [f"![Difference to plain attention while training, a panel for each mechanism]({picture})", ""]
    learned = f"{BASELINE}: learned positions"
    control = (
        f" Such vectors take long to be of use: read daggers beside `{learned}`." if learned in result.labels() else ""
    )
    lines += paragraph(
        "These are small models after a short training: they show what a mechanism learns first, at a length where "
        "none saves anything by being sparse, and not what it would reach. A difference within its spread says "
        "nothing. Every mechanism begins as it has it itself, and all train alike: AdamW, a learning rate of "
        f"{facts['lr']:g} after a warm-up of {facts['warmup']} steps, constant from there so that one run gives both "
        f"readings, gradients clipped at 1. That rate was chosen for `{BASELINE}` alone and **not tuned for any "
        "other**; some may do better at theirs. Losses that layers leave to be added (MoH's balance of heads) are "
        "added. Positions are rotary, or the mechanism's own; a dagger marks attention that takes none: there a "
        f"learned vector for each position is added to the embedding, and counted.{control} Seconds are those of "
        f"{_threads()} on a machine with other work. Text: the standard library of the Python that runs this, "
        f"{facts['tested']} windows of its held-out modules."
    )
    options = _grouped(result.runs, lambda run: ", ".join(f"{k}={v}" for k, v in run.options.items()))
    if options:
        lines += ["## Options", "", "Others run with their defaults.", "", *options, ""]
    reasons = _grouped(result.runs, lambda run: run.reason)
    if reasons:
        lines += ["## What has no figure", "", *reasons, ""]
    return "\n".join(lines)


def _threads() -> str:
    threads = torch.get_num_threads()
    return "one processor" if threads == 1 else f"{threads} threads"


def _grouped(runs: Sequence[LanguageRun], say: Callable[[LanguageRun], str]) -> list[str]:
    """Items of a list: what is said of a variant, once for all seeds of which the same is said."""
    said = dict.fromkeys((run.label, say(run)) for run in runs)
    return [f"- {label}: {text}" for label, text in said if text]
