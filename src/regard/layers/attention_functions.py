"""Functions of scores that stand in for softmax: each weight by itself, with no sum over the keys.

So et al., "Primer", 2021, arXiv 2109.08668 (squared ReLU); Ma et al., "Mega", 2022, arXiv 2209.10655, section 3
(Laplace). Weights need not add up to one, so scores are divided by the number of keys that a query sees, and what it
does not see is zeroed afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import UnknownNameError

__all__ = ["ACTIVATIONS", "activation", "laplace", "relu2"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "arctan": torch.arctan,
}
"""Functions of one number by name, of relations and affinities."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """A function by name; UnknownNameError shows the names."""
    if name not in ACTIVATIONS:
        raise UnknownNameError("function", name, ACTIVATIONS, f"There are: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def laplace(x: Tensor, mu: float = math.sqrt(1 / 2), sigma: float = math.sqrt(1 / (4 * math.pi))) -> Tensor:
    """``(1 + erf((x - mu) / (sigma sqrt(2)))) / 2``: the normal distribution function, between 0 and 1.

    With the default ``mu`` and ``sigma`` it has the value (1/2) and slope (sqrt 2) of :func:`relu2` at ``x = mu``, but
    neither its value nor its slope grows without bound.
    """
    return (1 + torch.erf((x - mu) / (sigma * math.sqrt(2)))) / 2


def relu2(x: Tensor) -> Tensor:
    """``max(x, 0)^2``."""
    return F.relu(x).square()
