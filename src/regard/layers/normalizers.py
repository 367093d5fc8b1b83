"""From scores to weights, row by row: softmax and what stands in for it.

All take scores ``(..., rows, k_len)`` and ``visible``, boolean and broadcastable to them (None: everything is seen),
and give weights that are zero where nothing is seen; a row that sees nothing is all zeros, with finite gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.kernels.dense import masked_softmax

__all__ = [
    "DISTRIBUTIONS",
    "NORMALIZERS",
    "PerHeadNormalizer",
    "entmax",
    "length_scaled_softmax",
    "normalizer",
    "pointwise",
    "row_normalized",
    "seen_count",
    "self_adjusted_softmax",
    "sparsemax",
    "tempered_softmax",
]

Normalizer = Callable[[Tensor, Tensor | None], Tensor]


def seen_count(scores: Tensor, visible: Tensor | None) -> Tensor:
    """How many keys each row sees, at least 1, ``(..., rows, 1)``."""
    if visible is None:
        return scores.new_full((*scores.shape[:-1], 1), max(scores.shape[-1], 1))
    return visible.sum(-1, keepdim=True).clamp_min(1).to(scores.dtype)


def tempered_softmax(scores: Tensor, visible: Tensor | None, temperature: float | Tensor = 1.0) -> Tensor:
    """``softmax(scores / temperature)``; towards 0 it takes the largest score alone, towards infinity all alike."""
    return masked_softmax(scores / temperature, visible)


def length_scaled_softmax(
    scores: Tensor, visible: Tensor | None, scale: float | Tensor = 0.43, length: float | None = None
) -> Tensor:
    """``softmax(scale log(n) scores)`` for a row that sees ``n`` keys, so that it does not flatten as ``n`` grows.

    Nakanishi, "Scalable-Softmax Is Superior for Attention", 2025, arXiv 2501.19399, equation 2; 0.43 is what it finds
    learned scales to be about. length: ``n``, where it is not the number of keys that a row sees.
    """
    count = seen_count(scores, visible) if length is None else scores.new_tensor(length)
    return masked_softmax(scores * (scale * count.log()), visible)


def self_adjusted_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """``(s - min(s_min, 0)) softmax(s)`` scaled to sum 1; softmax itself where all scores are one and not positive.

    Zheng et al., "Self-Adjust Softmax", 2025, arXiv 2502.18277; its normalised variant divides by the range of the
    scores instead, which cancels here.
    """
    soft = masked_softmax(scores, visible)
    shown = scores if visible is None else scores.masked_fill(~visible, float("inf"))
    lifted = (scores - shown.amin(-1, keepdim=True).clamp_max(0)) * soft
    total = lifted.sum(-1, keepdim=True)
    some = total > 0
    return torch.where(some, lifted / torch.where(some, total, 1), soft)


def pointwise(
    scores: Tensor, visible: Tensor | None, function: Callable[[Tensor], Tensor], mean: bool = False
) -> Tensor:
    """``function`` of each score by itself, with ``mean`` divided by the number of keys that are seen."""
    weights = function(scores)
    if mean:
        weights = weights / seen_count(scores, visible)
    return weights if visible is None else weights.masked_fill(~visible, 0)


def row_normalized(
    scores: Tensor, visible: Tensor | None, function: Callable[[Tensor], Tensor], eps: float = 1e-6
) -> Tensor:
    """A positive ``function`` of each score over the row's sum of it, plus ``eps``."""
    weights = pointwise(scores, visible, function)
    return weights / (weights.sum(-1, keepdim=True) + eps)


def sigmoid_attention(scores: Tensor, visible: Tensor | None) -> Tensor:
    """``sigmoid(scores - log n)`` for a row that sees ``n`` keys: weights of one size at any length, as softmax's.

    Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024, arXiv 2409.04431.
    """
    return pointwise(scores - seen_count(scores, visible).log(), visible, torch.sigmoid)


def sparsemax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """The nearest point to the scores on the simplex: few weights differ from zero.

    Martins and Astudillo, "From Softmax to Sparsemax", 2016, arXiv 1602.02068, algorithm 1.
    """
    return _Entmax.apply(*_filled(scores, visible), 2.0)


def entmax(scores: Tensor, visible: Tensor | None, alpha: float = 1.5) -> Tensor:
    """``alpha``-entmax, ``[(alpha - 1) s - tau]_+^(1 / (alpha - 1))``: softmax for alpha towards 1, sparsemax at 2.

    Peters, Niculae and Martins, "Sparse Sequence-to-Sequence Models", 2019, arXiv 1905.05702, by bisection for
    ``tau`` (section 3.2).
    """
    _check_alpha(alpha)
    return _Entmax.apply(*_filled(scores, visible), alpha)


def _check_alpha(alpha: float) -> None:
    if not alpha > 1:
        raise OptionError(f"alpha is above 1 (1 is softmax itself), got {alpha}.")


def _filled(scores: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    if visible is None:
        return scores, torch.ones_like(scores, dtype=torch.bool)
    return scores, visible.expand(scores.shape)


class _Entmax(torch.autograd.Function):
    """Bisection for the threshold; the gradient is that of the exact solution on the support that was found."""

    @staticmethod
    def forward(ctx, scores: Tensor, visible: Tensor, alpha: float) -> Tensor:  # type: ignore[no-untyped-def]
        work = scores.double() if scores.device.type != "mps" else scores
        z = ((alpha - 1) * work).masked_fill(~visible, float("-inf"))
        some = visible.any(-1, keepdim=True)
        top = torch.where(some, z.amax(-1, keepdim=True), torch.zeros_like(z[..., :1]))
        count = visible.sum(-1, keepdim=True).clamp_min(1).to(z.dtype)
        # At low the largest weight alone is one; at high no weight exceeds 1 / count.
        low, high = top - 1, top - count ** (1 - alpha)
        for _ in range(60):
            middle = (low + high) / 2
            total = (z - middle).clamp_min(0).pow(1 / (alpha - 1)).sum(-1, keepdim=True)
            low, high = torch.where(total >= 1, middle, low), torch.where(total >= 1, high, middle)
        weights = (z - low).clamp_min(0).pow(1 / (alpha - 1))
        weights = torch.where(some, weights / weights.sum(-1, keepdim=True).clamp_min(1e-30), torch.zeros_like(weights))
        weights = weights.to(scores.dtype)
        ctx.save_for_backward(weights)
        ctx.alpha = alpha
        return weights

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (weights,) = ctx.saved_tensors
        slope = torch.where(weights > 0, weights.pow(2 - ctx.alpha), torch.zeros_like(weights))
        moved = grad * slope
        mean = moved.sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        return moved - mean * slope, None, None


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": masked_softmax,
    "tempered": tempered_softmax,
    "length_scaled": length_scaled_softmax,
    "self_adjusted": self_adjusted_softmax,
    # A yardstick, whatever the scores are.
    "uniform": lambda scores, visible: masked_softmax(0 * scores, visible),
    "sigmoid": sigmoid_attention,
    "relu": partial(pointwise, function=F.relu, mean=True),
    "tanh": partial(pointwise, function=torch.tanh),
    "softplus": partial(row_normalized, function=F.softplus),
    "sparsemax": sparsemax,
    "entmax": entmax,
    "none": partial(pointwise, function=lambda scores: scores, mean=True),
}
"""By name; ``relu`` and ``none`` divide by the number of keys that a row sees."""
DISTRIBUTIONS = frozenset(("softmax", "tempered", "length_scaled", "self_adjusted", "uniform", "sparsemax", "entmax"))
"""Those whose rows are not negative and sum to one."""
_OPTIONS = {"tempered": "temperature", "length_scaled": "scale", "entmax": "alpha"}


class PerHeadNormalizer(nn.Module):
    """A normaliser ``(scores, visible, number)`` with a positive number for each head, such as ``tempered``'s
    temperature: fixed, or ``learned`` from ``start`` on."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        start: float | Sequence[float],
        num_heads: int,
        learned: bool = False,
    ) -> None:
        super().__init__()
        numbers = [float(start)] * num_heads if isinstance(start, int | float) else [float(x) for x in start]
        if len(numbers) != num_heads or not all(0 < x < float("inf") for x in numbers):
            raise OptionError(f"Give one positive number, or one for each of {num_heads} heads; got {start!r}.")
        self.function = function
        log = torch.tensor(numbers).log()
        self.log_number: Tensor
        if learned:
            self.log_number = nn.Parameter(log)
        else:
            self.register_buffer("log_number", log)

    def extra_repr(self) -> str:
        return f"{len(self.log_number)} heads, learned={isinstance(self.log_number, nn.Parameter)}"

    def forward(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """Weights ``(batch, heads, rows, k_len)``."""
        if scores.shape[-3] != len(self.log_number):
            raise ShapeError(
                f"This normaliser has a number for each of {len(self.log_number)} heads and got {scores.shape[-3]}; "
                f"build it with num_heads={scores.shape[-3]}."
            )
        return self.function(scores, visible, self.log_number.to(scores.dtype).exp().view(-1, 1, 1))


def normalizer(name: str, num_heads: int = 1, **options: Any) -> Normalizer:
    """A normaliser by name, with its options: ``tempered`` takes ``temperature`` and ``length_scaled`` ``scale``, each
    one number or one for each head, both ``learned``; ``entmax`` takes ``alpha``.

    Raises UnknownNameError, which shows the names, OptionError for options that it does not have.
    """
    if name not in NORMALIZERS:
        raise UnknownNameError("normaliser", name, NORMALIZERS, f"There are: {', '.join(NORMALIZERS)}.")
    function, option = NORMALIZERS[name], _OPTIONS.get(name)
    per_head = name in ("tempered", "length_scaled")
    known = ([] if option is None else [option]) + (["learned"] if per_head else [])
    for given in options:
        if given not in known:
            raise OptionError(
                f"The normaliser {name!r} has no option {given!r}. It takes: {', '.join(known) or 'none'}."
            )
    if not options or option is None:
        return function
    if not per_head:
        _check_alpha(options[option])
        return partial(function, **options)
    default = inspect.signature(function).parameters[option].default
    return PerHeadNormalizer(function, options.get(option, default), num_heads, bool(options.get("learned", False)))
