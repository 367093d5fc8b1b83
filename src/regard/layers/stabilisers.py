"""What keeps logits from growing while a transformer trains: a loss on the log-partition, normalised queries and keys,
a soft cap."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["QKNorm", "qk_norm", "soft_cap", "z_loss"]


def z_loss(logits: Tensor, weight: float = 1e-4) -> Tensor:
    """``weight * mean(log(sum(exp(logits)))^2)`` over the last axis, to be added to the loss.

    Chowdhery et al., "PaLM", 2022, arXiv 2204.02311, section 5: the output softmax's normaliser stays near one.
    """
    total = logits.to(accumulation_dtype(logits.dtype)).logsumexp(-1)
    return weight * total.square().mean()


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)``: as they are near zero, never beyond ``cap``.

    Gemma 2, 2024, arXiv 2408.00118, section 2: cap 50 for attention logits before the mask, 30 for output logits.
    """
    if cap <= 0:
        raise OptionError(f"A soft cap is above 0, got {cap}.")
    return cap * torch.tanh(logits / cap)


def qk_norm(query: Tensor, key: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Queries and keys of length one along the last axis: logits become cosines.

    Henry et al., "Query-Key Normalization for Transformers", 2020, arXiv 2010.04245, section 3.
    """
    work = accumulation_dtype(query.dtype)
    normed = (F.normalize(t.to(work), dim=-1, eps=eps).to(t.dtype) for t in (query, key))
    return next(normed), next(normed)


class QKNorm(nn.Module):
    """:func:`qk_norm` with the paper's learned scale ``g`` in place of ``1 / sqrt(head_dim)``, initially ``log2(L^2 -
    L)`` for sequences of ``length`` L.

    Returns query and key whose product is the logits: attend with ``scale=1``.
    """

    def __init__(self, length: int = 1024, eps: float = 1e-6) -> None:
        super().__init__()
        if length < 2:
            raise OptionError(f"QK-norm's scale is set for a length of at least 2, got {length}.")
        self.eps = eps
        self.scale = nn.Parameter(torch.tensor(math.log2(length * length - length)))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., head_dim)`` each, in and out."""
        query, key = qk_norm(query, key, self.eps)
        return query * self.scale.to(query.dtype), key
