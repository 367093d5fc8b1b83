"""Local Attender: attention without queries and keys, which upsamples features and keeps their distribution.

Source: "UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders", 2026, arXiv 2601.17950. A guide at
``I`` times the resolution of the values says at each of its pixels how to mix the ``n`` values around it:

    a = softmax_o(Conv1x1(guide) + guide[first n channels])
    out(y, x) = sum_o a_o(y, x) V(y // I + o_y, x // I + o_x)

where ``V`` repeats its border. Every output is a convex combination of nearby inputs, hence repeated application stays
within their range. ``n C_v`` multiplications per output pixel. Upsampler around it: :mod:`regard.models.uplift`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import Neighbors, accumulation_dtype, neighbor_mix
from regard.layers.maps import map_of, tokens_of
from regard.mechanism import Traits
from regard.registry import register

__all__ = ["LocalAttender", "neighbour_offsets"]


def neighbour_offsets(neighbours: int) -> tuple[tuple[int, int], ...]:
    """Offsets (down, right) of a set, row by row: 5 (plus), 9 (3 x 3), 13 (diamond of radius 2), 17 (the diamond and
    the corners at (+-2, +-2)) or 25 (5 x 5)."""
    square = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    rules = {
        5: lambda down, right: abs(down) + abs(right) <= 1,
        9: lambda down, right: max(abs(down), abs(right)) <= 1,
        13: lambda down, right: abs(down) + abs(right) <= 2,
        17: lambda down, right: abs(down) + abs(right) != 3,
        25: lambda down, right: True,
    }
    if neighbours not in rules:
        raise OptionError(f"neighbours is one of {', '.join(map(str, rules))}; got {neighbours}.")
    return tuple(offset for offset in square if rules[neighbours](*offset))


@register("uplift")
class LocalAttender(nn.Module, Traits):
    """Guide ``(batch, guide_channels, I * height, I * width)`` and value ``(batch, channels, height, width)``, ``I`` a
    whole number -> ``(batch, channels, I * height, I * width)``.

    neighbours: see :func:`neighbour_offsets`. conv_residual: add the guide's own first channels to the logits, zeros
    where it has fewer than ``neighbours``. low_mem: one neighbour after the other, instead of the kernel's fastest
    form.
    """

    patterns = frozenset()
    needs_training = True
    growth = "N n"
    grid_axes = frozenset({2})

    def __init__(
        self, guide_channels: int, neighbours: int = 17, conv_residual: bool = True, low_mem: bool = False
    ) -> None:
        super().__init__()
        self.offsets = neighbour_offsets(neighbours)
        self.guide_channels, self.conv_residual, self.low_mem = guide_channels, conv_residual, low_mem
        self.conv = nn.Conv2d(guide_channels, neighbours, 1)

    def extra_repr(self) -> str:
        return f"neighbours={len(self.offsets)}, conv_residual={self.conv_residual}, low_mem={self.low_mem}"

    def weights(self, guide: Tensor) -> Tensor:
        """The share of each neighbour, ``(batch, neighbours, I * height, I * width)``, in float32 or better."""
        if guide.dim() != 4 or guide.shape[1] != self.guide_channels:
            raise ShapeError(f"The guide is (batch, {self.guide_channels}, height, width), got {tuple(guide.shape)}.")
        logits: Tensor = self.conv(guide)
        if self.conv_residual:
            own = guide[:, : len(self.offsets)]
            logits = logits + F.pad(own, (0, 0, 0, 0, 0, len(self.offsets) - own.shape[1]))
        return logits.to(accumulation_dtype(logits.dtype)).softmax(1)

    def forward(self, guide: Tensor, value: Tensor) -> Tensor:
        fine, coarse = tuple(guide.shape[2:]), tuple(value.shape[2:])
        factor = fine[0] // coarse[0] if guide.dim() == value.dim() == 4 and min(coarse) else 0
        if not factor or fine != tuple(factor * side for side in coarse) or guide.shape[0] != value.shape[0]:
            raise ShapeError(
                "The guide (batch, guide_channels, I * height, I * width) is a whole number I times as fine as the "
                f"value (batch, channels, height, width), on both axes; got {tuple(guide.shape)} and "
                f"{tuple(value.shape)}."
            )
        near = Neighbors.stencil(coarse, self.offsets, "replicate", factor, value.device)
        shares, rows = (tokens_of(maps)[0][:, None] for maps in (self.weights(guide), value))
        mixed = neighbor_mix(shares, rows.contiguous(), near, backend="loop" if self.low_mem else None)
        return map_of(mixed[:, 0], fine)
