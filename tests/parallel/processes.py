"""Real ranks for tests: processes of this machine that meet over gloo, and give back what they computed."""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from regard.parallel.group import DistributedGroup, Group


def run_ranks(ranks: int, function: Callable[[Group], Any], folder: Path, timeout: float = 30.0) -> list[Any]:
    """``function(group)`` in each of ``ranks`` new processes; the results by rank. ``function`` is a module's own."""
    name = folder / uuid.uuid4().hex
    # One server imports torch, and each rank is a fork of it: that is a quarter of four spawned interpreters' time.
    multiprocessing.set_forkserver_preload(["torch.distributed", "pytest", "regard.parallel.zeco"])
    mp.start_processes(_rank, args=(ranks, function, str(name), timeout), nprocs=ranks, start_method="forkserver")
    return [torch.load(f"{name}.{rank}", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, function: Callable[[Group], Any], name: str, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{name}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    torch.save(function(DistributedGroup()), f"{name}.{rank}")
