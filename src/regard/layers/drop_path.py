"""Stochastic depth: Huang et al., 2016, arXiv 1603.09382. A branch is dropped for whole examples."""

from __future__ import annotations

from torch import Tensor, nn

from regard.errors import OptionError

__all__ = ["DropPath", "drop_path_rates"]


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of ``depth`` blocks, rising linearly from 0 to ``last``."""
    return [last * index / max(depth - 1, 1) for index in range(depth)]


class DropPath(nn.Module):
    """In training, zero a residual branch for each example with probability ``rate`` and scale the others up."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise OptionError(f"A drop-path rate lies in [0, 1), got {rate}.")
        self.rate = rate

    def extra_repr(self) -> str:
        return f"rate={self.rate}"

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...)`` in and out."""
        if not self.training or not self.rate:
            return x
        keep = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)
