"""Find which heads matter for a task and which pattern each follows; put patterns into heads, or beside them.

Li, Xiao, Xing, Wang, Murray, Carenini, "Human Guided Exploitation of Interpretable Attention Patterns in Summarization
and Topic Segmentation", 2022, arXiv 2112.05364.

- Importance of head ``h``, to first order what masking it changes: ``I_h = E_x |sum z_h * dL/dz_h|`` with ``z_h`` its
  output, divided by the l2 norm of its layer's (:func:`head_importance_taylor`). The authors' tool (T3-Vis) sums
  ``(w dL/dw)^2`` over the weights of each head instead, which only models with weights of their own per head allow.
- A person looks at maps of the important heads and names patterns as predicates on tokens
  (:mod:`regard.layers.token_patterns`). How far head ``h`` follows ``P``: the mean over inputs of
  ``sum_ij A_ij P_ij / sum_ij A_ij`` over the rows in which ``P`` has a target (:func:`pattern_relevance`).
- A head has the pattern whose relevance lies furthest above ``mean + one deviation`` over all heads (:func:`discover`).
- The patterns go into heads of a live model (:func:`fix_heads`), into small models trained from scratch, or beside a
  model's attention (:func:`adapted`; :mod:`regard.models.human_attention_patterns` has the heads and adapters).

Importance takes a forward and a backward pass, relevance ``O(L H N^2)`` on captured maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.capture import capture
from regard.inspect.intervene import Edit, Head, intervene, reweigh_heads
from regard.layers.token_patterns import Predicate, row_normalised
from regard.models.human_attention_patterns import PatternAdapter
from regard.retrofit.sites import discover as attention_sites
from regard.retrofit.switch import Call, Weights

__all__ = [
    "Documents",
    "HeadFinding",
    "Loss",
    "adapted",
    "discover",
    "fix_heads",
    "head_importance_taylor",
    "pattern_relevance",
]

Loss = Callable[[Any, Any], Tensor]
"""``(what the model gives, targets) -> (batch,)``: the loss of each example by itself."""


@dataclass(frozen=True)
class Documents:
    """One batch: ``inputs`` of the model (a tensor or keywords), ``tokens`` and ``segments`` ``(batch, length)`` for
    the patterns, ``targets`` for the loss."""

    inputs: Tensor | Mapping[str, Any]
    tokens: Tensor
    segments: Tensor | None = None
    targets: Any = None


def _run(model: nn.Module, batch: Documents) -> Any:
    return model(**batch.inputs) if isinstance(batch.inputs, Mapping) else model(batch.inputs)


def pattern_relevance(attn: Tensor, pattern: Tensor) -> Tensor:
    """Share of weight that follows a pattern, ``(layers, heads)``, 0 to 1.

    attn: ``(layers, batch, heads, length, length)``. pattern: ``(batch, length, length)``, boolean or with weights of
    0 to 1. A mean over the inputs in which the pattern has a target anywhere; NaN where there is none.
    """
    relevance, counted = _relevance(attn, pattern)
    return relevance / counted if counted else torch.full_like(relevance, torch.nan)


def _relevance(attn: Tensor, pattern: Tensor) -> tuple[Tensor, int]:
    """Relevance summed over the inputs with a target, and their number."""
    if attn.dim() != 5 or pattern.shape != (attn.shape[1], *attn.shape[3:]):
        raise ShapeError(
            "Maps (layers, batch, heads, length, length) go with a pattern (batch, length, length); got "
            f"{tuple(attn.shape)} and {tuple(pattern.shape)}."
        )
    weights = attn if attn.dtype == torch.float64 else attn.float()
    pattern = pattern.to(weights)
    if bool(((pattern < 0) | (pattern > 1)).any()):
        raise OptionError("A pattern is boolean, or has weights of 0 to 1; this one's go beyond.")
    rows = (pattern > 0).any(-1)
    inside = (weights * pattern[:, None]).sum((-2, -1))
    whole = (weights.sum(-1) * rows[:, None]).sum(-1)
    counted = rows.any(-1)
    share = inside / torch.where(whole > 0, whole, 1)
    return (share * counted[:, None]).sum(1), int(counted.sum())


def head_importance_taylor(model: nn.Module, loss: Loss, batch: Documents) -> Tensor:
    """First-order importance of each head, ``(layers, heads)``, of l2 norm 1 in every layer (0 where no head matters).

    The model stays in the mode that it is in; its parameters get no gradients and need none. A layer with fewer heads
    than others has 0 for those that it lacks.
    """
    size = _importance_sums(model, loss, batch)
    return size / size.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


def _importance_sums(model: nn.Module, loss: Loss, batch: Documents) -> Tensor:
    """``sum_x |sum z_h * dL/dz_h|`` for each head: the gradient of a gate on each example's head, at 1."""
    counts = [site.context["num_heads"] for site in attention_sites(model)]
    gates = torch.ones(len(counts), len(batch.tokens), max(counts), device=batch.tokens.device, requires_grad=True)

    def outputs(layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        if output.shape[0] != gates.shape[1]:
            raise ShapeError(f"Layer {layer} sees {output.shape[0]} examples, and tokens are of {gates.shape[1]}.")
        return output * gates[layer, :, None, : output.shape[2], None].to(output), weights

    with torch.enable_grad(), intervene(model, Edit(frozenset(range(len(counts))), outputs=outputs)):
        losses = loss(_run(model, batch), batch.targets)
        if losses.shape != gates.shape[1:2]:
            raise ShapeError(
                f"loss gives one number for each of {gates.shape[1]} examples, got {tuple(losses.shape)}; take "
                "reduction='none' and a mean over all but the first axis."
            )
        (gradient,) = torch.autograd.grad(losses.sum(), gates)
    return gradient.abs().sum(1)


@dataclass(frozen=True)
class HeadFinding:
    """One head: its importance within its layer, its relevance to each pattern, and the pattern it has, if any."""

    layer: int
    head: int
    importance: float
    relevance: dict[str, float]
    pattern: str | None


def discover(
    model: nn.Module, data: Iterable[Documents], patterns: Mapping[str, Predicate], loss: Loss
) -> list[HeadFinding]:
    """All heads, the most important first, with the pattern that each follows.

    A head has a pattern when its relevance exceeds the mean over all heads by more than one standard deviation; of
    several, the one that it exceeds by most deviations. Layers are to have equally many heads.
    """
    if not patterns:
        raise OptionError("discover needs at least one pattern, as {'matching token': matching_token}.")
    importance: Tensor | None = None
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(patterns, 0)
    for batch in data:
        size = _importance_sums(model, loss, batch)
        importance = size if importance is None else importance + size
        with torch.no_grad(), capture(model, "weights") as trace:
            _run(model, batch)
        attn = trace.stack("weights")
        if attn.shape[::2][:2] != importance.shape:
            raise OptionError(
                f"There are maps of {tuple(attn.shape[::2][:2])} (layers, heads) and importance of "
                f"{tuple(importance.shape)}: every attention layer must be run, with equally many heads in each."
            )
        for name, predicate in patterns.items():
            total, counted = _relevance(attn, predicate(batch.tokens, batch.segments))
            sums[name] = total if name not in sums else sums[name] + total
            counts[name] += counted
    if importance is None:
        raise OptionError("discover needs at least one batch of Documents.")
    importance = importance / importance.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(importance.dtype).tiny)
    relevance = {name: total / max(counts[name], 1) for name, total in sums.items()}
    above = {
        name: (found - found.mean()) / found.std(correction=0).clamp_min(1e-12) for name, found in relevance.items()
    }
    rows = []
    for layer in range(importance.shape[0]):
        for head in range(importance.shape[1]):
            best = max(patterns, key=lambda name: float(above[name][layer, head]))
            rows.append(
                HeadFinding(
                    layer,
                    head,
                    float(importance[layer, head]),
                    {name: float(found[layer, head]) for name, found in relevance.items()},
                    best if float(above[best][layer, head]) > 1 else None,
                )
            )
    return sorted(rows, key=lambda row: row.importance, reverse=True)


def fix_heads(patterns: Mapping[Head, Tensor]) -> list[Edit]:
    """Edits for :class:`regard.inspect.intervene.intervene`: heads of a live model get the weights of their map
    ``(batch, length, length)``, of the keys that the layer lets them see, rows over their sums; rows without a target
    among these keep the head's own weights."""

    def edit(head: Head, pattern: Tensor) -> Edit:
        def weigh(own: Tensor, _: int, call: Call) -> Tensor:
            if pattern.shape != own.shape:
                raise ShapeError(f"The pattern of head {head} is {tuple(pattern.shape)}, its maps {tuple(own.shape)}.")
            allowed, rule = pattern.to(own.device), call.reading.visible
            if rule is not None:
                seen = rule.dense(own.shape[-2], own.shape[-1], own.device)
                allowed = allowed * seen[:, head[1] if seen.shape[1] > 1 else 0]
            weights, empty = row_normalised(allowed, own.dtype)
            return torch.where(empty[..., None], own, weights.to(own))

        return reweigh_heads([head], None, weigh)

    return [edit(head, pattern) for head, pattern in patterns.items()]


@contextmanager
def adapted(
    model: nn.Module, adapters: Sequence[PatternAdapter], maps: Tensor, visible: Tensor | None = None
) -> Iterator[None]:
    """Within this block each attention layer gives what it gives and what its adapter gives, differentiably.

    adapters: one a layer, in the order of :func:`regard.retrofit.discover`. maps: the patterns of the batch that the
    model is about to see, ``(batch, patterns, length, length)``. visible: the keys that its queries see, ``(batch,
    length)`` where there is padding, or ``(batch | 1, length, length)``, as causal layers need.

    An adapter reads what the layer's projections read and adds to what its attention module returns; where a model
    keeps the output projection outside (BERT), it adds before it, which is the same adapter with ``W_O W_up`` in place
    of ``W_up``.
    """
    sites = attention_sites(model)
    if len(adapters) != len(sites):
        raise OptionError(f"The model has {len(sites)} attention layers; got {len(adapters)} adapters, one for each.")

    def beside(adapter: PatternAdapter) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = next(each for each in (*args, kwargs.get("hidden_states")) if isinstance(each, Tensor))
            if visible is None and (getattr(module, "is_causal", False) or kwargs.get("causal")):
                raise OptionError(
                    "This layer is causal, and its adapter would see what comes later: pass visible, for instance "
                    "torch.ones(1, length, length, dtype=torch.bool).tril()."
                )
            extra = adapter(x, maps, visible)
            return (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra

        return hook

    handles = [
        site.home.register_forward_hook(beside(adapter), with_kwargs=True)
        for site, adapter in zip(sites, adapters, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
