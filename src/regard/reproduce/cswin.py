"""CSWin: the time of stripes against global attention, and what a layer with a cross can tell that a window cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.measure import interleaved, median_ratio, one_thread
from regard.bench.training import evaluate, fit
from regard.kernels import dense_attention, use_backend
from regard.layers.maps import PatchEmbed, merge_heads, space_of, split_heads
from regard.local.cswin import CrossShapedWindowAttention, LePE, cswin_cost, stripe_attention
from regard.local.windows import window_plan, windowed_attention
from regard.models.pyramid import Pyramid
from regard.nn import TransformerBlock
from regard.reproduce.finding import Finding

SIDE, CHANNELS, HEADS, STRIPE = 28, 128, 4, 2
WIDTH, STEPS, BATCH = 32, 1000, 32


class CrossPairs:
    """Pairs of marked cells on an empty map of 16 x 16, each in a row (or each in a column) of its own, its two cells
    in different windows of 4 x 4: are the two colours of every pair equal, or those of none? Each colour is equally
    frequent under both answers and pairs are drawn independently, so what stands in one window says nothing."""

    num_classes = 2
    side, colours, window, pairs = 16, 3, 4, 6

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Images ``(size, colours, 16, 16)`` and answers ``(size,)``."""
        shape, blocks = (size, self.pairs), self.side // self.window
        common = torch.rand(size, self.side, generator=generator).argsort(-1)[:, : self.pairs]
        apart = torch.rand(*shape, blocks, generator=generator).argsort(-1)[..., :2] * self.window
        along = apart + torch.randint(self.window, (*shape, 2), generator=generator)
        upright = torch.randint(2, (size, 1), generator=generator).bool()
        first = torch.randint(self.colours, shape, generator=generator)
        other = torch.randint(1, self.colours, shape, generator=generator)
        same = torch.randint(2, (size,), generator=generator)
        second = torch.where(same.bool()[:, None], first, (first + other) % self.colours)
        images, rows = torch.zeros(size, self.colours, self.side, self.side), torch.arange(size)[:, None]
        for place, colour in zip(along.unbind(-1), (first, second), strict=True):
            images[rows, colour, torch.where(upright, place, common), torch.where(upright, common, place)] = 1
        return images, same

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Right answers and their number."""
        return float((outputs.argmax(-1) == targets).sum()), len(targets)


class _Windows(nn.Module):
    """The rival: square windows, with as many parameters and the same positional encoding."""

    def __init__(self, embed_dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv, self.proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)
        self.lepe = LePE(embed_dim)

    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        plan = window_plan(space_of(x, grid), (self.window,) * 2, (0, 0), x.device)
        out = windowed_attention(query, key, value, plan) + self.lepe(value, grid, plan)
        merged: Tensor = self.proj(merge_heads(out))
        return merged


@torch.no_grad()
def _speed(report: Callable[[str], None]) -> dict[str, float]:
    """Scores, softmax and values of all heads, without projections: global attention's time over the stripes'."""
    query, key, value = (torch.randn(1, HEADS, SIDE * SIDE, CHANNELS // HEADS) for _ in range(3))
    groups = zip(*(t.chunk(2, 1) for t in (query, key, value)), strict=True)
    halves = [(q, k, v) for q, k, v in groups]

    def stripes() -> Tensor:
        parts = [stripe_attention(*half, STRIPE, axis, grid=(SIDE, SIDE)) for axis, half in enumerate(halves)]
        return torch.cat(parts, 1)

    found = {}
    calls: dict[str, Callable[[], Tensor]] = {"global": partial(dense_attention, query, key, value), "stripes": stripes}
    for backend, name in (("reference", "written_out"), ("sdpa", "fused")):
        with use_backend(backend):
            taken = interleaved(calls, rounds=25, warmup=5)
        found[f"time_ratio_global_over_stripes_{name}"] = median_ratio(taken["global"], taken["stripes"])
    projections = 4 * SIDE**2 * CHANNELS**2
    found["score_multiply_add_ratio"] = (
        2 * SIDE**4 * CHANNELS / (cswin_cost(SIDE, SIDE, CHANNELS, STRIPE) - projections)
    )
    report(f"side {SIDE}: {found}")
    return found


@one_thread()
def run(report: Callable[[str], None]) -> Finding:
    """Time stripes and global attention on 28 x 28 tokens; train one block on pairs of cells in a row or column."""
    torch.manual_seed(0)
    speed = _speed(report)
    task, accuracy = CrossPairs(), {}
    attentions: dict[str, Callable[[], nn.Module]] = {
        "cswin_stripe_1": partial(CrossShapedWindowAttention, WIDTH, 2, 1),
        "windows_of_4": partial(_Windows, WIDTH, 2, task.window),
    }
    for name, build in attentions.items():
        torch.manual_seed(0)
        embed = PatchEmbed(task.colours, WIDTH, 1)
        model = Pyramid([embed], [[TransformerBlock(WIDTH, build())]], WIDTH, task.num_classes)
        fit(model, task, steps=STEPS, batch_size=BATCH, lr=3e-3, report=report)
        _, accuracy[name] = evaluate(model, task, batches=16)
        report(f"{name}: accuracy {accuracy[name]:.3f}")
    return Finding(
        {
            **{name: round(ratio, 2) for name, ratio in speed.items()},
            **{f"accuracy_{name}": round(value, 3) for name, value in accuracy.items()},
            "accuracy_of_chance": 0.5,
        },
        speed["time_ratio_global_over_stripes_written_out"] >= 3
        and accuracy["cswin_stripe_1"] > 0.95
        and accuracy["windows_of_4"] < 0.6,
        "Holds if scores, softmax and values written out take at least 3 times as long globally as in stripes of 2 "
        "(28 x 28 tokens, 128 channels in 4 heads, one thread), and one block with stripes of 1 tells above 95 % "
        "whether the two cells of pairs in a row or column, in different windows of 4 x 4, have one colour, where a "
        "block with such windows and as many parameters stays below 60 % (chance 50 %). The ImageNet, COCO and ADE20K "
        "figures need those data.",
    )
