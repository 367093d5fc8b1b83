"""Heads that rest on a sink, and what comes with it: a small value there, and a large residual state.

Softmax must put its weight somewhere. A head that has nothing to say puts it on one token, the *sink* (mostly the
first), whose value shrinks until the head's output is nearly zero: it is *dormant*. On other inputs the same head is
*active*. Three things are measured at the sink ``k``, each against the other tokens:

    attention sink       mean over queries q of A[q, k]                              sink_strength
    value-state drain    |v_k| / mean_j |v_j|                                        value_drain
    residual-state peak  |h_k| / mean_j |h_j|                                        residual_peak
    sink logit           mean over q of s[q, k] - mean_j s[q, j]                     sink_logit_gap

The two first feed each other: where much weight is on the sink, a small value makes the output small, and a small value
makes more weight harmless. In the reduced model of the paper the sink logit grows like the logarithm of training time.
Weights that need not sum to one (ReLU attention) need no sink. Peaks show from three layers on, trained by Adam.

Source: "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs", 2024, arXiv
2410.13835, sections 2 (the language :mod:`regard.inspect.backcopy`, the models) and 3 (language models).

Metrics are functions of what :func:`regard.capture` returns, with any dimensions in front: ``trace.stack("weights")``
``(layers, batch, heads, q_len, k_len)`` gives ``(layers, heads)``. All are means over batch and tokens; queries up to
the sink are left out, since they have no choice. Cost: linear in what they read; a report never holds a whole map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.capture import LayerTrace, capture
from regard.inspect.intervene import ablate_heads, intervene
from regard.kernels import expand_groups
from regard.retrofit.sites import discover

__all__ = [
    "ExtremeTokenReport",
    "active_dormant_heads",
    "dormancy",
    "extreme_token_report",
    "residual_peak",
    "sink_logit_gap",
    "sink_strength",
    "value_drain",
    "zero_head_effect",
]

Domain = Tensor | tuple[Tensor, Tensor]


def sink_strength(attn: Tensor, k: int = 0, query_mask: Tensor | None = None) -> Tensor:
    """Mean weight on key ``k``, 0 to 1: ``(..., batch, heads, q_len, k_len)`` to ``(..., heads)``.

    query_mask: boolean ``(batch, q_len)``, queries that count; of these, those after the sink do.
    """
    counted = _counted(attn, k, query_mask)
    return _mean(attn[..., k], counted.expand(attn.shape[:-1]))


def dormancy(attn: Tensor, domain_masks: Mapping[str, Tensor], k: int = 0) -> dict[str, Tensor]:
    """Activity of each head by domain, ``(..., heads)``: the mean weight (of its size) on keys other than the sink.

    For softmax that is ``1 - sink_strength``: 0 for a dormant head, 1 for an active one. A row of ReLU attention that
    is all zeros is dormant too. domain_masks: boolean ``(batch, q_len)`` or ``(batch,)``: queries, or whole texts.
    """
    elsewhere = attn.abs().sum(-1) - attn[..., k].abs()
    found = {}
    for name, mask in domain_masks.items():
        rows = mask[:, None].expand(-1, attn.shape[-2]) if mask.dim() == 1 else mask
        found[name] = _mean(elsewhere, _counted(attn, k, rows).expand(elsewhere.shape))
    return found


def active_dormant_heads(activity: Mapping[str, Tensor], active: float = 0.7, dormant: float = 0.3) -> Tensor:
    """Which heads are active in one domain and dormant in another, boolean ``(..., heads)``; ``activity`` is what
    :func:`dormancy` gives."""
    if len(activity) < 2 or not dormant < active:
        raise OptionError(f"Need at least two domains and dormant < active; got {len(activity)}, {dormant}, {active}.")
    every = torch.stack(list(activity.values()))
    return (every >= active).any(0) & (every <= dormant).any(0)


def value_drain(values: Tensor, k: int = 0, mask: Tensor | None = None) -> Tensor:
    """Length of the value at token ``k`` over the others': ``(..., batch, heads, length, value_dim)`` to ``(...,
    heads)``; 1 for a token like the others. mask: boolean ``(batch, length)``, tokens that are no padding."""
    _check(values, 4, "Values are (..., batch, heads, length, value_dim)")
    norms = values.norm(dim=-1)
    return _ratio(norms, k, None if mask is None else mask[:, None].expand(norms.shape))


def residual_peak(hidden: Tensor, k: int = 0, mask: Tensor | None = None) -> Tensor:
    """Length of the residual state at token ``k`` over the others': ``(..., batch, length, embed_dim)`` to ``(...)``;
    1 for a token like the others. mask: as in :func:`value_drain`."""
    _check(hidden, 3, "Residual states are (..., batch, length, embed_dim)")
    norms = hidden.norm(dim=-1)[..., None, :]
    return _ratio(norms, k, None if mask is None else mask[:, None].expand(norms.shape))[..., 0]


def sink_logit_gap(scores: Tensor, k: int = 0, query_mask: Tensor | None = None) -> Tensor:
    """How far the logit of key ``k`` lies above the mean logit of the other keys that a query sees: ``(..., batch,
    heads, q_len, k_len)``, ``-inf`` where nothing is seen, to ``(..., heads)``.

    Logarithms of softmax weights do as well, since they differ from the logits by a constant per query.
    """
    seen = scores.isfinite()
    others = seen.clone()
    others[..., k] = False
    counted = _counted(scores, k, query_mask).expand(scores.shape[:-1]) & others.any(-1) & seen[..., k]
    mean = scores.masked_fill(~others, 0).sum(-1) / others.sum(-1).clamp_min(1)
    return _mean(scores[..., k].masked_fill(~counted, 0) - mean, counted)


@dataclass(frozen=True, eq=False)
class ExtremeTokenReport:
    """``sink``, ``drain``, ``logit_gap`` ``(layers, heads)``: see :func:`sink_strength`, :func:`value_drain` (a value
    head stands once for each query head that it serves) and :func:`sink_logit_gap` (NaN where weights do not sum to
    one). ``peak`` ``(layers + 1,)``: :func:`residual_peak` of what enters each layer, and of what leaves the last.
    ``paths``: the layers."""

    paths: tuple[str, ...]
    sink: Tensor
    drain: Tensor
    logit_gap: Tensor
    peak: Tensor


@torch.no_grad()
def extreme_token_report(
    model: nn.Module, batch: Tensor | Mapping[str, Tensor], k: int = 0, query_mask: Tensor | None = None
) -> ExtremeTokenReport:
    """All four, in every layer of a causal decoder: of transformers, of this library, whatever :func:`regard.capture`
    works on.

    batch: token ids ``(batch, length)``, or keywords of the model's call; with an ``attention_mask`` padding is left
    out (the sink must not be padding: pad at the right). query_mask: which queries count for sink and logit gap.
    """
    real = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = None if real is None else real.bool()
    if mask is not None and not bool(mask[:, k].all()):
        raise OptionError(f"Token {k} is padding in some texts, which is no sink. Pad at the right.")
    rows = mask if query_mask is None else query_mask if mask is None else mask & query_mask

    def measure(layer: LayerTrace) -> dict[str, Tensor]:
        return _measure(layer, k, rows, mask)

    leaving: list[Tensor] = []
    last = discover(model)[-1].block
    hook = last.register_forward_hook(
        lambda block, args, out: leaving.append(out if isinstance(out, Tensor) else out[0])
    )
    try:
        with capture(model, ("values", "hidden_states"), summarize=measure) as trace:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        hook.remove()
    found = [layer.summary for layer in trace]
    if len({tuple(row["sink"].shape) for row in found}) != 1:
        raise OptionError("The layers of this model differ in their number of heads; measure them one by one.")
    stacked = {name: torch.stack([row[name] for row in found]) for name in found[0]}
    stacked["peak"] = torch.cat((stacked["peak"], residual_peak(leaving[-1], k, mask).cpu().view(1)))
    return ExtremeTokenReport(tuple(trace.paths), **stacked)


def _measure(layer: LayerTrace, k: int, rows: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
    """One layer, from rows of its weights as they come."""
    strength, gap = torch.zeros(()), torch.zeros(())
    counts, seeing, whole = 0, torch.zeros(()), True
    for first, part in layer.weight_rows():
        past = first + part.shape[2]
        chosen = None if rows is None else rows[:, first:past]
        # Up to the last of these queries' own keys, as if the map ended here.
        here = part[..., : part.shape[-1] - layer.queries_seen + past].float()
        counted = _counted(here, k, chosen).expand(len(here), -1, -1)
        count = int(counted.sum())
        if count == 0:
            continue
        whole &= bool((part.sum(-1) - 1).abs().max() < 1e-2)
        strength = strength + sink_strength(here, k, chosen).cpu() * count
        counts += count
        # A window may hide the sink from some queries, which then have no logit for it.
        see = (counted & (here[..., k] > 0)).sum((0, 2)).cpu()
        gap, seeing = gap + sink_logit_gap(here.log(), k, chosen).cpu().nan_to_num() * see, seeing + see
    if counts == 0 or layer.values is None or layer.hidden_states is None:
        raise OptionError(f"{layer.path} shows no attention weights after token {k}, so there is no sink to measure.")
    values = expand_groups(layer.values, len(strength))
    return {
        "sink": strength / counts,
        "drain": value_drain(values, k, mask).cpu(),
        "logit_gap": gap / seeing if whole else torch.full_like(strength, float("nan")),
        "peak": residual_peak(layer.hidden_states, k, mask).cpu(),
    }


@torch.no_grad()
def zero_head_effect(model: nn.Module, domains: Mapping[str, Domain]) -> dict[str, Tensor]:
    """By domain, by how many nats the loss of the next token rises when one head's output is zero: ``(layers, heads)``.

    A head that is dormant in a domain does not matter there. domains: token ids ``(batch, length)``, or ids and a
    boolean mask of this shape, the positions whose prediction counts. The model is called on ids and gives logits, or
    an output with ``logits``; one forward pass per head and text.
    """
    pairs = {name: given if isinstance(given, tuple) else (given, None) for name, given in domains.items()}
    texts = {id(tokens): tokens for tokens, _ in pairs.values()}

    def losses() -> dict[str, float]:
        each = {key: _next_token_loss(model(tokens), tokens) for key, tokens in texts.items()}
        found = {}
        for name, (tokens, mask) in pairs.items():
            chosen = each[id(tokens)] if mask is None else each[id(tokens)][mask[:, :-1]]
            found[name] = float(chosen.mean())
        return found

    base, counts = losses(), [site.context["num_heads"] for site in discover(model)]
    effects = {name: torch.full((len(counts), max(counts)), float("nan")) for name in domains}
    for layer, count in enumerate(counts):
        for head in range(count):
            with intervene(model, ablate_heads([(layer, head)])):
                for name, loss in losses().items():
                    effects[name][layer, head] = loss - base[name]
    return effects


def _next_token_loss(output: Any, tokens: Tensor) -> Tensor:
    """``(batch, length - 1)`` in nats."""
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def _counted(attn: Tensor, k: int, query_mask: Tensor | None) -> Tensor:
    """Boolean ``(batch or 1, 1, q_len)``: the queries after key ``k`` that count."""
    _check(attn, 4, "Attention is (..., batch, heads, q_len, k_len)")
    queries, keys = attn.shape[-2:]
    if not 0 <= k < keys:
        raise OptionError(f"The sink is one of the keys 0 to {keys - 1}; got {k}.")
    after = torch.arange(keys - queries, keys, device=attn.device) > k
    if query_mask is None:
        return after[None, None]
    if query_mask.shape != (attn.shape[-4], queries):
        raise ShapeError(
            f"A mask of queries is (batch, q_len) = {(attn.shape[-4], queries)}; got {tuple(query_mask.shape)}."
        )
    return query_mask.bool().to(attn.device)[:, None] & after


def _mean(x: Tensor, counted: Tensor) -> Tensor:
    """Over batch and tokens of ``(..., batch, heads, tokens)``; NaN where none counts."""
    return (x * counted).sum((-3, -1)) / counted.sum((-3, -1))


def _ratio(norms: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Mean of token ``k`` over the mean of the others, of ``(..., batch, heads, tokens)``."""
    if not 0 <= k < norms.shape[-1] or norms.shape[-1] < 2:
        raise OptionError(f"The sink is one of several tokens, 0 to {norms.shape[-1] - 1}; got {k}.")
    others = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask.bool().clone()
    others[..., k] = False
    return norms[..., k].mean(-2) / _mean(norms, others)


def _check(tensor: Tensor, least: int, what: str) -> None:
    if tensor.dim() < least:
        raise ShapeError(f"{what}; got {tuple(tensor.shape)}.")
