"""One layer of softmax attention that learns linear regression from examples in its context.

"In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head Softmax
Attention", 2025, arXiv 2503.12734. Heads are as wide as the input, projections have no biases, and the query attends to
the examples alone.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from regard.errors import ShapeError
from regard.nn.attention import MultiHeadAttention

__all__ = ["ICLHeads"]


class ICLHeads(nn.Module):
    """Examples ``z`` ``(n, L, d + tasks)``, rows ``[x | y]``, and a question ``z_q`` ``(n, 1, d + tasks)`` whose labels
    are 0, to predictions ``(n, tasks)``: the last coordinates of what attention gives. ``L`` may be any."""

    def __init__(self, d: int, heads: int = 2, tasks: int = 1) -> None:
        super().__init__()
        self.d, self.tasks = d, tasks
        width = d + tasks
        self.attention = MultiHeadAttention(width, heads, head_dim=width, bias=False)

    def forward(self, z: Tensor, z_q: Tensor) -> Tensor:
        """Predictions ``(n, tasks)``."""
        width = self.d + self.tasks
        if z.dim() != 3 or z.shape[-1] != width or z_q.shape != (len(z), 1, width):
            raise ShapeError(
                f"Examples are (n, L, {width}) and questions (n, 1, {width}); got {tuple(z.shape)} and "
                f"{tuple(z_q.shape)}."
            )
        return cast(Tensor, self.attention(z_q, z)[:, 0, self.d :])
