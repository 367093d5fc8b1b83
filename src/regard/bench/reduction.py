"""Ways of making few tokens of many, side by side: what each keeps, costs and, where a score is given, is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.bench.measure import seconds
from regard.sparse.token_sequence_compression import Compressed, Method, compress, reconstruction_error

__all__ = ["Reduction", "compare_reductions"]


@dataclass(frozen=True)
class Reduction:
    """One method at one budget of ``m`` tokens. ``error``: squared distance of the tokens to their substitutes over
    that to their mean (0: nothing is lost, 1: as if all were one). ``seconds``: of compressing. ``score``: the
    caller's, None without one."""

    method: Method
    m: int
    error: float
    seconds: float
    score: float | None


@torch.no_grad()
def compare_reductions(
    x: Tensor,
    budgets: Sequence[int],
    methods: Sequence[Method],
    score: Callable[[Compressed], float] | None = None,
    *,
    grid: Sequence[int] | None = None,
    saliency: Tensor | None = None,
    key: Tensor | None = None,
    seed: int = 0,
) -> list[Reduction]:
    """Every method at every budget on the same tokens ``x (batch, N, channels)``; ``grid``, ``saliency`` and ``key`` go
    to the methods that read them."""
    spread = (x - x.mean(1, keepdim=True)).square().sum(-1).mean()
    rows = []
    for m in budgets:
        for method in methods:
            found: list[Compressed] = []

            def run(method: Method = method, m: int = m, found: list[Compressed] = found) -> None:
                scores, keys = (saliency if method == "saliency" else None), (key if method == "tome" else None)
                found.append(compress(x, m, method, grid=grid, scores=scores, key=keys, seed=seed))

            taken, result = seconds(run), found[0]
            error = float(reconstruction_error(x, result.tokens, result.assignment).mean() / spread)
            rows.append(Reduction(method, m, error, taken, None if score is None else score(result)))
    return rows
