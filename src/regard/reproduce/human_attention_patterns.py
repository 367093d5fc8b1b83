"""An encoder that picks a document's key sentences, with all heads learnt and with two of four told where to look."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from regard.bench.pattern_tasks import MARKER, ExtractiveSummaryToy
from regard.bench.training import evaluate, fit
from regard.layers.token_patterns import intra_sentence, matching_token
from regard.models.human_attention_patterns import HeadPattern, PatternEncoder
from regard.reproduce.finding import Finding, Plot

DOCUMENTS, SEEDS, STEPS, BATCH, RATE = (500, 5000), 2, 800, 32, 3e-3
PATTERNS = (HeadPattern(partial(matching_token, ignored=(MARKER,))), HeadPattern(intra_sentence, "masked"))
HELD_OUT_BATCHES, HELD_OUT_BATCH = 8, 64


def run(report: Callable[[str], None]) -> Finding:
    """The same documents, steps and schedule for both, few documents and many."""
    build: dict[str, tuple[HeadPattern, ...]] = {"all_heads_learnt": (), "two_heads_with_patterns": PATTERNS}
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in DOCUMENTS} for name in build}
    weights: dict[str, int] = {}
    chance = 0.0
    for count in DOCUMENTS:
        for seed in range(SEEDS):
            task = ExtractiveSummaryToy(count, seed=seed)
            chance = task.salient / task.sentences
            for name, patterns in build.items():
                torch.manual_seed(seed)
                model = PatternEncoder(task.vocab, marker=MARKER, patterns=patterns, max_length=64)
                weights[name] = sum(parameter.numel() for parameter in model.parameters())
                fit(model, task, steps=STEPS, batch_size=BATCH, lr=RATE, seed=seed)
                score = evaluate(model, task, batches=HELD_OUT_BATCHES, batch_size=HELD_OUT_BATCH)[1]
                found[name][count].append(score)
                report(f"{count} documents, seed {seed}, {name} ({weights[name]} weights): F1 {score:.3f}")
    mean = {name: {count: statistics.mean(scores) for count, scores in by.items()} for name, by in found.items()}
    gap = {count: mean["two_heads_with_patterns"][count] - mean["all_heads_learnt"][count] for count in DOCUMENTS}
    few, many = DOCUMENTS
    parts = {
        "holds_three_points_with_few_documents": gap[few] >= 0.03,
        "holds_gap_shrinks_with_many": gap[many] < gap[few],
    }
    measured: dict[str, Any] = {
        **{f"f1_{name}": {str(count): round(score, 4) for count, score in by.items()} for name, by in mean.items()},
        **{
            f"f1_{name}_each_seed": {str(count): [round(score, 4) for score in scores] for count, scores in by.items()}
            for name, by in found.items()
        },
        "f1_points_gained_by_training_documents": {str(count): round(100 * gain, 2) for count, gain in gap.items()},
        "f1_by_chance": round(chance, 4),
        **{f"weights_{name}": count for name, count in weights.items()},
        **parts,
    }
    shown = {
        name.replace("_", " "): [(float(count), score) for count, score in by.items()] for name, by in mean.items()
    }
    plot = Plot(
        "Key sentences found in held-out documents",
        "training documents",
        "F1 of the chosen sentences",
        shown,
        kind="line",
        log_x=True,
        references={"guessing": chance},
    )
    return Finding(measured, all(parts.values()), NOTE, [plot])


NOTE = (
    "Encoders of 2 layers of 4 heads and width 48 on synthetic documents of 8 sentences of 6 words, of which 3 share "
    "key words, drawn from 60 content words among 300; "
    f"{SEEDS} seeds, {STEPS} steps of {BATCH} in all cases, {HELD_OUT_BATCHES * HELD_OUT_BATCH} fresh documents to "
    "test. In both layers one head has the fixed weights of matching tokens (markers match nothing; no queries, no "
    "keys) and one is softmax within the sentence; the plain encoder learns all heads, with more weights. Holds if the "
    "patterns gain at least 3 points of F1 with 500 documents, and fewer with 5000. The gap is far wider than the "
    "paper's, whose encoders start from BERT's embeddings: in so few steps the plain encoder learns no matching, and "
    "what it gains from more documents is which words are content words and where its sentence is. Settled after "
    "trials: with key words from all words and tiny position embeddings, which keep learnt heads from finding their "
    "sentence, it stayed at guessing with either number of documents, and with tiny positions alone too."
)
