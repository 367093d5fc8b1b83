"""One file a paper: the smallest honest experiment of its claim, ``run(report) -> Finding``.

``regard reproduce KEY`` runs it and keeps the result as ``reproductions/KEY.json``.
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
from regard.errors import RegardError
from regard.registry import describe
from regard.reproduce.finding import Finding

__all__ = ["Finding", "reproduce"]


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
    target = (folder or evidence_folder()) / f"{key}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(target)
    return result
