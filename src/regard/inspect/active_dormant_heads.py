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
``(layers, batch, heads, q_len, k_len)`` gives ``(layers, heads)``. All are means over batch and tokens, in float32 at
least, NaN where no token counts; queries up to the sink are left out, since they have no choice. Cost: linear in what
they read; a report never holds a whole map.
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
from regard.inspect.loading import token_logits
from regard.kernels import accumulation_dtype, expand_groups
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
    others = torch.arange(attn.shape[-1], device=attn.device) != k
    elsewhere = _wide(attn).abs()[..., others].sum(-1)
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
    if len({domain.shape for domain in activity.values()}) != 1:
        raise ShapeError(f"Activities are of the same heads; got {[tuple(a.shape) for a in activity.values()]}.")
    every = torch.stack(list(activity.values()))
    return (every >= active).any(0) & (every <= dormant).any(0)


def value_drain(values: Tensor, k: int = 0, mask: Tensor | None = None) -> Tensor:
    """Length of the value at token ``k`` over the others': ``(..., batch, heads, length, value_dim)`` to ``(...,
    heads)``; 1 for a token like the others. mask: boolean ``(batch, length)``, tokens that are no padding."""
    _check(values, 4, "Values are (..., batch, heads, length, value_dim)")
    return _ratio(_wide(values).norm(dim=-1), k, mask)


def residual_peak(hidden: Tensor, k: int = 0, mask: Tensor | None = None) -> Tensor:
    """Length of the residual state at token ``k`` over the others': ``(..., batch, length, embed_dim)`` to ``(...)``;
    1 for a token like the others. mask: as in :func:`value_drain`."""
    _check(hidden, 3, "Residual states are (..., batch, length, embed_dim)")
    return _ratio(_wide(hidden).norm(dim=-1)[..., None, :], k, mask)[..., 0]


def sink_logit_gap(scores: Tensor, k: int = 0, query_mask: Tensor | None = None) -> Tensor:
    """How far the logit of key ``k`` lies above the mean logit of the other keys that a query sees: ``(..., batch,
    heads, q_len, k_len)``, ``-inf`` where nothing is seen, to ``(..., heads)``.

    Logarithms of softmax weights do as well, since they differ from the logits by a constant per query; weights so
    small that their type makes them 0 are not seen.
    """
    counted = _counted(scores, k, query_mask)
    gaps, known = _gaps(scores, k)
    return _mean(gaps, known & counted)


def _gaps(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of each query ``(..., q_len)``, and where it has one: it sees the sink and another key."""
    seen = ~scores.isneginf()
    others = seen.clone()
    others[..., k] = False
    known = seen[..., k] & others.any(-1)
    wide = _wide(scores)
    mean = wide.masked_fill(~others, 0).sum(-1) / others.sum(-1).clamp_min(1)
    return wide[..., k].masked_fill(~known, 0) - mean, known


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
    """All four, in every layer of a stack of self-attention: of transformers, of this library, whatever
    :func:`regard.capture` works on.

    batch: token ids ``(batch, length)``, or keywords of the model's call; with an ``attention_mask`` padding is left
    out (the sink must not be padding: pad at the right). query_mask: which queries count for sink and logit gap.
    """
    real = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = None if real is None else real.bool()
    rows = mask if query_mask is None else query_mask.bool()
    if mask is not None and query_mask is not None:
        if mask.shape != query_mask.shape:
            raise ShapeError(f"query_mask is {tuple(query_mask.shape)}, and attention_mask {tuple(mask.shape)}.")
        rows = mask & query_mask.bool()
    sites = discover(model)
    if {site.num_layers for site in sites} != {len(sites)}:
        raise OptionError(
            "The model has attention of several kinds, as of encoder and decoder; measure it part by part."
        )

    def measure(layer: LayerTrace) -> dict[str, Tensor]:
        return _measure(layer, k, rows, mask)

    leaving: list[Tensor] = []
    hook = sites[-1].block.register_forward_hook(
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
    if layer.values is None or layer.hidden_states is None:
        raise OptionError(f"{layer.path} shows no values or no residual state, so there is none to measure.")
    if rows is not None and rows.shape != (needed := (len(layer.values), layer.queries_seen)):
        raise ShapeError(f"A mask of queries is (batch, length) = {needed}; got {tuple(rows.shape)}.")
    # Of each head: weight on the sink, logit gaps, and how many of them.
    strength = gap = known = torch.zeros(())
    count, whole = 0, True
    for first, part in layer.weight_rows():
        places = torch.arange(first, first + part.shape[2], device=part.device) + part.shape[-1] - layer.queries_seen
        counted = _after(part, k, places, None if rows is None else rows[:, first : first + part.shape[2]])
        weights = _wide(part)
        count += int(counted.expand(len(part), -1, -1).sum())
        strength = strength + (weights[..., k] * counted).sum((0, 2))
        whole &= bool(((weights.sum(-1) - 1).abs() * counted).max() < 1e-2)
        # A window may hide the sink from some queries, which then have no logit for it.
        gaps, logits = _gaps(weights.log(), k)
        gap = gap + (gaps * (logits & counted)).sum((0, 2))
        known = known + (logits & counted).sum((0, 2))
    if count == 0:
        raise OptionError(f"{layer.path} shows no weights of queries after token {k} that count: there is no sink.")
    return {
        "sink": (strength / count).cpu(),
        "drain": value_drain(expand_groups(layer.values, len(strength)), k, mask).cpu(),
        "logit_gap": (gap / known if whole else torch.full_like(strength, float("nan"))).cpu(),
        "peak": residual_peak(layer.hidden_states, k, mask).cpu(),
    }


@torch.no_grad()
def zero_head_effect(model: nn.Module, domains: Mapping[str, Domain]) -> dict[str, Tensor]:
    """By domain, by how many nats the loss of the next token rises when one head's output is zero: ``(layers, heads)``.

    A head that is dormant in a domain does not matter there. domains: token ids ``(batch, length)``, or ids and a
    boolean mask of this shape, the positions whose prediction counts (the last has none). The model is called on ids
    and gives logits, or an output with ``logits``; one forward pass per head and text.
    """
    pairs = {name: given if isinstance(given, tuple) else (given, None) for name, given in domains.items()}
    for name, (tokens, mask) in pairs.items():
        if tokens.dim() != 2 or (mask is not None and mask.shape != tokens.shape):
            raise ShapeError(f"Domain {name!r} is ids (batch, length) and a mask of this shape, if any.")
        if tokens.shape[1] < 2 or (mask is not None and not bool(mask[:, :-1].any())):
            raise OptionError(f"Domain {name!r} has no position whose next token is known.")
    # Domains of one text share its passes.
    texts = {id(tokens): tokens for tokens, _ in pairs.values()}

    def losses() -> dict[str, float]:
        each = {key: _next_token_loss(model(tokens), tokens) for key, tokens in texts.items()}
        found = {}
        for name, (tokens, mask) in pairs.items():
            chosen = each[id(tokens)] if mask is None else each[id(tokens)][mask[:, :-1].bool()]
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
    logits = token_logits(output)[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def _counted(attn: Tensor, k: int, query_mask: Tensor | None) -> Tensor:
    """Boolean ``(batch or 1, 1, q_len)``: the queries after key ``k`` that count, the last at the last key."""
    _check(attn, 4, "Attention is (..., batch, heads, q_len, k_len)")
    queries, keys = attn.shape[-2:]
    return _after(attn, k, torch.arange(keys - queries, keys, device=attn.device), query_mask)


def _after(attn: Tensor, k: int, places: Tensor, query_mask: Tensor | None) -> Tensor:
    """The same for queries at ``places`` ``(q_len,)``."""
    if not 0 <= k < attn.shape[-1]:
        raise OptionError(f"The sink is one of the keys 0 to {attn.shape[-1] - 1}; got {k}.")
    after = (places > k)[None, None]
    if query_mask is None:
        return after
    needed = (attn.shape[-4], len(places))
    if query_mask.shape != needed:
        raise ShapeError(f"A mask of queries is (batch, q_len) = {needed}; got {tuple(query_mask.shape)}.")
    return query_mask.bool().to(attn.device)[:, None] & after


def _mean(x: Tensor, counted: Tensor) -> Tensor:
    """Over batch and tokens of ``(..., batch, heads, tokens)``; NaN where none counts."""
    return (_wide(x) * counted).sum((-3, -1)) / counted.sum((-3, -1))


def _ratio(norms: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Mean of token ``k`` over the mean of the others, of ``(..., batch, heads, tokens)``; mask ``(batch, tokens)``."""
    batch, tokens = norms.shape[-3], norms.shape[-1]
    if not 0 <= k < tokens or tokens < 2:
        raise OptionError(f"The sink is one of several tokens, 0 to {tokens - 1}; got {k}.")
    others = torch.ones(batch, tokens, dtype=torch.bool, device=norms.device)
    if mask is not None:
        if mask.shape != others.shape:
            raise ShapeError(f"A mask of tokens is (batch, length) = {(batch, tokens)}; got {tuple(mask.shape)}.")
        others = mask.to(norms.device, torch.bool, copy=True)
        if not bool(others[:, k].all()):
            raise OptionError(f"Token {k} is padding in some texts, which is no sink. Pad at the right.")
    others[:, k] = False
    return norms[..., k].mean(-2) / _mean(norms, others[:, None].expand(norms.shape))


def _wide(x: Tensor) -> Tensor:
    """Sums over many tokens do not fit into half precision."""
    return x.to(accumulation_dtype(x.dtype))


def _check(tensor: Tensor, least: int, what: str) -> None:
    if tensor.dim() < least:
        raise ShapeError(f"{what}; got {tuple(tensor.shape)}.")
