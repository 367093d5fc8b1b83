"""The selected branch of native sparse attention in its two loop orders, by the size of a group of query heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.measure import interleaved, median_ratio, one_thread
from regard.kernels.selected_blocks import selected_attention
from regard.reproduce.finding import Finding
from regard.sparse.flash_sparse_nsa import NativeSparseAttention, nsa_topk, padding_cost, selected_cost

LENGTH, DIM, BLOCK, TOP_K, TILE = 4096, 64, 64, 16, 16
GROUPS = (1, 2, 4, 8, 16)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def orders(index: Tensor) -> dict[str, Attention]:
    """What is compared, as functions of query, key and value."""

    def order(backend: str, tile: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = selected_attention(query, key, value, index, BLOCK, tile=tile, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return {
        "query_major": partial(order, "query_major", TILE),
        "query_major_unpadded": partial(order, "query_major", 1),
        "key_major": partial(order, "key_major", 1),
        "dense": partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True),
    }


def step(attention: Attention, tensors: list[Tensor]) -> None:
    """Forward and backward."""
    attention(*(t.detach().requires_grad_() for t in tensors)).sum().backward()


def inputs(group: int, length: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value of one key/value head, and lists of blocks by random scores."""
    generator = torch.Generator().manual_seed(group)
    shapes = [(1, heads, length, DIM) for heads in (group, 1, 1)]
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    scores = torch.rand(1, 1, length, length // BLOCK, generator=generator)
    return tensors, nsa_topk(scores, TOP_K, block_size=BLOCK)


def by_group(group: int, report: Callable[[str], None]) -> dict[str, float]:
    """Ratios of times to that of the key-major order, for one key/value head."""
    tensors, index = inputs(group, LENGTH)
    forms = orders(index)
    with torch.no_grad():
        forward = interleaved({name: partial(form, *tensors) for name, form in forms.items()}, rounds=9)
    both = interleaved({name: partial(step, form, tensors) for name, form in forms.items()}, rounds=3)
    found = {}
    for name in forms:
        if name != "key_major":
            found[f"{name}_over_key_major_group_{group}"] = median_ratio(forward[name], forward["key_major"])
            found[f"training_{name}_over_key_major_group_{group}"] = median_ratio(both[name], both["key_major"])
    report(", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def dense_far(report: Callable[[str], None], length: int = 4 * LENGTH, group: int = 4) -> float:
    """Time of dense attention over key-major at a greater length, forward."""
    tensors, index = inputs(group, length)
    forms = orders(index)
    with torch.no_grad():
        times = interleaved({name: partial(forms[name], *tensors) for name in ("dense", "key_major")}, rounds=3)
    ratio = median_ratio(times["dense"], times["key_major"])
    report(f"dense over key-major, {length} tokens, groups of {group}: {ratio:.2f}")
    return ratio


def layer_step(report: Callable[[str], None], length: int = 2048) -> float:
    """A training step of a whole layer, four heads of their own keys, query-major (unpadded) over key-major."""
    torch.manual_seed(0)
    layer, x = NativeSparseAttention(256, 4), torch.randn(1, length, 256)

    def run(executor: str) -> None:
        layer.executor = executor  # type: ignore[assignment]
        layer(x).sum().backward()

    times = interleaved({name: partial(run, name) for name in ("query_major", "key_major")}, rounds=3)
    ratio = median_ratio(times["query_major"], times["key_major"])
    report(f"a whole layer, forward and backward, {length} tokens: {ratio:.2f}")
    return ratio


def run(report: Callable[[str], None]) -> Finding:
    """Both orders and dense attention over groups of 1 to 16 query heads."""
    measured: dict[str, float] = {}
    with one_thread():
        for group in GROUPS:
            measured |= by_group(group, report)
            both = (selected_cost(o, LENGTH, group, 1, DIM, tile=TILE) for o in ("query_major", "key_major"))
            operations = [cost.flops for cost in both]
            measured[f"operations_query_major_over_key_major_group_{group}"] = operations[0] / operations[1]
        measured[f"dense_over_key_major_{4 * LENGTH}_tokens_group_4"] = dense_far(report)
        measured["layer_training_query_major_unpadded_over_key_major"] = layer_step(report)
    ratios = [measured[f"query_major_over_key_major_group_{group}"] for group in GROUPS]
    holds = ratios[0] > 1.5 and ratios[-1] < 1.25 and all(a > b for a, b in pairwise(ratios))
    note = (
        f"{LENGTH} tokens, one key/value head of width {DIM}, blocks of {BLOCK}, {TOP_K} a query, random choices; both "
        "orders as batched matrix products in float32 on one thread, times of whole calls, the inverse index included; "
        "on a shared machine the ratios of the shortest calls move by half from run to run. "
        f"Query-major fills a group up to {TILE} rows, as matrix units ask. Holds if its time over the key-major one's "
        f"exceeds 1.5 for one head a group, falls with the group, and is below 1.25 for {GROUPS[-1]}, where nothing is "
        f"filled up (operations: {padding_cost(GROUPS[0], TILE):.0f} times as many at one head, equally many at "
        f"{GROUPS[-1]}). Unpadded, which a processor without matrix units may do, the query-major order still copies "
        "the keys of every query: with gathered products that costs more than a GPU's cache makes it cost, so the "
        "ratios lie above the paper's. Dense is torch's fused causal attention over all keys, of which a query here "
        f"lists up to {TOP_K * BLOCK}: of {LENGTH} that saves little. The paper's figures are kernels on H20 and H200 "
        "GPUs with groups of 1 to 16 and up to 64k tokens."
    )
    return Finding({name: round(value, 3) for name, value in measured.items()}, holds, note)
