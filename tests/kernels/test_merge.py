"""Merging attentions over parts of the keys gives the attention over all of them."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ShapeError
from regard.kernels import dense_attention, merge_attentions
from regard.masks import Boolean


@pytest.mark.parametrize("cuts", [(20,), (7, 13), (1, 5, 14)])
def test_merged_parts_are_the_whole(cuts: tuple[int, ...]) -> None:
    """In value, log-sum-exp and gradient, also for rows that a part, or every part, does not see."""
    leaves = [torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 20, 20)]
    query, key, value = leaves
    seen = torch.rand(2, 3, 6, 20) < 0.5
    seen[0, 0, 0, : cuts[0]] = False
    seen[1, 1, 2] = False
    parts = [
        dense_attention(query, k, v, mask=Boolean(s), return_lse=True)
        for k, v, s in zip(key.split(cuts, 2), value.split(cuts, 2), seen.split(cuts, 3), strict=True)
    ]
    merged = merge_attentions([out for out, _ in parts], [lse for _, lse in parts])
    whole = dense_attention(query, key, value, mask=Boolean(seen), return_lse=True)
    torch.testing.assert_close(merged[0], whole[0])
    torch.testing.assert_close(merged[1], whole[1])
    assert not bool(merged[0][1, 1, 2].any()) and bool(merged[1][1, 1, 2] == -torch.inf)
    finite, seed = whole[1].isfinite(), torch.randn_like(whole[0])
    totals = [(out * seed).sum() + lse[finite].sin().sum() for out, lse in (merged, whole)]
    for a, b in zip(*(torch.autograd.grad(t, leaves, retain_graph=True) for t in totals), strict=True):
        torch.testing.assert_close(a, b)


def test_order_does_not_matter() -> None:
    outs, lses = list(torch.randn(3, 2, 5, 4).double()), list(torch.randn(3, 2, 5).double() * 50)
    forwards, backwards = merge_attentions(outs, lses), merge_attentions(outs[::-1], lses[::-1])
    nested = merge_attentions(*map(list, zip(merge_attentions(outs[:2], lses[:2]), (outs[2], lses[2]), strict=True)))
    for other in (backwards, nested):
        torch.testing.assert_close(other[0], forwards[0])
        torch.testing.assert_close(other[1], forwards[1])


def test_extreme_log_sum_exps() -> None:
    """The larger one wins without overflow, and half-precision outputs keep their dtype."""
    outs = [torch.full((1, 2), 1.0, dtype=torch.bfloat16), torch.full((1, 2), 2.0, dtype=torch.bfloat16)]
    merged, lse = merge_attentions(outs, [torch.tensor([3e4]), torch.tensor([-3e4])])
    assert merged.dtype == torch.bfloat16 and merged.tolist() == [[1.0, 1.0]]
    assert lse.tolist() == [3e4]


def test_wrong_counts() -> None:
    with pytest.raises(ShapeError, match="as many log-sum-exps"):
        merge_attentions([torch.zeros(1, 1)], [])
    with pytest.raises(ShapeError):
        merge_attentions([], [])
