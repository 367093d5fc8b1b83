"""The trainer: it learns, repeats itself, and leaves models as it should."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from regard.bench.tasks import MultiQueryRecall
from regard.bench.training import evaluate, fit


class Lines:
    """Which side of a plane a point is on."""

    num_classes = 2

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 3, generator=generator)
        return (x if split == "train" else 2 * x), (x.sum(-1) > 0).long()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        return float((outputs.argmax(-1) == targets).sum()), len(targets)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))


def test_it_learns_and_reports() -> None:
    made, said = model(), []
    before = evaluate(made, Lines())
    history = fit(made, Lines(), steps=120, lr=0.02, warmup=10, every=50, report=said.append)
    loss, accuracy = evaluate(made, Lines())
    assert loss < 0.2 < before[0] and accuracy > 0.93 > before[1]
    assert history.steps == [50, 100, 120] and len(history.loss) == 3 and history.seconds > 0
    assert history.loss[-1] < history.loss[0]
    assert len(said) == 3 and "120/120" in said[-1]


def test_it_repeats_itself() -> None:
    runs = []
    for seed in (0, 0, 1):
        made = model()
        torch.manual_seed(5)
        fit(made, Lines(), steps=5, seed=seed)
        runs.append(made[0].weight.detach().clone())  # type: ignore[index]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_evaluation_is_the_mean_over_the_test_split() -> None:
    made, task = model(), Lines()
    made.train()
    loss, accuracy = evaluate(made, task, batches=3, batch_size=7, seed=4)
    assert made.training
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        made.eval()
        draws = [task.batch(7, generator, "test") for _ in range(3)]
        losses = [float(task.loss(made(x), y)) for x, y in draws]
        right = sum(float((made(x).argmax(-1) == y).sum()) for x, y in draws)
    assert loss == pytest.approx(math.fsum(losses) / 3)
    assert accuracy == pytest.approx(right / 21)
    evaluate(made, task, batches=1)
    assert not made.training


def test_evaluation_counts_targets_not_batches() -> None:
    task = MultiQueryRecall(32, 4, 24)

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(*x.shape, task.num_classes)

    loss, accuracy = evaluate(Silent(), task, batches=2, batch_size=4)
    assert loss == pytest.approx(math.log(32), rel=1e-5) and accuracy == 0


def test_extra_loss_is_trained_on_but_not_reported() -> None:
    made = model()
    first = made[0]  # type: ignore[index]
    plain = fit(model(), Lines(), steps=1, every=1).loss
    calls = []

    def extra() -> Tensor:
        calls.append(1)
        return 100 * first.weight.square().sum()

    size = float(first.weight.detach().norm())
    history = fit(made, Lines(), steps=1, every=1, extra_loss=extra)
    assert len(calls) == 1 and history.loss[0] == pytest.approx(plain[0], abs=0.2)
    fit(made, Lines(), steps=60, lr=0.02, warmup=1, extra_loss=extra)
    assert float(first.weight.detach().norm()) < 0.2 * size


def test_the_schedule_warms_up_and_decays_to_a_tenth() -> None:
    rates: list[float] = []

    class Constant(Lines):
        """A gradient of one always: AdamW then moves by the learning rate."""

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.sum()

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            rates.append(float(self.value.detach()))
            return self.value

    made = Bias()
    fit(made, Constant(), steps=40, warmup=10, lr=0.1, weight_decay=0.0)
    rates.append(float(made.value.detach()))
    moves = [a - b for a, b in itertools.pairwise(rates)]
    assert moves[0] == pytest.approx(0.01, rel=1e-3) and moves[4] == pytest.approx(0.05, rel=1e-3)
    assert max(moves) == pytest.approx(0.1, rel=1e-3)
    assert moves[-1] == pytest.approx(0.01, rel=0.05)
