"""Ring attention: queries stay, keys and values travel.

Each rank keeps its own queries; the key/value blocks of all ranks pass by on a ring, the next one arriving while the
present one is computed, and the parts are merged by their log-sum-exp (Liu, Zaharia and Abbeel, "Ring Attention with
Blockwise Transformers for Near-Infinite Context", 2023, arXiv 2310.01889). Kept for the backward pass are the local
query, key, value, output and log-sum-exp alone; keys and values travel a second time, and the gradients of a block
follow it, each rank adding its share, until the last one sends them home.

A block that no query of a rank sees is not computed there, and it travels no further than to the last rank that sees
any of it. Where the first and last such ranks are ``near`` and ``far`` steps onwards (1 and ``ranks - 1`` where every
rank sees every block), a block of ``l`` tokens makes ``far`` messages forward, of ``batch * kv_heads * l * (head_dim +
value_dim)`` numbers in the dtype of the keys; backward the same again, and ``far - near + 1`` messages of gradients in
the dtype of accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels.merge import merge_attentions
from regard.kernels.partial import partial_attention, partial_attention_backward
from regard.parallel.group import Group, Pending
from regard.parallel.shards import Sharding, Sight

__all__ = ["ring_attention"]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group | None,
    sharding: Sharding,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Exact attention of the local queries to the keys of all ranks; every rank of ``group`` makes this call (None:
    there is one rank).

    query ``(batch, num_heads, local_len, head_dim)``, key and value ``(batch, kv_heads, local_len, ...)``: this rank's
    shards. Returns ``(batch, num_heads, local_len, value_dim)``. Its backward pass communicates as well.
    """
    if group is not None and query.is_cuda and group not in _met:
        # NCCL forms its connections in the first call, in which every rank has to take part; a ring has idle ones.
        group.barrier()
        _met.add(group)
    out: Tensor = _Ring.apply(query, key, value, group, sharding, Sight(causal, window), scale)
    return out


_met: WeakSet[Group] = WeakSet()


class _Travel:
    """The passing of key/value blocks, the same forward and backward."""

    def __init__(self, key: Tensor, value: Tensor, group: Group, sharding: Sharding, sight: Sight) -> None:
        self._like = (key, value)
        self._group, self._lengths = group, sharding.lengths
        self.near, self.far = zip(*sharding.hops(*sight), strict=True)
        self.seen: list[bool] = (sharding.pairs(*sight)[group.rank] > 0).tolist()
        own = self.far[group.rank] > 0
        self._held = torch.cat((key.reshape(-1), value.reshape(-1))) if own else key.new_empty(0)
        self._coming: Pending | None = None

    def block(self, step: int) -> int:
        """Whose block is here at a step."""
        return (self._group.rank - step) % self._group.size

    def start(self, step: int) -> None:
        """Send on what is here, and begin to receive what comes next; there is nothing after the last step."""
        group, previous = self._group, self.block(step + 1)
        if step == group.size - 1:
            return
        onwards = self._held if step < self.far[self.block(step)] else self._held[:0]
        size = self._size(previous) if step < self.far[previous] else 0
        self._coming = group.start_exchange(
            [onwards],
            to=(group.rank + 1) % group.size,
            source=(group.rank - 1) % group.size,
            received_shapes=[(size,)],
            step=f"ring, keys and values {step + 1}",
        )

    def arrive(self, step: int) -> None:
        """Wait for what :meth:`start` began."""
        assert self._coming is not None
        (self._held,) = self._coming.wait()

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """Key and value of the block that is here."""
        key, value = self._like
        length = self._lengths[self.block(step)]
        cut = key.shape[0] * key.shape[1] * length * key.shape[3]
        shapes = [(*t.shape[:2], length, t.shape[3]) for t in (key, value)]
        return self._held[:cut].view(shapes[0]), self._held[cut:].view(shapes[1])

    def _size(self, block: int) -> int:
        key, value = self._like
        return key.shape[0] * key.shape[1] * self._lengths[block] * (key.shape[3] + value.shape[3])


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: Group | None,
        sharding: Sharding,
        sight: Sight,
        scale: float | None,
    ) -> Tensor:
        rank, travel = 0, None
        if group is not None:
            rank, travel = group.rank, _Travel(key, value, group, sharding, sight)
            travel.start(0)
        out, lse = partial_attention(query, key, value, sharding.ranges(rank, rank, *sight), scale=scale)
        dtype, out = out.dtype, out.to(lse.dtype)
        for step in range(1, sharding.ranks):
            assert travel is not None
            travel.arrive(step)
            travel.start(step)
            source = travel.block(step)
            if travel.seen[source]:
                ranges = sharding.ranges(rank, source, *sight)
                part, part_lse = partial_attention(query, *travel.read(step), ranges, scale=scale)
                out, lse = merge_attentions((out, part), (lse, part_lse))
        out = out.to(dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = (group, sharding, sight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        group, sharding, sight, scale = ctx.call
        rank = 0 if group is None else group.rank

        def part(source: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            ranges = sharding.ranges(rank, source, *sight)
            return partial_attention_backward(grad_out, query, keys, values, out, lse, ranges, scale=scale)

        if group is None:
            grad_query, grad_key, grad_value = part(rank, key, value)
        else:
            travel = _Travel(key, value, group, sharding, sight)
            travel.start(0)
            grad_query, grad_key, grad_value = part(rank, key, value)
            home = torch.cat((grad_key.flatten(), grad_value.flatten()))
            _carry(travel, part, home, grad_query, group, sharding.lengths)
            grad_key, grad_value = home[: key.numel()].view(key.shape), home[key.numel() :].view(value.shape)
        grads = (
            t.to(like.dtype) for t, like in zip((grad_query, grad_key, grad_value), (query, key, value), strict=True)
        )
        return *grads, None, None, None, None


def _carry(
    travel: _Travel,
    part: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    home: Tensor,
    grad_query: Tensor,
    group: Group,
    lengths: Sequence[int],
) -> None:
    """The backward pass of the other ranks' blocks: adds to ``grad_query``, and to ``home``, the gradients of the own
    block, what the others found."""
    rank, ranks, near, far = group.rank, group.size, travel.near, travel.far
    none, width = home[:0], len(home) // lengths[rank]
    following, returning = Pending(lambda: [none]), Pending(lambda: [none])
    for step in range(1, ranks):
        travel.arrive(step)
        travel.start(step)
        block, found = travel.block(step), none
        if travel.seen[block]:
            more_query, more_key, more_value = part(block, *travel.read(step))
            grad_query += more_query
            found = torch.cat((more_key.flatten(), more_value.flatten()))
        (before,) = following.wait()
        _add_home(home, returning)
        if len(before):
            found = found.add_(before) if len(found) else before
        coming = travel.block(step + 1)
        last, own, follows = step == far[block], step == far[rank], near[coming] <= step < far[coming]
        if step < ranks - 1:
            following = group.start_exchange(
                [found if step < far[block] else none],
                to=(rank + 1) % ranks,
                source=(rank - 1) % ranks,
                received_shapes=[(lengths[coming] * width if follows else 0,)],
                step=f"ring, gradients {step}",
            )
        # Of two messages between the same ranks the one sent first is received first, here as everywhere.
        returning = group.start_exchange(
            [found if last else none],
            to=block,
            source=(rank + step) % ranks,
            received_shapes=[(len(home) if own else 0,)],
            step=f"ring, gradients home {step}",
        )
    _add_home(home, returning)


def _add_home(home: Tensor, returning: Pending) -> None:
    (found,) = returning.wait()
    if len(found):
        home += found
