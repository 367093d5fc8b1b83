"""``report.html``: one self-contained page of a comparison, to look at anywhere."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import torch

from regard.bench.compare import Comparison
from regard.registry import describe

__all__ = ["render_report", "write_report"]

_PLACE = "__COMPARISON__"


def render_report(comparison: Comparison) -> str:
    """The page as HTML text; it needs no network."""
    rows = []
    for row in comparison.rows:
        entry = describe(row.mechanism)
        about = {"title": entry.title, "summary": entry.summary, "formula": entry.formula.strip()}
        rows.append({**asdict(row), **about, "arxiv": entry.arxiv, "year": entry.year})
    data = {
        "fingerprint": comparison.fingerprint,
        "reference": comparison.reference,
        "rows": rows,
        "made": {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }
    page = resources.files("regard.bench").joinpath("templates/report.html").read_text(encoding="utf-8")
    # "</" would end the script element that carries the data.
    return page.replace(_PLACE, json.dumps(data).replace("</", "<\\/"))


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write ``report.html`` into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "report.html"
    target.write_text(render_report(comparison), encoding="utf-8")
    return target
