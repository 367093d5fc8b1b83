"""Row normalisers that take in keys block by block and come with a backward pass of their own.

An :class:`OnlineFunc` is a fold: it keeps numbers of each row (its scales), takes in one block of scores after the
other, and says by how much the output so far is rescaled. From the final scales a block's weights can be made again,
which is what the backward pass does, tile by tile. Chen et al., "AttentionEngine: A Versatile Framework for Efficient
Attention Mechanisms on Diverse Hardware Platforms", 2025, arXiv 2502.15349.

A :class:`~regard.kernels.rowwise.Rowwise` is another thing, a monoid: two states merge, whichever came first. It is
that from which a fold follows, not the other way round: an OnlineFunc does not say what state two blocks have that were
read apart, nor what its final scales merge to (``combine`` gives shares of outputs alone). So there is no adapter from
one to the other. A Rowwise needs no derivative, as autograd goes through its functions; an OnlineFunc has its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from regard.errors import OptionError, UnknownNameError, UnsupportedPatternError

__all__ = [
    "ONLINE",
    "OnlineFunc",
    "OnlineIdentity",
    "OnlineRetention",
    "OnlineSoftmax",
    "Scales",
    "check_online",
    "initial_scales",
    "online_function",
    "whole_row",
]

Scales = dict[str, Tensor]
"""Of each row, by name: tensors ``(..., rows, 1)``."""


class OnlineFunc(ABC):
    """The protocol. Scores are ``(..., rows, keys)``; those of hidden pairs are ``mask_value``, and must get weight
    zero and leave the scales as they are.

    online_rowscales: what a row keeps while blocks come, and its value before the first. final_rowscales: what is kept
    of it for the backward pass. :func:`check_online` tries the parts against one another.
    """

    online_rowscales: ClassVar[Mapping[str, float]] = {}
    final_rowscales: ClassVar[tuple[str, ...]] = ()
    mask_value: ClassVar[float] = float("-inf")

    @abstractmethod
    def online_fwd(self, scores: Tensor, scales: Scales) -> tuple[Tensor, Scales, Tensor | float]:
        """Take in a block: its weights, the new scales, and the factor of the output so far."""

    def online_fwd_epilogue(self, o: Tensor, scales: Scales) -> tuple[Tensor, Scales]:
        """After the last block: the output, and the final scales."""
        return o, {name: scales[name] for name in self.final_rowscales}

    @abstractmethod
    def forward(self, scores: Tensor, final: Scales) -> Tensor:
        """The weights of a block, from the final scales."""

    @abstractmethod
    def backward(self, dp: Tensor, p: Tensor, final: Scales, doosum: Tensor) -> Tensor:
        """The gradient of the scores from that of the weights ``dp``. doosum ``(..., rows, 1)``: the sum of ``do o``
        over the value's channels, which is the row's sum of ``dp p``."""

    def combine(self, final: Scales) -> Tensor:
        """Shares of outputs of parts of the keys, ``(parts, ..., rows, 1)``, from the parts' final scales."""
        raise UnsupportedPatternError(
            f"{type(self).__name__} has no combine(final), so keys cannot be split. Define it, or pass splits=1."
        )


class OnlineSoftmax(OnlineFunc):
    """``p = exp(s - lse)``, by the running maximum ``m`` and the sum ``r`` of ``exp(s - m)``; final is ``lse = log r +
    m``, ``-inf`` for a row that sees nothing."""

    online_rowscales: ClassVar[Mapping[str, float]] = {"m": float("-inf"), "r": 0.0}
    final_rowscales = ("lse",)

    def online_fwd(self, scores: Tensor, scales: Scales) -> tuple[Tensor, Scales, Tensor | float]:
        top = torch.maximum(scales["m"], scores.amax(-1, keepdim=True))
        safe = top.masked_fill(top == float("-inf"), 0)
        fade = (scales["m"] - safe).exp()
        weights = (scores - safe).exp()
        return weights, {"m": top, "r": scales["r"] * fade + weights.sum(-1, keepdim=True)}, fade

    def online_fwd_epilogue(self, o: Tensor, scales: Scales) -> tuple[Tensor, Scales]:
        seen = scales["r"] > 0
        total = scales["r"].masked_fill(~seen, 1)
        return o / total, {"lse": (total.log() + scales["m"]).masked_fill(~seen, float("-inf"))}

    def forward(self, scores: Tensor, final: Scales) -> Tensor:
        lse = final["lse"]
        return (scores - lse.masked_fill(lse == float("-inf"), 0)).exp()

    def backward(self, dp: Tensor, p: Tensor, final: Scales, doosum: Tensor) -> Tensor:
        return (dp - doosum) * p

    def combine(self, final: Scales) -> Tensor:
        lse = final["lse"]
        top = lse.amax(0)
        shares = (lse - top.masked_fill(top == float("-inf"), 0)).exp()
        total = shares.sum(0)
        return shares / total.masked_fill(total == 0, 1)


class OnlineRetention(OnlineFunc):
    """``p = s / max(sum |s|, 1)`` (RetNet, Sun et al., 2023, arXiv 2307.08621), by the sum ``a`` so far and ``r``, 0
    before the first block and ``max(a, 1)`` after it.

    detach: take the denominator for a constant in the backward pass, as both papers' released code does.
    """

    online_rowscales: ClassVar[Mapping[str, float]] = {"a": 0.0, "r": 0.0}
    final_rowscales = ("a", "r")
    mask_value = 0.0

    def __init__(self, detach: bool = False) -> None:
        self.detach = detach

    def online_fwd(self, scores: Tensor, scales: Scales) -> tuple[Tensor, Scales, Tensor | float]:
        sized = scores.detach() if self.detach else scores
        total = scales["a"] + sized.abs().sum(-1, keepdim=True)
        divisor = total.clamp_min(1)
        return scores / divisor, {"a": total, "r": divisor}, scales["r"] / divisor

    def forward(self, scores: Tensor, final: Scales) -> Tensor:
        return scores / final["r"]

    def backward(self, dp: Tensor, p: Tensor, final: Scales, doosum: Tensor) -> Tensor:
        if self.detach:
            return dp / final["r"]
        return (dp - torch.where(final["a"] > 1, doosum, 0) * p.sign()) / final["r"]

    def combine(self, final: Scales) -> Tensor:
        return final["r"] / final["a"].sum(0).clamp_min(1)


class OnlineIdentity(OnlineFunc):
    """Weights are the scores: sigmoid and ReLU attention, whose nonlinearity is their ``score_mod``."""

    mask_value = 0.0

    def online_fwd(self, scores: Tensor, scales: Scales) -> tuple[Tensor, Scales, Tensor | float]:
        return scores, scales, 1.0

    def forward(self, scores: Tensor, final: Scales) -> Tensor:
        return scores

    def backward(self, dp: Tensor, p: Tensor, final: Scales, doosum: Tensor) -> Tensor:
        return dp

    def combine(self, final: Scales) -> Tensor:
        return torch.ones(())


ONLINE: dict[str, type[OnlineFunc]] = {
    "softmax": OnlineSoftmax,
    "retention": OnlineRetention,
    "identity": OnlineIdentity,
}
"""Those of the paper, by name."""


def online_function(choice: str | OnlineFunc, mask_value: float | None = None) -> tuple[OnlineFunc, float]:
    """The function of this name, or one's own, and the score of hidden pairs; both tried by :func:`check_online`."""
    if isinstance(choice, str):
        if choice not in ONLINE:
            raise UnknownNameError("online function", choice, ONLINE, f"There are: {', '.join(ONLINE)}.")
        choice = ONLINE[choice]()
    elif not isinstance(choice, OnlineFunc):
        raise OptionError(f"online_func is one of {', '.join(ONLINE)} or an OnlineFunc, got {choice!r}.")
    hidden = choice.mask_value if mask_value is None else mask_value
    check_online(choice, hidden)
    return choice, hidden


def whole_row(function: OnlineFunc, scores: Tensor, value: Tensor) -> tuple[Tensor, Scales]:
    """All keys as one block: the output and the final scales."""
    weights, scales, _ = function.online_fwd(scores, initial_scales(function, scores))
    return function.online_fwd_epilogue(weights @ value, scales)


def initial_scales(function: OnlineFunc, like: Tensor) -> Scales:
    """Before the first block, for the rows of ``like (..., rows, anything)``."""
    return {name: like.new_full((*like.shape[:-1], 1), at) for name, at in function.online_rowscales.items()}


def check_online(function: OnlineFunc, mask_value: float) -> None:
    """Try the parts of a function against one another on random rows in float64. Raises OptionError with what differs:
    blocks in turn and all keys at once, with and without hidden keys, ``forward``, ``backward`` (against autograd
    through ``online_fwd``) and, where it is defined, ``combine``."""
    generator = torch.Generator().manual_seed(0)
    scores, value, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 5, 8), (3, 8, 2), (3, 5, 2))
    )
    # Rows below and above whatever a clamp may divide.
    scores = (scores * torch.tensor([0.02, 0.3, 1.0, 3.0, 9.0]).view(-1, 1)).requires_grad_()
    hidden = torch.full((3, 5, 4), mask_value, dtype=torch.float64)
    name = type(function).__name__
    with torch.enable_grad():
        whole, final = whole_row(function, scores, value)
    with torch.no_grad():
        missing = [scale for scale in function.final_rowscales if scale not in final]
        if missing:
            raise OptionError(f"{name}.online_fwd_epilogue gives no {', '.join(missing)}, named in final_rowscales.")
        scales, out = initial_scales(function, scores), torch.zeros_like(whole)
        blocks = [(scores[..., a : a + 2], value[:, a : a + 2]) for a in (0, 2, 4, 6)]
        nothing = (hidden, torch.ones(3, 4, 2, dtype=torch.float64))
        for block, values in (nothing, *blocks[:2], nothing, *blocks[2:]):
            weights, scales, factor = function.online_fwd(block, scales)
            out = out * factor + weights @ values
        out, last = function.online_fwd_epilogue(out, scales)
        weights = function.forward(scores, final)
        doosum = (grad * whole).sum(-1, keepdim=True)
        back = function.backward(grad @ value.mT, weights, final, doosum)
        tried = {
            "online_fwd over four blocks, with blocks between whose pairs are all hidden (score "
            f"{mask_value}), does not give what one block gives": (out, whole),
            "forward(scores, final) are not the weights of online_fwd": (weights @ value, whole),
        }
        for scale in function.final_rowscales:
            tried[f"the final scale {scale!r} depends on how keys come in blocks"] = (last[scale], final[scale])
        if type(function).combine is not OnlineFunc.combine:
            parts = [whole_row(function, scores[..., part], value[:, part]) for part in (slice(0, 3), slice(3, 8))]
            shares = function.combine({s: torch.stack([f[s] for _, f in parts]) for s in function.final_rowscales})
            joined = (shares * torch.stack([o for o, _ in parts])).sum(0)
            tried["combine(final) does not give the whole row from two parts"] = (joined, whole)
    (exact,) = torch.autograd.grad(whole, scores, grad)
    tried["backward is not the derivative of online_fwd"] = (back, exact)
    for what, (found, meant) in tried.items():
        if found.shape != meant.shape or not torch.allclose(found, meant, rtol=1e-9, atol=1e-9):
            raise OptionError(f"{name} cannot be used: {what}. See regard.kernels.online_functions for examples.")
