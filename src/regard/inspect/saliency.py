"""Saliency by gradients and by perturbation, beside attention, with agreement measures: for any model.

Which tokens made a language model say what it says next? Three answers, and how far two of them agree::

    import torch

    import regard
    from regard.inspect.saliency import attention_saliency, explanation_agreement, gradient_saliency, lime, presence
    from regard.models.nano import load_nano, load_tokenizer

    model, tokenizer = load_nano(), load_tokenizer()
    ids = tokenizer("for index, item in enumerate(items): print(index,", return_tensors="pt")["input_ids"]
    with torch.no_grad(), regard.capture(model, "weights") as trace:
        target = int(model(ids).logits[0, -1].argmax())
    attention = attention_saliency(trace[-1].weights, query=-1)[0]
    embedded = model.get_input_embeddings()(ids)
    gradient = gradient_saliency(lambda e: model(inputs_embeds=e).logits[:, -1, target], embedded)[0]
    present = presence(lambda x: model(x).logits[:, -1, target], ids[0], baseline=tokenizer.eos_token_id)
    surrogate = lime(present, ids.shape[1], samples=500)
    print(explanation_agreement(gradient, surrogate, k=5))

What differs from model to model is the score. A classifier: ``model(inputs_embeds=e).logits[:, label]``, attention of
``query=0`` where it reads [CLS], ``baseline=tokenizer.mask_token_id``. An encoder-decoder: ``model(inputs_embeds=e,
decoder_input_ids=d.expand(len(e), -1)).logits[:, step, token]``, attention of ``query=step`` in a layer of
cross-attention. A vision model: pixels, with ``regions`` that number its patches.

By gradients: ``score`` takes embedded inputs ``(batch, positions, dim)`` to one number each ``(batch,)``.

By perturbation: a :data:`Presence` takes masks ``kept`` ``(n, features)``, boolean, to what the model says of the input
with the features left out that are not kept, ``(n, ...)``. :func:`presence` makes one from a model, one input and what
stands for a missing feature; features are positions, or any regions. Surrogates, deletion curves and random masks all
go through it, and see no more of the model than that.

Saliency is ``(..., features)``; the larger, the more a feature speaks for the score. Sums are taken in float32 or
float64, whatever the model computes in, and a NaN among the numbers is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
    if not -weights.shape[2] <= query < weights.shape[2]:
        raise OptionError(f"There is no query {query}: these weights are of {weights.shape[2]} queries.")
    row = weights[:, :, query]
    return row.mean(1) if agg == "mean" else row.amax(1)


def input_gradient(score: Score, inputs: Tensor) -> Tensor:
    """The gradient of every example's own score, in the shape of ``inputs``; the model's parameters get none."""
    if not inputs.is_floating_point():
        raise OptionError(
            f"{inputs.dtype} inputs have no gradient. Embed tokens first, model.get_input_embeddings()(ids), and let "
            "score take them as inputs_embeds."
        )
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        scores = _tensor(score(leaf))
        if scores.shape != inputs.shape[:1]:
            raise ShapeError(f"score gives one number for each of {len(inputs)} inputs, got {tuple(scores.shape)}.")
        found = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)[0] if scores.requires_grad else None
    if found is None:
        raise OptionError("The score does not depend on the inputs that it was given, or was computed under no_grad.")
    return found


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
    features = int(regions.max()) + 1

    def says(kept: Tensor) -> Tensor:
        if kept.dim() != 2 or kept.dtype != torch.bool or kept.shape[1] != features:
            raise ShapeError(
                f"kept is boolean (n, {features}): one column a feature; got {tuple(kept.shape)} {kept.dtype}."
            )
        found = []
        with torch.no_grad():
            for part in kept.to(x.device).split(batch_size):
                # Index -1 finds the column added behind, which keeps all.
                stays = torch.cat((part, part.new_ones(len(part), 1)), 1)[:, spread]
                said = _tensor(model(torch.where(stays, x, missing)))
                if said.shape[:1] != part.shape[:1]:
                    raise ShapeError(f"model gives (n, ...) for {len(part)} inputs, got {tuple(said.shape)}.")
                found.append(said)
        return torch.cat(found)

    return says


def occlusion(present: Presence, features: int) -> Tensor:
    """``f(all) - f(all but feature j)``, ``(..., features)``: leaving out one at a time."""
    kept = torch.cat((torch.ones(1, features, dtype=torch.bool), ~torch.eye(features, dtype=torch.bool)))
    scores = _wide(present(kept))
    return (scores[0] - scores[1:]).movedim(0, -1)


def mask_saliency(change: Tensor, kept: Tensor) -> Tensor:
    """Saliency ``(..., features)`` from how much the output changed ``(n, ...)`` under random masks ``(n, features)``:
    its mean where the feature was missing, less its mean where it was kept."""
    if kept.dim() != 2 or len(change) != len(kept):
        raise ShapeError(f"One mask (features,) for each change; got {tuple(kept.shape)}, {tuple(change.shape)}.")
    flat = _wide(change).reshape(len(change), -1)
    stays = kept.to(flat)
    count = stays.sum(0)
    if bool(((count == 0) | (count == len(kept))).any()):
        raise OptionError("A feature was never left out, or never kept: draw more masks, or keep nearer one half.")
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
    scores = _wide(present(kept))
    flat = scores.reshape(samples, -1).double()
    weights = lime_kernel(kept.double().mean(-1), kernel_width).to(flat.device)
    shares = weights / weights.sum()
    design = kept.to(flat)
    design = design - shares @ design  # so that the intercept takes what they have in common
    gram = design.mT @ (weights[:, None] * design)
    gram = gram + ridge * torch.eye(features, dtype=gram.dtype, device=gram.device)
    found = torch.linalg.solve(gram, design.mT @ (weights[:, None] * flat))
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
    place = _wide(saliency).argsort(descending=first == "most", stable=True).argsort()
    kept = place >= gone[:, None].to(place.device)
    return Deletion(gone / features, _wide(present(kept)))


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
    a, b = (x - x.mean(-1, keepdim=True) for x in _paired(a, b, 2))
    # Scaled first, so that tiny saliencies do not underflow when squared.
    a, b = (x / x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) for x in (a, b))
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return (a * b).sum(-1) / torch.where(norms > 0, norms, 1)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation ``(...)`` over the last axis; equal numbers share the mean of their ranks."""
    a, b = _paired(a, b, 2)
    return pearson(_ranks(a), _ranks(b))


def top_k_overlap(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The share of the ``k`` largest features that two explanations have in common, ``(...)``; of equal ones those
    that stand first are taken."""
    a, b = _paired(a, b, 1)
    if not 1 <= k <= a.shape[-1]:
        raise OptionError(f"k is between 1 and the {a.shape[-1]} features, got {k}.")
    found = []
    for x in (a, b):
        largest = x.argsort(dim=-1, descending=True, stable=True)[..., :k]
        found.append(torch.zeros_like(x, dtype=torch.bool).scatter(-1, largest, True))
    return (found[0] & found[1]).sum(-1) / k


def auroc(scores: Tensor, positive: Tensor) -> float:
    """How often a score of the positive ones is above one of the others, ties half: 0.5 is no separation.

    scores, positive (boolean): of any one shape."""
    scores, positive = scores.flatten(), positive.flatten()
    count = int(positive.sum())
    if positive.dtype != torch.bool or positive.shape != scores.shape or count in (0, len(scores)):
        raise ShapeError("auroc takes a boolean for each score, some of them True and some of them False.")
    above = float(_ranks(_wide(scores))[positive].sum()) - count * (count - 1) / 2
    return above / (count * (len(scores) - count))


def _ranks(x: Tensor) -> Tensor:
    """From 0, in float64, over the last axis."""
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous()
    ordered = flat.sort(-1).values
    below = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    return ((below + up_to - 1).double() / 2).reshape(x.shape)


def _paired(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Two explanations of the same features, ``least`` of them or more, to compute with."""
    if a.dim() == 0 or a.shape[-1:] != b.shape[-1:] or a.shape[-1] < least:
        raise ShapeError(
            f"Compared are two explanations (..., features) of the same {least} or more features; got "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    return _wide(a), _wide(b)


def _wide(x: Tensor) -> Tensor:
    """Numbers to sum up: float64 stays, whole numbers become it, all else is float32."""
    x = x.double() if x.dtype == torch.float64 or not x.is_floating_point() else x.float()
    if bool(x.isnan().any()):
        raise OptionError("There are NaN among the scores. Look at what the model gives for this input first.")
    return x


def _tensor(said: Any) -> Tensor:
    if not isinstance(said, Tensor):
        raise OptionError(
            f"The model is to give a tensor, got {type(said).__name__}. Wrap it: lambda x: model(x).logits[:, label]."
        )
    return said
