"""What follows the heads' read-out and comes before the output projection: a norm and a gate, per head."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["HeadGate", "HeadNorm", "differential_lambda", "lambda_init"]


def lambda_init(layer: int) -> float:
    """``0.8 - 0.6 exp(-0.3 (layer - 1))`` for the 1-based layer: 0.2 in the first, towards 0.8 in deep ones.

    Ye et al., "Differential Transformer", 2024, arXiv 2410.05258.
    """
    return 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))


def differential_lambda(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, begin: float) -> Tensor:
    """``exp(q1 . k1) - exp(q2 . k2) + begin``: the learned weight of a map that is subtracted, a scalar in float32 at
    least. Ye et al., 2024, section 2.1."""
    work = torch.promote_types(q1.dtype, torch.float32)
    q1, k1, q2, k2 = (v.to(work) for v in (q1, k1, q2, k2))
    return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + begin


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the channels of each head, ``(..., head_dim)`` in and out, with one gain for all heads.

    layer: the 1-based layer whose depth factor ``1 - lambda_init(layer)`` multiplies the result, None for none. Half
    precision is normed in float32.
    """

    def __init__(self, head_dim: int, layer: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(head_dim, eps=eps)
        self.factor = 1.0 if layer is None else 1 - lambda_init(layer)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape in and out."""
        work = accumulation_dtype(x.dtype)
        normed = F.rms_norm(x.to(work), x.shape[-1:], self.weight.to(work), self.eps)
        return (normed * self.factor).to(x.dtype)


class HeadGate(nn.Module):
    """``o * sigmoid(Linear(o))`` for each head's output ``(..., head_dim)``, one linear map for all heads.

    kind: ``"scalar"``, one gate a head, or ``"vector"``, one a channel.
    """

    def __init__(self, head_dim: int, kind: Literal["scalar", "vector"] = "scalar") -> None:
        super().__init__()
        if kind not in ("scalar", "vector"):
            raise OptionError(f"A head's gate is 'scalar' or 'vector', got {kind!r}.")
        self.linear = nn.Linear(head_dim, 1 if kind == "scalar" else head_dim)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape in and out."""
        return x * torch.sigmoid(self.linear(x))
