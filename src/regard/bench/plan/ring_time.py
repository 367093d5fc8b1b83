"""The time of one pass of a ring, followed rank by rank and step by step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ring_seconds"]


def ring_seconds(
    compute: Tensor,
    hops: list[tuple[int, int]],
    onward: list[float],
    gradients: list[float] | None,
    *,
    home: float = 0.0,
    overlap: bool = True,
) -> float:
    """When the last rank of a ring is done, as :mod:`regard.parallel.ring` goes about it.

    compute ``(steps, ranks)``: seconds of rank ``r`` with the block of rank ``r - step``; hops: the first and last step
    at which anyone sees a rank's block, so that it travels no further; onward: seconds in which each rank passes a
    block on, gradients: the same for a block's gradients, in the backward pass, home: for sending them back. A rank
    sends one message after another, and posts the next block's transfer before it computes with the present one.
    """
    ranks = len(hops)
    near, far = torch.tensor(hops).T
    index = torch.arange(ranks)
    cost = torch.tensor(onward, dtype=torch.float64)
    begun, done = torch.zeros(ranks, dtype=torch.float64), compute[0].clone()
    free, returned = begun.clone(), begun.clone()  # when a rank's own link is, and when its gradients came home
    following = begun.clone()
    grad = None if gradients is None else torch.tensor(gradients, dtype=torch.float64)

    def passed(posted: Tensor, comes: Tensor, seconds: Tensor) -> Tensor:
        """When messages from the rank before are there; both ends have to be ready."""
        nonlocal free
        there = torch.maximum(torch.maximum(posted.roll(1), posted), free.roll(1)) + seconds.roll(1)
        there = torch.where(comes, there, 0.0)
        free = torch.maximum(free, there.roll(-1))
        return there

    def key_values(step: int, posted: Tensor) -> Tensor:
        return passed(posted, far[(index - step) % ranks] >= step, cost)

    arriving = key_values(1, begun if overlap else done)
    for step in range(1, ranks):
        block, coming = (index - step) % ranks, (index - step - 1) % ranks
        begun = torch.maximum(done, torch.maximum(arriving, arriving.roll(-1)))  # sent on as well as received
        if overlap:
            arriving = key_values(step + 1, begun)
        done = begun + compute[step]
        if grad is not None:
            done = torch.maximum(done, torch.maximum(following, returned))
            following = passed(done, (near[coming] <= step) & (step < far[coming]), grad)
            sent = torch.where(far[block] == step, torch.maximum(done, free) + home, 0.0)
            free = torch.maximum(free, sent)
            returned = torch.zeros_like(done).scatter_(0, block, sent)
        if not overlap:
            arriving = key_values(step + 1, done)
    return float(torch.maximum(done, returned).max())
