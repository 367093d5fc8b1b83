"""The documentation's page of what :mod:`regard.bench.frontier` measured."""

from __future__ import annotations

from regard.bench.frontier import Frontier
from regard.bench.markdown import paragraph, table

__all__ = ["SHARES", "WORDS", "curves", "page"]

SHARES = (0.1, 0.25, 0.5)
"""Shares of the pairs at which curves are read off."""
WORDS = {"bits_per_byte": "bits", "error": "error", "recall": "mass"}
"""Measures in one word."""


def curves(result: Frontier, workload: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: what each name gives at some shares of the pairs."""
    points = [point for point in result.points if point.workload == workload]
    loss = "bits_per_byte" if workload in result.full else "error"
    head = ["mechanism", *(f"{WORDS[measure]} {share:.0%}" for measure in (loss, "recall") for share in SHARES)]
    rows = []
    for name in dict.fromkeys(point.name for point in points):
        cells = [result.at(workload, name, measure, share) for measure in (loss, "recall") for share in SHARES]
        if any(cell is not None for cell in cells):
            rows.append([name, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    return head, rows


def page(result: Frontier, picture: str | None, command: str) -> str:
    """The page that ``command`` writes; ``picture``: the figure's path as seen from it."""
    facts = result.fingerprint
    lines = ["# Quality at equal cost", ""]
    lines += paragraph(f"Written by `{command}`; no figure is typed by hand.")
    lines += paragraph(
        "Every training-free sparse mechanism at several settings, against the share of the pairs of full attention "
        "that it computes (whole blocks, as the executor does). *Mass*: how much of full attention's weight it has in "
        "common with its own weights. *Bits*: per byte of held-out text, with the mechanism in every layer. *Error*: "
        "of the output, relative to full attention's. *Oracle blocks* are chosen by their true attention mass, 64 x 64 "
        "tokens each; windows, sinks and strides choose without looking. Values at these shares are read off between "
        "two measured points, linear in the logarithm of the share; a cell is empty where a curve does not reach."
    )
    if picture is not None:
        lines += [f"![Curves of quality against the share of pairs computed]({picture})", ""]
    for workload in result.workloads:
        lines += [f"## {workload}", "", *paragraph(_about(result, workload)), *table(*curves(result, workload))]
        refused = sorted({f"{p.name}: {p.reason}" for p in result.points if p.workload == workload and p.reason})
        lines += [f"- {reason}" for reason in refused] + ([""] if refused else [])
    grid = " x ".join(map(str, facts["grid"]))
    lines += paragraph(f"Model {facts['model']}, {facts['tokens']} tokens of text at each length; grid {grid}.")
    return "\n".join(lines)


def _about(result: Frontier, workload: str) -> str:
    if workload == "fields":
        return "Queries and keys are smooth random fields in space and time with a little noise, as in video."
    if workload == "noise":
        return (
            "Queries and keys are white noise: no choice of few keys is good, and a method that adapts should say so "
            "by computing much." + _refusal(result)
        )
    squeezed = (
        " Positions beyond the model's context are squeezed into it." if result.fingerprint["interpolate"] else ""
    )
    return f"Full attention: {result.full[workload]:.3f} bits per byte.{squeezed}"


def _refusal(result: Frontier) -> str:
    """How the density of adaptive settings moves from fields to noise."""
    told = []
    for name in dict.fromkeys(point.name for point in result.points if point.group == "mechanism"):
        both = []
        for workload in ("fields", "noise"):
            found = {str(p.options): p.density for p in result.points if (p.name, p.workload) == (name, workload)}
            both.append(found)
        moved = [
            (before, after)
            for options, before in both[0].items()
            if before is not None and (after := both[1].get(options)) is not None
        ]
        if moved:
            middle = moved[len(moved) // 2]
            told.append(f"{name} {middle[0]:.0%} to {middle[1]:.0%}")
    return f" From fields to noise, at the middle setting of each: {', '.join(told)}." if told else ""
