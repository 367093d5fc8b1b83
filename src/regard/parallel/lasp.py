"""LASP and LASP-2: the two older ways to spread linear attention over ranks, ZeCO's baselines.

LASP ("Linear Attention Sequence Parallelism", 2024, arXiv 2404.02882) passes the state along a ring: a rank waits for
the state of the rank before, and sends its own on; P - 1 whole states pass one after another. Here a rank's own state
is computed first, so that nobody waits for another's outputs.
LASP-2 ("LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", 2025, arXiv 2502.07563) gathers
all states at once, overlapped with computation, and each rank forms its own prefix: one step, but P - 1 states into
every rank. With a decay, the total decays are gathered too, forward only.
Signature, shapes and gradients are those of :func:`regard.parallel.zeco.zeco`; so is the cost model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.parallel.group import Group
from regard.parallel.recurrence import sequence_parallel
from regard.parallel.zeco import AllScan

__all__ = ["GatherStates", "lasp1", "lasp2"]


class GatherStates:
    """The carry of LASP-2: every rank's state to every rank. The decays gathered forward serve the backward pass."""

    def __init__(self) -> None:
        self._decays: list[Tensor] | None = None

    def __call__(
        self, group: Group, state: Tensor, decay: Tensor | None, start: Tensor | None, reverse: bool
    ) -> Tensor:
        """See :class:`regard.parallel.recurrence.Carry`."""
        incoming = torch.zeros_like(state) if start is None else start
        if start is not None:  # what came before the first rank travels as a part of its state
            state = state + (start if decay is None else start * decay[..., None])
        sizes = [len(state)] * group.size
        states = group.all_gather(state, sizes=sizes, step=f"states of {'backward ' if reverse else ''}LASP-2")
        if decay is not None and self._decays is None:
            self._decays = group.all_gather(decay, sizes=sizes, step="decays of LASP-2")
        group.flush()
        before = range(group.size - 1, group.rank, -1) if reverse else range(group.rank)
        for rank in before:
            passed = incoming if self._decays is None else incoming * self._decays[rank][..., None]
            incoming = states[rank] + passed
        return incoming


def lasp1(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The serial ring: as :func:`regard.parallel.zeco.zeco` without overlap, of whole states."""
    return sequence_parallel(
        AllScan(1, name="ring of LASP"),
        group,
        query,
        key,
        value,
        log_decay,
        scale=scale,
        chunk_size=chunk_size,
        initial_state=initial_state,
        overlap=False,
    )


def lasp2(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    overlap: bool = True,
) -> tuple[Tensor, Tensor]:
    """The gather of all states: as :func:`regard.parallel.zeco.zeco`, with one collective and P - 1 states received."""
    return sequence_parallel(
        GatherStates(),
        group,
        query,
        key,
        value,
        log_decay,
        scale=scale,
        chunk_size=chunk_size,
        initial_state=initial_state,
        overlap=overlap,
    )
