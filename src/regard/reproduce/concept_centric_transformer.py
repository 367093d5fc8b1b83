"""Digits with strokes as concepts: a linear head, free concepts, and concepts made of slots."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.digits import DigitImages
from regard.bench.training import fit
from regard.inspect.concept_centric_transformer import (
    ConceptCentricHead,
    ConceptReading,
    concept_contributions,
    explanation_loss,
    sparsity_loss,
)
from regard.models.vit import VisionTransformer
from regard.reproduce.finding import Finding, Plot

SEEDS, STEPS, BATCH, RATE = 3, 500, 64, 3e-3
DIM, HEADS, DEPTH = 48, 4, 2
KINDS = {
    "linear": "linear head",
    "free": "free concepts",
    "free, one head": "free concepts, one head",
    "slots": "concepts of slots",
    "slots, one head": "concepts of slots, one head",
}
EXPLANATION, SPARSITY, THRESHOLD = 1.0, 0.5, 0.25

CONCEPTS = (
    "big loop",
    "upper loop",
    "lower loop",
    "vertical bar",
    "slanted bar",
    "upper bar",
    "middle bar",
    "lower bar",
    "upper arc",
    "lower arc",
)
# No two digits have the same strokes.
STROKES = (
    ("big loop",),
    ("vertical bar",),
    ("upper arc", "lower bar"),
    ("upper arc", "lower arc"),
    ("vertical bar", "middle bar"),
    ("upper bar", "lower arc"),
    ("slanted bar", "lower loop"),
    ("upper bar", "slanted bar"),
    ("upper loop", "lower loop"),
    ("upper loop", "vertical bar"),
)


class StrokeDigits(DigitImages):
    """Digits of 8 x 8 pixels whose loss also reads the attention over concepts, where a model gives it."""

    def __init__(self) -> None:
        super().__init__(scale=1)
        self.strokes = torch.tensor([[float(name in strokes) for name in CONCEPTS] for strokes in STROKES])

    def loss(self, outputs: Tensor | ConceptReading, targets: Tensor) -> Tensor:
        """Cross entropy, and for concepts the loss of explanations and of sparsity."""
        if isinstance(outputs, Tensor):
            return F.cross_entropy(outputs, targets)
        assert outputs.global_attn is not None
        explained = explanation_loss(outputs.global_attn, self.strokes[targets])
        entropy = sparsity_loss(outputs.global_attn)
        return F.cross_entropy(outputs.logits, targets) + EXPLANATION * explained + SPARSITY * entropy


class ConceptVit(nn.Module):
    """A vision transformer with a concept-centric head in place of its linear one."""

    def __init__(self, vit: VisionTransformer, concepts: Any, num_heads: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = ConceptCentricHead(DIM, 10, num_heads, n_global=len(CONCEPTS), concepts=concepts)

    def tokens(self, images: Tensor) -> Tensor:
        """What the head reads."""
        found: Tensor = self.vit.norm(self.vit.encode(self.vit.embed(images)))
        return found

    def forward(self, images: Tensor) -> ConceptReading:
        """Logits and attention over concepts."""
        return self.head.read(self.tokens(images))


def trained(kind: str, seed: int, task: StrokeDigits) -> nn.Module:
    """4 x 4 patches of 2 x 2 pixels; the same backbone, from the same weights, for each head."""
    torch.manual_seed(seed)
    vit = VisionTransformer(
        task.size, 2, 1, 10, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0, position_std=0.5
    )
    concepts, _, one = kind.partition(", ")
    model = vit if kind == "linear" else ConceptVit(vit, concepts, 1 if one else HEADS)
    fit(model, task, steps=STEPS, batch_size=BATCH, lr=RATE, weight_decay=0.05, seed=seed)
    return model.eval()


def explanation_f1(attn: Tensor, wanted: Tensor) -> float:
    """F1, over all images and concepts, of "attention is above a quarter" for ``wanted (images, concepts)``."""
    said, real = attn > THRESHOLD, wanted > 0
    return float(2 * (said & real).sum() / (said.sum() + real.sum()))


@torch.no_grad()
def judged(model: nn.Module, task: StrokeDigits) -> dict[str, float]:
    """Accuracy; for concepts also the explanations' F1 and what deleting a concept changes."""
    images, classes = task.all("test")
    if not isinstance(model, ConceptVit):
        return {"accuracy": float((model(images).argmax(-1) == classes).double().mean())}
    reading = model(images)
    assert reading.global_attn is not None
    answer = reading.logits.argmax(-1)
    shares = concept_contributions(model.head, model.tokens(images))
    of_answer = shares.global_[torch.arange(len(images)), :, answer]
    generator = torch.Generator().manual_seed(0)
    top = F.one_hot(of_answer.argmax(-1), len(CONCEPTS)).bool()
    chance = F.one_hot(torch.randint(len(CONCEPTS), (len(images),), generator=generator), len(CONCEPTS)).bool()
    attn = reading.global_attn[:, 0]
    reported = attn > THRESHOLD
    # A reported concept with all attention on it, where two are reported.
    alone = (shares.bias + shares.global_ / attn[..., None]).argmax(-1) == answer[:, None]
    of_two = reported & (reported.sum(1, keepdim=True) == 2)
    single = task.strokes[answer].sum(1) == 1

    def flipped(concepts: Tensor, among: Tensor) -> float:
        return float((shares.without(concepts).argmax(-1) != answer)[among].double().mean())

    every = torch.ones_like(single)
    return {
        "accuracy": float((answer == classes).double().mean()),
        "explanation_f1": explanation_f1(attn, task.strokes[classes]),
        "flipped_without_the_top_concept": flipped(top, every),
        "flipped_without_the_top_concept_digits_of_one_stroke": flipped(top, single),
        "flipped_without_all_reported_concepts": flipped(reported, every),
        "flipped_without_a_concept_by_chance": flipped(chance, every),
        "one_of_two_reported_concepts_names_the_digit_alone": float(alone[of_two].double().mean()),
        "error_of_the_decomposition": float((shares.logits() - reading.logits).abs().max()),
    }


def run(report: Callable[[str], None]) -> Finding:
    """Train the heads on a few seeds; judge them on held-out images."""
    task = StrokeDigits()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for seed in range(SEEDS):
        for kind, results in found.items():
            results.append(judged(trained(kind, seed, task), task))
            report(f"seed {seed}, {KINDS[kind]}: " + ", ".join(f"{k} {v:.4g}" for k, v in results[-1].items()))
    means = {
        kind: {name: statistics.mean(result[name] for result in results) for name in results[0]}
        for kind, results in found.items()
    }
    slots = means["slots"]
    parts = {
        "holds_accuracy_within_1_point_of_linear": slots["accuracy"] >= means["linear"]["accuracy"] - 0.01,
        "holds_explanation_f1_above_0.9": slots["explanation_f1"] > 0.9,
        "holds_deleting_the_top_concept_flips_80_percent": slots["flipped_without_the_top_concept"] >= 0.8,
    }
    measured: dict[str, Any] = {
        f"{name}_{_key(kind)}": float(f"{value:.4g}")
        for kind, values in means.items()
        for name, value in values.items()
    }
    for kind in ("linear", "slots"):
        each = [round(result["accuracy"], 4) for result in found[kind]]
        measured[f"accuracy_{_key(kind)}_each_seed"] = each
    return Finding({**measured, **parts}, all(parts.values()), NOTE, _plots(means))


NOTE = (
    f"{SEEDS} seeds of a vision transformer of {DEPTH} layers on digits of 8 x 8 pixels (16 patches and a class "
    f"token), {STEPS} steps of {BATCH}, with a linear head, with {len(CONCEPTS)} free concepts (the concept "
    "transformer), and with as many concepts of slots (variant qsa, one iteration on the patches); backbone, its "
    "first "
    "weights, data and schedule are the same. Concepts are strokes given for each digit, one or two, no two digits "
    f"alike; loss is cross entropy + {EXPLANATION:g} explanation + {SPARSITY:g} entropy. Explanations report a concept "
    f"where attention is above {THRESHOLD:g}, half the share of one of two; F1 is over all held-out images and "
    "concepts. Deleting a concept takes its contribution out of all logits; the top one adds most to the predicted "
    "class. Heads are 4 as in the backbone, and one besides. Holds if accuracy is at most a point below linear, F1 "
    "above 0.9, and deleting the top concept flips 80 percent, all with slots and 4 heads. The last fails, and would "
    "not come with size: a slot reads the whole image and its vote changes with it, so that of two reported concepts "
    "either alone names the digit, and taking away one changes nothing. Where votes are the same for all images, as "
    "those of free concepts are, one alone names it less often and more answers flip, most so with one head, whose "
    "attention is the very one that the loss saw; 80 percent are not reached there either, since one stroke of two "
    "often leaves the digit its best guess. Two changes were tried with slots: one head, shown here, and the released"
    " settings (two heads, two iterations, projection dropout 0.1; one seed); neither helped. Strokes are annotated "
    "by class, so F1 says little more than accuracy does; concepts seen in single images, and the paper's own data, "
    "would need annotated photographs."
)


def _key(kind: str) -> str:
    return KINDS[kind].replace(",", "").replace(" ", "_")


def _plots(means: dict[str, dict[str, float]]) -> list[Plot]:
    names = {
        "explanation_f1": "F1 of\nexplanations",
        "flipped_without_the_top_concept": "flipped\nwithout top",
        "flipped_without_all_reported_concepts": "flipped\nwithout all",
        "flipped_without_a_concept_by_chance": "flipped without\none by chance",
        "one_of_two_reported_concepts_names_the_digit_alone": "one alone\nnames it",
    }
    return [
        Plot(
            "Held-out digits read right",
            "",
            "accuracy",
            {"mean of the seeds": [(at, means[kind]["accuracy"]) for at, kind in enumerate(KINDS)]},
            kind="bar",
            ticks={kind.replace(", ", ",\n"): at for at, kind in enumerate(KINDS)},
        ),
        Plot(
            "What the concepts say, and whether it matters",
            "",
            "share",
            {
                KINDS[kind]: [(at, means[kind][name]) for at, name in enumerate(names)]
                for kind in KINDS
                if kind != "linear"
            },
            kind="bar",
            ticks={name: at for at, name in enumerate(names.values())},
        ),
    ]
