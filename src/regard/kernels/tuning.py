"""Which form of a kernel is fastest here: measured once per device, class of shapes and dtype, and kept.

The file is ``tuning.json`` in the library's cache (``REGARD_CACHE``, or the user's cache); ``regard env --tuning``
shows it. Deleting it, or an entry, has that measured again. Lengths and batches count by their power of two.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import BackendError
from regard.kernels.native import cache_folder

__all__ = ["Record", "kept", "records", "shape_class", "tune", "tuning_file"]

Candidate = Callable[[], Any]


@dataclass(frozen=True)
class Record:
    """What was measured: ``seconds`` of each candidate that ran (medians), why others did not, the fastest."""

    best: str
    seconds: dict[str, float]
    failed: dict[str, str]
    date: str


def tuning_file() -> Path:
    """Where measurements are kept."""
    return cache_folder() / "tuning.json"


def shape_class(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> str:
    """What calls have in common that one measurement speaks for: device, torch, threads, dtype, whether a gradient is
    asked for, sizes, and whatever else matters."""
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    device = torch.cuda.get_device_name(query.device) if query.is_cuda else f"cpu x{torch.get_num_threads()}"
    sizes = {
        "batch": 1 << round(math.log2(query.shape[0])) if query.shape[0] else 0,
        "heads": f"{query.shape[1]}/{key.shape[1]}",
        "queries": _power(query.shape[2]),
        "keys": _power(key.shape[2]),
        "dims": f"{query.shape[3]}/{value.shape[3]}",
    }
    parts = {
        "device": device if query.is_cuda else f"{device} {platform.machine()}",
        "torch": torch.__version__,
        "dtype": str(query.dtype).removeprefix("torch."),
        "pass": "forward + backward" if gradient else "forward",
        **sizes,
        **more,
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def _power(length: int) -> int:
    return 1 << math.ceil(math.log2(max(length, 1)))


def records() -> dict[str, dict[str, Record]]:
    """All that is kept: by kernel, then by class of shapes."""
    found: dict[str, dict[str, Record]] = {}
    for kernel, classes in _read().items():
        found[kernel] = {name: Record(**record) for name, record in classes.items()}
    return found


def kept(kernel: str, shapes: str) -> Record | None:
    """The measurement for a class of shapes, if there is one."""
    found = _memory.get((str(tuning_file()), kernel, shapes))
    if found is None:
        record = _read().get(kernel, {}).get(shapes)
        found = None if record is None else Record(**record)
        _memory[str(tuning_file()), kernel, shapes] = found
    return found


_memory: dict[tuple[str, str, str], Record | None] = {}


def tune(kernel: str, shapes: str, candidates: Mapping[str, Candidate], *, rounds: int = 3) -> Record:
    """Time the candidates in turn, ``rounds`` times after one that does not count, and keep the result.

    A candidate that fails is left out, and why is kept; one that took more than four times the fastest's first time is
    not run again. Raises BackendError if none runs.
    """
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, call in candidates.items():
        try:
            call()
            first[name] = _seconds(call)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if not first:
        raise BackendError(f"No form of {kernel} runs this call: {failed}.")
    limit = 4 * min(first.values())
    times = {name: [taken] for name, taken in first.items()}
    for _ in range(rounds - 1):
        for name in times:
            if first[name] <= limit:
                times[name].append(_seconds(candidates[name]))
    medians = {name: statistics.median(some) for name, some in times.items()}
    record = Record(min(medians, key=lambda name: medians[name]), medians, failed, time.strftime("%Y-%m-%d"))
    everything = _read()
    everything.setdefault(kernel, {})[shapes] = asdict(record)
    _write(everything)
    _memory[str(tuning_file()), kernel, shapes] = record
    return record


def _seconds(call: Candidate) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _read() -> dict[str, Any]:
    try:
        found = json.loads(tuning_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Not there, or cut off by a crash: it can be measured again.
        return {}
    return found if isinstance(found, dict) else {}


def _write(everything: dict[str, Any]) -> None:
    target = tuning_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)
