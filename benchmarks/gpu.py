"""On a GPU: Triton and FlexAttention forms of block-sparse and selected attention beside SDPA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.block_sparse import chosen_blocks, random_layout
from benchmarks.rows import Report, Row, gradients, inputs, ratio
from regard.bench.measure import interleaved
from regard.kernels import block_sparse_attention
from regard.kernels.selected_blocks import selected_attention


def run(report: Report, quick: bool) -> list[Row]:
    """Times faster than dense (blocks) or causal (selected) SDPA, forward and forward + backward, in bfloat16."""
    if not torch.cuda.is_available():
        return [Row("block-sparse and selected attention on a GPU", None, note="there is no GPU here")]
    length, rounds = (2048, 2) if quick else (32768, 10)
    return [*_blocks(report, length, rounds), *_selected(report, length, rounds)]


def _tensors(heads: int, kv_heads: int, length: int, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (t.cuda().bfloat16() for t in inputs(heads, length, kv_heads=kv_heads))
    return query.requires_grad_(grad), key.requires_grad_(grad), value.requires_grad_(grad)


def _timed(
    report: Report, what: str, forms: dict[str, Callable[..., Tensor]], sizes: tuple[int, int, int], rounds: int
) -> list[Row]:
    """Every form beside the first, which is SDPA's."""
    report(f"gpu: {what}, {rounds} rounds")
    plain, tracked = _tensors(*sizes, grad=False), _tensors(*sizes, grad=True)
    calls: dict[str, Callable[[], object]] = {}
    for name, form in forms.items():
        calls[name] = partial(form, *plain)
        calls[f"{name} backward"] = gradients(form, tracked)
    times = interleaved(calls, rounds, warmup=3)
    base, *others = forms
    return [
        Row(f"{label}, {what}, {name}", ratio(times, base + suffix, name + suffix), f"x {base}'s speed")
        for name in others
        for label, suffix in (("forward", ""), ("forward + backward", " backward"))
    ]


def _blocks(report: Report, length: int, rounds: int) -> list[Row]:
    rows = []
    for block in (32, 64, 128):
        layout = random_layout(chosen_blocks(8, length // block, 0.1), length, block)
        visit = layout.visit.cuda()
        layout = type(layout)(visit, layout.full.cuda(), layout.mask, length, length, block, block)
        names = ("triton", "flex") if block == 128 else ("triton",)
        forms: dict[str, Callable[..., Tensor]] = {"SDPA": F.scaled_dot_product_attention}
        forms |= {name: partial(block_sparse_attention, layout=layout, backend=name) for name in names}
        rows += _timed(report, f"blocks of {block}, density 0.1, {length} tokens", forms, (8, 8, length), rounds)
    return rows


def _selected(report: Report, length: int, rounds: int) -> list[Row]:
    rows = []
    for group in (1, 4, 16):
        own = torch.arange(length, device="cuda").div(64, rounding_mode="floor")
        drawn = (torch.rand(1, 2, length, 16, device="cuda") * own[:, None]).long()
        index = torch.cat((drawn, own.expand(1, 2, -1)[..., None]), -1).sort(-1).values
        again = torch.cat((torch.zeros_like(index[..., :1]), index[..., 1:] == index[..., :-1]), -1).bool()
        index = index.masked_fill(again, -1)

        def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        forms: dict[str, Callable[..., Tensor]] = {"causal SDPA": causal}
        forms |= {
            name: partial(selected_attention, index=index, block_size=64, backend=name)
            for name in ("triton", "query_major")
        }
        what = f"at most 17 blocks of 64, groups of {group}, {length} tokens"
        rows += _timed(report, what, forms, (2 * group, 2, length), rounds)
    return rows
