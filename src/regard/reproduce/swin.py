"""Swin: cost against image area, and what the shift of the windows is for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.measure import interleaved
from regard.bench.training import evaluate, fit
from regard.kernels import dense_attention
from regard.local.swin import SwinAttention
from regard.models.swin import Swin
from regard.reproduce.finding import Finding

SIDES = (28, 56, 112)
HEADS, HEAD_DIM = 3, 32
STEPS, BATCH = 500, 32


class BorderPairs:
    """One pair of coloured cells on both sides of a border between windows of four, on an empty map of 16 x 16: are the
    two colours equal? Each colour and each answer is equally frequent, so either cell alone says nothing."""

    num_classes = 2
    colours = 6

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Images ``(size, colours, 16, 16)`` and answers ``(size,)``."""
        border = torch.randint(1, 4, (size,), generator=generator) * 4
        along = torch.randint(16, (size,), generator=generator)
        upright = torch.randint(2, (size,), generator=generator).bool()
        first = torch.randint(self.colours, (size,), generator=generator)
        other = torch.randint(1, self.colours, (size,), generator=generator)
        same = torch.randint(2, (size,), generator=generator)
        second = torch.where(same.bool(), first, (first + other) % self.colours)
        images, rows = torch.zeros(size, self.colours, 16, 16), torch.arange(size)
        for colour, place in ((first, border - 1), (second, border)):
            y, x = torch.where(upright, along, place), torch.where(upright, place, along)
            images[rows, colour, y, x] = 1
        return images, same

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Right answers and their number."""
        return float((outputs.argmax(-1) == targets).sum()), len(targets)


@torch.no_grad()
def _slopes(report: Callable[[str], None]) -> dict[str, float]:
    """Log-log slope of time against area between the smallest and the largest map."""
    swin = SwinAttention(7, num_heads=HEADS)
    times: dict[str, list[float]] = {"windows": [], "global": []}
    for side in SIDES:
        query, key, value = (torch.randn(1, HEADS, side * side, HEAD_DIM) for _ in range(3))
        calls: dict[str, Callable[[], object]] = {
            "windows": lambda q=query, k=key, v=value, n=side: swin(q, k, v, grid=(n, n)),  # type: ignore[misc]
            "global": lambda q=query, k=key, v=value: dense_attention(q, k, v),  # type: ignore[misc]
        }
        few = side == SIDES[-1]
        taken = interleaved({"global": calls["global"]}, rounds=2 if few else 5)
        taken |= interleaved({"windows": calls["windows"]}, rounds=21, warmup=3)
        for name, seconds in taken.items():
            times[name].append(statistics.median(seconds))
        report(f"side {side}: windows {times['windows'][-1]:.4f} s, global {times['global'][-1]:.4f} s")
    span = math.log((SIDES[-1] / SIDES[0]) ** 2)
    return {name: math.log(seconds[-1] / seconds[0]) / span for name, seconds in times.items()}


def run(report: Callable[[str], None]) -> Finding:
    """Time windows and global attention on growing maps; train the same two blocks with and without the shift."""
    torch.manual_seed(0)
    slopes = _slopes(report)
    accuracy = {}
    for name, shifted in (("with_shift", True), ("without_shift", False)):
        torch.manual_seed(0)
        model = Swin(
            embed_dim=32,
            depths=(2,),
            num_heads=(2,),
            window=4,
            patch_size=1,
            in_channels=BorderPairs.colours,
            num_classes=2,
            drop_path=0.0,
            shifted=shifted,
        )
        task = BorderPairs()
        fit(model, task, steps=STEPS, batch_size=BATCH, lr=3e-3, report=report)
        _, accuracy[name] = evaluate(model, task, batches=16)
        report(f"{name}: accuracy {accuracy[name]:.3f}")
    linear, square = abs(slopes["windows"] - 1) <= 0.15, slopes["global"] >= 1.7
    return Finding(
        {
            "slope_log_time_over_log_area_windows": round(slopes["windows"], 2),
            "slope_log_time_over_log_area_global": round(slopes["global"], 2),
            "accuracy_with_shift": round(accuracy["with_shift"], 3),
            "accuracy_without_shift": round(accuracy["without_shift"], 3),
            "accuracy_of_chance": 0.5,
        },
        linear and square and accuracy["with_shift"] > 0.95 and accuracy["without_shift"] < 0.65,
        "Holds if the time of window attention (sides 28, 56, 112, window 7, 3 heads of 32) grows as area to the power "
        "1.0 +- 0.15 and that of global attention to at least 1.7, and two blocks with windows of 4 solve a task on "
        "pairs of cells astride a window border above 95 % with the shift and below 65 % without (chance 50 %). The "
        "ImageNet and COCO figures need those data.",
    )
