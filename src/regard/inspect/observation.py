"""What a model's heads do on one input, and what it loses without them: all that an explored page shows.

Maps are never held whole: each layer's weights are read in rows while it runs, and what is kept of a query are the keys
that it weighs most, of a head a reduced picture of its map and its metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.inspect.capture import LayerTrace, capture
from regard.inspect.intervene import Head, ablate_heads, intervene
from regard.inspect.metrics import HeadSummary, Metric, shares
from regard.inspect.roles import ROLES
from regard.retrofit.sites import discover

__all__ = ["Ablation", "Exploration", "Patches", "Progress", "Span", "ablate_all", "look"]

MAP_SIDE = 160
"""Rows and columns of a head's reduced map."""
# Bytes of the keys and weights that the page keeps, over all heads.
_BUDGET = 24 << 20
_SHORT = 256

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Ablation:
    """What the model loses without some heads: ``change`` in nats per token (of the loss, or the divergence from its
    own predictions where it has no loss); ``repetition``: nats per token that it gains, then, when the text's beginning
    is written a second time (:func:`~regard.inspect.roles.repetition_losses`)."""

    name: str
    heads: list[Head]
    change: float
    repetition: float | None = None


@dataclass(frozen=True)
class Patches:
    """The image behind tokens: ``grid`` (rows, columns) of patches, ``before`` tokens beside them, the picture as a
    ``data:`` address."""

    grid: tuple[int, int]
    before: int
    picture: str


@dataclass(frozen=True)
class Span:
    """The tokens among which a layer's heads attend: the first query and how many there are, and the same of the keys.
    ``name``: what a person calls the layer."""

    name: str
    queries: tuple[int, int]
    keys: tuple[int, int]

    @property
    def crosses(self) -> bool:
        """Whether queries and keys are different tokens."""
        return self.queries != self.keys


@dataclass(eq=False)
class Exploration:
    """One model on one input. ``tokens``: text of each; ``losses``: nats of each, None where the model does not predict
    it. ``spans``: of each layer. ``metrics``: of heads, ``[layer][head]``, None where one means nothing in a layer.
    ``keys`` ``(heads, queries, top)`` int32, counted from the layer's first, and ``weights`` uint8 (255: all of a
    query's weight) per layer; ``maps`` ``(heads, rows, columns)`` uint8 per layer, the root of the weight over the
    largest of the head. ``measure``: what ablations are measured by; ``repetition``: as in
    :class:`Ablation`, with all heads."""

    model: str
    tokens: list[str]
    spans: list[Span]
    metrics: dict[str, list[list[float | None]]]
    keys: list[Tensor]
    weights: list[Tensor]
    maps: list[Tensor]
    causal: bool
    losses: list[float | None] = field(default_factory=list)
    roles: list[list[str]] = field(default_factory=list)
    head_changes: list[list[float]] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)
    measure: str = ""
    repetition: float | None = None
    patches: Patches | None = None

    @property
    def heads(self) -> list[int]:
        """Heads of each layer."""
        return [len(keys) for keys in self.keys]


def look(
    model: nn.Module,
    run: Callable[[], Tensor],
    name: str,
    tokens: list[str] | None,
    causal: bool,
    judged: Callable[[Span], tuple[Mapping[str, Metric], int]],
    spans: Sequence[Span] | None = None,
) -> tuple[Exploration, Tensor]:
    """``run()`` once, and what its heads do. Returns it with the answer.

    tokens: their texts, by default empty ones, as many as attend. judged: the metrics of a layer's heads, and how many
    queries at the beginning these leave out. spans: of each layer, by default all tokens among themselves. Raises
    OptionError where layers attend otherwise.
    """
    sites = discover(model)
    expected = sum(site.context["num_heads"] for site in sites)
    places = {} if spans is None else {site.path: span for site, span in zip(sites, spans, strict=True)}

    def summarize(layer: LayerTrace) -> tuple[HeadSummary, Tensor, tuple[int, int]] | None:
        queries = layer.queries_seen
        span = places[layer.path] if places else Span("", (0, queries), (0, queries))
        keys = span.keys[1]
        # All keys of a short input, and of a long one as many as the budget allows; a key and its weight are 3 bytes.
        most = keys if keys <= _SHORT else 24
        top = max(4, min(most, _BUDGET // (3 * queries * max(expected, 1))))
        metrics, skip = judged(span)
        summary, picture = HeadSummary(queries, metrics, top=min(top, keys), skip=skip), None
        for start, weights in layer.weight_rows(128):
            if weights.shape[-1] != keys or weights.shape[0] != 1:
                return None
            summary.add(start, weights)
            picture = _reduced(picture, shares(weights[0]), start, queries)
        return None if picture is None else (summary, picture, (queries, keys))

    with torch.no_grad(), capture(model, summarize=summarize) as trace:
        answer = run()
    layers = [layer.summary for layer in trace if layer.summary is not None]
    sizes = [size for _, _, size in layers]
    count = sizes[0][0] if sizes and tokens is None else len(tokens or ())
    asked = [Span(f"layer {layer}", (0, count), (0, count)) for layer in range(len(sites))] if spans is None else spans
    if len(layers) != len(sites) or sizes != [(span.queries[1], span.keys[1]) for span in asked]:
        raise OptionError(
            "The page shows attention among all tokens of one sequence in every layer, or of encoder and decoder; "
            f"layers saw {sorted({layer.queries_seen for layer in trace}) or 'no'} queries, or have no weights. Models "
            "that merge tokens, or attend in windows of an image, are not shown."
        )
    means = [summary.means() for summary, _, _ in layers]
    names = dict.fromkeys(metric for found in means for metric in found)
    found = Exploration(
        name,
        tokens or [""] * count,
        list(asked),
        {
            metric: [_listed(mean, metric, picture) for mean, (_, picture, _) in zip(means, layers, strict=True)]
            for metric in names
        },
        [summary.top_keys[0] for summary, _, _ in layers],
        [(summary.top_weights[0] * 255).round().to(torch.uint8) for summary, _, _ in layers],
        [_bytes(picture) for _, picture, _ in layers],
        causal,
    )
    return found, answer


def _listed(mean: Mapping[str, Tensor], metric: str, picture: Tensor) -> list[float | None]:
    """A metric of a layer's heads, None for each where it means nothing."""
    if metric not in mean:
        return [None] * len(picture)
    return [round(value, 4) for value in mean[metric][0].tolist()]


def _reduced(picture: Tensor | None, weights: Tensor, start: int, queries: int) -> Tensor:
    """Adds rows ``(heads, rows, keys)`` to a map of at most ``MAP_SIDE`` bins either way."""
    device, keys = weights.device, weights.shape[-1]
    height, width = min(MAP_SIDE, queries), min(MAP_SIDE, keys)
    columns = torch.arange(keys, device=device) * width // keys
    rows = torch.arange(start, start + weights.shape[1], device=device) * height // queries
    wide = weights.new_zeros(*weights.shape[:2], width).index_add_(2, columns, weights)
    if picture is None:
        picture = weights.new_zeros(weights.shape[0], height, width)
    return picture.index_add_(1, rows, wide)


def _bytes(picture: Tensor) -> Tensor:
    # The root lifts faint weights out of the background.
    share = (picture / picture.amax((-2, -1), keepdim=True).clamp_min(1e-9)).sqrt()
    return (share * 255).round().to(torch.uint8)


@torch.no_grad()
def ablate_all(
    model: nn.Module,
    run: Callable[[], Tensor],
    found: Exploration,
    loss: Callable[[Tensor], float] | None,
    repetition: Callable[[], float] | None,
    progress: Progress,
) -> None:
    """What switching off each head, each layer and each role does to ``run()``: by ``loss`` of its answer, or without
    one by the divergence from its own predictions; and to ``repetition()``."""
    found.repetition = None if repetition is None else repetition()
    own = run()
    if loss is None:
        target = own.float().log_softmax(-1)
        found.measure = "divergence from the model's own predictions, nats"

        def change(logits: Tensor) -> float:
            return float((target.exp() * (target - logits.float().log_softmax(-1))).sum(-1).mean())
    else:
        base = loss(own)
        found.measure = "rise of the loss, nats per token"

        def change(logits: Tensor) -> float:
            return loss(logits) - base

    def without(heads: Sequence[Head]) -> float:
        with intervene(model, ablate_heads(heads)):
            return round(change(run()), 5)

    layers = found.heads
    total = sum(layers)
    done = 0
    for layer, heads in enumerate(layers):
        row = []
        for head in range(heads):
            row.append(without([(layer, head)]))
            done += 1
            progress(f"without head {done} of {total}")
        found.head_changes.append(row)
    groups = {span.name: [(layer, head) for head in range(layers[layer])] for layer, span in enumerate(found.spans)}
    kinds = dict.fromkeys(span.name.split()[0] for span in found.spans)
    for kind in kinds if len(kinds) > 1 else ():
        groups[f"all {kind} layers"] = [
            head for name, heads in groups.items() if name.split()[0] == kind for head in heads
        ]
    for role, told in ROLES.items():
        chosen = [(i, j) for i, row in enumerate(found.roles) for j, name in enumerate(row) if name == role]
        if chosen:
            groups[f"{role} heads ({told})"] = chosen
    order = sorted(
        ((found.head_changes[i][j], (i, j)) for i, heads in enumerate(layers) for j in range(heads)), reverse=True
    )
    quarter = max(total // 4, 1)
    groups["the quarter of heads that matter most by themselves"] = [head for _, head in order[:quarter]]
    groups["the quarter that matter least"] = [head for _, head in order[-quarter:]]
    for name, chosen in groups.items():
        progress(f"without {name}")
        gain = None
        if repetition is not None:
            with intervene(model, ablate_heads(chosen)):
                gain = repetition()
        found.ablations.append(Ablation(name, chosen, without(chosen), gain))
