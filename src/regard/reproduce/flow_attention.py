"""Flow-attention on a needle: one of 256 tokens is marked, and its content is the label. Does competition find it?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.training import evaluate, fit
from regard.linear.flow_attention import flow_quantities
from regard.nn import MultiHeadAttention
from regard.reproduce.finding import Finding

TOKENS, CLASSES, WIDTH, SEEDS, STEPS = 256, 8, 32, 3, 500
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow": ("flow_attention", {}),
    "flow_without_competition": ("flow_attention", {"competition": False}),
    "softmax": ("full", {}),
}


class Needle:
    """Every token has a content of ``CLASSES``, one token is marked; the label is its content."""

    num_classes = CLASSES

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Vectors ``(size, TOKENS, CLASSES + 1)``: the content as one-hot, and the mark."""
        content = torch.randint(CLASSES, (size, TOKENS), generator=generator)
        place = torch.randint(TOKENS, (size,), generator=generator)
        mark = F.one_hot(place, TOKENS).float()
        return torch.cat((F.one_hot(content, CLASSES).float(), mark[..., None]), -1), content[torch.arange(size), place]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Hits and trials."""
        return float((outputs.argmax(-1) == targets).sum()), len(targets)


class Pooler(nn.Module):
    """One attention layer of width 32, its outputs averaged and read out; nothing else mixes tokens."""

    def __init__(self, mechanism: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Linear(CLASSES + 1, WIDTH)
        self.attention = MultiHeadAttention(WIDTH, 1, mechanism, **options)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, CLASSES)``."""
        logits: Tensor = self.head(self.attention(self.embed(x)).mean(1))
        return logits

    @torch.no_grad()
    def competition_entropy(self, x: Tensor) -> float:
        """Entropy of the sources' competition weights in nats, averaged over ``x``."""
        query, key, _ = self.attention.project(self.embed(x))
        share = flow_quantities(query, key).conserved_outgoing.clamp(-1, 1).softmax(-1)
        return float(-(share * share.log()).sum(-1).mean())


def run(report: Callable[[str], None]) -> Finding:
    """Three seeds of flow-attention, the same without competition, and softmax."""
    task = Needle()
    probe, _ = task.batch(64, torch.Generator().manual_seed(99))
    accuracy: dict[str, list[float]] = {name: [] for name in LAYERS}
    before, after = [], []
    for seed in range(SEEDS):
        for name, (mechanism, options) in LAYERS.items():
            torch.manual_seed(seed)
            model = Pooler(mechanism, options)
            start = model.competition_entropy(probe)
            fit(model, task, steps=STEPS, batch_size=64, lr=1e-2, weight_decay=0.0, seed=seed)
            accuracy[name].append(evaluate(model, task, batches=8, batch_size=256)[1])
            if name == "flow":
                before.append(start)
                after.append(model.competition_entropy(probe))
            report(f"seed {seed}, {name}: accuracy {accuracy[name][-1]:.3f}")
    mean = {name: sum(values) / SEEDS for name, values in accuracy.items()}
    beats = mean["flow"] > mean["flow_without_competition"]
    reaches = mean["flow"] >= 0.9 * mean["softmax"]
    falls = all(b < a for a, b in zip(before, after, strict=True))
    measured = {
        **{f"accuracy_{name}_mean_of_{SEEDS}_seeds": round(value, 4) for name, value in mean.items()},
        **{f"accuracy_{name}_by_seed": [round(v, 4) for v in values] for name, values in accuracy.items()},
        "competition_entropy_before_training_nats": [round(v, 4) for v in before],
        "competition_entropy_after_training_nats": [round(v, 4) for v in after],
        "entropy_of_no_competition_nats": round(math.log(TOKENS), 4),
        "flow_beats_flow_without_competition": beats,
        "flow_reaches_0.9_of_softmax": reaches,
        "competition_entropy_falls": falls,
    }
    return Finding(
        measured,
        beats and reaches and falls,
        "Holds if flow-attention's mean accuracy over three seeds is above that without competition and at least "
        "0.9 of softmax's, and the entropy of the competition weights falls in every seed. One layer of width 32, 256 tokens, "
        f"{STEPS} steps of 64.",
    )
