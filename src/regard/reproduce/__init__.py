"""One file a paper: the smallest honest experiment of its claim, ``run(report) -> Finding``.

``regard reproduce KEY`` runs it and keeps the result as ``reproductions/KEY.json``, with its picture beside it where
the finding has plots.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regard.catalogue import evidence_folder
from regard.errors import MissingExtraError, RegardError
from regard.registry import describe
from regard.reproduce.finding import Finding, Plot

__all__ = ["Finding", "Plot", "reproduce"]


def reproduce(key: str, report: Callable[[str], None] = print, folder: Path | None = None) -> dict[str, Any]:
    """Run the experiment of ``key`` and write its result to ``folder`` (default: ``reproductions/``). Returns it."""
    import torch

    entry = describe(key)
    if importlib.util.find_spec(f"regard.reproduce.{key}") is None:
        raise RegardError(f"{key!r} has no reproduction. It is no paper's, or its evidence is still to be made.")
    module = importlib.import_module(f"regard.reproduce.{key}")
    began = time.perf_counter()
    found: Finding = module.run(report)
    result = {
        "key": key,
        "paper_claim": entry.claim,
        "measured": found.measured,
        "holds": bool(found.holds),
        "note": found.note,
        "command": f"regard reproduce {key}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": "cpu"},
        "seconds": round(time.perf_counter() - began, 1),
        "date": datetime.date.today().isoformat(),
    }
    if found.plots:
        result["plots"] = [plot.content() for plot in found.plots]
    target = (folder or evidence_folder()) / f"{key}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".json.partial")
    partial.write_text(_text(result), encoding="utf-8")
    partial.replace(target)
    # A picture of an earlier run shows figures that are no longer kept.
    target.with_suffix(".png").unlink(missing_ok=True)
    if found.plots:
        _draw(found.plots, f"{key}: {entry.title}", target.with_suffix(".png"), report)
    return result


def _text(result: dict[str, Any]) -> str:
    """As JSON that a person reads; a plot takes one line, since its points one by one would bury the rest."""
    text = json.dumps({name: value for name, value in result.items() if name != "plots"}, indent=2)
    if "plots" in result:
        plots = ",\n    ".join(json.dumps(plot) for plot in result["plots"])
        text = f'{text.removesuffix("}").rstrip()},\n  "plots": [\n    {plots}\n  ]\n}}'
    return text + "\n"


def _draw(plots: list[Plot], title: str, file: Path, report: Callable[[str], None]) -> None:
    """Without matplotlib the result stands as it is, and the person learns how to get its picture."""
    from regard.bench.evidence_picture import save_picture

    try:
        save_picture(plots, file, title)
        report(f"drew {file}")
    except MissingExtraError as error:
        report(f"No picture was drawn. {error}")
