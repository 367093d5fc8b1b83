"""HaloNet's blocked local attention: the pixels of a block share one neighbourhood, the block grown by a halo.

The map is cut into blocks of ``b x b`` pixels. All ``b^2`` queries of a block see the same ``w^2`` keys, ``w = b +
2h``: the block and ``h`` pixels around it. With ``o`` the position of key ``j`` minus that of query ``i``,

    logit(i, j) = q_i . k_j / sqrt(d) + q_i . (r_row[o_row] + r_col[o_col]),

with learned tables of ``2 (b + h) - 1`` offsets per axis, shared by the heads and not scaled. So equivariance under
shifts by one pixel is given up for shifts by ``b``, and keys are gathered once a block: ``(w / b)^2`` copies of the map
where a window for every pixel needs ``w^2``. ``b = 1`` is sliding-window attention with a window of ``2h + 1``, ``h =
0`` attention inside windows, one block that covers the map global attention.

*Attention downsampling*: with ``stride s`` only every ``s``-th pixel keeps its query, the keys stay as they are.

Keys outside the map are hidden (``pad="mask"``); with ``pad="zero"`` they are zeros that take their share of the
softmax, as in public ports, whose tables or scaling of the position logits differ as well.

Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", 2021, arXiv 2103.12731,
sections 2.2 and 3 (position logits as in arXiv 1906.05909). The backbone is :class:`regard.models.halonet.HaloNet`.
``2 w^2 d`` multiply-adds per pixel and head. Maps ``(batch, channels, height, width)``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention, score_scale
from regard.layers.position_bias import RowColumnPositions, fold_positions
from regard.local.windows import halo_gather, pad_to_windows, window_partition, window_reverse
from regard.masks import Boolean
from regard.mechanism import Feature
from regard.registry import register

__all__ = ["HaloAttention", "halo_attention", "halo_gather"]

Border = Literal["mask", "zero"]


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int = 8,
    halo: int = 3,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    pad: Border = "mask",
    stride: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Blocked local attention on ``query, key (batch, heads, height, width, head_dim)`` and ``value (..., value_dim)``.

    rel_h, rel_w: tables ``(2 (block + halo) - 1, head_dim)`` of the position logits, both or neither. stride: keep the
    query of every so many pixels; it divides ``block``. Returns ``(batch, heads, ceil(height / stride), ceil(width /
    stride), value_dim)``.
    """
    _check_options(block, halo, pad, stride)
    if query.dim() != 5 or query.shape != key.shape or key.shape[:-1] != value.shape[:-1]:
        raise ShapeError(
            "halo_attention takes query and key (batch, heads, height, width, head_dim) and value (..., value_dim); "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if (rel_h is None) != (rel_w is None):
        raise ShapeError("Row and column tables come together: give both rel_h and rel_w, or neither.")
    tables = None if rel_h is None or rel_w is None else (rel_h, rel_w)
    expected = (2 * (block + halo) - 1, query.shape[-1])
    if tables is not None and any(tuple(table.shape) != expected for table in tables):
        raise ShapeError(
            f"Position tables for block {block}, halo {halo} and head_dim {query.shape[-1]} are {expected}; got "
            f"{tuple(tables[0].shape)} and {tuple(tables[1].shape)}."
        )
    return _attend(query[:, :, ::stride, ::stride], key, value, block, halo, tables, pad, stride, scale)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    halo: int,
    tables: tuple[Tensor, Tensor] | None,
    pad: Border,
    stride: int,
    scale: float | None,
) -> Tensor:
    """As :func:`halo_attention`, on the queries that are kept."""
    batch, heads, factor = query.shape[0], query.shape[1], score_scale(query, scale)
    space, kept_space = key.shape[2:4], query.shape[2:4]
    # Where one block covers an axis, all beyond the map is hidden, so nothing beyond it need be gathered.
    covered = [pad == "mask" and length <= block for length in space]
    sides = tuple(length if whole else block for length, whole in zip(space, covered, strict=True))
    rims = tuple(0 if whole else halo for whole in covered)
    keys, real = halo_gather(key.flatten(0, 1), sides, rims)
    values, _ = halo_gather(value.flatten(0, 1), sides, rims)
    kept = tuple(-(-side // stride) for side in sides)
    image = pad_to_windows(query.flatten(0, 1), kept)
    # Blocks stand where heads usually do: which keys are real is the same for all examples and heads.
    queries = window_partition(image, kept).flatten(1, 2).unflatten(0, (batch * heads, -1))
    if tables is not None:
        queries, keys = fold_positions(queries, keys, tables, _offsets(sides, rims, stride, key.device), factor)
    whole = not any(rims) and not any(length % side for length, side in zip(space, sides, strict=True))
    mask = None if whole or pad == "zero" else Boolean(real[None, :, None])
    out = dense_attention(queries, keys, values, mask=mask, scale=factor)
    merged = window_reverse(out.flatten(0, 1).unflatten(1, kept), kept, image.shape[1:3])
    return merged[:, : kept_space[0], : kept_space[1]].unflatten(0, (batch, heads))


@torch.compiler.disable
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _offsets(block: tuple[int, ...], halo: tuple[int, ...], stride: int, device: torch.device) -> tuple[Tensor, ...]:
    """For each axis, from each query of a block to each coordinate of its keys: ``(queries, block + 2 halo)``."""
    steps = [torch.arange(0, side, stride) for side in block]
    places = torch.meshgrid(*steps, indexing="ij")
    return tuple(
        (torch.arange(side + 2 * rim) - rim - place.reshape(-1, 1)).to(device)
        for side, rim, place in zip(block, halo, places, strict=True)
    )


def _check_options(block: int, halo: int, pad: str, stride: int) -> None:
    if block < 1 or halo < 0 or stride < 1 or block % stride:
        raise OptionError(
            f"Need block >= 1, halo >= 0 and a stride that divides block; got {block}, {halo} and {stride}."
        )
    if pad not in ("mask", "zero"):
        raise OptionError(f"pad is 'mask' or 'zero', got {pad!r}.")


@register("halonet")
class HaloAttention(Feature):
    """``(batch, channels, height, width)`` -> ``(batch, out_channels, ceil(height / stride), ceil(width / stride))``.

    ``out_channels = num_heads * int(head_dim * v_ratio)``, without an output projection: in the paper the block's next
    1 x 1 convolution mixes heads. num_heads: by default as many as fill ``channels``. block, halo: sides of a block and
    of the rim around it. stride: attention downsampling. v_ratio: width of a value over that of a key. pad: 'mask'
    hides keys outside the map, 'zero' makes them zeros. position: learn logits of row and column offsets. bias: in the
    projections.
    """

    growth = "N (b + 2h)^2"

    def __init__(
        self,
        channels: int,
        num_heads: int | None = None,
        head_dim: int = 16,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        v_ratio: float = 1.0,
        pad: Border = "mask",
        position: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check_options(block, halo, pad, stride)
        heads = channels // head_dim if num_heads is None else num_heads
        value_dim = int(head_dim * v_ratio)
        if heads < 1 or head_dim < 1 or value_dim < 1:
            raise OptionError(
                f"No head is left: channels {channels}, num_heads {num_heads}, head_dim {head_dim}, v_ratio {v_ratio}."
            )
        self.channels, self.num_heads, self.head_dim = channels, heads, head_dim
        self.block, self.halo, self.stride, self.pad = block, halo, stride, pad
        self.out_channels = heads * value_dim
        self.query = nn.Conv2d(channels, heads * head_dim, 1, stride, bias=bias)
        self.key = nn.Conv2d(channels, heads * head_dim, 1, bias=bias)
        self.value = nn.Conv2d(channels, heads * value_dim, 1, bias=bias)
        self.positions = RowColumnPositions((block + halo - 1,) * 2, head_dim) if position else None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, block={self.block}, halo={self.halo}, stride={self.stride}, pad={self.pad}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ShapeError(f"This halonet takes (batch, {self.channels}, height, width), got {tuple(x.shape)}.")
        query, key, value = (self._heads(maps) for maps in (self.query(x), self.key(x), self.value(x)))
        tables = None if self.positions is None else (self.positions.tables[0], self.positions.tables[1])
        out = _attend(query, key, value, self.block, self.halo, tables, self.pad, self.stride, None)
        return out.movedim(-1, 2).flatten(1, 2)

    def _heads(self, maps: Tensor) -> Tensor:
        """``(batch, heads * dim, height, width)`` -> ``(batch, heads, height, width, dim)``."""
        return maps.unflatten(1, (self.num_heads, -1)).movedim(2, -1)
