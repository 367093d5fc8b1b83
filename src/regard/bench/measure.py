"""Time and memory, measured side by side: ratios within one run mean something on a noisy machine, seconds do not."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["interleaved", "median_ratio", "one_thread", "peak_bytes", "seconds", "training_clock"]


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    _synchronize()
    began = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - began


def training_clock() -> float:
    """Seconds: of the processor where it is one thread's, so that what else the machine does takes nobody's time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, run in turn ``rounds`` times (A B A B ...), after ``warmup`` rounds that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            spent = seconds(call)
            if turn >= warmup:
                taken[name].append(spent)
    return taken


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios pair by pair."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread of the processor: where other work shares it, threads that wait for each other make short
    calls slow at random."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's own library announces itself on the process's standard error, whatever its log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that the call holds at once beyond what was held before it, as torch's allocator sees them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    results = trace.profiler.kineto_results if trace.profiler is not None else None
    assert results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
