"""State-space recurrences whose parameters depend on the input: S6 (Mamba) and SSD (Mamba-2).

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,    y_t = C_t . h_t + D u_t,    delta_t = softplus(z_t)

S6: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752, section 3:
``A`` is diagonal, one number per channel and state. SSD: Dao and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060:
``A`` is one number per head, so that ``exp(A softplus(z)) = sigmoid(-z)^(-A)``, a gate. ``B`` and ``C`` are shared by
all channels. Both modules give ``(y, state)``, are causal, and go on from the state of an earlier stretch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels.linear import LinearState, linear_attention
from regard.kernels.scan import selective_scan
from regard.kernels.shapes import accumulation_dtype

__all__ = ["ScalarSSM", "SelectiveSSM", "log_reversed_sigmoid", "ssd_scan", "step_size_bias"]


def step_size_bias(count: int, dt_min: float = 1e-3, dt_max: float = 0.1) -> Tensor:
    """Biases ``(count,)`` whose softplus is spread log-uniformly over ``[dt_min, dt_max]``."""
    if not 0 < dt_min <= dt_max:
        raise OptionError(f"Need 0 < dt_min <= dt_max, got {dt_min} and {dt_max}.")
    low, high = math.log(dt_min), math.log(dt_max)
    steps = (low + torch.rand(count) * (high - low)).exp()
    return steps + torch.log(-torch.expm1(-steps))


def log_reversed_sigmoid(z: Tensor, power: Tensor | float = 1.0) -> Tensor:
    """``log(sigmoid(-z)^power) = -power softplus(z)``: the log-decay of SSD's gate, exact for any ``z``."""
    return power * F.logsigmoid(-z)


def ssd_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: LinearState | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, LinearState]:
    """SSD of ``u (batch, length, heads, channels)``, ``delta (batch, length, heads)``, ``A (heads,) <= 0``, ``B, C
    (batch, length, state_dim)``, ``D (heads,)``: ``y`` like ``u``, and the state ``(batch, heads, state_dim,
    channels)``.

    It is causal linear attention with queries ``C``, keys ``B``, values ``delta u`` and a decay per head and token.
    """
    batch, length, heads, _ = u.shape
    if delta.shape != (batch, length, heads) or A.shape != (heads,):
        raise ShapeError(
            f"For u {tuple(u.shape)}, delta is {(batch, length, heads)} and A {(heads,)}; "
            f"got {tuple(delta.shape)} and {tuple(A.shape)}."
        )
    work = accumulation_dtype(u.dtype)
    values, steps = u.to(work), delta.to(work)
    out, state = linear_attention(
        C.to(work)[:, None].expand(-1, heads, -1, -1),
        B.to(work)[:, None],
        (values * steps[..., None]).transpose(1, 2),
        causal=True,
        log_decay=(steps * A.to(work)).transpose(1, 2),
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    out = out.transpose(1, 2)
    if D is not None:
        out = out + D.to(work)[:, None] * values
    return out.to(u.dtype), state


class SelectiveSSM(nn.Module):
    """S6 on ``(batch, length, dim)``: ``delta``, ``B`` and ``C`` are linear in the input, ``delta`` through ``dt_rank``
    channels (default ``dim / 16``). ``A`` starts at ``-1 .. -state_dim`` in each channel, ``D`` at one.

    state_size: elements that a sequence keeps, ``dim * state_dim``.
    """

    def __init__(
        self, dim: int, state_dim: int = 16, dt_rank: int | None = None, dt_min: float = 1e-3, dt_max: float = 0.1
    ) -> None:
        super().__init__()
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        if dim < 1 or state_dim < 1 or rank < 1:
            raise OptionError(f"dim, state_dim and dt_rank are at least 1; got {dim}, {state_dim} and {rank}.")
        self.dim, self.state_dim, self.dt_rank = dim, state_dim, rank
        self.select = nn.Linear(dim, rank + 2 * state_dim, bias=False)
        self.step_size = nn.Linear(rank, dim)
        with torch.no_grad():
            self.step_size.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.step_size.bias.copy_(step_size_bias(dim, dt_min, dt_max))
        self.log_a = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(dim, 1))
        self.skip = nn.Parameter(torch.ones(dim))

    def extra_repr(self) -> str:
        return f"{self.dim}, state_dim={self.state_dim}, dt_rank={self.dt_rank}"

    @property
    def state_size(self) -> int:
        return self.dim * self.state_dim

    def dynamics(self, u: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``delta (batch, length, dim)``, ``A (dim, state_dim)``, ``B`` and ``C (batch, length, state_dim)``.

        keys: boolean ``(batch | 1, length)``; at False tokens ``delta`` is zero, so that the state passes them by.
        """
        work = accumulation_dtype(u.dtype)
        rank, b, c = self.select(u).split((self.dt_rank, self.state_dim, self.state_dim), -1)
        delta = F.softplus(self.step_size(rank).to(work))
        if keys is not None:
            delta = delta.masked_fill(~keys[..., None], 0)
        return delta, -self.log_a.to(work).exp(), b, c

    def forward(self, u: Tensor, state: Tensor | None = None, *, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``y (batch, length, dim)`` and the state ``(batch, dim, state_dim)``. keys: as in :meth:`dynamics`."""
        delta, a, b, c = self.dynamics(u, keys)
        work = delta.dtype
        y, state = selective_scan(u.to(work), delta, a, b.to(work), c.to(work), self.skip.to(work), state=state)
        return y.to(u.dtype), state


class ScalarSSM(nn.Module):
    """SSD on ``(batch, length, dim)``: as :class:`SelectiveSSM` with one ``A`` and one ``delta`` per head.

    With one head, ``A`` and ``delta`` are shared by all channels. ``-A`` starts uniform in ``a_range``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        state_dim: int = 16,
        a_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or state_dim < 1 or dim % num_heads:
            raise OptionError(
                f"Need state_dim >= 1 and num_heads that divide dim; got dim {dim}, {num_heads} heads, state_dim "
                f"{state_dim}."
            )
        if not 0 < a_range[0] <= a_range[1]:
            raise OptionError(f"a_range is 0 < low <= high, got {a_range}.")
        self.dim, self.num_heads, self.state_dim = dim, num_heads, state_dim
        self.select = nn.Linear(dim, 2 * state_dim, bias=False)
        self.step_size = nn.Linear(dim, num_heads)
        with torch.no_grad():
            self.step_size.bias.copy_(step_size_bias(num_heads, dt_min, dt_max))
        self.log_a = nn.Parameter(torch.empty(num_heads).uniform_(*a_range).log())
        self.skip = nn.Parameter(torch.ones(num_heads))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, state_dim={self.state_dim}"

    @property
    def state_size(self) -> int:
        return self.dim * self.state_dim

    def dynamics(self, u: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``delta (batch, length, num_heads)``, ``A (num_heads,)``, ``B`` and ``C (batch, length, state_dim)``."""
        work = accumulation_dtype(u.dtype)
        b, c = self.select(u).chunk(2, -1)
        delta = F.softplus(self.step_size(u).to(work))
        if keys is not None:
            delta = delta.masked_fill(~keys[..., None], 0)
        return delta, -self.log_a.to(work).exp(), b, c

    def forward(
        self, u: Tensor, state: LinearState | None = None, *, keys: Tensor | None = None
    ) -> tuple[Tensor, LinearState]:
        """``y (batch, length, dim)`` and the state. keys: as in :meth:`SelectiveSSM.dynamics`."""
        delta, a, b, c = self.dynamics(u, keys)
        y, state = ssd_scan(u.unflatten(-1, (self.num_heads, -1)), delta, a, b, c, self.skip, state=state)
        return y.flatten(2), state
