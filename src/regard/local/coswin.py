"""CoSwin: beside the windows' attention, two small convolutions over the whole map, let in by a learned gate.

With ``x`` the tokens of a map of ``C`` channels, a block computes

    c = conv3x3(relu(conv3x3(x)))        C -> int(1.1 C) -> C channels, zeros outside the map, on x before its norm
    x = x + DropPath(attention(norm(x)) + sigmoid(g) c)        g: one number per block, 0.5 at first
    x = x + DropPath(mlp(norm(x)))

Attention is Swin's, its windows shifted in every second block. Convolutions know no windows, so even a block without
shift sees across their borders, and a network trained on few small images need not learn locality: about ``2 * 9 * 1.1
C^2`` more weights a block, which is more than attention itself has (``4 C^2``).

:class:`GatedConvAttention` puts the same branch beside any other attention on a grid.

Source: "CoSwin: Convolution Enhanced Hierarchical Shifted Window Attention For Small-Scale Vision", 2025, arXiv
2509.08959, and the code of its anonymous submission, from which the published version may differ in detail (a summary
speaks of four stages, the code has three). ``(batch, length, channels)`` in and out. The backbone is
:class:`regard.models.coswin.CoSwin`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.layers.maps import map_of, space_of, tokens_of
from regard.local.swin import SwinBlock
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["CoSwinBlock", "GatedConvAttention", "GatedLocalBranch", "LocalFeatureBranch", "gate_values"]


class LocalFeatureBranch(nn.Module):
    """Two convolutions with a ReLU between them, on tokens and their grid; ``int(expand * embed_dim)`` channels inside,
    zeros outside the map."""

    def __init__(self, embed_dim: int, expand: float = 1.1, kernel_size: int = 3) -> None:
        super().__init__()
        hidden = int(expand * embed_dim)
        if hidden < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise OptionError(
                f"Need an odd kernel_size and at least one channel inside; got {kernel_size} and expand={expand} of "
                f"{embed_dim} channels."
            )
        padding = kernel_size // 2
        self.widen = nn.Conv2d(embed_dim, hidden, kernel_size, padding=padding)
        self.narrow = nn.Conv2d(hidden, embed_dim, kernel_size, padding=padding)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``(batch, length, embed_dim)`` in and out."""
        return tokens_of(self.narrow(self.widen(map_of(x, grid)).relu()))[0]


class GatedLocalBranch(LocalFeatureBranch):
    """The branch times ``sigmoid(gate)``, one learned number. init: of the number, before the sigmoid."""

    def __init__(self, embed_dim: int, init: float = 0.5, expand: float = 1.1, kernel_size: int = 3) -> None:
        super().__init__(embed_dim, expand, kernel_size)
        self.gate = nn.Parameter(torch.tensor(float(init)))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return self.gate.sigmoid() * super().forward(x, grid)


class GatedConvAttention(Layer):
    """``attention(norm(x), grid=grid) + sigmoid(gate) * branch(x)``, for any attention on tokens of a map.

    norm: a LayerNorm before the attention alone, so that the layer stands where a block has norm and attention; with
    False both read ``x`` as it comes.
    """

    patterns = frozenset(("self",))
    grid_axes = frozenset((2,))
    needs_grid = True

    def __init__(
        self,
        attention: nn.Module,
        embed_dim: int,
        init: float = 0.5,
        expand: float = 1.1,
        kernel_size: int = 3,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()
        self.attention = attention
        self.local = GatedLocalBranch(embed_dim, init, expand, kernel_size)

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None) -> Tensor:
        """``(batch, length, embed_dim)`` in and out, ``grid`` = (height, width)."""
        space = space_of(x, grid)
        out: Tensor = self.attention(self.norm(x), grid=space) + self.local(x, space)
        return out


@register("coswin")
class CoSwinBlock(SwinBlock):
    """Swin's block with the gated branch beside its attention. shift: 0 or ``window // 2``."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int = 4,
        shift: int = 0,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        init: float = 0.5,
        expand: float = 1.1,
        kernel_size: int = 3,
    ) -> None:
        super().__init__(embed_dim, num_heads, window, shift, mlp_ratio, drop_path)
        self.local = GatedLocalBranch(embed_dim, init, expand, kernel_size)

    def mix(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        out: Tensor = super().mix(x, space) + self.local(x, space)
        return out


def gate_values(model: nn.Module) -> dict[str, float]:
    """How far each gate of a model is open, between 0 and 1, by the branch's name."""
    branches = {name: m for name, m in model.named_modules() if isinstance(m, GatedLocalBranch)}
    return {name: float(branch.gate.detach().sigmoid()) for name, branch in branches.items()}
