"""Recurrences with one number of state per channel and gates that read the input alone: RG-LRU and qLSTM.

    RG-LRU  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(g_t) x_t,   y_t = h_t,   a_t = exp(-8 s sigmoid(r_t))
    qLSTM   h_t = sigmoid(f_t) h_{t-1} + sigmoid(g_t) x_t,          y_t = sigmoid(o_t) h_t

Both give ``(y, state)``, are causal, and go on from the state of an earlier stretch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.kernels.scan import linear_scan
from regard.kernels.shapes import accumulation_dtype
from regard.layers.ssm import log_reversed_sigmoid

__all__ = ["QuasiLSTM", "RealGatedLRU"]


class RealGatedLRU(nn.Module):
    """The real-gated linear recurrent unit on ``(batch, length, dim)``: De et al., "Griffin", 2024, arXiv 2402.19427,
    section 2.4. Gates mix channels within each of ``num_heads`` blocks. At an open gate a channel keeps a share of its
    state that is drawn uniformly from 0.9 to 0.999."""

    _POWER = 8.0

    def __init__(self, dim: int, num_heads: int = 1) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise OptionError(f"{num_heads} blocks do not divide {dim} channels.")
        self.dim, self.num_heads, width = dim, num_heads, dim // num_heads
        self.gates = nn.Parameter(torch.randn(num_heads, width, 2 * width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_heads, 2 * width))
        slow = -(0.9 + 0.099 * torch.rand(dim)).log() / self._POWER
        self.rate = nn.Parameter(slow.expm1().log())

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"

    @property
    def state_size(self) -> int:
        return self.dim

    def dynamics(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-decay and input gate ``sqrt(1 - a^2) sigmoid(g)``, each ``(batch, length, dim)``; a token that is not
        there has none of either."""
        work = accumulation_dtype(x.dtype)
        blocks = torch.einsum("blhc,hco->blho", x.unflatten(-1, (self.num_heads, -1)), self.gates) + self.bias
        recur, admit = (t.flatten(2) for t in blocks.to(work).sigmoid().chunk(2, -1))
        log_decay = -self._POWER * F.softplus(self.rate.to(work)) * recur
        # The root is kept off zero, where it has no derivative.
        kept = (-torch.expm1(2 * log_decay)).clamp_min(torch.finfo(work).tiny).sqrt() * admit
        if keys is not None:
            log_decay, kept = (t.masked_fill(~keys[..., None], 0) for t in (log_decay, kept))
        return log_decay, kept

    def forward(self, x: Tensor, state: Tensor | None = None, *, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``y (batch, length, dim)`` and the state ``(batch, dim)``."""
        log_decay, kept = self.dynamics(x, keys)
        states = linear_scan(log_decay, kept * x, state)
        return states.to(x.dtype), states[:, -1].clone()


class QuasiLSTM(nn.Module):
    """The quasi-LSTM on ``(batch, length, dim)``: an LSTM without tanh and without links from its state to its gates
    (Sieber et al., 2024, arXiv 2405.15731, section 3.2.3).

    reversed_sigmoid: forget by ``sigmoid(-f)^relu(alpha)``, alpha learned from 1, in place of ``sigmoid(f)``.
    """

    def __init__(self, dim: int, reversed_sigmoid: bool = True) -> None:
        super().__init__()
        if dim < 1:
            raise OptionError(f"dim is at least 1, got {dim}.")
        self.dim, self.reversed_sigmoid = dim, reversed_sigmoid
        self.gates = nn.Linear(dim, 3 * dim)
        nn.init.normal_(self.gates.weight, std=dim**-0.5)
        self.alpha = nn.Parameter(torch.ones(())) if reversed_sigmoid else None

    def extra_repr(self) -> str:
        return f"{self.dim}, reversed_sigmoid={self.reversed_sigmoid}"

    @property
    def state_size(self) -> int:
        return self.dim

    def dynamics(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-decay, input gate and output gate, each ``(batch, length, dim)``."""
        forget, admit, show = self.gates(x).to(accumulation_dtype(x.dtype)).chunk(3, -1)
        if self.alpha is not None:
            log_decay = log_reversed_sigmoid(forget, F.relu(self.alpha).to(forget.dtype))
        else:
            log_decay = F.logsigmoid(forget)
        admit = admit.sigmoid()
        if keys is not None:
            log_decay, admit = (t.masked_fill(~keys[..., None], 0) for t in (log_decay, admit))
        return log_decay, admit, show.sigmoid()

    def forward(self, x: Tensor, state: Tensor | None = None, *, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``y (batch, length, dim)`` and the state ``(batch, dim)``."""
        log_decay, admit, show = self.dynamics(x, keys)
        states = linear_scan(log_decay, admit * x, state)
        return (show * states).to(x.dtype), states[:, -1].clone()
