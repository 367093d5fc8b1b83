"""Can a model tell, or steer, its own activations? Labels made of them are shown in context, as neurofeedback does.

A sentence's state is the mean of the residual stream over its tokens at one layer. Its score on a unit axis ``w`` is
``a(s) = w . (h(s) - mean)``; the axis is a principal component of the states of a corpus, or the normal of a logistic
regression of a semantic label on them. Labels are the scores split in two (or six). Three tasks follow N sentences
shown with their labels:

    report     tell the label of the next sentence, from logit(1) - logit(0) where the label would stand
    explicit   write a sentence in the manner of label c
    implicit   read a given sentence under that instruction: only the instruction differs, no new text carries it

Control is measured as ``d = (mean a | c = 1  -  mean a | c = 0) / pooled sd`` on the axis of the labels, and on other
axes for comparison. Labels are shown as they are and flipped, against what words like "0" and "1" mean by themselves.

Source: "Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations", 2025, arXiv
2505.13763 (NeurIPS 2025), and its repository. As there, components are of centred states that are not scaled, the
penalty of the regression is 1 on ``|w|^2 / 2``, and the interval of d is ``d +- 1.96 sqrt((n1 + n0)/(n1 n0) +
d^2/(2 (n1 + n0)))``. The repository cuts components at 0, the corpus mean, and the regression at its own boundary;
:class:`Binarizer` cuts at the median, so that labels are balanced, unless told a threshold.

Prompts are made in :mod:`regard.inspect.neurofeedback_prompts`. Cost: one forward pass a prompt; components take the
singular values of ``(n, D)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.capture import capture
from regard.inspect.logistic import fit_logistic
from regard.inspect.neurofeedback_prompts import binary_labels
from regard.kernels import accumulation_dtype
from regard.retrofit.sites import discover

__all__ = [
    "ActivationAxes",
    "Binarizer",
    "ControlEffect",
    "EvenLikert",
    "ReportAccuracy",
    "activation_axes",
    "axis_score",
    "control_effect",
    "ideal_observer",
    "metacognitive_dimension",
    "report_accuracy",
    "span_states",
]

_PAPER_COMPONENTS = (1, 2, 4, 8, 32, 128, 512)


@torch.no_grad()
def span_states(
    model: nn.Module, inputs: Tensor | Mapping[str, Tensor], spans: Tensor, layer: int, **kwargs: Any
) -> Tensor:
    """Mean residual stream over token spans: ``(batch, spans, D)``, of ``spans`` ``(batch, spans, 2)``, start and end.

    layer: the attention layer, counted as in ``discover(model)``, whose block these states enter; what block ``l``
    gives is layer ``l + 1`` here. inputs: the model's first argument, or its named ones. Takes a forward pass of the
    model as it is: put it into evaluation mode. At least float32.
    """
    sites = discover(model)
    if not 0 <= layer < len(sites):
        raise OptionError(f"There is no layer {layer}: the model has {len(sites)}, 0 to {len(sites) - 1}.")
    with capture(model, "hidden_states", layers=lambda path: path == sites[layer].path) as trace:
        _ = model(**inputs, **kwargs) if isinstance(inputs, Mapping) else model(inputs, **kwargs)
    states = trace[0].hidden_states
    if states is None:
        raise OptionError(f"Layer {layer} has no block around it whose residual stream could be read.")
    if spans.dim() != 3 or spans.shape[-1] != 2 or len(spans) != len(states):
        raise ShapeError(f"spans is (batch, spans, 2) for {len(states)} rows; got {tuple(spans.shape)}.")
    start, end = spans.to(states.device).unbind(-1)
    if bool((start < 0).any()) or bool((end > states.shape[1]).any()) or bool((start >= end).any()):
        raise OptionError(f"Each span has 0 <= start < end <= {states.shape[1]}.")
    states = states.to(accumulation_dtype(states.dtype))
    place = torch.arange(states.shape[1], device=states.device)
    inside = ((place >= start[..., None]) & (place < end[..., None])).to(states.dtype)
    return inside @ states / (end - start)[..., None]


@dataclass(frozen=True)
class ActivationAxes:
    """``directions`` ``(k, D)``: unit axes. ``mean`` ``(D,)`` and ``deviation`` ``(k,)``: of the states they were
    fitted to, and of their scores. ``names``: "PC1", ..., or "LR"."""

    directions: Tensor
    mean: Tensor
    deviation: Tensor
    names: tuple[str, ...]

    def variance_share(self, hidden: Tensor) -> Tensor:
        """Share of the variance of ``hidden`` ``(n, D)`` along each axis, ``(k,)``."""
        return axis_score(hidden, self).var(0) / hidden.double().var(0).sum()


def activation_axes(
    hidden: Tensor, kind: Literal["pca", "lr"] = "pca", ks: Sequence[int] | None = None, labels: Tensor | None = None
) -> ActivationAxes:
    """Axes of states ``(n, D)`` in float64: principal components of numbers ``ks``, from 1, or the normal that tells
    ``labels`` ``(n,)``, 0 and 1, apart.

    By default components 1, 2, 4, 8, 32, 128 and 512, as far as the states have them. A component's sign is that which
    makes its largest entry positive; the normal points to label 1.
    """
    if hidden.dim() != 2 or len(hidden) < 2:
        raise ShapeError(f"States are (n, D) with n >= 2; got {tuple(hidden.shape)}.")
    if not bool(hidden.isfinite().all()):
        raise OptionError("Some states are not finite: axes cannot be fitted to them.")
    hidden = hidden.detach().double()
    mean = hidden.mean(0)
    if kind == "lr":
        if labels is None or ks is not None:
            raise OptionError("kind='lr' needs labels (n,), 0 and 1, and has one axis: leave ks out.")
        normal, _ = fit_logistic(hidden, labels)
        directions = F.normalize(normal, dim=0)[None]
        names: tuple[str, ...] = ("LR",)
    elif kind == "pca":
        _, sizes, right = torch.linalg.svd(hidden - mean, full_matrices=False)
        # Of equal singular values and of zero, axes are arbitrary; zero ones are no components.
        count = int((sizes > 1e-10 * sizes[0]).sum()) if float(sizes[0]) > 0 else 0
        numbers = [k for k in _PAPER_COMPONENTS if k <= count] if ks is None else list(ks)
        if not numbers or min(numbers) < 1 or max(numbers) > count:
            raise OptionError(f"These states have components 1 to {count}; got ks={numbers}.")
        directions = right[[k - 1 for k in numbers]]
        directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        names = tuple(f"PC{k}" for k in numbers)
    else:
        raise OptionError(f"kind is 'pca' or 'lr'; got {kind!r}.")
    deviation = ((hidden - mean) @ directions.T).std(0, correction=0)
    return ActivationAxes(directions, mean, deviation, names)


def axis_score(hidden: Tensor, axes: ActivationAxes) -> Tensor:
    """Scores ``(..., k)`` of states ``(..., D)``, in the states' units; over ``axes.deviation`` in the corpus' own."""
    if hidden.shape[-1] != len(axes.mean):
        raise ShapeError(f"These axes are of {len(axes.mean)} dimensions; the states have {hidden.shape[-1]}.")
    return (hidden.detach().to(axes.mean) - axes.mean) @ axes.directions.T


class Binarizer:
    """Label 1 from the median of the fitted scores on, else 0; or from ``threshold`` on (0: the mean of the corpus)."""

    levels = 2

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold, self._given = threshold, threshold is not None

    def fit(self, scores: Tensor) -> Binarizer:
        """Take the median of scores ``(n,)``, midway between the middle two; a threshold given stays. Scores equal to
        the median are 1, however many."""
        _need_scores(scores)
        if not self._given:
            self.threshold = float(scores.double().quantile(0.5))
        return self

    def __call__(self, scores: Tensor) -> Tensor:
        """Labels int64, in the scores' shape."""
        if self.threshold is None:
            raise OptionError("fit(scores) first, or give a threshold.")
        return (scores >= self.threshold).long()


class EvenLikert:
    """Labels 1 to ``levels`` (even): half of them below 0 and half from 0 on, each side cut at its own quantiles."""

    def __init__(self, levels: int = 6) -> None:
        if levels < 2 or levels % 2:
            raise OptionError(f"levels is an even number >= 2; got {levels}.")
        self.levels = levels
        self._cuts: Tensor | None = None

    def fit(self, scores: Tensor) -> EvenLikert:
        """Take the quantiles of scores ``(n,)``, which are centred."""
        _need_scores(scores)
        scores, half = scores.double(), self.levels // 2
        sides = scores[scores < 0], scores[scores >= 0]
        if min(map(len, sides)) < half:
            raise OptionError(f"{self.levels} levels need {half} scores below 0 and {half} from 0 on.")
        at = torch.arange(1, half, device=scores.device).double() / half
        zero = scores.new_zeros(1)
        self._cuts = torch.cat((sides[0].quantile(at), zero, sides[1].quantile(at)))
        return self

    def __call__(self, scores: Tensor) -> Tensor:
        """Labels int64, in the scores' shape."""
        if self._cuts is None:
            raise OptionError("fit(scores) first.")
        return torch.bucketize(scores.double(), self._cuts, right=True) + 1


def _need_scores(scores: Tensor) -> None:
    if scores.numel() == 0 or not bool(scores.isfinite().all()):
        raise OptionError(f"Labels are cut by finite scores, one at least; got {tuple(scores.shape)}.")


@dataclass(frozen=True)
class ReportAccuracy:
    """By number of labels seen before, from 0: ``accuracy`` and ``cross_entropy`` (nats) ``(N,)``, means over prompts.
    ``difference`` ``(batch, N)``: logit(1) - logit(0); the model tells 1 where it is not negative."""

    accuracy: Tensor
    cross_entropy: Tensor
    difference: Tensor


def report_accuracy(
    logits: Tensor, label_positions: Tensor, token0: int, token1: int, labels: Tensor
) -> ReportAccuracy:
    """How well labels ``(batch, N)`` are told by ``logits`` ``(batch, length, vocabulary)`` of the tokens before
    ``label_positions`` ``(batch, N)``. Only the two labels' tokens count; the rest of the vocabulary is left out."""
    if logits.dim() != 3 or label_positions.shape != labels.shape or label_positions.shape[:1] != logits.shape[:1]:
        raise ShapeError(
            "Need logits (batch, length, vocabulary), label_positions and labels (batch, N); got "
            f"{tuple(logits.shape)}, {tuple(label_positions.shape)}, {tuple(labels.shape)}."
        )
    before = label_positions.to(logits.device) - 1
    if bool((before < 0).any()) or bool((before >= logits.shape[1]).any()):
        raise OptionError(f"Labels stand at places 1 to {logits.shape[1]}, after the token whose logits tell them.")
    if token0 == token1 or not all(0 <= token < logits.shape[-1] for token in (token0, token1)):
        raise OptionError(f"Two labels have two tokens, of 0 to {logits.shape[-1] - 1}; got {token0} and {token1}.")
    labels = binary_labels(labels)
    of_labels = logits.detach()[..., [token0, token1]].double()
    told = of_labels.gather(1, before[..., None].expand(-1, -1, 2))
    difference, truth = told[..., 1] - told[..., 0], labels.to(logits.device)
    loss = F.binary_cross_entropy_with_logits(difference, truth.double(), reduction="none")
    return ReportAccuracy(((difference >= 0) == (truth == 1)).double().mean(0), loss.mean(0), difference)


def ideal_observer(hidden: Tensor, labels: Tensor, n: int) -> tuple[float, float]:
    """Accuracy and cross-entropy (nats) of logistic regression on the states: fitted to the first ``n`` of ``hidden``
    ``(m, D)`` and labels ``(m,)``, judged on the rest. Where the first hold one label only it tells their share with a
    prior of one each, ``(ones + 1) / (n + 2)``: chance at n = 0."""
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or not 0 <= n < len(hidden):
        raise ShapeError(f"Need states (m, D), labels (m,) and 0 <= n < m; got {tuple(hidden.shape)} and n={n}.")
    labels = binary_labels(labels)
    seen, truth = labels[:n], labels[n:].double()
    if n and 0 < int(seen.sum()) < n:
        normal, offset = fit_logistic(hidden[:n], seen)
        logit = hidden[n:].detach().double() @ normal + offset
    else:
        share = (float(seen.sum()) + 1) / (n + 2)
        logit = torch.full_like(truth, math.log(share / (1 - share)))
    # Even odds are right half of the time.
    right = torch.where(logit == 0, 0.5, ((logit > 0) == (truth == 1)).double())
    return float(right.mean()), float(F.binary_cross_entropy_with_logits(logit, truth))


@dataclass(frozen=True)
class ControlEffect:
    """Cohen's ``d`` with the ends ``low`` and ``high`` of its 95 percent interval, one for each axis."""

    d: Tensor
    low: Tensor
    high: Tensor


def control_effect(scores_target1: Tensor, scores_target0: Tensor) -> ControlEffect:
    """How far scores ``(n1, ...)`` under target 1 lie above those under target 0, ``(n0, ...)``, in pooled standard
    deviations; equal means are 0 apart, different ones of scores that do not vary infinitely far."""
    ones, zeros = scores_target1.detach().double(), scores_target0.detach().double()
    if ones.shape[1:] != zeros.shape[1:] or min(len(ones), len(zeros)) < 2:
        raise ShapeError(
            f"Need at least two scores under each target, of the same axes; got {ones.shape}, {zeros.shape}."
        )
    n1, n0 = len(ones), len(zeros)
    gap = ones.mean(0) - zeros.mean(0)
    pooled = (((n1 - 1) * ones.var(0) + (n0 - 1) * zeros.var(0)) / (n1 + n0 - 2)).sqrt()
    d = torch.where(gap == 0, 0.0, gap / pooled)
    half = 1.96 * ((n1 + n0) / (n1 * n0) + d.square() / (2 * (n1 + n0))).sqrt()
    half = half.where(half.isfinite(), 0.0)  # where d is infinite, so are both ends
    return ControlEffect(d, d - half, d + half)


def metacognitive_dimension(effect: ControlEffect) -> int:
    """Number of axes that moved the way they were asked to: whose interval lies above 0."""
    return int((effect.low > 0).sum())
