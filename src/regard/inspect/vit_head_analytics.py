"""Which heads of a vision transformer matter, how far each looks, and what patterns its maps take.

Li, Wang, Dai, Wang, Yeh, Zheng, Zhang, Ma, "How Does Attention Work in Vision Transformers? A Visual Analytics
Attempt", 2023, arXiv 2303.13731.

- Importance by pruning (:func:`head_importance`). With ``p`` the class probabilities and ``p_-h`` those with head ``h``
  switched off (its output before the output projection is zero): ``prob_drop = E[p(y) - p_-h(y)]``,
  ``js_divergence = E[JS(p, p_-h)]`` in nats, ``rank_drop = E[rank_-h(y) - rank(y)]``, means over the images that the
  whole model classifies correctly. Left in alone, a head is judged by what it gives back of what its layer is worth.
- Attention strength by distance (:func:`khop_profile`). For a patch ``p``, ``S_k(p)`` is the weight on patches at
  Chebyshev distance ``k``, a ring of ``8 k`` patches, fewer at borders. Its sum grows with ``k`` under uniform
  attention; over the ring's size it is ``1/N`` at every ``k``.
- Patterns (:mod:`regard.inspect.pattern_atlas`). A convolutional autoencoder with a narrow bottleneck learns the maps
  of all heads; its plane of codes, decoded on a grid, shows every pattern that they take.

Shapes: maps ``(layers, batch, heads, N, N)``, as ``trace.stack("weights")`` of :func:`regard.capture` gives them; ``N``
tokens, those beside the grid (class token, registers) first, then the patches row by row. Importance costs ``L H`` more
forward passes (left in alone, ``L H + L``); profiles need none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.inspect.capture import capture
from regard.inspect.intervene import Head, ablate_heads, intervene
from regard.inspect.metrics import js_divergence
from regard.inspect.pattern_atlas import PatternEmbedding, attention_pattern_embedding
from regard.kernels import accumulation_dtype
from regard.retrofit.sites import discover
from regard.retrofit.switch import evaluating

__all__ = [
    "METRICS",
    "HeadReport",
    "HeadRow",
    "KHopProfile",
    "Metric",
    "head_importance",
    "head_importances",
    "head_report",
    "khop_profile",
    "mean_attention_distance",
]

Metric = Literal["prob_drop", "js_divergence", "rank_drop"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Batch = Tensor | Mapping[str, Any]


def head_importance(
    model: nn.Module,
    batch: Batch,
    labels: Tensor,
    metric: Metric = "prob_drop",
    *,
    leave_one_in: bool = False,
) -> Tensor:
    """How much each head matters: ``(layers, heads)`` float64; greater is more important, 0 is not at all.

    batch: images, or keywords of the model (``{"pixel_values": ...}``); its logits ``(batch, classes)`` are the output
    or its ``logits``. labels: ``(batch,)`` classes. metric: one of :data:`METRICS`: ``"prob_drop"`` -1 to 1,
    ``"js_divergence"`` 0 to ``log 2`` (left in alone, down to ``-log 2``), ``"rank_drop"`` in ranks. leave_one_in: the
    layer's other heads are off, and counted is what the head gives back of what is lost with its whole layer.

    Heads that a layer lacks (layers may differ) are NaN. The model runs in evaluation mode, and is left as it was.
    """
    return head_importances(model, batch, labels, (metric,), leave_one_in=leave_one_in)[metric]


@torch.no_grad()
def head_importances(
    model: nn.Module,
    batch: Batch,
    labels: Tensor,
    metrics: Sequence[Metric] = METRICS,
    *,
    leave_one_in: bool = False,
) -> dict[Metric, Tensor]:
    """Several metrics of :func:`head_importance` from the same forward passes."""
    for metric in metrics:
        if metric not in METRICS:
            raise UnknownNameError("metric of importance", metric, METRICS, f"There are {', '.join(METRICS)}.")
    counts = [site.context["num_heads"] for site in discover(model)]
    found = {metric: torch.full((len(counts), max(counts)), torch.nan, dtype=torch.float64) for metric in metrics}
    if labels.dim() != 1 or not len(labels):
        raise ShapeError(f"labels are (batch,), one class an image, of an image at least; got {tuple(labels.shape)}.")
    with evaluating(model):
        own = _logits(model, batch)
        if len(labels) != len(own):
            raise ShapeError(f"labels are ({len(own)},), one class an image; got {tuple(labels.shape)}.")
        labels = labels.to(own.device)
        right = own.argmax(-1) == labels
        if not right.any():
            raise OptionError(
                "The model classifies none of these images correctly, and importance is a mean over those."
            )
        truth = labels[right].long()

        def loss_without(heads: Sequence[Head]) -> dict[Metric, float]:
            with intervene(model, ablate_heads(heads)):
                return _changes(own[right], _logits(model, batch)[right], truth, metrics)

        for layer, count in enumerate(counts):
            every = [(layer, head) for head in range(count)]
            whole = loss_without(every) if leave_one_in else {}
            for head in range(count):
                off = [other for other in every if (other[1] == head) != leave_one_in]
                for metric, loss in loss_without(off).items():
                    found[metric][layer, head] = whole[metric] - loss if leave_one_in else loss
    return found


def _changes(own: Tensor, pruned: Tensor, truth: Tensor, metrics: Sequence[Metric]) -> dict[Metric, float]:
    """What pruning changes, from logits ``(images, classes)`` before and after."""
    p, q = own.double().softmax(-1), pruned.double().softmax(-1)

    def at_truth(rows: Tensor) -> Tensor:
        return rows.gather(1, truth[:, None])

    changes = {
        "prob_drop": lambda: at_truth(p) - at_truth(q),
        "js_divergence": lambda: js_divergence(p, q),
        "rank_drop": lambda: (pruned > at_truth(pruned)).sum(-1) - (own > at_truth(own)).sum(-1),
    }
    return {metric: float(changes[metric]().double().mean()) for metric in metrics}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ShapeError(
            f"{type(model).__name__} gives no logits (batch, classes) on this batch. Importance is judged by classes: "
            "take a classifier (transformers: ...ForImageClassification)."
        )
    return logits


@dataclass(frozen=True)
class KHopProfile:
    """Attention by distance in patches, means over query patches and images; ``K + 1`` distances, 0 the patch itself.

    ``strength`` ``(layers, heads, K + 1)``: weight at distance ``k``, 0 to 1; with ``cls_column`` it sums to 1.
    ``per_neighbour`` of the same shape: weight for each patch at that distance, a mean over the queries that have any.
    ``cls_column`` ``(layers, heads)``: weight that patches give the tokens beside the grid; ``cls_row``: weight that
    those tokens give the patches, NaN where there are none.
    """

    strength: Tensor
    per_neighbour: Tensor
    cls_column: Tensor
    cls_row: Tensor

    @property
    def layer_trend(self) -> Tensor:
        """``per_neighbour`` as a mean over the heads of each layer, ``(layers, K + 1)``."""
        return self.per_neighbour.mean(1)


def khop_profile(attn: Tensor, grid: Sequence[int], cls: bool | int = True) -> KHopProfile:
    """How strongly patches attend to those ``k`` steps away (a king's steps), ``k = 0 .. max(grid) - 1``.

    attn: ``(layers, batch, heads, N, N)``. grid: rows and columns of patches. cls: how many tokens stand before them
    (True: one).
    """
    attn, before = _maps(attn, grid, cls)
    mean = attn.mean(1)
    hops = _offsets(grid, attn.device).abs().amax(-1)
    ring = F.one_hot(hops).to(mean.dtype)
    size = ring.sum(1)
    # Of each patch at each distance, (layers, heads, patches, K + 1).
    mass = torch.einsum("lhpq,pqk->lhpk", mean[..., before:, before:], ring)
    per_neighbour = (mass / size.clamp_min(1)).sum(2) / (size > 0).sum(0)
    column = mean[..., before:, :before].sum(-1).mean(-1)
    row = mean[..., :before, before:].sum(-1).mean(-1)
    return KHopProfile(mass.mean(2), per_neighbour, column, row)


def mean_attention_distance(attn: Tensor, grid: Sequence[int], cls: bool | int = True) -> Tensor:
    """Mean Euclidean distance ``(layers, heads)``, in patches, between a patch and the patches that it attends to;
    weights on other tokens are left out, and the others count by their share. NaN for a head that attends to those
    alone."""
    attn, before = _maps(attn, grid, cls)
    patches = attn[..., before:, before:]
    distance = _offsets(grid, attn.device).to(patches.dtype).square().sum(-1).sqrt()
    # A patch without weight on any has 0 / 0 and is left out of the mean.
    return ((patches * distance).sum(-1) / patches.sum(-1)).transpose(1, 2).flatten(2).nanmean(-1)


def _maps(attn: Tensor, grid: Sequence[int], cls: bool | int) -> tuple[Tensor, int]:
    """The maps in at least float32, and how many tokens stand before the patches."""
    if not isinstance(grid, Sequence) or len(grid) != 2 or min(grid) < 1 or int(cls) < 0:
        raise OptionError(f"grid is (rows, columns) of patches and cls the tokens before; got {grid} and {cls}.")
    before, count = int(cls), grid[0] * grid[1]
    if attn.dim() != 5 or attn.shape[3] != attn.shape[4] or attn.shape[3] != before + count or attn.numel() == 0:
        raise ShapeError(
            f"Maps are (layers, batch, heads, N, N) with N = {before} + {grid[0]} x {grid[1]} tokens; got "
            f"{tuple(attn.shape)}. Set cls to the number of tokens before the patches."
        )
    if not bool(attn.isfinite().all()):
        raise OptionError("Some weights are not finite, and no mean would be.")
    return attn.to(accumulation_dtype(attn.dtype)), before


def _offsets(grid: Sequence[int], device: torch.device) -> Tensor:
    """Rows and columns from each patch to each, ``(patches, patches, 2)``."""
    place = torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid))
    return place[:, None] - place


@dataclass(frozen=True)
class HeadRow:
    """One head: its importances, ``strength`` at each distance in patches, the share of weight on tokens beside the
    grid, its mean distance in patches, and the cluster of its pattern."""

    layer: int
    head: int
    importance: dict[Metric, float]
    strength: tuple[float, ...]
    cls_share: float
    distance: float
    cluster: int


@dataclass(frozen=True, eq=False)
class HeadReport:
    """``rows``: all heads, the most important first by ``metric``; and the tensors that they come from."""

    rows: list[HeadRow]
    metric: Metric
    profile: KHopProfile
    patterns: PatternEmbedding

    def clusters_of(self, count: int) -> Counter[int]:
        """How many of the ``count`` most important heads have each pattern."""
        return Counter(row.cluster for row in self.rows[:count])

    def __str__(self) -> str:
        lines = [f"{'head':>7}  {self.metric:>13}  {'own':>5}  {'next':>5}  {'cls':>5}  {'distance':>8}  pattern"]
        for row in self.rows:
            near = row.strength[1] if len(row.strength) > 1 else 0.0
            lines.append(
                f"{f'{row.layer}.{row.head}':>7}  {row.importance[self.metric]:13.4f}  {row.strength[0]:5.2f}  "
                f"{near:5.2f}  {row.cls_share:5.2f}  {row.distance:8.2f}  {row.cluster}"
            )
        return "\n".join(lines)


def head_report(
    model: nn.Module,
    batch: Batch,
    labels: Tensor,
    *,
    grid: Sequence[int] | None = None,
    metric: Metric = "prob_drop",
    leave_one_in: bool = False,
    **patterns: Any,
) -> HeadReport:
    """Importance, profile and pattern of every head on one batch.

    grid: rows and columns of patches, by default the model's own ``grid``; tokens beyond it stand before the patches.
    Other keywords go to :func:`attention_pattern_embedding`.
    """
    grid = getattr(model, "grid", None) if grid is None else grid
    if grid is None:
        raise OptionError(f"{type(model).__name__} does not say how its patches lie; pass grid=(rows, columns).")
    if metric not in METRICS:
        raise UnknownNameError("metric of importance", metric, METRICS, f"There are {', '.join(METRICS)}.")
    importance = head_importances(model, batch, labels, leave_one_in=leave_one_in)
    with (
        torch.no_grad(),
        evaluating(model),
        capture(model, "weights") as trace,
    ):
        _logits(model, batch)
    attn = trace.stack("weights")
    before = attn.shape[-1] - grid[0] * grid[1]
    if before < 0:
        raise OptionError(f"The model's maps are of {attn.shape[-1]} tokens, fewer than a grid of {tuple(grid)} has.")
    profile, distance = khop_profile(attn, grid, before), mean_attention_distance(attn, grid, before)
    found = attention_pattern_embedding(attn, **patterns)
    clusters = found.head_clusters()
    rows = [
        HeadRow(
            layer,
            head,
            {name: float(values[layer, head]) for name, values in importance.items()},
            tuple(profile.strength[layer, head].tolist()),
            float(profile.cls_column[layer, head]),
            float(distance[layer, head]),
            int(clusters[layer, head]),
        )
        for layer in range(attn.shape[0])
        for head in range(attn.shape[2])
    ]
    rows.sort(key=lambda row: row.importance[metric], reverse=True)
    return HeadReport(rows, metric, profile, found)
