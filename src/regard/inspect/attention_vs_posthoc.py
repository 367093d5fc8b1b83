"""Attention beside gradients and LIME as explanations, with closed forms of the two on a one-layer classifier.

"Attention Meets Post-hoc Interpretability: A Mathematical Perspective", 2024, arXiv 2402.03485, sections 3 to 5. On
:class:`~regard.models.attention_vs_posthoc.CLSAttentionClassifier`, where ``f = (1/H) sum_i F_i`` with
``F_i = sum_t alpha_t^i w_i . v_t^i``, every explainer takes tokens ``(batch, length)`` to one score per token,
``(batch, length)``, of the logit of class ``target``, or of the difference of two: ``(1, 0)`` is class 1 against 0, all
that training on classes shapes.

* attention: the mean or the largest ``alpha_t^i`` over heads; never negative, and blind to ``w`` and ``v``;
* gradient, for a token other than [CLS]:
  ``(1/H) sum_i alpha_t^i [W_V^T w_i + (w_i . v_t - F_i) W_K^T q_i / sqrt(head_dim)]``;
* LIME, for long documents and many samples: ``beta_j = (3/2) (1/H) sum_i sum_{t: token_t = j} w_i . (alpha_t v_t -
  alpha~_t v~_t)`` with keys and values ``~`` of the document of unknown tokens alone, under the same query.

The last is the paper's approximation. It leaves out that a word takes part in the softmax's sum: it is not 0 for a word
that is just like the unknown one, and it moves with a constant added to all values, which LIME does not.
:func:`lime_mean_field` keeps that part. Every other word is present by a share ``p``: with its
``g_t = exp(q . k_t / sqrt(head_dim))`` that makes a sum ``N(p)`` and a weighted sum ``A(p)`` of all ``w . v``, and the
word changes the head by ``(A + g_j w . v_j) / (N + g_j) - (A + g~_j w . v~_j) / (N + g~_j)``. LIME weighs that by how
often it draws ``p`` and by ``p (1 - p)``. Where attention is nearly even it is ``w . (v_t - v~_t)`` over the length: a
factor of 1, not 3/2.

Cost: one forward pass for attention and the closed forms, one more backwards for gradients, ``samples`` for LIME.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.inspect.saliency import (
    Reduce,
    attention_saliency,
    gradient_saliency,
    lime,
    lime_kernel,
    presence,
    reduce_gradient,
)
from regard.models.attention_vs_posthoc import CLSAttentionClassifier

__all__ = [
    "Target",
    "attention_explanation",
    "gradient_closed_form",
    "gradient_explanation",
    "lime_closed_form",
    "lime_mean_field",
    "lime_tokens",
    "word_regions",
]

Target = int | tuple[int, int]


@torch.no_grad()
def attention_explanation(
    model: CLSAttentionClassifier, tokens: Tensor, agg: Literal["mean", "max"] = "mean"
) -> Tensor:
    """Attention of [CLS], over the heads."""
    return attention_saliency(model.read(model.embed(tokens)).weights[:, :, None], agg)


def gradient_explanation(
    model: CLSAttentionClassifier, tokens: Tensor, reduce: Reduce = "xinput", target: Target = 1
) -> Tensor:
    """The gradient with respect to the embedded tokens, positions included, by autograd; ``reduce`` as in
    :func:`~regard.inspect.saliency.reduce_gradient`."""
    with torch.no_grad():
        embedded = model.embed(tokens)
    return gradient_saliency(lambda e: _logit(model.from_embedded(e), target), embedded, reduce)


@torch.no_grad()
def gradient_closed_form(
    model: CLSAttentionClassifier, tokens: Tensor, reduce: Reduce | None = None, target: Target = 1
) -> Tensor:
    """The same from the formula: ``(batch, length, embed_dim)``, or reduced to ``(batch, length)``. [CLS] has one more
    term, since it is the query: ``(1/H) sum_i W_Q^T sum_t alpha_t (w . v_t - F) k_t / sqrt(head_dim)``."""
    w = _logit(model.class_vectors.movedim(0, 1), target)
    embedded = model.embed(tokens)
    reading = model.read(embedded)
    heads, scale = model.num_heads, 1 / math.sqrt(reading.query.shape[-1])
    by_query, by_key, by_value = (
        layer.weight.unflatten(0, (heads, -1)) for layer in (model.query, model.key, model.value)
    )
    worth = torch.einsum("bhtd,hd->bht", reading.value, w)
    apart = reading.weights * (worth - (reading.weights * worth).sum(-1, keepdim=True))
    through_values = torch.einsum("bht,hd,hde->bte", reading.weights, w, by_value)
    through_keys = scale * torch.einsum("bht,bhd,hde->bte", apart, reading.query, by_key)
    gradient = through_values + through_keys
    gradient[:, 0] += scale * torch.einsum("bht,bhtd,hde->be", apart, reading.key, by_query)
    gradient = gradient / heads
    return gradient if reduce is None else reduce_gradient(gradient, embedded, reduce)


def word_regions(tokens: Tensor, unk: int | None = None) -> tuple[Tensor, int]:
    """The word of each place of a document ``(length,)``, int64, and how many words there are: equal tokens are one
    word; [CLS], which comes first, and ``unk`` are none (-1)."""
    if tokens.dim() != 1:
        raise ShapeError(f"Words are numbered for one document (length,) at a time, got {tuple(tokens.shape)}.")
    words, place = tokens[1:].unique(return_inverse=True)
    if unk is not None and bool((words == unk).any()):
        at = int((words == unk).nonzero())
        place = torch.where(place == at, -1, place - (place > at).long())
        words = words[words != unk]
    return torch.cat((place.new_full((1,), -1), place)), len(words)


def lime_tokens(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    samples: int = 5000,
    unk: int = 1,
    *,
    target: Target = 1,
    kernel_width: float | None = 0.25,
    generator: torch.Generator | None = None,
) -> Tensor:
    """LIME for text: words kept or replaced by ``unk`` wherever they stand; each place gets its word's coefficient,
    [CLS] and unknown tokens 0. Of any ``model`` from tokens to logits ``(batch, classes)``, as ``lambda x:
    bert(input_ids=x).logits`` with ``unk=tokenizer.mask_token_id``; for ``kernel_width`` see
    :func:`~regard.inspect.saliency.lime_kernel`."""
    found = []
    for document in tokens:
        regions, words = word_regions(document, unk)
        score = presence(lambda x: _logit(model(x), target), document, unk, regions)
        if words == 0:
            found.append(document.new_zeros(len(document), dtype=torch.get_default_dtype()))
            continue
        coefficients = lime(score, words, samples, kernel_width=kernel_width, generator=generator)
        # Region -1 finds the zero put behind.
        found.append(torch.cat((coefficients, coefficients.new_zeros(1)))[regions.to(coefficients.device)])
    return torch.stack(found)


@torch.no_grad()
def lime_closed_form(model: CLSAttentionClassifier, tokens: Tensor, unk: int = 1, target: Target = 1) -> Tensor:
    """What :func:`lime_tokens` tends to, by the paper's formula."""
    (alpha, worth), (alpha_unk, worth_unk) = _with_and_without(model, tokens, unk, target)
    terms = 1.5 * (alpha.softmax(-1) * worth - alpha_unk.softmax(-1) * worth_unk).mean(1)
    return _words_only(_per_word(terms, tokens), tokens, unk)


@torch.no_grad()
def lime_mean_field(
    model: CLSAttentionClassifier,
    tokens: Tensor,
    unk: int = 1,
    target: Target = 1,
    kernel_width: float | None = 0.25,
    points: int = 64,
) -> Tensor:
    """What :func:`lime_tokens` tends to for documents of many words whose attention does not rest on a few of them; up
    to a constant that all words share, which is 0 for a flat kernel. points: of the integral over ``p``."""
    (score, worth), (score_unk, worth_unk) = _with_and_without(model, tokens, unk, target)
    top = torch.maximum(score, score_unk).amax(-1, keepdim=True)
    g, g_unk = (score - top).exp(), (score_unk - top).exp()
    # Per place, the sums over all places of its word.
    sums = [_per_word(x, tokens) for x in (g, g * worth, g_unk, g_unk * worth_unk)]
    own, own_worth, own_unk, own_worth_unk = sums
    share = (torch.arange(points, dtype=g.dtype, device=g.device) + 0.5) / points
    weight = lime_kernel(share, kernel_width) * share * (1 - share)
    total = torch.zeros_like(g)
    for p, density in zip(share, weight / weight.sum(), strict=True):
        # [CLS] and unknown tokens are there in both.
        mass, mixed = (p * g + (1 - p) * g_unk), (p * g * worth + (1 - p) * g_unk * worth_unk)
        others = mass.sum(-1, keepdim=True) - p * own - (1 - p) * own_unk
        others_worth = mixed.sum(-1, keepdim=True) - p * own_worth - (1 - p) * own_worth_unk
        there = (others_worth + own_worth) / (others + own)
        gone = (others_worth + own_worth_unk) / (others + own_unk)
        total += density * (there - gone)
    return _words_only(total.mean(1), tokens, unk)


def _with_and_without(
    model: CLSAttentionClassifier, tokens: Tensor, unk: int, target: Target
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scores and ``w . v`` ``(batch, num_heads, length)`` of the documents, and of unknown tokens in their places;
    [CLS] stays."""
    w = _logit(model.class_vectors.movedim(0, 1), target)
    if not 0 <= unk < model.embedding.num_embeddings:
        raise OptionError(f"unk is a token below {model.embedding.num_embeddings}, got {unk}.")
    unknown = torch.full_like(tokens, unk)
    unknown[:, 0] = tokens[:, 0]
    found = []
    for document in (tokens, unknown):
        reading = model.read(model.embed(document))
        scores = (reading.key @ reading.query[..., None])[..., 0] / math.sqrt(reading.query.shape[-1])
        found.append((scores, torch.einsum("bhtd,hd->bht", reading.value, w)))
    return found[0], found[1]


def _per_word(terms: Tensor, tokens: Tensor) -> Tensor:
    """The sum of ``terms`` ``(batch, ..., length)`` over all places of a word, at each of them; [CLS] is its own."""
    same = tokens[:, :, None] == tokens[:, None]
    same[:, 0, 1:] = same[:, 1:, 0] = False
    same = same.to(terms).reshape(same.shape[:1] + (1,) * (terms.dim() - 2) + same.shape[1:])
    return (same @ terms[..., None])[..., 0]


def _words_only(scores: Tensor, tokens: Tensor, unk: int) -> Tensor:
    """0 at [CLS] and unknown tokens, which LIME never leaves out."""
    scores = scores.masked_fill(tokens == unk, 0)
    scores[:, 0] = 0
    return scores


def _logit(logits: Tensor, target: Target) -> Tensor:
    """Of ``(n, classes, ...)``: that of ``target``, or the difference of the two."""
    classes = (target,) if isinstance(target, int) else tuple(target)
    if len(classes) > 2 or not all(0 <= c < logits.shape[1] for c in classes):
        raise OptionError(
            f"target is a class from 0 to {logits.shape[1] - 1}, or a pair (for, against) of them; got {target!r}."
        )
    return logits[:, classes[0]] if len(classes) == 1 else logits[:, classes[0]] - logits[:, classes[1]]
