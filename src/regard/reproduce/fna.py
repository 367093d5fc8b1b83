"""Faster neighborhood attention: the fused form against the stored one, in time and in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from regard.bench.measure import interleaved, median_ratio, peak_bytes
from regard.local.fna import NeighborhoodAttention, na_flops, na_memory
from regard.reproduce.finding import Finding

SIDE, WINDOW, HEADS, HEAD_DIM = 64, 13, 4, 32
FORMS = ("fused", "gemm", "unfused")


def run(report: Callable[[str], None]) -> Finding:
    """One map of 64 x 64 tokens, window 13, 4 heads of 32, float32."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(1, HEADS, SIDE * SIDE, HEAD_DIM, generator=generator) for _ in range(4))
    forms = {form: NeighborhoodAttention(WINDOW, backend=form) for form in FORMS}

    def forward(form: str) -> torch.Tensor:
        out: torch.Tensor = forms[form](query, key, value, grid=(SIDE, SIDE))
        return out

    calls: dict[str, Callable[[], object]] = {form: lambda form=form: forward(form) for form in FORMS}  # type: ignore[misc]
    calls["dense"] = lambda: F.scaled_dot_product_attention(query, key, value)
    with torch.no_grad():
        taken = interleaved(calls, rounds=7, warmup=2)
    over = {form: median_ratio(taken[form], taken["fused"]) for form in ("unfused", "gemm", "dense")}
    report(f"forward time over the fused form's: { {k: round(v, 2) for k, v in over.items()} }")

    leaves = [t.clone().requires_grad_() for t in (query, key, value)]

    def both(form: str) -> object:
        return torch.autograd.grad(forms[form](*leaves, grid=(SIDE, SIDE)), leaves, grad)

    timed = interleaved({form: lambda form=form: both(form) for form in FORMS}, rounds=5, warmup=1)  # type: ignore[misc]
    back = median_ratio(timed["unfused"], timed["fused"])
    output = query.numel() * query.element_size()
    with torch.no_grad():
        extra = {form: peak_bytes(lambda form=form: forward(form)) - output for form in FORMS}  # type: ignore[misc]
        wide = NeighborhoodAttention(31, backend="fused")
        wide(query, key, value, grid=(SIDE, SIDE))  # what depends on sizes alone is made at the first call and kept
        extra_wide = peak_bytes(lambda: wide(query, key, value, grid=(SIDE, SIDE))) - output
    report(f"bytes beyond inputs and output: {extra}, fused with window 31: {extra_wide}")
    flops = na_flops((SIDE, SIDE), WINDOW, HEADS, HEAD_DIM) / (4 * HEADS * (SIDE * SIDE) ** 2 * HEAD_DIM)
    return Finding(
        {
            "forward_time_ratio_unfused_over_fused": round(over["unfused"], 2),
            "forward_time_ratio_gemm_over_fused": round(over["gemm"], 2),
            "forward_time_ratio_dense_sdpa_over_fused": round(over["dense"], 2),
            "forward_and_backward_time_ratio_unfused_over_fused": round(back, 2),
            "extra_bytes_fused": extra["fused"],
            "extra_bytes_fused_window_31": extra_wide,
            "extra_bytes_gemm": extra["gemm"],
            "extra_bytes_unfused": extra["unfused"],
            "bytes_of_stored_weights": na_memory((SIDE, SIDE), WINDOW, HEADS, form="unfused"),
            "memory_ratio_unfused_over_fused": round(extra["unfused"] / extra["fused"], 2),
            "flop_ratio_to_dense": round(flops, 4),
        },
        over["unfused"] >= 3 and extra["unfused"] >= 8 * extra["fused"],
        "Holds if the fused form is at least 3 times faster forward than the form that goes key by key and stores its "
        "scores, and its memory beyond inputs and output (their copies in tile order included) is at least 8 times "
        "below that form's. The paper's factors are those of half precision on a GPU.",
    )
