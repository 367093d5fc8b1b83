"""Short causal convolution along a sequence, one kernel per channel: what stands in front of most recurrences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.kernels.shapes import accumulation_dtype

__all__ = ["CausalConv"]


class CausalConv(nn.Module):
    """``y_t = bias + sum_j weight_j x_{t - kernel_size + 1 + j}`` on each channel of ``(batch, length, channels)``,
    zeros before the first token. Weights ``(channels, kernel_size)``; the last column is that of the token itself."""

    def __init__(self, channels: int, kernel_size: int = 4, bias: bool = True) -> None:
        super().__init__()
        if kernel_size < 1:
            raise OptionError(f"kernel_size is at least 1, got {kernel_size}.")
        self.channels, self.kernel_size = channels, kernel_size
        # As torch initialises a depthwise Conv1d, whose fan-in is the kernel's size.
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, and the last ``kernel_size - 1`` inputs, with which a later call goes on (``tail``)."""
        length, work = x.shape[1], accumulation_dtype(x.dtype)
        if tail is None:
            tail = x.new_zeros(x.shape[0], self.kernel_size - 1, self.channels)
        # Sums of shifted copies: torch's depthwise convolution is slower for so few taps.
        seen = torch.cat((tail, x), 1)
        taps = self.weight.to(work).unbind(-1)
        out = seen[:, :length].to(work) * taps[0]
        for index, tap in enumerate(taps[1:], 1):
            out = torch.addcmul(out, seen[:, index : index + length].to(work), tap)
        if self.bias is not None:
            out = out + self.bias.to(work)
        # A copy: a view would keep the whole stretch.
        return out.to(x.dtype), seen[:, length:].clone()
