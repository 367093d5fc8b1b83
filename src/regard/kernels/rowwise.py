"""Reductions of a row of scores that go block of keys by block of keys: softmax, sigmoid, ReLU, or one's own.

A reduction is a monoid. A block of keys gives weights and a state (for softmax the largest score and the sum of
exponentials); two states merge into one, with factors for the outputs that belong to each; at the end the state says
what the summed output is multiplied with. If merging is associative, keys may come in any number of blocks, and a row
may be split over workers. :func:`check` tries that before a reduction is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import OptionError, UnknownNameError

__all__ = ["ROWWISE", "Rowwise", "State", "check", "pointwise", "rowwise"]

State = tuple[Tensor, ...]
"""Of a row: tensors ``(..., rows, 1)``."""


@dataclass(frozen=True)
class Rowwise:
    """An online reduction.

    block: ``(scores, visible) -> (weights, state)`` for ``scores (..., rows, keys)`` and a boolean that broadcasts to
    it; hidden pairs must not reach the state (their weights are set to zero by the caller). merge: ``(left, right) ->
    (state, left factor, right factor)``, factors ``(..., rows, 1)`` for the outputs so far. finish: ``state -> factor``
    of the summed output, or None where it is 1.
    """

    name: str
    block: Callable[[Tensor, Tensor], tuple[Tensor, State]]
    merge: Callable[[State, State], tuple[State, Tensor | float, Tensor | float]]
    finish: Callable[[State], Tensor] | None = None

    def reduce(self, scores: Tensor, visible: Tensor) -> tuple[Tensor, State]:
        """:attr:`block`, with zero weight for what is hidden."""
        weights, state = self.block(scores, visible)
        return weights.masked_fill(~visible, 0), state

    def finished(self, out: Tensor, state: State) -> Tensor:
        """The output of a row, from the sum over its blocks."""
        return out if self.finish is None else out * self.finish(state)


def pointwise(name: str, function: Callable[[Tensor], Tensor]) -> Rowwise:
    """Weights that depend on their own score alone: nothing to reduce."""
    return Rowwise(name, lambda scores, visible: (function(scores), ()), lambda left, right: ((), 1.0, 1.0))


def _softmax_block(scores: Tensor, visible: Tensor) -> tuple[Tensor, State]:
    hidden = scores.masked_fill(~visible, float("-inf"))
    # The largest score cancels from the output, so that no gradient need pass through it.
    top = hidden.detach().amax(-1, keepdim=True)
    weights = (hidden - torch.where(top.isfinite(), top, 0)).exp()
    return weights, (top, weights.sum(-1, keepdim=True))


def _softmax_merge(left: State, right: State) -> tuple[State, Tensor, Tensor]:
    top = torch.maximum(left[0], right[0])
    safe = torch.where(top.isfinite(), top, 0)
    a, b = (left[0] - safe).exp(), (right[0] - safe).exp()
    return (top, left[1] * a + right[1] * b), a, b


def _softmax_finish(state: State) -> Tensor:
    return torch.where(state[1] > 0, 1 / torch.where(state[1] > 0, state[1], 1), 0)


def _softmax_one_finish(state: State) -> Tensor:
    """One more term ``exp(0)`` in the sum: ``1 / (sum + exp(-top))``, from above or below zero without overflow."""
    top = state[0].clamp_min(0)
    return (state[0] - top).exp() / (state[1] * (state[0] - top).exp() + (-top).exp())


def _absolute(scores: Tensor, visible: Tensor) -> tuple[Tensor, State]:
    return scores, (scores.abs().masked_fill(~visible, 0).sum(-1, keepdim=True),)


ROWWISE = {
    row.name: row
    for row in (
        Rowwise("softmax", _softmax_block, _softmax_merge, _softmax_finish),
        Rowwise("softmax_one", _softmax_block, _softmax_merge, _softmax_one_finish),
        pointwise("sigmoid", torch.sigmoid),
        pointwise("relu", torch.relu),
        pointwise("none", lambda scores: scores),
        Rowwise(
            "retention",
            _absolute,
            lambda left, right: ((left[0] + right[0],), 1.0, 1.0),
            lambda state: 1 / state[0].clamp_min(1),
        ),
    )
}
"""By name. ``softmax_one``: one more term 1 in the denominator, so that a row may attend to nothing. ``retention``:
scores over ``max(sum |scores|, 1)`` (RetNet, Sun et al. 2023, arXiv 2307.08621)."""


def rowwise(choice: str | Rowwise) -> Rowwise:
    """The reduction of this name, or one's own once it has passed :func:`check`."""
    if isinstance(choice, Rowwise):
        if choice.name not in ROWWISE or ROWWISE[choice.name] is not choice:
            check(choice)
        return choice
    if choice not in ROWWISE:
        raise UnknownNameError("rowwise reduction", choice, ROWWISE, f"There are: {', '.join(ROWWISE)}.")
    return ROWWISE[choice]


def check(choice: Rowwise) -> None:
    """Try a reduction on random rows in float64: any bracketing of three blocks gives what the whole row gives, hidden
    keys have no say, and a block with nothing to see changes nothing. Raises OptionError with what differs."""
    generator = torch.Generator().manual_seed(0)
    scores = 6 * torch.randn(4, 5, 12, generator=generator, dtype=torch.float64)
    value = torch.randn(4, 12, 3, generator=generator, dtype=torch.float64)
    visible = torch.rand(4, 5, 12, generator=generator) < 0.7
    # One row sees nothing of the middle block.
    visible[..., 0], visible[:, 0, 4:8] = True, False
    whole = _output(choice, [(scores, visible, value)], "left")
    parts = [(scores[..., a:b], visible[..., a:b], value[:, a:b]) for a, b in ((0, 4), (4, 8), (8, 12))]
    other = scores.masked_fill(~visible, 3.0)
    hidden = _output(choice, [(other, visible, value)], "left")
    tried = {
        "merging (first, second) with third does not give the whole row": _output(choice, parts, "left"),
        "merging first with (second, third) does not give the whole row": _output(choice, parts, "right"),
        "hidden keys change the output; leave them out of the state": hidden,
    }
    for what, found in tried.items():
        if found.shape != whole.shape or not torch.allclose(found, whole, rtol=1e-9, atol=1e-9):
            far = float((found - whole).abs().max()) if found.shape == whole.shape else float("nan")
            raise OptionError(
                f"The reduction {choice.name!r} cannot run block by block: {what} (largest difference {far:.2g}). See "
                "regard.kernels.rowwise for softmax and others as examples."
            )


def _output(choice: Rowwise, blocks: list[tuple[Tensor, Tensor, Tensor]], order: str) -> Tensor:
    done = []
    for scores, visible, value in blocks:
        weights, state = choice.reduce(scores, visible)
        done.append((weights @ value, state))
    while len(done) > 1:
        (left_out, left), (right_out, right) = done[:2] if order == "left" else done[-2:]
        state, a, b = choice.merge(left, right)
        merged = (left_out * a + right_out * b, state)
        done = [merged, *done[2:]] if order == "left" else [*done[:-2], merged]
    return choice.finished(*done[0])
