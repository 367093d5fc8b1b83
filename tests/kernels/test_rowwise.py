"""Online reductions: what they give block by block, and that those which cannot go block by block are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, UnknownNameError
from regard.kernels.rowwise import ROWWISE, Rowwise, State, check, pointwise, rowwise


def _written_out(name: str, scores: Tensor, visible: Tensor) -> Tensor:
    """The weights of one row, from the formulas."""
    row = scores[visible]
    weights = torch.zeros_like(scores)
    if name == "softmax":
        weights[visible] = row.exp() / row.exp().sum() if visible.any() else row
    elif name == "softmax_one":
        weights[visible] = row.exp() / (1 + row.exp().sum())
    elif name == "sigmoid":
        weights[visible] = 1 / (1 + (-row).exp())
    elif name == "relu":
        weights[visible] = row.clamp_min(0)
    elif name == "retention":
        weights[visible] = row / max(float(row.abs().sum()), 1.0)
    else:
        weights[visible] = row
    return weights


@pytest.mark.parametrize("name", ROWWISE)
def test_blocks_of_any_size_give_the_formula(name: str) -> None:
    torch.manual_seed(0)
    scores, value = 3 * torch.randn(6, 11, dtype=torch.float64), torch.randn(11, 2, dtype=torch.float64)
    visible = torch.rand(6, 11) < 0.6
    visible[0], visible[1, :5] = False, False
    expected = torch.stack([_written_out(name, s, seen) @ value for s, seen in zip(scores, visible, strict=True)])
    row = ROWWISE[name]
    for size in (1, 4, 11):
        out: Tensor | None = None
        state: State = ()
        for start in range(0, 11, size):
            span = slice(start, start + size)
            weights, new = row.reduce(scores[:, span], visible[:, span])
            added = weights @ value[span]
            if out is None:
                out, state = added, new
            else:
                state, before, after = row.merge(state, new)
                out = out * before + added * after
        assert out is not None
        torch.testing.assert_close(row.finished(out, state), expected, rtol=1e-12, atol=1e-12)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    scores = torch.tensor([[900.0, 899.0], [-900.0, -901.0]])
    seen = torch.ones(2, 2, dtype=torch.bool)
    weights, state = ROWWISE["softmax"].reduce(scores, seen)
    torch.testing.assert_close(ROWWISE["softmax"].finished(weights, state), torch.softmax(scores, -1))
    weights, state = ROWWISE["softmax_one"].reduce(scores, seen)
    expected = torch.stack((torch.softmax(scores[0], -1), torch.zeros(2)))
    torch.testing.assert_close(ROWWISE["softmax_one"].finished(weights, state), expected)


@pytest.mark.parametrize("name", ROWWISE)
def test_those_of_the_library_pass_their_own_check(name: str) -> None:
    check(ROWWISE[name])


def test_a_softmax_that_forgets_to_rescale_is_refused() -> None:
    right = ROWWISE["softmax"]
    wrong = Rowwise(
        "forgetful", right.block, lambda a, b: ((torch.maximum(a[0], b[0]), a[1] + b[1]), 1.0, 1.0), right.finish
    )
    with pytest.raises(OptionError, match="block by block"):
        rowwise(wrong)


def test_a_reduction_of_the_whole_row_is_refused() -> None:
    """The largest score of each block alone cannot say what the largest of all blocks was."""
    whole = pointwise("centred", lambda scores: scores - scores.mean(-1, keepdim=True))
    with pytest.raises(OptionError, match="block by block"):
        rowwise(whole)


def test_a_merge_that_is_not_associative_is_refused() -> None:
    def merge(left: State, right: State) -> tuple[State, float, float]:
        return ((left[0] + right[0]) / 2,), 1.0, 1.0

    mean = Rowwise(
        "mean of means", lambda s, seen: (s, (s.masked_fill(~seen, 0).sum(-1, keepdim=True),)), merge, lambda s: s[0]
    )
    with pytest.raises(OptionError, match="block by block"):
        rowwise(mean)


def test_hidden_keys_in_the_state_are_refused() -> None:
    leaky = Rowwise(
        "leaky",
        lambda scores, seen: (scores, (scores.abs().sum(-1, keepdim=True),)),
        lambda left, right: ((left[0] + right[0],), 1.0, 1.0),
        lambda state: 1 / state[0],
    )
    with pytest.raises(OptionError, match="hidden keys"):
        rowwise(leaky)


def test_unknown_names_are_told_their_neighbours() -> None:
    with pytest.raises(UnknownNameError, match="softmax"):
        rowwise("softmx")
