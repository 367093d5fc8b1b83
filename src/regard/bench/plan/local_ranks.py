"""Ranks of this machine: processes that meet over gloo, one thread each, and give back what the first one found."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from regard.errors import CommunicationError
from regard.parallel.group import DistributedGroup, Group

__all__ = ["run_local"]


def run_local(ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> Any:
    """``function(group, *arguments)`` in each of ``ranks`` new processes; what rank 0 returned.

    ``function`` is a module's own, and what passes between the processes can be pickled. timeout: seconds that a rank
    waits for another.
    """
    start = "spawn" if os.name == "nt" else "forkserver"
    if start == "forkserver":
        # One server imports torch, and each rank is a fork of it: a fraction of several interpreters' start.
        multiprocessing.set_forkserver_preload(["torch.distributed", "regard.parallel", function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        name = str(Path(folder) / "meeting")
        try:
            mp.start_processes(_rank, (ranks, function, arguments, name, timeout), nprocs=ranks, start_method=start)
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise CommunicationError(
                f"A local rank ended: {str(error).strip().splitlines()[-1]} Ranks meet over gloo on this machine; see "
                "that nothing forbids processes to connect to one another."
            ) from error
        return torch.load(f"{name}.result", weights_only=False)


def _rank(
    rank: int, ranks: int, function: Callable[..., Any], arguments: tuple[Any, ...], name: str, timeout: float
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{name}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    group: Group = DistributedGroup()
    found = function(group, *arguments)
    if rank == 0:
        torch.save(found, f"{name}.result")
    group.barrier()
    dist.destroy_process_group()
