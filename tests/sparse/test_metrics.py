"""Measures of a selection against loops over the dense attention matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.layout import BlockLayout, TokenLayout
from regard.masks import Causal, KeyPadding, Mask
from regard.sparse import metrics
from regard.sparse.metrics import head_agreement, mass_recall

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def query_key(q_len: int = 21, k_len: int = 21) -> tuple[Tensor, Tensor]:
    query, key = torch.randn(2, 4, q_len, 8), torch.randn(2, 2, k_len, 8)
    return query.double(), key.double()


def full_weights(query: Tensor, key: Tensor, seen: Tensor, scale: float = 8**-0.5) -> Tensor:
    """Softmax written out, zeros where a query sees nothing."""
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * scale).exp() * seen
    return (scores / scores.sum(-1, keepdim=True)).nan_to_num(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(21, 21), (13, 29)])
@pytest.mark.parametrize("area", [1, 400, 1 << 24])
def test_recall_is_the_mass_inside(
    causal: bool, lengths: tuple[int, int], area: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_AREA", area)
    query, key = query_key(*lengths)
    base = BlockLayout.of(Causal() if causal else None, *lengths, 8, 4)
    layout = base.only(torch.rand(2, 4, *base.visit.shape[-2:]) < 0.5)
    seen = Causal().dense(*lengths) if causal else torch.ones(1, 1, *lengths, dtype=torch.bool)
    expected = (full_weights(query, key, seen) * layout.dense()).sum(-1)
    torch.testing.assert_close(mass_recall(query, key, layout, causal=causal), expected.mean(-1), **TIGHT)
    torch.testing.assert_close(mass_recall(query, key, layout, causal=causal, per_query=True), expected, **TIGHT)


def test_everything_recalls_all_and_nothing_nothing() -> None:
    query, key = query_key()
    base = BlockLayout.of(Causal(), 21, 21, 8, 8)
    ones = torch.ones(2, 4, dtype=torch.float64)
    torch.testing.assert_close(mass_recall(query, key, base, causal=True), ones, **TIGHT)
    nothing = base.only(torch.tensor(False))
    torch.testing.assert_close(mass_recall(query, key, nothing, causal=True), 0 * ones, **TIGHT)


def test_a_causal_choice_judged_by_all_keys() -> None:
    """The reference is what the call says, whatever rule the layout has inside its blocks."""
    query, key = query_key()
    weights = full_weights(query, key, torch.ones(1, 1, 21, 21))
    recall = mass_recall(query, key, BlockLayout.of(Causal(), 21, 21, 8, 8))
    torch.testing.assert_close(recall, weights.tril().sum(-1).mean(-1), **TIGHT)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_queries_that_see_nothing_do_not_count(as_tensor: bool) -> None:
    query, key = query_key()
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[0, :6] = False
    mask: Mask = KeyPadding(valid)
    layout = BlockLayout.of(mask & Causal(), 21, 21, 4, 4).only(torch.arange(6) % 2 == 0)
    given = mask.dense(21, 21) if as_tensor else mask
    inside = (full_weights(query, key, (mask & Causal()).dense(21, 21)) * layout.dense()).sum(-1)
    recall = mass_recall(query, key, layout, causal=True, mask=given)
    torch.testing.assert_close(recall[0], inside[0, :, 6:].mean(-1), **TIGHT)
    torch.testing.assert_close(recall[1], inside[1].mean(-1), **TIGHT)
    rows = mass_recall(query, key, layout, causal=True, mask=given, per_query=True)
    assert bool(rows[0, :, :6].isnan().all()) and not bool(rows[0, :, 6:].isnan().any())


def test_token_layouts_scale_and_half_precision() -> None:
    query, key = query_key(9, 17)
    seen = torch.rand(2, 4, 9, 17) < 0.4
    expected = (full_weights(query, key, torch.ones(1, 1, 9, 17), 0.9) * seen).sum(-1).mean(-1)
    layout = TokenLayout.of(seen)
    torch.testing.assert_close(mass_recall(query, key, layout, scale=0.9), expected, **TIGHT)
    half = mass_recall(query.bfloat16(), key.bfloat16(), layout, scale=0.9)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.02)


def test_recall_refuses_a_layout_of_other_lengths() -> None:
    query, key = query_key()
    with pytest.raises(ShapeError, match="20 x 21"):
        mass_recall(query, key, BlockLayout.of(None, 20, 21, 8, 8))


def test_agreement_counts_common_keys() -> None:
    weights = torch.rand(2, 3, 10, 12, dtype=torch.float64) * (torch.arange(12) <= torch.arange(10)[:, None])
    found = head_agreement(weights, 4)
    for b in range(2):
        for g in range(3):
            for h in range(3):
                shares = []
                for row in range(3, 10):  # earlier queries see fewer than four keys
                    ours, theirs = (
                        set(sorted(range(12), key=lambda k, head=head: -weights[b, head, row, k])[:4])
                        for head in (g, h)
                    )
                    shares.append(len(ours & theirs) / 4)
                assert float(found[b, g, h]) == pytest.approx(sum(shares) / len(shares))
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.ones(2, 3, dtype=torch.float64))


def test_agreement_limits_and_errors() -> None:
    same = torch.rand(1, 1, 6, 20).expand(1, 4, 6, 20)
    assert bool((head_agreement(same, 5) == 1).all())
    apart = torch.zeros(1, 2, 3, 8)
    apart[:, 0, :, :4], apart[:, 1, :, 4:] = 1, 1
    assert torch.equal(head_agreement(apart, 4), torch.eye(2)[None])
    chance = head_agreement(torch.rand(1, 2, 4000, 20), 5)[0, 0, 1]
    assert float(chance) == pytest.approx(5 / 20, abs=0.01)
    assert bool(head_agreement(torch.zeros(1, 2, 3, 8), 4).isnan().all())
    with pytest.raises(ShapeError, match="top"):
        head_agreement(same, 21)
    with pytest.raises(ShapeError, match="weights"):
        head_agreement(same[0], 2)
