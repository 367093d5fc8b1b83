"""Everything that the page of :mod:`regard.inspect.explore_page` shows of one model on one text or image.

Maps are never held whole: each layer's weights are read in rows while it runs, and what is kept of a query are the keys
that it weighs most, of a head a reduced picture of its map and its metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.inspect.capture import LayerTrace, capture
from regard.inspect.intervene import Head, ablate_heads, intervene
from regard.inspect.loading import model_answer
from regard.inspect.metrics import METRICS, HeadSummary, Metric, patch_metrics, shares
from regard.inspect.retrieval_heads import text_retrieval_scores
from regard.inspect.roles import ROLES, head_roles, repetition_losses
from regard.retrofit.sites import discover

__all__ = ["Ablation", "Exploration", "Patches", "explore_image", "explore_text"]

MAP_SIDE = 160
"""Rows and columns of a head's reduced map."""
# Bytes of the keys and weights that the page keeps, over all heads.
_BUDGET = 24 << 20
_SHORT = 256
# Tokens of the text that are written twice.
_REPEATED = 128

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


@dataclass(eq=False)
class Exploration:
    """One model on one input. ``tokens``: text of each; ``losses`` nats of each but the first, if the model predicts
    the next token. ``metrics``: of heads, ``[layer][head]``. ``keys`` ``(heads, tokens, top)`` int32 and ``weights``
    uint8 (255: all of a query's weight) per layer; ``maps`` ``(heads, side, side)`` uint8 per layer, the root of the
    weight over the largest of the head. ``measure``: what ablations are measured by; ``repetition``: as in
    :class:`Ablation`, with all heads."""

    model: str
    tokens: list[str]
    metrics: dict[str, list[list[float]]]
    keys: list[Tensor]
    weights: list[Tensor]
    maps: list[Tensor]
    causal: bool
    losses: list[float] = field(default_factory=list)
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


def explore_text(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    name: str = "model",
    max_tokens: int = 4096,
    ablate_tokens: int = 512,
    progress: Progress = lambda line: None,
) -> Exploration:
    """A transformers language model (causal or masked) on a text.

    The text is cut at ``max_tokens``; heads are ablated on its first ``ablate_tokens`` (0: not at all). Raises
    OptionError for texts of less than 2 tokens.
    """
    start = tokenizer.bos_token_id
    ids = tokenizer(text, add_special_tokens=start is None, verbose=False)["input_ids"]
    ids = ([] if start is None else [start]) + list(ids)
    if len(ids) > max_tokens:
        progress(f"the text has {len(ids)} tokens; the first {max_tokens} are shown")
    ids = ids[:max_tokens]
    if len(ids) < 2:
        raise OptionError("The text has fewer than two tokens; there is nothing to attend to.")
    tokens = torch.tensor([ids])
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    def run(given: Tensor) -> Tensor:
        return model_answer(model(input_ids=given))

    progress(f"attention of {len(ids)} tokens")
    found, logits = _look(model, partial(run, tokens), name, [_shown(tokenizer, i) for i in ids], causal, _of_text)
    repetition: Callable[[], float] | None = None
    if causal:
        each = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="none")
        found.losses = [round(value, 3) for value in each.tolist()]
        progress("roles on repeated tokens")
        prefix = None if start is None else torch.tensor([[start]])
        roles = head_roles(model, run, logits.shape[-1], prefix=prefix)
        found.roles = roles.roles
        for role in ("previous", "duplicate", "induction"):
            found.metrics[f"{role}, repeated tokens"] = _listed(roles.scores[role])
        progress("retrieval of lines hidden in the text")
        retrieval = text_retrieval_scores(model, tokenizer, text)
        # A model that finds no needle has no heads that are known to.
        if len(retrieval.by_context):
            found.metrics["retrieval"] = _listed(retrieval.scores)
        if len(ids) > 2 + (start is not None):
            repetition = partial(_repetition_gain, run, tokens[:, start is not None :][:, :_REPEATED], prefix)
    if ablate_tokens:
        short = tokens[:, :ablate_tokens]
        _ablate(model, partial(run, short), found, _next_token_loss(short) if causal else None, repetition, progress)
    return found


def explore_image(
    model: nn.Module,
    pixels: Tensor,
    picture: str,
    *,
    name: str = "model",
    ablate: bool = True,
    progress: Progress = lambda line: None,
) -> Exploration:
    """A vision transformer on one image ``(1, channels, height, width)``, as its processor gives it: one of
    transformers, or one that takes images alone, such as :class:`regard.models.vit.VisionTransformer`.

    picture: the image to show, as a ``data:`` address.
    """
    named = "pixel_values" in signature(model.forward).parameters

    def run() -> Tensor:
        return model_answer(model(pixel_values=pixels) if named else model(pixels))

    ratio = pixels.shape[-2] / pixels.shape[-1]
    found, _ = _look(model, run, name, None, False, partial(_of_patches, ratio))
    grid, before = _grid(len(found.tokens), ratio)
    rows = [f"patch {r}, {c}" for r in range(grid[0]) for c in range(grid[1])]
    found.tokens = [*(("[CLS]", *(f"[register {i}]" for i in range(1, before)))[:before]), *rows]
    found.patches = Patches(grid, before, picture)
    if ablate:
        _ablate(model, run, found, None, None, progress)
    return found


def _grid(count: int, ratio: float) -> tuple[tuple[int, int], int]:
    """Rows and columns of the patches and the tokens before them, from their number and the image's height over
    width."""
    for before in range(0, 9):
        rows = round(math.sqrt((count - before) * ratio))
        if rows > 0 and (count - before) % rows == 0:
            columns = (count - before) // rows
            if abs(rows / columns - ratio) <= 0.25 * ratio and before != 2:
                return (rows, columns), before
    raise OptionError(f"{count} tokens are no grid of patches of an image with sides {ratio:.2f} : 1.")


def _of_text(tokens: int) -> tuple[Mapping[str, Metric], int]:
    """The metrics of heads, and how many queries at the beginning they leave out."""
    return METRICS, 0


def _of_patches(ratio: float, tokens: int) -> tuple[Mapping[str, Metric], int]:
    grid, before = _grid(tokens, ratio)
    return patch_metrics(grid, before), before


def _look(
    model: nn.Module,
    run: Callable[[], Tensor],
    name: str,
    tokens: list[str] | None,
    causal: bool,
    judged: Callable[[int], tuple[Mapping[str, Metric], int]],
) -> tuple[Exploration, Tensor]:
    def summarize(layer: LayerTrace) -> tuple[HeadSummary, Tensor] | None:
        queries = layer.queries_seen
        # All keys of a short input, and of a long one as many as the budget allows; a key and its weight are 3 bytes.
        most = queries if queries <= _SHORT else 24
        top = max(4, min(most, _BUDGET // (3 * queries * max(expected, 1))))
        metrics, skip = judged(queries)
        summary, picture = HeadSummary(queries, metrics, top=min(top, queries), skip=skip), None
        side = min(MAP_SIDE, queries)
        for start, weights in layer.weight_rows(128):
            if weights.shape[-1] != queries or weights.shape[0] != 1:
                return None
            summary.add(start, weights)
            picture = _reduced(picture, shares(weights[0]), start, queries, side)
        return None if picture is None else (summary, picture)

    expected = sum(site.context["num_heads"] for site in discover(model))
    with (
        torch.no_grad(),
        capture(model, summarize=summarize) as trace,
    ):
        logits = run()
    layers = [layer.summary for layer in trace if layer.summary is not None]
    lengths = {summary.queries for summary, _ in layers}
    if len(layers) < len(trace) or len(lengths) != 1 or (tokens is not None and lengths != {len(tokens)}):
        raise OptionError(
            "The page shows self-attention from all tokens to all tokens, one sequence in every layer; layers saw "
            f"{sorted({layer.queries_seen for layer in trace}) or 'no'} queries, or have no weights. Models of encoder "
            "and decoder, and those that merge tokens, are not shown."
        )
    (length,) = lengths
    metrics: dict[str, list[list[float]]] = {}
    for summary, _ in layers:
        for metric, values in summary.means().items():
            metrics.setdefault(metric, []).append([round(v, 4) for v in values[0].tolist()])
    found = Exploration(
        name,
        tokens or [""] * length,
        metrics,
        [summary.top_keys[0] for summary, _ in layers],
        [(summary.top_weights[0] * 255).round().to(torch.uint8) for summary, _ in layers],
        [_bytes(picture) for _, picture in layers],
        causal,
    )
    return found, logits


def _reduced(picture: Tensor | None, weights: Tensor, start: int, queries: int, side: int) -> Tensor:
    """Adds rows ``(heads, rows, keys)`` to a map of ``side`` bins either way."""
    device = weights.device
    columns = torch.arange(queries, device=device) * side // queries
    rows = torch.arange(start, start + weights.shape[1], device=device) * side // queries
    wide = weights.new_zeros(*weights.shape[:2], side).index_add_(2, columns, weights)
    if picture is None:
        picture = weights.new_zeros(weights.shape[0], side, side)
    return picture.index_add_(1, rows, wide)


def _bytes(picture: Tensor) -> Tensor:
    # The root lifts faint weights out of the background.
    share = (picture / picture.amax((-2, -1), keepdim=True).clamp_min(1e-9)).sqrt()
    return (share * 255).round().to(torch.uint8)


def _repetition_gain(run: Callable[[Tensor], Tensor], tokens: Tensor, prefix: Tensor | None) -> float:
    first, second = repetition_losses(run, tokens, prefix)
    return round(first - second, 5)


def _next_token_loss(tokens: Tensor) -> Callable[[Tensor], float]:
    return lambda logits: float(F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]))


@torch.no_grad()
def _ablate(
    model: nn.Module,
    run: Callable[[], Tensor],
    found: Exploration,
    loss: Callable[[Tensor], float] | None,
    repetition: Callable[[], float] | None,
    progress: Progress,
) -> None:
    """What switching off each head, each layer and each role does."""
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
    groups = {f"layer {layer}": [(layer, head) for head in range(heads)] for layer, heads in enumerate(layers)}
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


def _listed(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def _shown(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else str(text)
