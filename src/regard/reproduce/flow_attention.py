"""Flow-attention on a needle: one of 256 tokens carries the label. Does competition among keys help to find it?"""

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

TOKENS, CLASSES, FILLERS, WIDTH, SEEDS, STEPS = 256, 8, 56, 32, 3, 300
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow": ("flow_attention", {}),
    "flow_without_competition": ("flow_attention", {"competition": False}),
    "softmax": ("full", {}),
}


class Needle:
    """Sequences of random fillers with one label token at a random place; the target is that label."""

    num_classes = CLASSES

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Tokens ``(size, TOKENS)`` and labels ``(size,)``."""
        tokens = CLASSES + torch.randint(FILLERS, (size, TOKENS), generator=generator)
        label = torch.randint(CLASSES, (size,), generator=generator)
        tokens[torch.arange(size), torch.randint(TOKENS, (size,), generator=generator)] = label
        return tokens, label

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
        self.embed = nn.Embedding(CLASSES + FILLERS, WIDTH)
        self.attention = MultiHeadAttention(WIDTH, 1, mechanism, **options)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, CLASSES)``."""
        logits: Tensor = self.head(self.attention(self.embed(tokens)).mean(1))
        return logits

    @torch.no_grad()
    def competition_entropy(self, tokens: Tensor) -> float:
        """Entropy of the sources' competition weights in nats, averaged over the batch."""
        query, key, _ = self.attention.project(self.embed(tokens))
        share = flow_quantities(query, key).conserved_outgoing.clamp(-1, 1).softmax(-1)
        return float(-(share * share.log()).sum(-1).mean())


def run(report: Callable[[str], None]) -> Finding:
    """Three seeds of flow-attention, the same without competition, and softmax."""
    task = Needle()
    probe, _ = task.batch(64, torch.Generator().manual_seed(99))
    accuracy: dict[str, list[float]] = {name: [] for name in LAYERS}
    speed: dict[str, list[float]] = {name: [] for name in LAYERS}
    before, after = [], []
    for seed in range(SEEDS):
        for name, (mechanism, options) in LAYERS.items():
            torch.manual_seed(seed)
            model = Pooler(mechanism, options)
            start = model.competition_entropy(probe)
            history = fit(model, task, steps=STEPS, lr=1e-2, weight_decay=0.0, seed=seed, every=5)
            accuracy[name].append(evaluate(model, task, batches=4, batch_size=256)[1])
            speed[name].append(sum(history.loss) / len(history.loss))
            if name == "flow":
                before.append(start)
                after.append(model.competition_entropy(probe))
            report(f"seed {seed}, {name}: accuracy {accuracy[name][-1]:.3f}, mean loss {speed[name][-1]:.3f}")
    mean = {name: sum(values) / SEEDS for name, values in accuracy.items()}
    loss = {name: sum(values) / SEEDS for name, values in speed.items()}
    with_it, without = "flow", "flow_without_competition"
    tied = abs(mean[with_it] - mean[without]) < 0.005
    beats = loss[with_it] < loss[without] if tied else mean[with_it] > mean[without]
    reaches = mean["flow"] >= 0.9 * mean["softmax"]
    falls = all(b < a for a, b in zip(before, after, strict=True))
    measured = {
        **{f"accuracy_{name}_mean_of_{SEEDS}_seeds": round(value, 4) for name, value in mean.items()},
        **{f"accuracy_{name}_by_seed": [round(v, 4) for v in values] for name, values in accuracy.items()},
        **{f"loss_over_training_{name}_nats_by_seed": [round(v, 4) for v in values] for name, values in speed.items()},
        "competition_entropy_before_training_nats": [round(v, 4) for v in before],
        "competition_entropy_after_training_nats": [round(v, 4) for v in after],
        "entropy_of_equal_weights_nats": round(math.log(TOKENS), 4),
        "flow_beats_flow_without_competition": beats,
        "flow_reaches_0.9_of_softmax": reaches,
        "competition_entropy_falls": falls,
    }
    return Finding(
        measured,
        beats and reaches and falls,
        "Holds if flow-attention's mean accuracy over three seeds is above that without competition (accuracies within "
        "half a point count as equal and the mean loss over training decides), at least 0.9 of softmax's, and the "
        "entropy of the competition weights falls in every seed. One layer of width 32, one head, 256 tokens, "
        f"{STEPS} steps of 32. Competition weights lie between 1 and e of one another, since the flow that feeds them "
        "is clamped to [-1, 1]; a task on which that matters more would need several layers and longer training.",
    )
