"""ZeCO: linear attention over many ranks whose only traffic is one state each, in slices that flow like a pipeline.

"ZeCO: Zero Communication Overhead Sequence Parallelism for Linear Attention" (2025), arXiv 2507.01004.

Each rank holds a stretch of the sequence and needs the state ``R_p (dk, dv)`` that all earlier tokens leave behind,
with ``R_{p+1} = S_p + diag(G_p) R_p`` (see :mod:`regard.parallel.recurrence`). ZeCO's collective, the all-scan, cuts
the state into K slices along dk, where the recurrence is elementwise and the cut therefore exact: a rank receives a
slice, scales it, adds its own and passes it on before the next arrives. While slices flow the rank computes its outputs
from a zero state, and adds ``(q_t * A_t) R_p`` when all have come. Backward the same scan runs from the last rank to
the first.

Cost for P ranks, per batch item and head: every rank but the last sends ``dk dv`` numbers, whatever P is, in K
messages; the last rank has all after ``K + P - 2`` message hops (the K-th slice leaves rank 0 at tick K, and passes P -
2 more ranks). Adding the last rank's own update of the last slice gives the K + P - 1 steps, or ``tau + (P - 1) tau /
K`` for a state's transfer time tau, of the usual latency model. Hiding the scan costs products of ``length x dk x dv``
beyond the local recurrence, two forward and four backward; ``overlap=False`` needs one each way.
States travel in the accumulation dtype (float32 for half-precision inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.parallel.group import Group
from regard.parallel.recurrence import carry_states, chunked_gla, sequence_parallel

__all__ = ["AllScan", "SpCost", "all_scan", "chunked_gla", "sp_cost", "zeco"]


@dataclass(frozen=True)
class AllScan:
    """The carry of ZeCO: ``blocks`` slices, no more than dk, each passed on before the next arrives."""

    blocks: int
    name: str = "all-scan"

    def __call__(
        self, group: Group, state: Tensor, decay: Tensor | None, start: Tensor | None, reverse: bool
    ) -> Tensor:
        """See :class:`regard.parallel.recurrence.Carry`."""
        blocks = min(self.blocks, state.shape[-2])
        step = -1 if reverse else 1
        before, after = group.rank - step, group.rank + step
        whole = torch.zeros_like(state) if start is None else start
        factor = None if decay is None else decay.expand(*state.shape[:-1])[..., None].tensor_split(blocks, -2)
        arrived = []
        for index, (own, initial) in enumerate(
            zip(state.tensor_split(blocks, -2), whole.tensor_split(blocks, -2), strict=True)
        ):
            label = f"slice {index + 1} of {blocks} of the {'backward ' if reverse else ''}{self.name}"
            here = initial
            if 0 <= before < group.size:
                here = group.receive(own.shape, own.dtype, own.device, before, step=label)
            if 0 <= after < group.size:
                group.send(own + (here if factor is None else here * factor[index]), after, step=label)
            arrived.append(here)
        group.flush()
        return torch.cat(arrived, -2)


def _check_blocks(blocks: int) -> None:
    if blocks < 1:
        raise OptionError(f"blocks is the number of slices that a state travels in, at least 1, got {blocks}.")


def all_scan(
    group: Group,
    local_state: Tensor,
    total_decay: Tensor | None = None,
    *,
    blocks: int = 8,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The collective: ``(incoming_state, outgoing_state)`` of this rank, differentiable.

    local_state ``(..., dk, dv)`` is what the rank's tokens add up to from a zero state, total_decay ``(..., dk)`` or
    ``(..., 1)`` what they leave of an earlier one (None: all of it). ``initial_state`` comes before rank 0, which alone
    passes it. ``blocks`` need not divide dk; beyond dk it means dk.
    """
    _check_blocks(blocks)
    return carry_states(AllScan(blocks), group, local_state, total_decay, initial_state)


def zeco(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    blocks: int = 8,
    overlap: bool = True,
) -> tuple[Tensor, Tensor]:
    """Causal (gated) linear attention of a sequence that is spread over the ranks of ``group``, in order.

    query ``(batch, heads, length, dk)``, key ``(batch, kv_heads, length, dk)`` and value ``(batch, kv_heads, length,
    dv)`` are the rank's own tokens; lengths may differ from rank to rank, and be 0. ``log_decay`` at most 0:
    ``(heads,)``, ``(batch, heads, length)``, ``(batch, heads, length, dk)`` or None; ``-inf`` at the first token of a
    document forgets all before it, so that packed documents do not mix. Gives this rank's outputs and the state
    ``(batch, heads, dk, dv)`` after its last token; the last rank's is the whole sequence's, and may be the
    ``initial_state`` that rank 0 passes for the sequence's continuation. Every rank has to run its backward pass, if
    one does.
    """
    _check_blocks(blocks)
    return sequence_parallel(
        AllScan(blocks),
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


@dataclass(frozen=True)
class SpCost:
    """What one forward pass of a method costs a rank in the middle; ``latency`` as ``tau`` measures it."""

    bytes_sent: int
    bytes_received: int
    messages_sent: int
    latency: float


def sp_cost(
    method: Literal["zeco", "lasp1", "lasp2"],
    ranks: int,
    key_dim: int,
    value_dim: int,
    *,
    blocks: int = 8,
    tau: Callable[[float], float] | None = None,
    itemsize: int = 4,
    states: int = 1,
    decay_dim: int = 0,
) -> SpCost:
    """Bytes and modelled latency of the three methods, forward.

    ``tau(numbers)`` is the time to pass that many numbers to another rank, by default in units of one rank's states.
    ``states`` counts batch items times heads, ``decay_dim`` the decays that LASP-2 gathers with each (0, 1 or key_dim).
    zeco: ``(K + P - 1) tau(dk dv / K)``, which is ``tau(dk dv) + (P - 1) tau(dk dv) / K`` for a tau without a fixed
    part. lasp1 and lasp2: ``(P - 1) tau(dk dv)``, serially from rank to rank, and all the others' states into one rank.
    """
    if method not in ("zeco", "lasp1", "lasp2"):
        raise OptionError(f"method is 'zeco', 'lasp1' or 'lasp2', got {method!r}.")
    if ranks < 1:
        raise OptionError(f"ranks is at least 1, got {ranks}.")
    _check_blocks(blocks)
    blocks = min(blocks, key_dim)
    numbers = states * key_dim * value_dim
    time = tau or (lambda count: count / numbers)
    others = ranks - 1
    if not others:
        return SpCost(0, 0, 0, 0.0)
    if method == "lasp2":
        gathered = numbers + states * decay_dim
        volume = others * gathered * itemsize
        return SpCost(volume, volume, others * (1 + bool(decay_dim)), others * time(gathered))
    volume = numbers * itemsize
    if method == "lasp1":
        return SpCost(volume, volume, 1, others * time(numbers))
    return SpCost(volume, volume, blocks, (blocks + others) * time(numbers / blocks))
