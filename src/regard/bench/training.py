"""One small trainer for the small experiments: same data, same steps, same schedule for every mechanism."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from regard.bench.tasks import Task

__all__ = ["History", "evaluate", "fit", "reads_ahead"]


@dataclass
class History:
    """Training loss at each reported step (nats), and seconds taken in all."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    warmup: int = 50,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    every: int = 100,
    extra_loss: Callable[[], torch.Tensor] | None = None,
) -> History:
    """Train with AdamW, linear warm-up and cosine decay to a tenth. ``extra_loss`` is added after each forward pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=betas)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator, history, began = torch.Generator().manual_seed(seed), History(), time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        inputs, targets = task.batch(batch_size, generator)
        loss = task.loss(model(inputs), targets)
        total = loss if extra_loss is None else loss + extra_loss()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            history.steps.append(step)
            history.loss.append(float(loss.detach()))
            if report is not None:
                report(f"step {step}/{steps}  loss {float(loss.detach()):.4f}")
    history.seconds = time.perf_counter() - began
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, *, batches: int = 8, batch_size: int = 64, seed: int = 10_000
) -> tuple[float, float]:
    """Mean loss (nats) and mean score on the test split."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    loss, score, count = 0.0, 0.0, 0
    for _ in range(batches):
        inputs, targets = task.batch(batch_size, generator, "test")
        outputs = model(inputs)
        loss += float(task.loss(outputs, targets)) / batches
        hit, counted = task.score(outputs, targets)
        score, count = score + hit, count + counted
    model.train(was_training)
    return loss, score / max(count, 1)


@torch.no_grad()
def reads_ahead(model: nn.Module, inputs: Tensor, other: Tensor) -> bool:
    """Whether a model's outputs in the first half of ``inputs`` change with their second half, taken from ``other``."""
    half = inputs.shape[1] // 2
    other = torch.cat((inputs[:, :half], other[:, half:]), 1)
    was_training = model.training
    model.eval()
    before, after = (model(tokens)[:, :half] for tokens in (inputs, other))
    model.train(was_training)
    return not torch.allclose(before, after, atol=1e-4)
