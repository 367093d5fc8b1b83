"""Neighborhood attention against NATTEN, the reference implementation of its authors, on its FlexAttention route
(forward alone: on a CPU it has no backward); and windows and neighbourhoods against torch's own pieces.

Both sides compute in float32, in another order of sums: outputs of size about one agree to ``ATOL``.
"""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.functional import attention
from regard.kernels import dense_attention
from regard.local.gna import neighborhood_attention, neighborhood_mask
from regard.local.windows import window_plan, windowed_attention
from regard.masks import Boolean, Neighborhood

ATOL = 5e-6
EXACT = {"rtol": 1e-10, "atol": 1e-11}
LONGEST = {1: 48, 2: 12, 3: 7}


@dataclass(frozen=True)
class Setting:
    """One call of both sides."""

    space: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    heads: int
    kv_heads: int
    head_dim: int
    seed: int

    def __str__(self) -> str:
        def sides(numbers: tuple[int, ...]) -> str:
            return "x".join(str(int(n)) for n in numbers)

        return (
            f"{sides(self.space)}-w{sides(self.window)}-s{sides(self.stride)}-d{sides(self.dilation)}"
            f"-c{sides(self.causal)}-h{self.heads}:{self.kv_heads}x{self.head_dim}"
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(batch, heads, *space, head_dim)``."""
        generator = torch.Generator().manual_seed(self.seed)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (torch.randn(2, n, *self.space, self.head_dim, generator=generator) for n in counts)
        return q, k, v

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = neighborhood_attention(q, k, v, self.window, self.stride, self.dilation, self.causal)
        assert isinstance(out, Tensor)
        return out


def settings(axes: int, count: int, head_dims: tuple[int, ...]) -> list[Setting]:
    """Random ones, the same in every run; on each axis window times dilation is at most the length."""
    draw = random.Random(f"{axes} axes, head dims {head_dims}")
    found = []
    for seed in range(count):
        space = tuple(draw.randint(4, LONGEST[axes]) for _ in range(axes))
        window = tuple(draw.randint(2, n) for n in space)
        stride = tuple(draw.choice((1, draw.randint(1, w), w)) for w in window)
        dilation = tuple(draw.randint(1, n // w) for n, w in zip(space, window, strict=True))
        causal = tuple(draw.random() < 0.4 for _ in space)
        heads, kv_heads = draw.choice(((1, 1), (2, 2), (4, 2), (3, 1)))
        found.append(
            Setting(space, window, stride, dilation, causal, heads, kv_heads, draw.choice(head_dims), 100 * axes + seed)
        )
    return found


def natten(setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """NATTEN's output and log-sum-exp, heads before the space as ours: it has them behind."""
    functional = pytest.importorskip(
        "natten.functional", reason="NATTEN is not installed: `make install` installs it behind torch"
    )
    call = (functional.na1d, functional.na2d, functional.na3d)[len(setting.space) - 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FlexAttention, that it runs unfused on a CPU
        out, lse = call(
            *(x.movedim(1, -2) for x in (q, k, v)),
            kernel_size=setting.window,
            stride=setting.stride,
            dilation=setting.dilation,
            is_causal=setting.causal,
            backend="flex-fna",
            return_lse=True,
        )
    return out.movedim(-2, 1), lse.movedim(-1, 1)


# NATTEN's FlexAttention route takes powers of two from 32 on as head dims.
SHARED = [setting for axes in (1, 2, 3) for setting in settings(axes, 22, (32, 64))]
SMALL = [setting for axes in (1, 2, 3) for setting in settings(axes, 10, (1, 3, 8, 16, 24))]


def test_settings_cover_what_they_should() -> None:
    assert len(SHARED) >= 60 and len(set(map(str, SHARED))) == len(SHARED)
    for axes in (1, 2, 3):
        own = [s for s in SHARED if len(s.space) == axes]
        assert any(max(s.dilation) > 1 for s in own) and any(max(s.stride) > 1 for s in own)
        assert any(any(s.causal) for s in own) and any(not any(s.causal) for s in own)
        assert any(s.stride == s.window for s in own) and any(s.heads > s.kv_heads for s in own)
        assert any(w % 2 == 0 for s in own for w in s.window)
        assert axes == 1 or any(len(set(s.causal)) == 2 for s in own)


@pytest.mark.paper("gna")
@pytest.mark.parametrize("setting", SHARED, ids=str)
def test_outputs_equal_nattens(setting: Setting) -> None:
    q, k, v = setting.inputs()
    expected, expected_lse = natten(setting, q, k, v)
    torch.testing.assert_close(setting.ours(q, k, v), expected, rtol=0, atol=ATOL)
    out, lse = neighborhood_attention(
        q, k, v, setting.window, setting.stride, setting.dilation, setting.causal, return_lse=True
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=ATOL)


@pytest.mark.paper("gna")
@pytest.mark.parametrize("setting", SMALL, ids=str)
def test_outputs_at_small_head_dims_equal_dense_attention(setting: Setting) -> None:
    q, k, v = setting.inputs()
    seen = neighborhood_mask(setting.space, setting.window, setting.stride, setting.dilation, setting.causal)
    flat = [x.flatten(2, -2).double() for x in (q, k, v)]
    expected = dense_attention(*flat, mask=Boolean(seen[None, None]))
    torch.testing.assert_close(setting.ours(q, k, v).flatten(2, -2).double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("space", "window"), [((12,), (4,)), ((10, 9), (4, 3)), ((4, 7, 6), (2, 3, 4))])
def test_window_attention_is_sdpa_in_a_loop_over_windows(space: tuple[int, ...], window: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(2, 3, *space, 8, dtype=torch.float64) for _ in range(3))
    plan = window_plan(space, window, (0,) * len(space), torch.device("cpu"))
    out = windowed_attention(*(x.flatten(2, -2) for x in (q, k, v)), plan)
    expected = torch.empty_like(q)
    corners = torch.cartesian_prod(*(torch.arange(0, n, w) for n, w in zip(space, window, strict=True)))
    for corner in corners.view(-1, len(space)).tolist():
        part = (slice(None), slice(None), *(slice(c, c + w) for c, w in zip(corner, window, strict=True)))
        inside = q[part].shape
        alone = F.scaled_dot_product_attention(*(x[part].flatten(2, -2) for x in (q, k, v)))
        expected[part] = alone.view(inside)
    torch.testing.assert_close(out, expected.flatten(2, -2), **EXACT)


@pytest.mark.parametrize(("side", "rate"), [((3, 3), 1), ((5, 3), 1), ((3, 5), 2), ((7, 7), 1)])
def test_a_neighbourhood_cut_off_at_the_border_is_unfold(side: tuple[int, int], rate: int) -> None:
    height, width = 11, 13
    q, k, v = (torch.randn(2, 2, height, width, 8, dtype=torch.float64) for _ in range(3))
    padding = tuple(rate * (s // 2) for s in side)

    def neighbours(x: Tensor) -> Tensor:
        """``(batch * heads, tokens, neighbours, dim)`` by torch's own sliding blocks; places off the map are zeros."""
        maps = x.flatten(0, 1).movedim(-1, 1)
        blocks = F.unfold(maps, side, dilation=rate, padding=padding)
        return blocks.view(len(maps), maps.shape[1], math.prod(side), -1).permute(0, 3, 2, 1)

    real = neighbours(torch.ones(1, 1, height, width, 1, dtype=torch.float64))[..., 0] > 0
    query = q.flatten(0, 1).flatten(1, 2)[:, :, None]
    scores = (query * neighbours(k)).sum(-1) / math.sqrt(8)
    weights = scores.masked_fill(~real, float("-inf")).softmax(-1)
    expected = (weights[..., None] * neighbours(v)).sum(2).view(2, 2, height * width, 8)
    rule = Neighborhood.of((height, width), side, 1, rate, border="mask")
    out = attention(*(x.flatten(2, 3) for x in (q, k, v)), "full", mask=rule)
    torch.testing.assert_close(out, expected, **EXACT)
