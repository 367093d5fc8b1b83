"""The documentation's page of what :mod:`regard.bench.study` found."""

from __future__ import annotations

from collections.abc import Sequence

from regard.bench.markdown import paragraph, table
from regard.bench.study import StudyResult, tested_sequences
from regard.bench.study_tasks import TASKS

__all__ = ["page", "rows_of"]


def rows_of(result: StudyResult) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: the task's score by length."""
    lengths = sorted({int(length) for outcome in result.outcomes for length in outcome.scores})
    rows = []
    for outcome in result.outcomes:
        found = [outcome.scores.get(str(length)) for length in lengths]
        loss = "" if outcome.loss is None else f"{outcome.loss:.3f}"
        cells = ["" if share is None else f"{share:.3f}" for share in found]
        rows.append([outcome.mechanism, str(outcome.steps), loss, *cells])
    return ["mechanism", "steps", "loss", *map(str, lengths)], rows


def page(results: Sequence[StudyResult]) -> str:
    """One section a study, with the command that makes it."""
    retrieval = all(result.fingerprint["task"] in ("passkey", "recall", "mqar") for result in results)
    lines = ["# Finding things far back" if retrieval else "# Mechanisms by task", ""]
    lines += paragraph(
        "Small models that differ in their attention alone, trained for equal time and tested at lengths that they "
        "never saw. Written by the commands below (with `--out` and `--report`); no figure is typed by hand. Equal "
        "time means more steps for a faster mechanism."
    )
    for result in results:
        facts = {"positions": "none", "tested": 131072, **result.fingerprint}
        setup = TASKS[facts["task"]]
        right = setup.at(facts["length"]).higher_is_better
        score = "Share of right answers" if right else "Error relative to telling the mean"
        positions = "no" if facts["positions"] == "none" else facts["positions"]
        lengths = sorted({int(length) for outcome in result.outcomes for length in outcome.scores})
        lines += [f"## {facts['task']}", ""]
        lines += paragraph(setup.about)
        lines += [
            f"`regard train --task {facts['task']} --mechanisms {','.join(o.mechanism for o in result.outcomes)} "
            f"--length {facts['length']} --test-lengths {','.join(map(str, lengths))} --budget {facts['seconds']:g}s`",
            "",
        ]
        counts = ", ".join(f"{tested_sequences(length, facts['tested'])} of {length}" for length in lengths)
        lines += paragraph(
            f"{facts['depth']} layers of {facts['num_heads']} heads, {facts['embed_dim']} channels, {positions} "
            f"positions; {facts['seconds']:.0f} s of training a mechanism at up to {facts['length']} tokens. {score} "
            f"by length of the test (sequences tested: {counts} tokens):"
        )
        lines += table(*rows_of(result))
        for outcome in result.outcomes:
            options = ", ".join(f"{name}={value}" for name, value in outcome.options.items()) or "its defaults"
            lines += [f"- {outcome.mechanism}: {outcome.reason or options}"]
        lines += [""]
    return "\n".join(lines)
