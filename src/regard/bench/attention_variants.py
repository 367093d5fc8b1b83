"""Language models that differ in the attention variants of their layers alone, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from regard.bench.tasks import StdlibText, Task
from regard.bench.training import evaluate, fit
from regard.errors import OptionError
from regard.models.deconstructed_attention import TinyLM

__all__ = ["VariantRow", "compare_variants"]


@dataclass(frozen=True)
class VariantRow:
    """One model: the kinds of its layers, held-out loss in nats per token, its perplexity ``exp(loss)``, the task's
    score (accuracy), parameters, and FLOPs of one forward pass over a batch."""

    kinds: tuple[str, ...]
    loss: float
    perplexity: float
    score: float
    parameters: int
    flops: int


def compare_variants(
    kinds: Sequence[str] | Mapping[str, Sequence[str]],
    data: Task | None = None,
    *,
    steps: int = 1000,
    batch_size: int = 16,
    lr: float = 3e-3,
    embed_dim: int = 64,
    num_heads: int = 4,
    depth: int = 2,
    seed: int = 0,
    batches: int = 16,
    report: Callable[[str], None] | None = None,
) -> dict[str, VariantRow]:
    """Train a :class:`~regard.models.deconstructed_attention.TinyLM` for each entry, on the same data in the same
    order.

    kinds: names, each for all ``depth`` layers, or schedules by name, as :func:`~regard.models.deconstructed_attention.
    hybrid_stack` gives them. data: a task on tokens with ``vocab_size`` and ``length`` (default: next bytes of Python
    source, 64 at a time). Models with fixed_seq_qk take the first tokens of one training batch of it as their text.
    """
    task = StdlibText(64) if data is None else data
    vocab, length = getattr(task, "vocab_size", None), getattr(task, "length", None)
    if vocab is None or length is None:
        raise OptionError("compare_variants needs a task on tokens, with vocab_size and length.")
    schedules = kinds if isinstance(kinds, Mapping) else {kind: (kind,) * depth for kind in kinds}
    fixed = task.batch(1, torch.Generator().manual_seed(seed))[0][0]
    rows = {}
    for name, schedule in schedules.items():
        torch.manual_seed(seed)
        model = TinyLM(
            schedule, vocab, embed_dim=embed_dim, num_heads=num_heads, max_length=len(fixed), fixed_tokens=fixed
        )
        fit(model, task, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
        loss, score = evaluate(model, task, batches=batches)
        size = sum(p.numel() for p in model.parameters())
        perplexity = math.exp(loss)
        rows[name] = VariantRow(tuple(schedule), loss, perplexity, score, size, model.flops(len(fixed), batch_size))
        if report is not None:
            report(f"{name}: {loss:.3f} nats, perplexity {perplexity:.2f}, score {score:.3f}, {size} parameters")
    return rows
