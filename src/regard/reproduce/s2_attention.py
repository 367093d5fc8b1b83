"""S2-Attention: recall of heads that share the context against heads that all see the same stripes, time against dense
blocks with the same executor, and the size of the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from regard.bench.measure import interleaved, median_ratio
from regard.bench.recall import PairedRecall, recall_accuracy
from regard.kernels import block_sparse_attention
from regard.layout import BlockLayout
from regard.local.s2_attention import S2Attention, coverage, local_stride_pattern
from regard.masks import Causal
from regard.reproduce.finding import Finding

LENGTH, BLOCK, HEADS, STEPS = 512, 16, 4, 500
STRIPES = {"block_size": BLOCK, "local_blocks": 2, "stride": HEADS}
RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("full", {}),
    "heterogeneous": ("s2_attention", STRIPES),
    "homogeneous": ("s2_attention", {**STRIPES, "homogeneous": True}),
}
LONG, LOCAL, STRIDE = 4096, 4, 8


def recall(report: Callable[[str], None]) -> dict[str, float]:
    """Accuracy on pairs in the first quarter of 512 tokens, asked for in the second half."""
    task = PairedRecall(LENGTH, pairs=16, keys=16, values=8, memory=LENGTH // 4)
    found = recall_accuracy(task, RIVALS, report, steps=STEPS, num_heads=HEADS, batches=8)
    return {f"recall_accuracy_{name}": round(accuracy, 4) for name, accuracy in found.items()}


@torch.no_grad()
def operator() -> dict[str, float]:
    """Time and cache at 4096 tokens, 8 heads of 64, blocks of 64, 4 of them local, stride 8."""
    blocks = LONG // 64
    query, key, value = torch.randn(3, 1, 8, LONG, 64, generator=torch.Generator().manual_seed(0))
    s2 = S2Attention(8, block_size=64, local_blocks=LOCAL, stride=STRIDE)
    causal = BlockLayout.of(Causal(), LONG, LONG, 64, 64)
    taken = interleaved(
        {
            "s2": partial(s2, query, key, value, causal=True),
            "dense": partial(block_sparse_attention, query, key, value, causal),
        },
        rounds=9,
        warmup=2,
    )
    pattern = local_stride_pattern(8, blocks, LOCAL, STRIDE)
    density = float(pattern.sum()) / (8 * blocks * (blocks + 1) / 2)
    _, cache = s2.step(query, key, value, s2.init_state(1, like=query))
    speedup = median_ratio(taken["dense"], taken["s2"])
    return {
        "density_of_causal_blocks": round(density, 4),
        "speedup_over_dense_blocks": round(speedup, 2),
        "speedup_share_of_bound": round(speedup * density, 3),
        "cache_tokens_share_of_dense": round(float(cache.counts().double().mean()) / LONG, 4),
        "cache_bound_share_of_dense": round(1 / STRIDE + LOCAL / blocks, 4),
    }


def run(report: Callable[[str], None]) -> Finding:
    """Three models on recall, one operator."""
    measured: dict[str, Any] = operator()
    report(f"operator: {measured}")
    measured |= {
        f"recall_coverage_{name}": round(
            coverage(local_stride_pattern(HEADS, LENGTH // BLOCK, 2, HEADS, homogeneous=name == "homogeneous")), 4
        )
        for name in ("heterogeneous", "homogeneous")
    }
    measured |= recall(report)
    dense, shared, same = (measured[f"recall_accuracy_{name}"] for name in RIVALS)
    holds = (
        measured["speedup_share_of_bound"] >= 0.6
        and measured["cache_tokens_share_of_dense"] <= measured["cache_bound_share_of_dense"] + 1e-4
        and shared >= dense - 0.02
        and same <= shared - 0.1
    )
    return Finding(
        measured,
        holds,
        f"Operator: {LONG} tokens, 8 heads of 64, blocks of 64, {LOCAL} local, stride {STRIDE}, forward, against all "
        "causal blocks with the same executor. Recall: two layers of width 64, 16 pairs (key and value on one token) "
        f"in the first quarter of {LENGTH} tokens, asked for in the second half; {HEADS} heads, blocks of {BLOCK}, 2 "
        f"local, stride {HEADS}, {STEPS} steps, chance 12.5 %. Holds if the speed-up is at least 60 % of 1 / density, "
        "the cache at most 1 / stride and the local blocks, heads with stripes of their own within 2 points of dense "
        "attention, and heads with the same stripes at least 10 points below. Training a language model and needles "
        "at 32 thousand tokens take GPUs.",
    )
