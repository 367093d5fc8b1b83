"""What the page of :mod:`regard.inspect.explore_page` shows of a model on a text, on two, or on an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.inspect.capture import capture
from regard.inspect.loading import model_answer
from regard.inspect.metrics import METRICS, Metric, patch_metrics
from regard.inspect.observation import Exploration, Patches, Progress, Span, ablate_all, look
from regard.inspect.retrieval_heads import text_retrieval_scores
from regard.inspect.roles import head_roles, repetition_losses
from regard.retrofit.sites import discover

__all__ = ["explore_image", "explore_text"]

# Tokens of the text that are written twice.
_REPEATED = 128
# Tokens that a model of encoder and decoder writes by itself.
_WRITTEN = 64


def explore_text(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    second: str | None = None,
    *,
    name: str = "model",
    max_tokens: int = 4096,
    ablate_tokens: int = 512,
    progress: Progress = lambda line: None,
) -> Exploration:
    """A transformers language model on a text.

    second: another text. An encoder reads both as a pair; of a model of encoder and decoder it is what the decoder
    writes, by default what the model writes by itself. Each text is cut at ``max_tokens``; heads are ablated on its
    first ``ablate_tokens`` (0: not at all). Raises OptionError for texts of less than 2 tokens, and for a second text
    where a model reads one alone.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        reading = _translation(model, tokenizer, text, second, max_tokens, progress)
    elif type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        reading = _continuation(model, tokenizer, text, second, max_tokens, progress)
    else:
        reading = _encoding(model, tokenizer, text, second, max_tokens, progress)
    tokens, source = reading.tokens, reading.source.shape[1]
    progress(f"attention of {source + tokens.shape[1]} tokens")
    ids = torch.cat((reading.source, tokens), 1)[0].tolist()
    shown = [str(tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
    causal = reading.predicts and not source
    found, answer = look(model, partial(reading.run, tokens), name, shown, causal, _of_text, reading.spans)
    gain = None
    if reading.predicts:
        each = F.cross_entropy(answer[0, :-1].float(), tokens[0, 1:], reduction="none")
        found.losses = [None] * (source + 1) + [round(value, 3) for value in each.tolist()]
    if causal:
        gain = _roles(model, tokenizer, text, reading, answer.shape[-1], found, progress)
    if ablate_tokens:
        # Of a single token nothing is predicted.
        short = tokens[:, : max(ablate_tokens, 2)]
        loss = partial(_next_token_loss, short) if reading.predicts else None
        ablate_all(model, partial(reading.run, short), found, loss, gain, progress)
    return found


@dataclass(frozen=True)
class _Reading:
    """How a model reads: ``run`` on ``tokens`` ``(1, length)`` or the first of them; ``source``: what its encoder reads
    besides, empty without one; ``predicts``: whether the answer at a token is of the next one."""

    tokens: Tensor
    run: Callable[[Tensor], Tensor]
    predicts: bool
    source: Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.int64))
    spans: list[Span] | None = None


def _continuation(
    model: nn.Module, tokenizer: Any, text: str, second: str | None, max_tokens: int, progress: Progress
) -> _Reading:
    if second is not None:
        raise OptionError("This model reads one text from left to right; write the second one behind the first.")
    start = tokenizer.bos_token_id
    ids = tokenizer(text, add_special_tokens=start is None, verbose=False)["input_ids"]
    tokens = _cut(([] if start is None else [start]) + list(ids), max_tokens, progress)
    return _Reading(tokens, lambda given: model_answer(model(input_ids=given)), True)


def _encoding(
    model: nn.Module, tokenizer: Any, text: str, second: str | None, max_tokens: int, progress: Progress
) -> _Reading:
    read = tokenizer(text, second, verbose=False)
    # Which of the two texts each token is of, where a model asks.
    types = None if second is None else read.get("token_type_ids")

    def run(given: Tensor) -> Tensor:
        more = {} if types is None else {"token_type_ids": torch.tensor([types])[:, : given.shape[1]]}
        return model_answer(model(input_ids=given, **more))

    return _Reading(_cut(read["input_ids"], max_tokens, progress), run, False)


def _translation(
    model: nn.Module, tokenizer: Any, text: str, second: str | None, max_tokens: int, progress: Progress
) -> _Reading:
    source = _cut(tokenizer(text, verbose=False)["input_ids"], max_tokens, progress)
    translator: Any = model
    if second is None:
        progress("what the model writes")
        limit = min(_WRITTEN, max_tokens - 1)
        ids = translator.generate(input_ids=source, max_new_tokens=limit, do_sample=False)[0].tolist()
    else:
        start = translator.config.decoder_start_token_id
        ids = ([] if start is None else [start]) + list(tokenizer(text_target=second, verbose=False)["input_ids"])
    target = _cut(ids, max_tokens, progress)

    def run(given: Tensor) -> Tensor:
        return model_answer(model(input_ids=source, decoder_input_ids=given, use_cache=False))

    return _Reading(target, run, True, source, _spans(model, source.shape[1], target.shape[1]))


def _roles(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    reading: _Reading,
    vocab: int,
    found: Exploration,
    progress: Progress,
) -> Callable[[], float] | None:
    """Roles and retrieval of a causal model's heads, into ``found``; returns what tells how much a second writing of
    the text gains, None of texts too short."""
    progress("roles on repeated tokens")
    start = tokenizer.bos_token_id
    prefix = None if start is None else torch.tensor([[start]])
    roles = head_roles(model, reading.run, vocab, prefix=prefix)
    found.roles = roles.roles
    for role in ("previous", "duplicate", "induction"):
        found.metrics[f"{role}, repeated tokens"] = _table(roles.scores[role])
    progress("retrieval of lines hidden in the text")
    retrieval = text_retrieval_scores(model, tokenizer, text)
    # A model that finds no needle has no heads that are known to.
    if len(retrieval.by_context):
        found.metrics["retrieval"] = _table(retrieval.scores)
    repeated = reading.tokens[:, start is not None :][:, :_REPEATED]
    return partial(_repetition_gain, reading.run, repeated, prefix) if repeated.shape[1] > 1 else None


@torch.no_grad()
def _spans(model: nn.Module, source: int, target: int) -> list[Span]:
    """What attends to what in each layer, found by a run in which every kind of layer sees its own numbers."""
    few = torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    with capture(model, "weights") as trace:
        model(input_ids=few[0], decoder_input_ids=few[1], use_cache=False)
    first, then = (0, source), (source, target)
    kinds = {(3, 3): ("encoder", first, first), (5, 5): ("decoder", then, then), (5, 3): ("cross", then, first)}
    found = []
    for site, layer in zip(discover(model), trace, strict=True):
        shape = None if layer.weights is None else tuple(layer.weights.shape[-2:])
        if shape not in kinds:
            raise OptionError(f"{site.path} attends from and to {shape} tokens of 5 and 3; it cannot be shown.")
        kind, queries, keys = kinds[shape]
        found.append(Span(f"{kind} {site.layer_index}", queries, keys))
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
    found, _ = look(model, run, name, None, False, partial(_of_patches, ratio))
    grid, before = _grid(len(found.tokens), ratio)
    rows = [f"patch {r}, {c}" for r in range(grid[0]) for c in range(grid[1])]
    found.tokens = [*(("[CLS]", *(f"[register {i}]" for i in range(1, before)))[:before]), *rows]
    found.patches = Patches(grid, before, picture)
    if ablate:
        ablate_all(model, run, found, None, None, progress)
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


def _of_text(span: Span) -> tuple[Mapping[str, Metric], int]:
    """The metrics of heads, and how many queries at the beginning they leave out."""
    # Tokens of another text are neither near nor far.
    return ({"entropy": METRICS["entropy"]} if span.crosses else METRICS), 0


def _of_patches(ratio: float, span: Span) -> tuple[Mapping[str, Metric], int]:
    grid, before = _grid(span.queries[1], ratio)
    return patch_metrics(grid, before), before


def _repetition_gain(run: Callable[[Tensor], Tensor], tokens: Tensor, prefix: Tensor | None) -> float:
    first, second = repetition_losses(run, tokens, prefix)
    return round(first - second, 5)


def _next_token_loss(tokens: Tensor, logits: Tensor) -> float:
    return float(F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]))


def _table(values: Tensor) -> list[list[float | None]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def _cut(ids: list[int], max_tokens: int, progress: Progress) -> Tensor:
    if len(ids) > max_tokens:
        progress(f"the text has {len(ids)} tokens; the first {max_tokens} are shown")
    if len(ids[:max_tokens]) < 2:
        raise OptionError("The text has fewer than two tokens; there is nothing to attend to.")
    return torch.tensor([ids[:max_tokens]])
