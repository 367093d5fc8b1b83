"""Window attention against SDPA over the same windows, and HiLo against its rivals at a third stage's size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rows import Report, Row, ratio
from regard.bench.measure import interleaved
from regard.local.swin import SwinAttention
from regard.local.windows import window_plan
from regard.registry import create
from regard.reproduce.hilo import Rival


def run(report: Report, quick: bool) -> list[Row]:
    """Swin's windows with bias and shift on a first stage's map; HiLo on 14 x 14 tokens of 384 channels."""
    return [*_swin(report, quick), *_hilo(report, quick)]


def _swin(report: Report, quick: bool) -> list[Row]:
    side, heads, window, batch = 56, 3, 7, 2 if quick else 16
    # As projections give them: heads beside their channels.
    query, key, value = (torch.randn(batch, side * side, heads, 32).transpose(1, 2) for _ in range(3))
    rows = []
    for shift in (0, 3):
        swin = SwinAttention(window, shift, num_heads=heads)
        plan = window_plan((side, side), (window, window), (shift, shift), query.device)
        assert swin.position_bias is not None
        bias, visible = swin.position_bias().detach()[None], plan.visible
        if visible is not None:
            bias = bias.masked_fill(~visible[:, None], float("-inf")).repeat(batch, 1, 1, 1)
        cut = [_windows(t, side, window, shift) for t in (query, key, value)]

        def plain(bias: Tensor = bias, shift: int = shift) -> Tensor:
            parts = [_windows(t, side, window, shift) for t in (query, key, value)]
            return _whole(F.scaled_dot_product_attention(*parts, attn_mask=bias), side, window, shift)

        calls: dict[str, Callable[[], object]] = {
            "swin": lambda swin=swin: swin(query, key, value, grid=(side, side)),  # type: ignore[misc]
            "plain": plain,
            "cut": lambda cut=cut, bias=bias: F.scaled_dot_product_attention(*cut, attn_mask=bias),  # type: ignore[misc]
        }
        report(f"swin, shift {shift}")
        with torch.no_grad():
            times = interleaved(calls, 3 if quick else 15, warmup=2)
        name = f"swin windows, shift {shift}"
        rows += [
            Row(
                f"{name}, over SDPA with torch's own partition",
                ratio(times, "swin", "plain"),
                target=None if quick else 1.1,
                sense="<=",
                note=f"time, {side} x {side} tokens, window {window}, batch {batch}, 3 heads of 32",
            ),
            Row(f"{name}, over SDPA on windows already cut", ratio(times, "swin", "cut"), note="time"),
        ]
    return rows


def _windows(x: Tensor, side: int, window: int, shift: int) -> Tensor:
    """``(batch, heads, tokens, dim)`` -> ``(batch * windows, heads, window^2, dim)``, as one writes it by hand."""
    batch, heads, _, dim = x.shape
    maps = x.transpose(1, 2).view(batch, side, side, heads, dim)
    maps = maps.roll((-shift, -shift), (1, 2)) if shift else maps
    count = side // window
    cut = maps.view(batch, count, window, count, window, heads, dim).permute(0, 1, 3, 2, 4, 5, 6)
    return cut.reshape(-1, window * window, heads, dim).transpose(1, 2)


def _whole(x: Tensor, side: int, window: int, shift: int) -> Tensor:
    heads, dim, count = x.shape[1], x.shape[-1], side // window
    maps = x.transpose(1, 2).reshape(-1, count, count, window, window, heads, dim).permute(0, 1, 3, 2, 4, 5, 6)
    maps = maps.reshape(-1, side, side, heads, dim)
    return (maps.roll((shift, shift), (1, 2)) if shift else maps).flatten(1, 2).transpose(1, 2)


def _hilo(report: Report, quick: bool) -> list[Row]:
    side, channels, heads, batch = 14, 384, 12, 4 if quick else 32
    x = torch.randn(batch, side * side, channels)
    modules: dict[str, nn.Module] = {
        "hilo": create("hilo", embed_dim=channels, num_heads=heads, window=2, alpha=0.9),
        "standard attention": Rival(linear=nn.Linear),
        "spatial reduction": Rival(reduce=2, linear=nn.Linear),
        "windows of 7": Rival(window=7, linear=nn.Linear),
        "standard attention, same linear layers": Rival(),
        "spatial reduction, same linear layers": Rival(reduce=2),
        "windows of 7, same linear layers": Rival(window=7),
    }
    report("hilo")
    with torch.no_grad():
        # Four passes at a time, as layers of a stage follow one another: memory that one of them frees serves the next.
        calls = {
            name: lambda module=module: [module(x, grid=(side, side)) for _ in range(4)]  # type: ignore[misc]
            for name, module in modules.items()
        }
        times = interleaved(calls, 3 if quick else 15, warmup=2)
    size = f"{side} x {side} tokens, {channels} channels, batch {batch}, forward"
    targets = {} if quick else {"spatial reduction": 1.4, "windows of 7": 1.6}
    return [
        Row(
            f"HiLo over {name}",
            ratio(times, name, "hilo"),
            target=targets.get(name),
            note=size + ("" if "same" in name else "; the rival on torch's linear layers"),
        )
        for name in modules
        if name != "hilo"
    ]
