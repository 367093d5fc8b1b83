"""What the ranks of simulated and of real groups compute alike, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.parallel.context import context_parallel_attention
from regard.parallel.group import Group, Traffic
from regard.parallel.mesh import Mesh
from regard.parallel.shards import Deal, Sharding
from regard.parallel.traffic import PassTraffic, Strategy, traffic


@dataclass(frozen=True)
class Case:
    """One call on a whole sequence; ``documents``: their lengths, or one list of them per sequence."""

    strategy: Strategy = "ring"
    deal: Deal = "zigzag"
    causal: bool = True
    length: int = 40
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)
    documents: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    ulysses_size: int | None = None
    window: int | None = None

    @property
    def ids(self) -> Tensor | None:
        """Document ids, ``(length,)`` or ``(batch, length)``."""
        if self.documents is None:
            return None
        rows = self.documents if isinstance(self.documents[0], tuple) else (self.documents,)
        ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]  # type: ignore[arg-type]
        return torch.stack(ids) if len(ids) > 1 else ids[0]

    def sharding(self, ranks: int) -> Sharding:
        return Sharding.of(self.deal, self.length, ranks, documents=self.ids)

    def tensors(self) -> list[Tensor]:
        """Query, key, value and the gradient of the output, the same on every rank."""
        generator = torch.Generator().manual_seed(self.length)
        shapes = (
            (2, self.heads[0], self.length, self.dims[0]),
            (2, self.heads[1], self.length, self.dims[0]),
            (2, self.heads[1], self.length, self.dims[1]),
            (2, self.heads[0], self.length, self.dims[1]),
        )
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def expected(self) -> list[Tensor]:
        """Output and gradients of one process' attention over the whole sequence."""
        *inputs, grad = self.tensors()
        inputs = [t.requires_grad_() for t in inputs]
        place = torch.arange(self.length)
        seen = place[:, None] >= place if self.causal else torch.ones(self.length, self.length, dtype=torch.bool)
        if self.window is not None:
            seen = seen & ((place[:, None] - place).abs() < self.window)
        if self.ids is not None:
            ids = self.ids.view(-1, 1, self.length)
            seen = seen & (ids[..., None] == ids[..., None, :])
        out = F.scaled_dot_product_attention(*inputs, attn_mask=seen, scale=0.4, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    def formula(self, ranks: int, rank: int) -> PassTraffic:
        return traffic(
            self.strategy,
            self.sharding(ranks),
            rank,
            batch=2,
            num_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            head_dim=self.dims[0],
            value_dim=self.dims[1],
            dtype=torch.float64,
            causal=self.causal,
            window=self.window,
            ulysses_size=self.ulysses_size,
        )


def run(group: Group, case: Case) -> tuple[list[Tensor], PassTraffic]:
    """One rank's output and gradients, and what it sent for them."""
    where = Mesh.split(group, case.ulysses_size) if case.ulysses_size is not None else group
    sharding = case.sharding(group.size)
    *inputs, grad = (sharding.shard(t, group.rank, 2) for t in case.tensors())
    inputs = [t.requires_grad_() for t in inputs]
    began = group.traffic.copy()
    out = context_parallel_attention(
        *inputs,
        group=where,
        sharding=sharding,
        strategy=case.strategy,
        causal=case.causal,
        window=case.window,
        scale=0.4,
    )
    between = group.traffic.copy()
    grads = torch.autograd.grad(out, inputs, grad)
    return [out.detach(), *grads], PassTraffic(between - began, group.traffic.copy() - between)


def check(case: Case, ranks: int, results: list[tuple[list[Tensor], PassTraffic]]) -> None:
    """Values, gradients and counts of all ranks against one process' attention and the formula."""
    sharding = case.sharding(ranks)
    parts = zip(*(tensors for tensors, _ in results), strict=True)
    for name, part, whole in zip(("output", "dq", "dk", "dv"), parts, case.expected(), strict=True):
        torch.testing.assert_close(
            sharding.gather(part, 2), whole, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n} of {case}: {m}"
        )
    for rank, (_, counted) in enumerate(results):
        for found, formula in zip(counted, case.formula(ranks, rank), strict=True):
            assert without_ticks(found) == formula, f"rank {rank} of {case}"


def without_ticks(found: Traffic) -> Traffic:
    return Traffic(found.messages_sent, found.messages_received, found.bytes_sent, found.bytes_received)


SHARED = [Case(deal=deal, causal=causal) for deal in ("contiguous", "zigzag", "striped") for causal in (True, False)]  # type: ignore[arg-type]
UNEVEN = [Case(deal=deal, length=length) for deal in ("contiguous", "zigzag", "striped") for length in (37, 9)]  # type: ignore[arg-type]
PACKED = [
    Case(deal=deal, causal=causal, length=41, documents=documents)  # type: ignore[arg-type]
    for deal in ("contiguous", "zigzag", "striped")
    for causal in (True, False)
    for documents in ((5, 1, 20, 15), ((41,), (3, 30, 8)))
]
HEADS = [
    Case(strategy=strategy, heads=heads, length=30)  # type: ignore[arg-type]
    for strategy in ("ring", "ulysses")
    for heads in ((4, 4), (4, 1), (8, 2), (12, 6), (6, 3), (5, 5))
]
OTHERS = [
    Case(dims=(8, 4)),
    Case(dims=(3, 20), strategy="ulysses"),
    Case(strategy="ulysses", documents=(5, 20, 15)),
    Case(strategy="ulysses", causal=False, deal="striped", length=39),
    Case(window=7),
    Case(window=7, deal="contiguous"),
    Case(window=1, deal="striped"),
    Case(window=12, causal=False, deal="contiguous", documents=(5, 20, 15)),
    Case(window=7, strategy="ulysses"),
]
