"""``python -m benchmarks [--only NAME ...] [--quick] [--out FILE.json]``: one table of ratios measured side by side.

Calls that are compared run in turn, round after round, and the median of the ratios counts, so that the table holds on
a busy machine. Results go to ``docs/benchmarks.json``, where those of benchmarks that did not run are kept, and from
there to ``docs/benchmarks.md``; with ``--quick`` to ``runs/`` alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from regard.kernels.native import status

NAMES = (
    *("dense", "dense_memory", "neighborhood", "windows", "linear", "memory", "selection", "crossover"),
    *("block_sparse", "block_sparse_long", "block_sparse_settings", "explore", "gpu"),
)
ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}; repeatable"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds: does it run, not how fast it is"
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes; results of other benchmarks in it are kept")
    options = parser.parse_args(arguments)
    out = options.out or (
        ROOT / "runs" / "benchmarks-quick.json" if options.quick else ROOT / "docs" / "benchmarks.json"
    )
    command = shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
    kept = json.loads(out.read_text()) if options.only and out.exists() else {}
    for name in options.only or NAMES:
        rows = importlib.import_module(f"benchmarks.{name}").run(_progress, options.quick)
        kept[name] = {
            **_surroundings(),
            "command": command,
            "rows": [{**asdict(row), "reached": row.reached} for row in rows],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(kept, indent=1) + "\n")
    ordered = {name: kept[name] for name in NAMES if name in kept}
    print(_table(ordered))
    print(f"\n{out}")
    if not options.quick:
        page = ROOT / "docs" / "benchmarks.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(_page(ordered))
        print(page)
    return 0


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _surroundings() -> dict[str, Any]:
    native = status()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "native": native.state if native.state == "ready" else f"{native.state}: {native.detail}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "natten": _version("natten")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {instructions}"


def _cells(row: dict[str, Any]) -> list[str]:
    measured = "not measured" if row["measured"] is None else f"{row['measured']:.2f} {row['unit']}"
    target = "" if row["target"] is None else f"{row['sense']} {row['target']:g}"
    reached = {True: "yes", False: "no", None: ""}[row["reached"]]
    return [row["name"], measured, target, reached, row["note"]]


HEADER = ["name", "measured", "target", "reached", "note"]


def _table(results: dict[str, Any]) -> str:
    lines = [HEADER, *(_cells(row) for part in results.values() for row in part["rows"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _page(results: dict[str, Any]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks` (`make bench`); no figure is typed by hand. All figures are ratios of calls",
        "that ran in turn in one run, medians over the rounds: float32, one sequence, heads of 64 channels. *Of the",
        "ideal* is the time of dense non-causal SDPA on the same shape times the share of blocks computed, divided by",
        "the time taken; 1 means that sparsity costs nothing. A backward ideal is SDPA's own forward + backward.",
    ]
    for name, part in results.items():
        versions = ", ".join(f"{package} {number}" for package, number in part["versions"].items() if number)
        title = (importlib.import_module(f"benchmarks.{name}").__doc__ or name).split("\n")[0]
        lines += [
            "",
            f"## {name.replace('_', '-')}",
            "",
            title,
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + " --- |" * len(HEADER),
        ]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in part["rows"]]
        lines += [
            "",
            f"`{part['command']}` on {part['date']}: {part['processor']}, {part['threads']} threads, load "
            f"{part['load']}; {versions}; native kernels {part['native']}.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
