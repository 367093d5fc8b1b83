"""Methods of compression side by side."""

from __future__ import annotations

import pytest
import torch

from regard.bench.reduction import compare_reductions
from regard.sparse.token_sequence_compression import compress


@pytest.mark.paper("token_sequence_compression")
def test_every_method_at_every_budget_with_its_error_and_score() -> None:
    x = torch.randn(4, 24, 6, generator=torch.Generator().manual_seed(0))
    rows = compare_reductions(
        x,
        (24, 6, 1),
        ("cluster", "pooling", "saliency", "tome"),
        lambda found: float(found.tokens.shape[1]),
        grid=(4, 6),
        saliency=x[..., 0],
    )
    assert [(row.m, row.method) for row in rows[:5]] == [
        (24, "cluster"),
        (24, "pooling"),
        (24, "saliency"),
        (24, "tome"),
        (6, "cluster"),
    ]
    assert all(row.score == row.m and row.seconds > 0 for row in rows)
    assert all(row.error < 1e-10 for row in rows if row.m == 24)
    one = {row.method: row.error for row in rows if row.m == 1}
    assert one["cluster"] == pytest.approx(1) == one["tome"] and one["saliency"] > 1
    found = compress(x, 6, "pooling", grid=(4, 6))
    lost = sum(
        float((x[b, i] - found.tokens[b, found.assignment[b, i]]).square().sum()) for b in range(4) for i in range(24)
    )
    spread = sum(float((x[b] - x[b].mean(0)).square().sum()) for b in range(4))
    assert rows[5].error == pytest.approx(lost / spread, rel=1e-5)
    assert compare_reductions(x, (2,), ("random",))[0].score is None
