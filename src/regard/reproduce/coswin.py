"""CoSwin on few small images: against Swin, and against a Swin widened to as many weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.bench.tasks import Digits
from regard.bench.training import fit
from regard.local.coswin import gate_values
from regard.models.coswin import CoSwin
from regard.models.swin import Swin
from regard.reproduce.finding import Finding

IMAGES, SEEDS, STEPS, BATCH, RATE = 300, 3, 600, 32, 3e-3
SIZE: dict[str, Any] = {
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window": 4,
    "patch_size": 1,
    "in_channels": 1,
    "num_classes": 10,
}
RECIPE: dict[str, Any] = {"mlp_ratio": 2.0, "drop_path": 0.1}


class FewDigits(Digits):
    """The digits as images ``(batch, 1, 8, 8)``, ``IMAGES`` of them to train on and all held-out ones to test."""

    def all(self, split: str = "test") -> tuple[Tensor, Tensor]:
        tokens, digits = super().all(split)
        count = IMAGES if split == "train" else len(digits)
        return tokens[:count].transpose(1, 2).unflatten(2, self.grid), digits[:count]

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Drawn with replacement."""
        images, digits = self.all(split)
        index = torch.randint(len(digits), (size,), generator=generator)
        return images[index], digits[index]


@torch.no_grad()
def _accuracy(model: Swin, images: Tensor, digits: Tensor) -> float:
    return float((model.eval()(images).argmax(-1) == digits).float().mean())


def run(report: Callable[[str], None]) -> Finding:
    """The same steps, images and schedule for all, three seeds."""
    task = FewDigits()
    held, known = task.all("test"), task.all("train")
    build: dict[str, Callable[[], Swin]] = {
        "coswin": lambda: CoSwin(32, **SIZE, **RECIPE),
        "swin": lambda: Swin(32, **SIZE, **RECIPE),
        "wide_swin": lambda: Swin(58, **SIZE, **RECIPE),
    }
    accuracy: dict[str, list[float]] = {name: [] for name in build}
    fitted: dict[str, list[float]] = {name: [] for name in build}
    weights: dict[str, int] = {}
    gates: list[float] = []
    for seed in range(SEEDS):
        for name, make in build.items():
            torch.manual_seed(seed)
            model = make()
            weights[name] = sum(p.numel() for p in model.parameters())
            fit(model, task, steps=STEPS, batch_size=BATCH, lr=RATE, weight_decay=0.05, seed=seed)
            accuracy[name].append(_accuracy(model, *held))
            fitted[name].append(_accuracy(model, *known))
            gates += gate_values(model).values()
            report(f"seed {seed}, {name} ({weights[name]} weights): accuracy {accuracy[name][-1]:.4f}")
    mean = {name: statistics.mean(found) for name, found in accuracy.items()}
    gain, gain_wide = mean["coswin"] - mean["swin"], mean["coswin"] - mean["wide_swin"]
    return Finding(
        {
            **{f"accuracy_{name}": round(found, 4) for name, found in mean.items()},
            **{f"accuracy_{name}_each_seed": [round(a, 4) for a in found] for name, found in accuracy.items()},
            **{f"weights_{name}": count for name, count in weights.items()},
            **{f"accuracy_on_training_images_{name}": round(statistics.mean(f), 4) for name, f in fitted.items()},
            "points_gained_over_swin": round(100 * gain, 2),
            "points_gained_over_wide_swin": round(100 * gain_wide, 2),
            "gates_after_training_mean": round(statistics.mean(gates), 4),
            "papers_points_gained_cifar_10": 2.17,
            "papers_points_gained_cifar_100": 4.92,
        },
        gain >= 0.01 and gain_wide > 0,
        f"Digits of 8 x 8 pixels, {IMAGES} to train on and {len(held[1])} to test, {SEEDS} seeds, {STEPS} steps of "
        f"{BATCH}, patches of one pixel, windows of 4, two stages of two blocks. Holds if CoSwin's mean accuracy is "
        "above Swin's by at least one point, and above that of a Swin widened to about as many weights at all. "
        "How much of the gain is locality, and how much the place of a pixel, which the zeros around the convolutions "
        "tell, is not separated here.",
    )
