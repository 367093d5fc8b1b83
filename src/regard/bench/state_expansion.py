"""How recall grows with the state: one small model per state expansion, on multi-query associative recall.

Sieber et al., 2024, arXiv 2405.15731, section 4: models differ in their mixer and its state expansion alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from regard.bench.tasks import MultiQueryRecall
from regard.bench.training import evaluate, fit
from regard.errors import OptionError
from regard.models.sequence import SequenceModel
from regard.registry import options as known_options

__all__ = ["ExpansionPoint", "state_expansion_sweep"]


@dataclass(frozen=True)
class ExpansionPoint:
    """``expansion``: the value of the option that was swept. ``state_size``: elements that a sequence keeps in all
    layers, None where they grow with length or the layer does not say. ``accuracy``, ``loss`` (nats): per seed, on new
    sequences."""

    expansion: int
    state_size: int | None
    parameters: int
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds."""
        return sum(self.accuracy) / len(self.accuracy)


def state_expansion_sweep(
    mixer: str,
    n_list: Sequence[int],
    *,
    task: MultiQueryRecall | None = None,
    option: str = "state_dim",
    options: Mapping[str, Any] | None = None,
    embed_dim: int = 32,
    depth: int = 2,
    num_heads: int = 1,
    mlp_ratio: float = 2.0,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 3e-3,
    seeds: Sequence[int] = (0,),
    report: Callable[[str], None] | None = None,
) -> list[ExpansionPoint]:
    """Train a model of ``depth`` layers of ``mixer`` for each ``n`` in ``n_list`` and seed, and test it.

    mixer: a registered name with an ``option`` that sets its state: ``state_dim`` of attention, S6 and SSD,
    ``expansion`` of RG-LRU and qLSTM, whose own ``n`` is one. task: by default 8 pairs in 32 tokens.
    """
    if option not in known_options(mixer):
        raise OptionError(f"{mixer!r} has no option {option!r} to sweep. It has: {', '.join(known_options(mixer))}.")
    if not n_list or not seeds:
        raise OptionError("n_list and seeds each need at least one value.")
    task = task or MultiQueryRecall(vocab_size=64, pairs=8, length=32)
    points = []
    for n in n_list:
        found, seconds, size, parameters = [], 0.0, None, 0
        for seed in seeds:
            torch.manual_seed(seed)
            model = SequenceModel(
                task.num_classes,
                vocab_size=task.vocab_size,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=num_heads,
                mechanism=mixer,
                options={**(options or {}), option: n},
                positions="none",
                mlp_ratio=mlp_ratio,
            )
            parameters = sum(p.numel() for p in model.parameters())
            size = _state_size(model)
            seconds += fit(model, task, steps=steps, batch_size=batch_size, lr=lr, seed=seed).seconds
            loss, accuracy = evaluate(model, task)
            found.append((accuracy, loss))
            if report is not None:
                report(f"{mixer}, {option}={n}, seed {seed}: accuracy {accuracy:.3f}, loss {loss:.3f}")
        accuracies, losses = zip(*found, strict=True)
        points.append(ExpansionPoint(n, size, parameters, accuracies, losses, seconds))
    return points


def _state_size(model: SequenceModel) -> int | None:
    sizes = [cast("int | None", getattr(block.attention, "state_size", None)) for block in model.blocks]
    return None if any(size is None for size in sizes) else sum(size for size in sizes if size is not None)
