"""Flash window attention: Swin's attention with a window's scores never leaving the fast memory.

Nothing of the mechanism changes: ``softmax(q k^T / sqrt(d) + B) v`` inside (shifted) windows, as in
:mod:`regard.local.swin`. What changes is how a window is run. Its ``n x n`` scores fit on chip, so they are formed and
softmaxed there once, without rescaling, and the feature axis is cut into chunks instead of the sequence:
:mod:`regard.kernels.flash_window` has the formulas, forward and backward.

:func:`window_traffic` counts what that saves. Per window and head, in elements, a forward pass moves

    standard        4 n d + 4 n^2    scores and weights are each written and read
    flash           4 n d            with n^2 + 3 n d on chip: whole rows of query, key and value
    flash_window    4 n d            with n^2 + 2 n c on chip: two chunks of c features at a time

so that flash attention's tiling, made for long sequences, moves no fewer bytes on windows and needs more room.

The public kernel leaves the scale out of its gradients of query and key (it is called with queries scaled before), and
has no mask for shifted windows; here the scale counts and the mask is a term of the logits. The kernel for GPUs is not
part.

Source: Zhang, "Flash Window Attention: speedup the attention computation for Swin Transformer", 2025, arXiv 2501.06480.
``(batch, heads, length, head_dim)`` in and out; the drop-in is ``WindowAttention(..., impl="flash_window")`` of
:mod:`regard.local.swin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from regard.errors import OptionError
from regard.kernels import accumulation_dtype, flash_window_attention
from regard.local.swin import SwinAttention
from regard.registry import register

__all__ = ["FlashWindowAttention", "WindowTraffic", "flash_window_attention", "window_traffic"]

Scheme = Literal["standard", "flash", "flash_window"]


@dataclass(frozen=True)
class WindowTraffic:
    """``moved``: bytes to and from slow memory, of all windows and heads. ``on_chip``: bytes that one window and head
    needs in fast memory at once."""

    moved: int
    on_chip: int


def window_traffic(
    n: int,
    d: int,
    heads: int,
    windows: int,
    dtype: torch.dtype = torch.float32,
    scheme: Scheme = "flash_window",
    chunk: int = 16,
) -> WindowTraffic:
    """The model of a forward pass over windows of ``n`` tokens, ``d`` features a head; bias and masks, which many
    windows share, do not count. On chip scores have the dtype that they accumulate in; ``"standard"`` needs one row of
    them there."""
    if min(n, d, heads, windows, chunk) < 1:
        raise OptionError(f"All sizes are at least 1; got n={n}, d={d}, heads={heads}, windows={windows}, {chunk=}.")
    held = {"standard": (n, 0), "flash": (n * n, 3 * n * d), "flash_window": (n * n, 2 * n * min(chunk, d))}
    if scheme not in held:
        raise OptionError(f"scheme is one of {', '.join(held)}; got {scheme!r}.")
    scores, features = held[scheme]
    elements = 4 * n * d + (4 * n * n if scheme == "standard" else 0)
    on_chip = scores * accumulation_dtype(dtype).itemsize + features * dtype.itemsize
    return WindowTraffic(elements * dtype.itemsize * heads * windows, on_chip)


@register("flash_window")
class FlashWindowAttention(SwinAttention):
    """Window attention as in ``swin``, run by :func:`~regard.kernels.flash_window_attention`.

    window, shift, axes, position_bias: as there. chunk: features per step of the form that goes chunk by chunk.
    """

    def __init__(
        self,
        window: int | Sequence[int] = 7,
        shift: int | Sequence[int] | None = None,
        axes: int = 2,
        position_bias: Literal["table", "continuous"] | None = "table",
        chunk: int = 16,
        num_heads: int = 1,
        layer_index: int = 0,
    ) -> None:
        super().__init__(window, shift, axes, position_bias, num_heads=num_heads, layer_index=layer_index)
        if chunk < 1:
            raise OptionError(f"chunk is a number of features of at least 1, got {chunk}.")
        self.kernel = partial(flash_window_attention, chunk=chunk)
