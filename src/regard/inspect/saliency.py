"""Saliency by gradients and by perturbation, beside attention, with agreement measures: for any model.

By gradients: ``score`` takes embedded inputs ``(batch, positions, dim)`` to one number each ``(batch,)``. On a Hugging
Face model that is ``lambda e: model(inputs_embeds=e).logits[:, target]``.

By perturbation: a :data:`Presence` takes masks ``kept`` ``(n, features)``, boolean, to what the model says of the input
with the features left out that are not kept, ``(n, ...)``. :func:`presence` makes one from a model, one input and what
stands for a missing feature; features are positions, or any regions. Surrogates, deletion curves and random masks all
go through it, and see no more of the model than that.

Saliency is ``(..., features)``; the larger, the more a feature speaks for the score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = [
    "Agreement",
    "Deletion",
    "Presence",
    "Reduce",
    "Score",
    "attention_saliency",
    "auroc",
    "deletion_curve",
    "explanation_agreement",
    "gradient_saliency",
    "input_gradient",
    "lime",
    "lime_kernel",
    "mask_saliency",
    "occlusion",
    "pearson",
    "presence",
    "rank_correlation",
    "reduce_gradient",
    "top_k_overlap",
]

Score = Callable[[Tensor], Tensor]
Presence = Callable[[Tensor], Tensor]
Reduce = Literal["mean", "l1", "l2", "xinput"]


# Attention and gradients


def attention_saliency(weights: Tensor, agg: Literal["mean", "max"] = "mean", query: int = 0) -> Tensor:
    """``(batch, k_len)``: what one query gives each key, over the heads of ``weights`` ``(batch, num_heads, q_len,
    k_len)``, as :func:`regard.capture` returns them. Never negative, and blind to the values."""
    if agg not in ("mean", "max"):
        raise OptionError(f"agg is 'mean' or 'max' over the heads, got {agg!r}.")
    if weights.dim() != 4:
        raise ShapeError(f"Attention weights are (batch, num_heads, q_len, k_len), got {tuple(weights.shape)}.")
    row = weights[:, :, query]
    return row.mean(1) if agg == "mean" else row.amax(1)


def input_gradient(score: Score, inputs: Tensor) -> Tensor:
    """The gradient of every example's own score, in the shape of ``inputs``; the model's parameters get none."""
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        scores = score(leaf)
        if scores.shape != inputs.shape[:1]:
            raise ShapeError(f"score gives one number for each of {len(inputs)} inputs, got {tuple(scores.shape)}.")
        return torch.autograd.grad(scores.sum(), leaf)[0]


def reduce_gradient(gradient: Tensor, inputs: Tensor, reduce: Reduce = "xinput") -> Tensor:
    """``(batch, positions)`` from ``(batch, positions, dim)``: the gradient's mean over channels, its l1 or l2 norm, or
    its product with the input, ``<e_t, grad_t>``. Norms have no sign."""
    if reduce == "mean":
        return gradient.mean(-1)
    if reduce == "l1":
        return gradient.abs().sum(-1)
    if reduce == "l2":
        return gradient.norm(dim=-1)
    if reduce == "xinput":
        return (gradient * inputs).sum(-1)
    raise OptionError(f"reduce is 'mean', 'l1', 'l2' or 'xinput', got {reduce!r}.")


def gradient_saliency(score: Score, inputs: Tensor, reduce: Reduce = "xinput") -> Tensor:
    """:func:`reduce_gradient` of :func:`input_gradient`, ``(batch, positions)``."""
    return reduce_gradient(input_gradient(score, inputs), inputs.detach(), reduce)


# Perturbation


def presence(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    baseline: Tensor | float = 0.0,
    regions: Tensor | None = None,
    batch_size: int = 128,
) -> Presence:
    """What ``model`` ``(n, ...) -> (n, ...)`` says of one input ``x`` with features missing.

    baseline: what stands where a feature is missing, broadcast to ``x``: zero for a spectrogram, the unknown token's
    id for tokens, its embedding for embedded ones. regions: the feature of each place, integers in the shape of ``x``
    or of its first axes, -1 for places that always stay; by default every index of the first axis is one. batch_size:
    masked inputs at a time. No gradients.
    """
    if regions is None:
        regions = torch.arange(len(x), device=x.device)
    if regions.shape != x.shape[: regions.dim()] or regions.is_floating_point():
        raise ShapeError(
            f"regions numbers the places of the input, so its shape begins {tuple(x.shape)} and it is integer; got "
            f"{tuple(regions.shape)} {regions.dtype}."
        )
    spread = regions.reshape(regions.shape + (1,) * (x.dim() - regions.dim()))
    missing = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand(x.shape)

    def says(kept: Tensor) -> Tensor:
        if kept.dim() != 2 or kept.dtype != torch.bool or int(regions.max()) >= kept.shape[1]:
            raise ShapeError(
                f"kept is boolean (n, {int(regions.max()) + 1}): one column a feature; got {tuple(kept.shape)} "
                f"{kept.dtype}."
            )
        found = []
        with torch.no_grad():
            for part in kept.to(x.device).split(batch_size):
                # Index -1 finds the column added behind, which keeps all.
                stays = torch.cat((part, part.new_ones(len(part), 1)), 1)[:, spread]
                found.append(model(torch.where(stays, x, missing)))
        return torch.cat(found)

    return says


def occlusion(present: Presence, features: int) -> Tensor:
    """``f(all) - f(all but feature j)``, ``(..., features)``: leaving out one at a time."""
    kept = torch.cat((torch.ones(1, features, dtype=torch.bool), ~torch.eye(features, dtype=torch.bool)))
    scores = present(kept)
    return (scores[0] - scores[1:]).movedim(0, -1)


def mask_saliency(change: Tensor, kept: Tensor) -> Tensor:
    """Saliency ``(..., features)`` from how much the output changed ``(n, ...)`` under random masks ``(n, features)``:
    its mean where the feature was missing, less its mean where it was kept."""
    if kept.dim() != 2 or len(change) != len(kept):
        raise ShapeError(f"One mask (features,) for each change; got {tuple(kept.shape)}, {tuple(change.shape)}.")
    stays = kept.to(change.dtype)
    count = stays.sum(0)
    if bool(((count == 0) | (count == len(kept))).any()):
        raise OptionError("A feature was never left out, or never kept: draw more masks, or keep nearer one half.")
    flat = change.reshape(len(change), -1)
    with_feature = flat.mT @ stays / count
    without = flat.mT @ (1 - stays) / (len(kept) - count)
    return (without - with_feature).reshape(*change.shape[1:], kept.shape[1])


def lime_kernel(share: Tensor, width: float | None = 0.25) -> Tensor:
    """LIME's weight of a sample that keeps ``share`` of the features: ``sqrt(exp(-(d / width)^2))`` of its cosine
    distance ``d = 1 - sqrt(share)`` to the whole document. None: all samples alike."""
    if width is None:
        return torch.ones_like(share)
    return torch.exp(-0.5 * ((1 - share.sqrt()) / width).square())


def lime(
    present: Presence,
    features: int,
    samples: int = 5000,
    *,
    kernel_width: float | None = 0.25,
    ridge: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Coefficients ``(..., features)`` of the linear model that explains the score by which features are present.

    "Why Should I Trust You?", 2016, arXiv 1602.04938, with the settings of its authors' package for text: a sample
    leaves out a number of features drawn evenly from 1 to all of them, and that many at random; the first one leaves
    out none. Weighted ridge regression (:func:`lime_kernel`; the intercept is free), on all features.
    """
    if features < 1 or samples < 2 or ridge < 0:
        raise OptionError(
            f"LIME needs a feature, two samples and a ridge that is not negative; got {features}, {samples}, {ridge}."
        )
    missing = torch.randint(1, features + 1, (samples, 1), generator=generator)
    missing[0] = 0
    # The place of each feature in a random order: the first of them go.
    order = torch.rand(samples, features, generator=generator).argsort(-1).argsort(-1)
    kept = order >= missing
    scores = present(kept)
    flat = scores.reshape(samples, -1).double()
    weights = lime_kernel(kept.double().mean(-1), kernel_width).to(flat.device)
    shares = weights / weights.sum()
    design = kept.to(flat)
    design = design - shares @ design
    target = flat - shares @ flat
    gram = design.mT @ (weights[:, None] * design)
    gram = gram + ridge * torch.eye(features, dtype=gram.dtype, device=gram.device)
    found = torch.linalg.solve(gram, design.mT @ (weights[:, None] * target))
    return found.mT.reshape(*scores.shape[1:], features).to(scores.dtype)


@dataclass(frozen=True)
class Deletion:
    """``shares`` of the features left out, 0 to 1, and ``scores`` ``(points, ...)`` there."""

    shares: Tensor
    scores: Tensor

    @property
    def auc(self) -> Tensor:
        """Area under the curve ``(...)``, by trapezia: for the most salient first, the lower the better."""
        return torch.trapezoid(self.scores, self.shares.to(self.scores), dim=0)


def deletion_curve(
    present: Presence, saliency: Tensor, steps: int = 20, first: Literal["most", "least"] = "most"
) -> Deletion:
    """The score while features go in the order of ``saliency`` ``(features,)``, from none to all in ``steps`` steps."""
    if saliency.dim() != 1 or steps < 1:
        raise ShapeError(f"One saliency per feature, (features,), and a step at least; got {tuple(saliency.shape)}.")
    if first not in ("most", "least"):
        raise OptionError(f"first is 'most' or 'least' salient, got {first!r}.")
    features = len(saliency)
    gone = torch.linspace(0, features, min(steps, features) + 1).round().long()
    place = saliency.argsort(descending=first == "most", stable=True).argsort()
    kept = place >= gone[:, None].to(place.device)
    return Deletion(gone / features, present(kept))


# Agreement


@dataclass(frozen=True)
class Agreement:
    """``rank_correlation`` -1 to 1 and ``overlap`` of the top k, 0 to 1; both ``(...)``."""

    rank_correlation: Tensor
    overlap: Tensor


def explanation_agreement(a: Tensor, b: Tensor, k: int) -> Agreement:
    """How far two explanations ``(..., features)`` of the same inputs agree."""
    return Agreement(rank_correlation(a, b), top_k_overlap(a, b, k))


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation ``(...)`` over the last axis; 0 where one of them is constant."""
    if a.shape[-1:] != b.shape[-1:] or a.shape[-1] < 2:
        raise ShapeError(
            f"A correlation takes two explanations of the same two or more features; got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    # Scaled first, so that tiny saliencies do not underflow when squared.
    a, b = (x / x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) for x in (a, b))
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(norms > 0, (a * b).sum(-1) / norms.where(norms > 0, torch.ones_like(norms)), 0.0)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation ``(...)`` over the last axis; equal numbers share the mean of their ranks."""
    return pearson(_ranks(a), _ranks(b))


def top_k_overlap(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The share of the ``k`` largest features that two explanations have in common, ``(...)``."""
    if not 1 <= k <= a.shape[-1]:
        raise OptionError(f"k is between 1 and the {a.shape[-1]} features, got {k}.")
    found = [torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(k, -1).indices, True) for x in (a, b)]
    return (found[0] & found[1]).sum(-1) / k


def auroc(scores: Tensor, positive: Tensor) -> float:
    """How often a score of the positive ones is above one of the others, ties half: 0.5 is no separation.

    scores, positive (boolean): of any one shape."""
    scores, positive = scores.flatten(), positive.flatten()
    count = int(positive.sum())
    if positive.dtype != torch.bool or positive.shape != scores.shape or count in (0, len(scores)):
        raise ShapeError("auroc takes a boolean for each score, some of them True and some of them False.")
    above = float(_ranks(scores)[positive].sum()) - count * (count - 1) / 2
    return above / (count * (len(scores) - count))


def _ranks(x: Tensor) -> Tensor:
    """From 0, in float64, over the last axis."""
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous()
    ordered = flat.sort(-1).values
    below = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    return ((below + up_to - 1).double() / 2).reshape(x.shape)
