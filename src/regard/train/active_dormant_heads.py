"""Training on bigram-backcopy, by Adam or by plain gradient descent: which of them makes residual peaks is the point.

"Active-Dormant Attention Heads", 2024, arXiv 2410.13835, section 2. The loss is the mean over all positions; it is kept
in its two parts, the Markov risk (where bigrams tell what comes) and the backcopy risk (at triggers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError

__all__ = ["BackcopyHistory", "backcopy_losses", "backcopy_optimizer", "train_backcopy"]

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""``(batch, generator) -> tokens, triggers``, both ``(batch, length)``, as of :func:`regard.inspect.backcopy.
bigram_backcopy`."""


@dataclass
class BackcopyHistory:
    """Risks of each step in nats, and what ``watch`` gave, by step."""

    markov: list[float] = field(default_factory=list)
    backcopy: list[float] = field(default_factory=list)
    watched: dict[int, Any] = field(default_factory=dict)


def backcopy_losses(logits: Tensor, tokens: Tensor, triggers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, Markov risk and backcopy risk in nats of ``logits`` ``(batch, length, vocab_size)`` on their own tokens;
    a risk is NaN where no position has it."""
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    here = triggers[:, :-1]
    return each.mean(), each[~here].mean(), each[here].mean()


def backcopy_optimizer(
    model: nn.Module,
    kind: Literal["adam", "sgd"] = "adam",
    lr: float | None = None,
    weight_decay: float = 1e-4,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """AdamW (rate 3e-4 by default) or gradient descent with momentum (0.03), as in the paper's runs."""
    rates = {"adam": 3e-4, "sgd": 0.03}
    if kind not in rates:
        raise OptionError(f"kind is 'adam' or 'sgd', got {kind!r}.")
    rate = rates[kind] if lr is None else lr
    if kind == "adam":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay)


def train_backcopy(
    model: nn.Module,
    draw: Draw,
    *,
    steps: int = 10_000,
    batch_size: int = 512,
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: float | None = None,
    weight_decay: float = 1e-4,
    seed: int = 0,
    watch: Callable[[], Any] | None = None,
    at: Sequence[int] = (),
) -> BackcopyHistory:
    """Train at a constant rate. watch: called after the steps in ``at`` (0: before the first), with the model in
    evaluation mode; what it returns is kept."""
    stepper = backcopy_optimizer(model, optimizer, lr, weight_decay)
    generator, history, places = torch.Generator().manual_seed(seed), BackcopyHistory(), frozenset(at)

    def look(step: int) -> None:
        if watch is not None and step in places:
            model.eval()
            history.watched[step] = watch()
            model.train()

    model.train()
    look(0)
    for step in range(1, steps + 1):
        tokens, triggers = draw(batch_size, generator)
        loss, markov, backcopy = backcopy_losses(model(tokens), tokens, triggers)
        stepper.zero_grad(set_to_none=True)
        loss.backward()
        stepper.step()
        history.markov.append(float(markov.detach()))
        history.backcopy.append(float(backcopy.detach()))
        look(step)
    return history
