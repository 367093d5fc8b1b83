"""Cluster and aggregate in small vision transformers, beside merging, pooling and choosing tokens."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.digits import digits_vit
from regard.bench.measure import one_thread
from regard.bench.reduction import compare_reductions
from regard.models.vit import VisionTransformer
from regard.nn import MultiHeadAttention, TransformerBlock
from regard.reproduce.finding import Finding
from regard.sparse.token_sequence_compression import (
    Compressed,
    Method,
    attention_saliency,
    proportional_bias,
    saliency_stability,
)

SEEDS, STEPS, BUDGETS = 5, 600, (32, 16, 8)
METHODS: tuple[Method, ...] = ("cluster", "tome", "pooling", "strided", "random", "saliency", "cluster_select")
MERGING: tuple[Method, ...] = ("cluster", "tome", "pooling")
CLASS, PATCHES = slice(0, 1), slice(1, None)


def _keys(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """Keys of the patches in the first block, mean over the heads, as ToMe compares them."""
    block = cast(TransformerBlock, model.blocks[0])
    key = cast(MultiHeadAttention, block.attention).project(block.attention_norm(tokens))[1]
    return key[:, :, 1:].mean(1)


def _accuracy(
    model: VisionTransformer, head: Tensor, classes: Tensor, found: Compressed, weighed: bool = False
) -> float:
    """Of the later blocks on the class token and what is left of the patches; weighed: by how many each stands for."""
    bias = proportional_bias(torch.cat((found.sizes.new_ones(len(head), 1), found.sizes), 1)) if weighed else None
    tokens = torch.cat((head, found.tokens), 1)
    out = model.classify(model.encode(tokens, first=1, mask=bias))
    return float((out.argmax(-1) == classes).double().mean())


def _operations(model: VisionTransformer, tokens: int) -> int:
    """Of the later blocks on so many patches and the class token, products of matrices alone."""
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model.encode(torch.zeros(1, 1 + tokens, model.class_token.shape[0]), first=1)
    return cast(int, counter.get_total_flops())


@one_thread()
@torch.no_grad()
def run(report: Callable[[str], None]) -> Finding:
    """Train five models, compress what leaves their first block, and let the other blocks go on untrained for it."""
    accuracy: dict[tuple[str, int], list[float]] = defaultdict(list)
    error: dict[tuple[str, int], list[float]] = defaultdict(list)
    whole: list[float] = []
    agreement: list[float] = []
    saving: dict[int, float] = {}
    for seed in range(SEEDS):
        with torch.enable_grad():
            model, task = digits_vit(seed, steps=STEPS)
        images, classes = task.all("test")
        states = [model.embed(images)]
        for layer in range(len(model.blocks)):
            states.append(model.encode(states[-1], layer, layer + 1))
        saliency = [
            attention_saliency(model.attention_weights(tokens, layer), CLASS, PATCHES)
            for layer, tokens in enumerate(states[:-1])
        ]
        correlation = saliency_stability(saliency).correlation
        agreement.append(float(correlation[~torch.eye(len(correlation), dtype=torch.bool)].mean()))
        whole.append(float((model.classify(states[-1]).argmax(-1) == classes).double().mean()))
        head, patches = states[1][:, CLASS], states[1][:, PATCHES]
        for weighed, methods in ((False, METHODS), (True, MERGING)):
            rows = compare_reductions(
                patches,
                BUDGETS,
                methods,
                partial(_accuracy, model, head, classes, weighed=weighed),
                grid=model.grid,
                saliency=saliency[0],
                key=_keys(model, states[0]),
                seed=seed,
            )
            for row in rows:
                name = f"{row.method}_log_size" if weighed else row.method
                accuracy[name, row.m].append(cast(float, row.score))
                if not weighed:
                    error[row.method, row.m].append(row.error)
        saving = {m: _operations(model, 64) / _operations(model, m) for m in BUDGETS}
        found = ", ".join(f"{name} {accuracy[name, 16][-1]:.3f}" for name in METHODS)
        report(f"seed {seed}: all 64 tokens {whole[-1]:.3f}; 16 tokens: {found}")
    means = {row: statistics.mean(values) for row, values in accuracy.items()}
    lost = {row: statistics.mean(values) for row, values in error.items()}
    best = {m: max(means[method, m] for method in METHODS) for m in (16, 8)}
    holds = (
        all(means["cluster", m] >= best[m] - 0.01 for m in (16, 8))
        and all(means["cluster", m] > means["saliency", m] for m in (16, 8))
        and all(lost["cluster", m] == min(lost[method, m] for method in METHODS) for m in BUDGETS)
    )
    names = [*METHODS, *(f"{method}_log_size" for method in MERGING)]
    return Finding(
        {
            "accuracy_64_tokens": round(statistics.mean(whole), 4),
            **{f"accuracy_{name}_{m}_tokens": round(means[name, m], 4) for m in BUDGETS for name in names},
            **{f"relative_error_{method}_{m}_tokens": round(lost[method, m], 3) for m in BUDGETS for method in METHODS},
            **{f"operations_saved_in_later_blocks_{m}_tokens": round(ratio, 2) for m, ratio in saving.items()},
            "rank_correlation_of_class_token_saliency_between_layers": round(statistics.mean(agreement), 2),
        },
        holds,
        f"Vision transformers of 4 blocks on digits of 16 x 16 pixels in 64 patches, {STEPS} steps each, {SEEDS} "
        "seeds, 359 held-out images. The patches that leave the first block are compressed, the class token stays, "
        "nothing is trained for it. Holds if at 16 and at 8 tokens clustering is at most one point below the best "
        "method and above saliency (the class token's attention in the first block), and its error is the lowest at "
        "all budgets. Error: squared distance to the substitute (for methods that choose, the nearest token kept) over "
        "that to the mean. log_size: attention weighed by how many tokens each stands for. Results on vision language "
        "models need those models.",
    )
