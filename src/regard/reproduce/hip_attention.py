"""HiP: how much of the true top keys a tree search finds as scores get smoother, what pruning costs the loss of nano
beside a window of the same size, and how operations grow with the length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import regard
from regard.bench.measure import interleaved, median_ratio, one_thread
from regard.cost import AttentionShape, dense_cost
from regard.kernels import dense_attention
from regard.reproduce.finding import Finding
from regard.sparse.hip_attention import HiPAttention, hip_topk, locality_theorem, smooth_scores
from regard.sparse.metrics import topk_recall

KEYS, KEPT, COUNT = 4096, 256, 32
# Standard deviation of the scores whose softmax is looked at.
SPREAD = 3.0
CONTEXT, WINDOWS, FROM = 2048, 8, 512
BUDGET: dict[str, Any] = {"mask_k": 128, "window": 128, "sinks": 16}


def search(report: Callable[[str], None]) -> dict[str, Any]:
    """Recall of the true top and share of its softmax mass, by correlation length of synthetic scores."""
    found: dict[str, Any] = {}
    for correlation in (0, 1, 2, 4, 8, 16, 64):
        scores = smooth_scores(COUNT, KEYS, correlation, seed=1)
        query, key = torch.ones(COUNT, 1, 1, 1, dtype=scores.dtype), scores[:, None, :, None]
        mass = (SPREAD * scores).softmax(-1)
        best = mass.topk(KEPT, -1).values.sum(-1)
        for representative in ("first", "center"):
            kept = hip_topk(query, key, KEPT, 1, 1, representative, 1, causal=False)[:, 0, 0]
            recall = float(topk_recall(kept, scores, KEPT).mean())
            share = float((mass.gather(-1, kept).sum(-1) / best).mean())
            found[f"recall_{representative}_correlation_{correlation}"] = round(recall, 3)
            found[f"mass_ratio_{representative}_correlation_{correlation}"] = round(share, 3)
            report(f"correlation {correlation}, {representative}: recall {recall:.3f}, mass ratio {share:.3f}")
    for correlation in (0, 16):
        descent = locality_theorem(1024, correlation)
        found[f"smallest_chance_of_the_right_half_correlation_{correlation}"] = round(min(descent.levels), 3)
        found[f"descent_over_coin_tosses_correlation_{correlation}"] = round(descent.found / descent.chance, 1)
    return found


def _text() -> tuple[Any, Tensor]:
    """nano and windows of the first held-out modules that fill one."""
    from regard.models.nano import load_nano, load_tokenizer
    from regard.models.nano.corpus import read_corpus
    from regard.models.nano.train import encode

    documents = [tokens for _, tokens in encode(load_tokenizer().backend_tokenizer, read_corpus("held_out"))]
    whole = [tokens[: CONTEXT + 1] for tokens in documents if len(tokens) > CONTEXT]
    return load_nano(), torch.stack(whole[:WINDOWS])


@torch.no_grad()
def pruning(report: Callable[[str], None]) -> dict[str, Any]:
    """Loss of nano on held-out text, positions from ``FROM`` on, with nothing changed but its attention."""
    from regard.models.nano.train import token_losses

    model, windows = _text()
    wide = {"window": BUDGET["mask_k"] + BUDGET["window"], "sinks": BUDGET["sinks"]}
    rivals: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("full", {}),
        "window": ("sliding_window", wide),
        "hip": ("hip_attention", dict(BUDGET)),
        "hip_center": ("hip_attention", {**BUDGET, "representative": "center"}),
    }
    found = {}
    for name, (mechanism, options) in rivals.items():
        with regard.retrofit(model, mechanism, **options):
            losses = [token_losses(model, row[None, :-1], row[None, 1:])[FROM:].mean() for row in windows]
        found[f"nano_loss_nats_{name}"] = round(float(torch.stack(losses).mean()), 4)
        report(f"nano with {name}: {found[f'nano_loss_nats_{name}']:.4f} nats a token")
    return found


def growth(report: Callable[[str], None]) -> dict[str, Any]:
    """Exponents of counted operations between 1024 and 32768 tokens."""
    ends, found = (1024, 32768), {}
    for name, causal in (("all_keys_seen", False), ("causal", True)):
        shapes = [AttentionShape(n, n, 1, 64, causal=causal) for n in ends]
        pruned, dense = ([c.flops for c in costs] for costs in zip(*_costs(shapes), strict=True))
        for label, counts in (("hip", pruned), ("dense", dense)):
            exponent = math.log(counts[1] / counts[0]) / math.log(ends[1] / ends[0])
            found[f"exponent_{label}_{name}"] = round(exponent, 3)
            report(f"operations, {name}, {label}: exponent {exponent:.3f}")
    return found


def _costs(shapes: list[AttentionShape]) -> list[tuple[Any, Any]]:
    module = HiPAttention(**BUDGET)
    return [(module.cost(shape), dense_cost(shape, 0.5 if shape.causal else 1.0)) for shape in shapes]


def speed(report: Callable[[str], None], length: int = 16384) -> dict[str, float]:
    """Time of a causal pass over dense attention, search included."""
    query, key, value = torch.randn(3, 1, 2, length, 64, generator=torch.Generator().manual_seed(0))
    module = HiPAttention()
    with one_thread(), torch.no_grad():
        taken = interleaved(
            {
                "dense": lambda: dense_attention(query, key, value, causal=True),
                "hip": lambda: module(query, key, value, causal=True),
            },
            rounds=5,
        )
    ratio = round(median_ratio(taken["hip"], taken["dense"]), 2)
    report(f"time over dense at {length} tokens: {ratio}")
    return {"time_over_dense_16384_tokens": ratio}


def run(report: Callable[[str], None]) -> Finding:
    """The search, the loss, the growth."""
    measured = search(report) | pruning(report) | growth(report) | speed(report)
    gaps = {name: measured[f"nano_loss_nats_{name}"] - measured["nano_loss_nats_full"] for name in ("hip", "window")}
    measured["loss_gap_hip_over_window"] = round(gaps["hip"] / gaps["window"], 3)
    smooth = [measured[f"mass_ratio_{r}_correlation_{c}"] for r in ("first", "center") for c in (16, 64)]
    holds = (
        measured["recall_first_correlation_0"] > 2 * KEPT / KEYS
        and min(smooth) > 0.99
        and gaps["hip"] <= 0.5 * gaps["window"]
        and measured["exponent_hip_all_keys_seen"] < 1.2
    )
    note = (
        f"Search: {COUNT} rows of {KEYS} Gaussian scores, {KEPT} kept, single queries and keys; chance is "
        f"{KEPT / KEYS:.4f}; mass is that of a softmax over scores of standard deviation {SPREAD}. Loss: nano, trained "
        f"at this context with full attention and not tuned, on {WINDOWS} held-out modules, targets {FROM + 1} to "
        f"{CONTEXT}; HiP keeps 128 keys in pairs for 32 queries, a window of 128 and 16 sinks, its rival a window of "
        "256 and 16 sinks. Growth: of operations between 1024 and 32768 tokens with these options, where every query "
        "sees all keys; a causal pass begins with stretches too short to prune, which makes its exponent larger. Holds "
        "if recall on white noise is at least twice chance, if 0.99 of the mass is found from a correlation length of "
        "16 on, if pruning costs at most half of what the window costs, and if the exponent is below 1.2. Time is of "
        "one thread with the default options. Windows of 32 and 64 keys and blocks of 8 queries give the same picture; "
        "single queries with single keys lose more. A million tokens takes a large model."
    )
    return Finding(measured, holds, note)
