"""The block-sparse executor against the ideal: the time of dense SDPA on the same shape, times the density.

Beside it what a user would take instead: compiled FlexAttention (forward alone on a CPU) and a dozen lines that gather
the key blocks and call SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Report, Row, Times, gradients, inputs, ratio
from regard.bench.measure import interleaved
from regard.errors import BackendError
from regard.kernels import block_sparse_attention
from regard.kernels.native import status
from regard.layout import BlockLayout
from regard.masks import Causal, SlidingWindow

DENSITY = 0.1
TARGETS = (0.90, 0.85)


def run(report: Report, quick: bool) -> list[Row]:
    """Rows for both blocks and both kinds of layout at 8k tokens."""
    heads, length, rounds = (2, 2048, 2) if quick else (8, 8192, 3)
    return compare(report, heads, heads, length, (64, 128), DENSITY, rounds, TARGETS)


def chosen_blocks(heads: int, blocks: int, density: float) -> Tensor:
    """Key blocks of each query block, drawn per head: ``(heads, blocks, kept)``."""
    scores = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(2))
    return scores.topk(max(round(density * blocks), 1), -1).indices.sort(-1).values


def random_layout(chosen: Tensor, length: int, block: int) -> BlockLayout:
    """The layout that visits the chosen blocks."""
    heads, blocks, _ = chosen.shape
    visit = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool).scatter_(3, chosen[None], True)
    return BlockLayout.of(None, length, length, block, block).only(visit)


def band_layout(length: int, block: int, density: float) -> BlockLayout:
    """A causal sliding window of so many keys that about ``density`` of the blocks is visited."""
    return BlockLayout.of(Causal() & SlidingWindow(max(int(density * length) - block, 1)), length, length, block, block)


def gather_and_sdpa(query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block: int) -> Tensor:
    """What a user would write for layouts with as many key blocks in every row."""
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1).view(batch * heads, -1, block, dim) for t in (key, value))
    head = torch.arange(heads)[:, None, None]
    keys, values = (t[head, chosen].flatten(2, 3).flatten(0, 1) for t in (key, value))
    queries = query.reshape(-1, block, dim)
    out = F.scaled_dot_product_attention(queries[None], keys[None], values[None])
    return out.view(batch, heads, length, dim)


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA; grouped heads are repeated, because its own grouping takes a slow path backward."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t if groups == 1 else t.repeat_interleave(groups, 1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value)


def compare(
    report: Report,
    heads: int,
    kv_heads: int,
    length: int,
    blocks: tuple[int, ...],
    density: float,
    rounds: int,
    targets: tuple[float, float] | None,
    competitors: bool = True,
) -> list[Row]:
    """Rows of one setting; ``competitors``: beside what a user would take instead."""
    plain, tracked = inputs(heads, length, kv_heads=kv_heads), inputs(heads, length, kv_heads=kv_heads, grad=True)
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: _dense(*plain),
        "dense backward": gradients(_dense, tracked),
    }
    densities: dict[str, float] = {}
    for block in blocks:
        chosen = chosen_blocks(heads, length // block, density)
        layouts = {"random": random_layout(chosen, length, block), "band": band_layout(length, block, density)}
        for kind, layout in layouts.items():
            name = f"{kind}, blocks of {block}"
            ours = partial(block_sparse_attention, layout=layout)
            calls[name], calls[f"{name} backward"] = partial(ours, *plain), gradients(ours, tracked)
            densities[name] = layout.density()
        if not competitors:
            continue
        name = f"random, blocks of {block}, FlexAttention"
        if targets and _runs(report, partial(block_sparse_attention, *plain, layouts["random"], backend="flex")):
            calls[name] = partial(block_sparse_attention, *plain, layouts["random"], backend="flex")
            densities[name] = layouts["random"].density()
        name = f"random, blocks of {block}, gather + SDPA"
        theirs = partial(gather_and_sdpa, chosen=chosen, block=block)
        calls[name], calls[f"{name} backward"] = partial(theirs, *plain), gradients(theirs, tracked)
        densities[name] = layouts["random"].density()
    report(f"block_sparse: {length} tokens, {len(calls)} calls, {rounds} rounds")
    times = interleaved(calls, rounds)
    where = f"{length} tokens" + (f", {kv_heads} key heads" if kv_heads != heads else "")
    return _rows(times, densities, where + (f", density {density}" if density != DENSITY else ""), targets)


def _runs(report: Report, call: Callable[[], object]) -> bool:
    try:
        call()
    except (BackendError, RuntimeError) as error:
        report(f"FlexAttention does not run here: {str(error).splitlines()[0]}")
        return False
    return True


def _rows(times: Times, densities: dict[str, float], where: str, targets: tuple[float, float] | None) -> list[Row]:
    rows = []
    for name, density in densities.items():
        own = "FlexAttention" not in name and "SDPA" not in name
        for suffix, base, share, label in (
            ("", "dense", 0, "forward"),
            (" backward", "dense backward", 1, "forward + backward"),
        ):
            if name + suffix in times:
                measured = ratio(times, base, name + suffix) * density
                target = targets[share] if targets and own else None
                note = f"density {density:.3f}" + (f", native kernel: {status().state}" if own else "")
                rows.append(Row(f"{label}, {where}, {name}", measured, "of the ideal", target, note=note))
    return rows
