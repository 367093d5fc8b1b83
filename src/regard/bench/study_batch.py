"""Many studies as one table: each task with each mechanism and seed, in folders of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from regard.bench.study import Outcome, Study, StudyResult, run_study
from regard.registry import catalogue, describe

__all__ = ["folder_of", "kept_results", "mechanism_names", "run_batch"]


def mechanism_names(text: str) -> tuple[str, ...]:
    """Names of the catalogue from a list with commas. A home such as ``linear`` stands for ``full`` and for all of
    its mechanisms and layers."""
    homes = {entry.home for entry in catalogue()}
    names: list[str] = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        if part in homes:
            own = [e.key for e in catalogue(home=part) if e.kind in ("mechanism", "layer") and e.module]
            names += ["full", *sorted(own)]
        else:
            names.append(describe(part).key)
    return tuple(dict.fromkeys(names))


def folder_of(study: Study, out: Path) -> Path:
    """Where the results of one of many studies lie."""
    return out / study.task / f"seed{study.seed}"


def kept_results(studies: Sequence[Study], out: Path) -> list[StudyResult]:
    """What there is of these studies, mechanisms in their order."""
    results = []
    for study in studies:
        kept = study.kept(folder_of(study, out))
        outcomes = [] if kept is None else kept.outcomes
        chosen = [outcome for name in study.mechanisms for outcome in outcomes if outcome.mechanism == name]
        if chosen:
            results.append(StudyResult(study.fingerprint, chosen))
    return results


def run_batch(
    studies: Sequence[Study],
    out: Path | None = None,
    report: Callable[[str, float], None] = lambda line, done: None,
    finished: Callable[[Study, Outcome], None] = lambda study, outcome: None,
) -> list[StudyResult]:
    """Run each study, mechanism by mechanism.

    report: what is going on, and how many of the runs (a mechanism in a study) are done, the current one in part.
    finished: called after each run. With ``out``, every run is kept as it comes, and the same studies go on from there.
    Raises OptionError before anything is run if other studies' results lie in the way.
    """
    for study in studies:
        study.at(study.length)
        if out is not None:
            study.kept(folder_of(study, out))
    results, done = [], 0
    for study in studies:
        result = StudyResult(study.fingerprint)
        for name in study.mechanisms:

            def tell(line: str, share: float, task: str = study.task, before: int = done) -> None:
                report(f"{task}, {line}", before + share)

            one = run_study(replace(study, mechanisms=(name,)), None if out is None else folder_of(study, out), tell)
            outcome = next(outcome for outcome in one.outcomes if outcome.mechanism == name)
            result.outcomes.append(outcome)
            done += 1
            finished(study, outcome)
        results.append(result)
    return results
